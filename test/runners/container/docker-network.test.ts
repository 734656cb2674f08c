import { once } from 'node:events'
import { createServer } from 'node:net'
import { networkInterfaces } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { NetworksUnavailable, openNetworks } from '../../../runners/container/network/index.ts'
import { skip } from '../../harness.ts'
import { finish, noDocker, sh, specOf, startEngine } from './docker-support.ts'

const name = 'a container reaches what its policy names, by name, and nothing else'

/** Of this host, where it has one beside loopback. */
const ownAddress = () =>
  Object.values(networkInterfaces())
    .flat()
    .find((one) => one?.family === 'IPv4' && !one.internal)?.address

async function whyNot(): Promise<string | undefined> {
  if (ownAddress() === undefined) return 'this host has no address but loopback'
  try {
    await (await openNetworks({ owner: 'test', stateDir: '/nowhere', egress: {} }))[Symbol.asyncDispose]()
    return noDocker()
  } catch (error) {
    if (error instanceof NetworksUnavailable) return `${error.message}: ${error.fix}`
    throw error
  }
}

const reason = await whyNot()
if (reason !== undefined) skip(test, name, reason)
else
  test(name, async () => {
    await using scope = new AsyncDisposableStack()
    const listen = async () => {
      const server = createServer((socket) => socket.end('served')).listen(0, '0.0.0.0')
      scope.defer(async () => void server.close())
      await once(server, 'listening')
      return (server.address() as { port: number }).port
    }
    const [port, other] = [await listen(), await listen()]
    const address = ownAddress()!
    const host = scope.use(await startEngine())
    const allowed = `service.example.com:${port}`
    const egress = { allowPrivate: [allowed], resolve: async () => [address] }
    const stateDir = join(host.dir, 'network')
    const networks = scope.use(await openNetworks({ owner: 'test', stateDir, egress }))
    const network = scope.use(await networks.open([allowed], AbortSignal.timeout(10_000)))
    const reach = (at: string) => `echo "$(nc -w 3 ${at} </dev/null 2>/dev/null || echo refused)"`
    const script = [
      `service.example.com ${port}`,
      `${address} ${other}`,
      `127.0.0.1 ${port}`,
      `169.254.169.254 80`,
    ]
    const box = await host.engine.create(specOf(host.image, sh(script.map(reach).join('\n')), { network }))
    try {
      assert.equal((await finish(box)).stdout.trim().split('\n'), ['served', 'refused', 'refused', 'refused'])
      assert.ok((await network.denied()) > 0)
    } finally {
      await box.remove()
    }
  })

test.run()
