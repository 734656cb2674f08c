import { spawn } from 'node:child_process'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { missingFor } from '../../scripts/isolations.ts'
import { natsAnswers } from '../../scripts/nats-server.ts'
import { type Platform, platformConfig, StartError, startPlatform } from '../../scripts/platform.ts'
import { tryPort } from '../../scripts/ports.ts'
import { gone, startTime } from '../../scripts/process-identity.ts'

/** Stands in for the product: answers at the port that the named variable holds. */
const service = (port: string, ready = 200) => `
  import { createServer } from 'node:http'
  createServer((request, response) => {
    if (request.url === '/env') return response.end(JSON.stringify(process.env))
    response.statusCode = request.url === '/readyz' ? ${ready} : 200
    response.end(request.url === '/readyz' ? '{"runner":"none"}' : 'ok')
  }).listen(Number(process.env.${port}), '127.0.0.1')
  process.on('SIGTERM', () => process.exit())`

type Fixture = Awaited<ReturnType<typeof fixture>>

async function fixture(scope: AsyncDisposableStack, { ready = 200 } = {}) {
  const folder = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  scope.defer(() => rm(folder, { recursive: true, force: true }))
  const script = async (name: string, code: string) => {
    await writeFile(join(folder, name), code)
    return [join(folder, name)]
  }
  const entrypoints = {
    dispatcher: await script('dispatcher.mjs', service('VULCAN_DISPATCHER_PORT')),
    runner: await script('runner.mjs', 'setInterval(() => {}, 1000); console.log("runner is up")'),
    gateway: await script('gateway.mjs', service('VULCAN_PORT', ready)),
  }
  return { dataDir: join(folder, 'data dir'), entrypoints, lines: [] as string[] }
}

function start({ dataDir, entrypoints, lines }: Fixture, env: NodeJS.ProcessEnv = {}): Promise<Platform> {
  const ports = { VULCAN_PORT: '0', VULCAN_NATS_PORT: '0' }
  const config = platformConfig({ ...process.env, ...ports, VULCAN_DATA_DIR: dataDir, ...env })
  return startPlatform(config, { entrypoints, log: (line) => lines.push(line), readyTimeoutMs: 500 })
}

async function failure(promise: Promise<unknown>): Promise<Error> {
  try {
    await promise
  } catch (error) {
    return error as Error
  }
  throw new Error('did not fail')
}

const names = ['nats-server', 'dispatcher', 'runner', 'gateway']

test('the processes run with their configuration, and all are gone after stop', async () => {
  await using scope = new AsyncDisposableStack()
  const parts = await fixture(scope)
  await using platform = await start(parts, { VULCAN_LOG_LEVEL: 'debug', SECRET_TOKEN: 'x' })
  const env = (await (await fetch(`${platform.url}/env`)).json()) as Record<string, string>
  assert.is(env.NATS_URL, platform.natsUrl)
  assert.is(env.VULCAN_DATA_DIR, platform.dataDir)
  assert.is(env.VULCAN_DATABASE_URL, `file:${platform.dataDir.replace(' ', '%20')}/vulcan.db`)
  assert.is(env.VULCAN_LOG_LEVEL, 'debug')
  assert.is(env.SECRET_TOKEN, undefined)
  assert.is((await fetch(`${env.VULCAN_DISPATCHER_URL}/healthz`)).status, 200)

  const pids = names.map((name) => platform.supervisor.pid(name)!)
  const recorded = JSON.parse(readFileSync(join(platform.dataDir, 'pids.json'), 'utf8'))
  assert.equal(
    names.map((name) => recorded[name]),
    pids,
  )
  await Promise.all([platform.stop(), platform.stop()])
  for (const pid of pids) assert.is(startTime(pid), undefined)
  assert.equal(
    readdirSync(platform.dataDir).filter((file) => file !== 'nats'),
    [],
  )
})

test('a runner is started for each isolation that is asked for, and told which', async () => {
  await using scope = new AsyncDisposableStack()
  const parts = await fixture(scope)
  await using platform = await start(parts, {
    VULCAN_ISOLATIONS: 'gvisor, isolate',
    DOCKER_HOST: 'unix:///x',
  })
  assert.equal(platform.isolations, ['isolate', 'gvisor'])
  for (const [name, isolation] of [
    ['runner', 'isolate'],
    ['runner-gvisor', 'gvisor'],
  ] as const) {
    const command = () => readFileSync(`/proc/${platform.supervisor.pid(name)}/cmdline`, 'utf8')
    // A process that was started just now may not be what it will be.
    for (let waited = 0; waited < 5_000 && !command().endsWith(`\0${isolation}\0`); waited += 10)
      await sleep(10)
    assert.ok(command().endsWith(`\0${isolation}\0`), command())
  }
  assert.is(platform.supervisor.pid('runner-docker'), undefined)
  const env = (await (await fetch(`${platform.url}/env`)).json()) as Record<string, string>
  assert.is(env.DOCKER_HOST, 'unix:///x')
})

