import { once } from 'node:events'
import { mkdtemp, rm, symlink } from 'node:fs/promises'
import { connect, createServer, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Transform } from 'node:stream'
import { text } from 'node:stream/consumers'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { openRelay } from '../../../runners/container/network/relay.ts'

async function directory(): Promise<AsyncDisposable & { path: string }> {
  const path = await mkdtemp(join(tmpdir(), 'vulcan-test-relay-'))
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true }) }
}

async function listen(path: string, serve: (socket: Socket) => void): Promise<AsyncDisposable> {
  const server = createServer({ allowHalfOpen: true }, serve)
  await once(server.listen(path), 'listening')
  return {
    async [Symbol.asyncDispose]() {
      const closed = once(server, 'close')
      server.close()
      await closed
    },
  }
}

/** Gives everything back at the end, in capitals. */
function upperCase(): Transform {
  let whole = ''
  return new Transform({
    transform: (chunk, _, done) => {
      whole += chunk
      done()
    },
    flush: (done) => done(null, whole.toUpperCase()),
  })
}

/** What comes back for that text, or the code of the error. */
async function ask(port: number, question: string): Promise<string> {
  const socket = connect({ host: '127.0.0.1', port, allowHalfOpen: true })
  socket.end(question)
  return await text(socket).catch((error: NodeJS.ErrnoException) => error.code!)
}

test('connections go both ways, at once, with bodies of any size', async () => {
  await using dir = await directory()
  const socket = join(dir.path, 'service.sock')
  await using _service = await listen(socket, (one) => void one.pipe(upperCase()).pipe(one))
  await using relay = await openRelay({ host: '127.0.0.1', port: 0, socket })
  const questions = ['a', 'b'.repeat(3_000_000), '', 'd']
  assert.equal(
    await Promise.all(questions.map((question) => ask(relay.port, question))),
    questions.map((question) => question.toUpperCase()),
  )
})

test('a socket that comes later is found, and where none listens the connection is reset', async () => {
  await using dir = await directory()
  const socket = join(dir.path, 'service.sock')
  await using relay = await openRelay({ host: '127.0.0.1', port: 0, socket })
  assert.is(await ask(relay.port, 'x'), 'ECONNRESET')
  {
    await using _service = await listen(socket, (one) => void one.end('here').resume())
    assert.is(await ask(relay.port, 'x'), 'here')
  }
  assert.is(await ask(relay.port, 'x'), 'ECONNRESET')
})

test('a link to a socket of the host leads nowhere', async () => {
  await using dir = await directory()
  const secret = join(dir.path, 'host.sock')
  const socket = join(dir.path, 'service.sock')
  await using _secret = await listen(secret, (one) => void one.end('secret').resume())
  await using open = await openRelay({ host: '127.0.0.1', port: 0, socket: secret })
  assert.is(await ask(open.port, 'x'), 'secret')
  await symlink(secret, socket)
  await using relay = await openRelay({ host: '127.0.0.1', port: 0, socket })
  assert.is(await ask(relay.port, 'x'), 'ECONNRESET')
})

test('disposing ends what is open', async () => {
  await using dir = await directory()
  const socket = join(dir.path, 'service.sock')
  const ended = Promise.withResolvers<void>()
  await using _service = await listen(socket, (one) => {
    one
      .on('close', ended.resolve)
      .on('error', () => {})
      .on('end', () => one.destroy())
    one.resume().write('hello')
  })
  const relay = await openRelay({ host: '127.0.0.1', port: 0, socket })
  const client = connect({ host: '127.0.0.1', port: relay.port })
  await once(client, 'data')
  const closed = once(client, 'close').catch((error: Error) => error)
  await relay[Symbol.asyncDispose]()
  await Promise.all([closed, ended.promise])
  assert.is(await ask(relay.port, 'x'), 'ECONNREFUSED')
})

test.run()
