import { once } from 'node:events'
import { createServer } from 'node:net'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { nextFreePort } from '../../scripts/ports.ts'

const host = '127.0.0.1'

test('a port that is taken or promised to another is passed over', async () => {
  const server = createServer().listen({ host, port: 0 })
  await once(server, 'listening')
  const { port } = server.address() as { port: number }
  const next = await nextFreePort(host, port)
  assert.ok(next > port)
  assert.ok((await nextFreePort(host, port, [next])) > next)
  await new Promise((resolve) => server.close(resolve))
})

test.run()