test('without a word, what the host has in sight is tried', () => {
  const nothing = { PATH: '/nowhere', VULCAN_CACHE_DIR: '/nowhere' }
  assert.is(missingFor('isolate', nothing), undefined)
  assert.is(missingFor('gvisor', nothing), 'runsc is not on PATH')
  assert.is(missingFor('docker', { ...nothing, DOCKER_HOST: 'tcp://127.0.0.1:1' }), undefined)
  assert.is(missingFor('microvm', nothing), 'neither qemu-system-x86_64 nor firecracker is on PATH')
  const firecracker = { ...nothing, VULCAN_FIRECRACKER: '/opt/firecracker' }
  assert.match(missingFor('microvm', firecracker)!, 'no kernel for machines was prepared in /nowhere/microvm')
  assert.equal(
    platformConfig({ ...nothing, DOCKER_HOST: 'unix:///x', VULCAN_ISOLATIONS: '' }).isolations.at(-1),
    'docker',
  )
  assert.throws(() => platformConfig({ VULCAN_ISOLATIONS: 'isolate,jail' }), 'VULCAN_ISOLATIONS')
})

test('the password of the broker’s account stands in the URL that the processes get', async () => {
  await using scope = new AsyncDisposableStack()
  const VULCAN_NATS_PASSWORD = 'p/w:1@ "'
  await using platform = await start(await fixture(scope), { VULCAN_NATS_PASSWORD })
  const env = (await (await fetch(`${platform.url}/env`)).json()) as Record<string, string>
  assert.is(env.NATS_URL, platform.natsUrl)
  const { username, password } = new URL(platform.natsUrl)
  assert.equal([username, decodeURIComponent(password)], ['vulcan', VULCAN_NATS_PASSWORD])
})

test('nats-server comes back at the same port', async () => {
  await using scope = new AsyncDisposableStack()
  await using platform = await start(await fixture(scope))
  const before = platform.supervisor.pid('nats-server')!
  process.kill(before, 'SIGKILL')
  assert.ok(await gone(before, 1_000))
  let name: string | undefined
  while (!name) {
    await sleep(5)
    // Between its two lives it has no pid, and at first it is not yet nats-server.
    const pid = platform.supervisor.pid('nats-server')
    if (pid) name = /\0(vulcan-\w+)\0/.exec(readFileSync(`/proc/${pid}/cmdline`, 'utf8'))?.[1]
  }
  const port = Number(new URL(platform.natsUrl).port)
  await natsAnswers('127.0.0.1', port, name, AbortSignal.timeout(5_000))
})

test('two platforms run side by side, a second on the same data directory is refused', async () => {
  await using scope = new AsyncDisposableStack()
  const [one, two] = [await fixture(scope), await fixture(scope)]
  const natsPort = String(await tryPort('127.0.0.1', 0))
  const platforms = await Promise.all([one, two].map((parts) => start(parts, { VULCAN_NATS_PORT: natsPort })))
  for (const platform of platforms) scope.use(platform)
  assert.is.not(platforms[0]!.natsUrl, platforms[1]!.natsUrl)

  const refused = await failure(start(one))
  assert.instance(refused, StartError)
  assert.match(refused.message, 'VULCAN_DATA_DIR')
  assert.match(refused.message, String(process.pid))
  assert.is((await fetch(`${platforms[0]!.url}/healthz`)).status, 200)
})

test('a port in use is named', async () => {
  await using scope = new AsyncDisposableStack()
  const parts = await fixture(scope)
  const port = await tryPort('127.0.0.1', 0)
  const other = createServer()
  await new Promise<void>((resolve) => other.listen(port, '127.0.0.1', resolve))
  scope.defer(() => new Promise<void>((resolve) => other.close(() => resolve())))
  const error = await failure(start(parts, { VULCAN_PORT: String(port) }))
  assert.instance(error, StartError)
  assert.match(error.message, `127.0.0.1:${port} is in use. Set VULCAN_PORT`)
  assert.not.ok(existsSync(join(parts.dataDir, 'lock')))
})

test('a wrong value names its variable', () => {
  assert.throws(() => platformConfig({ VULCAN_PORT: 'http' }), 'VULCAN_PORT')
  assert.is(platformConfig({ VULCAN_PORT: '' }).port, 8080)
})

test('a platform that does not become ready says what is missing and leaves nothing', async () => {
  await using scope = new AsyncDisposableStack()
  const parts = await fixture(scope, { ready: 503 })
  const error = await failure(start(parts))
  assert.match(error.message, '{"runner":"none"}')
  assert.match(error.message, 'runner is up')
  assert.not.ok(existsSync(join(parts.dataDir, 'pids.json')))
})

test('what a killed platform leaves running on the store is ended before the next start', async () => {
  await using scope = new AsyncDisposableStack()
  const parts = await fixture(scope)
  const first = await start(parts)
  const pid = first.supervisor.pid('nats-server')!
  const pids = readFileSync(join(first.dataDir, 'pids.json'))
  await first.stop()
  assert.ok(await gone(pid, 1_000))

  // An orphan as it would look without setpriv, and a stranger that has got the pid of another part.
  const orphan = spawn('sleep', ['1000'], { env: { PATH: process.env.PATH, VULCAN_DATA_DIR: first.dataDir } })
  const stranger = spawn('sleep', ['1000'])
  scope.defer(() => void stranger.kill())
  const record = { ...JSON.parse(String(pids)), 'nats-server': orphan.pid, gateway: stranger.pid }
  await writeFile(join(first.dataDir, 'pids.json'), JSON.stringify(record))
  await using second = await start(parts)
  assert.is(startTime(orphan.pid!), undefined)
  assert.ok(startTime(stranger.pid!))
  await second.stop()
})

test.run()
