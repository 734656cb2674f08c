import { chmod, mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { findNatsServer, isAtLeast, natsAnswers } from '../../scripts/nats-server.ts'
import { tryPort } from '../../scripts/ports.ts'
import { startNats } from '../nats.ts'

async function temporary(scope: AsyncDisposableStack): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  scope.defer(() => rm(folder, { recursive: true, force: true }))
  return folder
}

/** A `nats-server` in `folder` that does nothing but print its version. */
async function fakeServer(folder: string, version: string): Promise<string> {
  const file = join(folder, 'nats-server')
  await mkdir(folder, { recursive: true })
  await writeFile(file, `#!/bin/sh\necho 'nats-server: v${version}'\n`)
  await chmod(file, 0o755)
  return file
}

const log = () => {}

test('a new enough server on PATH is used, also behind one that is too old', async () => {
  await using scope = new AsyncDisposableStack()
  const folder = await temporary(scope)
  await fakeServer(join(folder, 'old'), '2.9.10')
  const wanted = await fakeServer(join(folder, 'new'), '2.14.0')
  const path = `${join(folder, 'old')}:${join(folder, 'new')}`
  assert.is(await findNatsServer({ cacheDir: folder, log, path, download: false }), wanted)
})

test('a server on PATH that is too old gives way to the cached one', async () => {
  await using scope = new AsyncDisposableStack()
  const folder = await temporary(scope)
  await fakeServer(join(folder, 'bin'), '2.9.10')
  const cacheDir = join(folder, 'cache')
  const cached = await fakeServer(cacheDir, '2.15.1')
  assert.is(await findNatsServer({ cacheDir, log, path: join(folder, 'bin'), download: false }), cached)
})

test('without a usable server the error says what was found and what to install', async () => {
  await using scope = new AsyncDisposableStack()
  const folder = await temporary(scope)
  const old = await fakeServer(join(folder, 'bin'), '2.9.10')
  const cacheDir = join(folder, 'cache')
  await mkdir(cacheDir)
  await writeFile(join(cacheDir, 'nats-server'), 'half a download', { mode: 0o755 })
  try {
    await findNatsServer({ cacheDir, log, path: join(folder, 'bin'), download: false })
    assert.unreachable()
  } catch (error) {
    assert.match((error as Error).message, `${old} is 2.9.10`)
    assert.match((error as Error).message, 'NATS_URL')
  }
})

test('versions are compared by number', () => {
  assert.ok(isAtLeast('2.14.0', '2.14.0'))
  assert.ok(isAtLeast('2.100.1', '2.14.0'))
  assert.ok(isAtLeast('3.0.0', '2.14.0'))
  assert.not.ok(isAtLeast('2.9.10', '2.14.0'))
})

test("another server's greeting does not count as ours", async () => {
  await using scope = new AsyncDisposableStack()
  const port = await tryPort('127.0.0.1', 0)
  const stranger = createServer((socket) => socket.end('INFO {"server_name":"stranger"}\r\n'))
  await new Promise<void>((resolve) => stranger.listen(port, '127.0.0.1', resolve))
  scope.defer(() => new Promise<void>((resolve) => stranger.close(() => resolve())))
  await natsAnswers('127.0.0.1', port, 'stranger', AbortSignal.timeout(2_000))
  try {
    await natsAnswers('127.0.0.1', port, 'ours', AbortSignal.timeout(100))
    assert.unreachable()
  } catch (error) {
    assert.is((error as Error).name, 'TimeoutError')
  }
})

test('the configuration file runs a real server whose store may have any name', async () => {
  await using scope = new AsyncDisposableStack()
  const dir = join(await temporary(scope), 'a "quoted" $HOME # name')
  await mkdir(dir)
  await using nats = await startNats({ dir })
  const before = nats.pid
  await nats.restart()
  assert.is.not(nats.pid, before)
})

test.run()
