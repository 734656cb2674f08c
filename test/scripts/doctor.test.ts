import { spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readdirSync } from 'node:fs'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { createServer, type RequestListener } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { cacheDirectory } from '../../scripts/cache-directory.ts'
import { checkClock, checkDisk, checkPorts } from '../../scripts/doctor/host.ts'
import { tryIsolation } from '../../scripts/doctor/isolations.ts'
import { exitCode, type Finding, linesOf } from '../../scripts/doctor/report.ts'
import { checkNatsServer } from '../../scripts/doctor/versions.ts'
import { platformConfig } from '../../scripts/platform.ts'
import { tryPort } from '../../scripts/ports.ts'
import { gone } from '../../scripts/process-identity.ts'
import { startNats } from '../nats.ts'

const doctor = join(import.meta.dirname, '../../scripts/doctor.ts')
const freePorts = { VULCAN_PORT: '0', VULCAN_NATS_PORT: '0', NATS_URL: '' }

async function temporary(scope: AsyncDisposableStack): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  scope.defer(() => rm(folder, { recursive: true, force: true }))
  return folder
}

async function serve(scope: AsyncDisposableStack, listener: RequestListener): Promise<number> {
  const server = createServer(listener).listen(0, '127.0.0.1')
  await once(server, 'listening')
  scope.defer(() => {
    server.closeAllConnections()
    server.close()
  })
  return (server.address() as AddressInfo).port
}

/** The program on a host where no isolation but that of isolates is in sight. */
function examine(cwd: string, args: string[], env: Record<string, string> = {}) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [doctor, ...args], {
    cwd,
    env: {
      PATH: '/nowhere',
      HOME: process.env.HOME ?? '',
      TMPDIR: cwd,
      VULCAN_CACHE_DIR: cacheDirectory(process.env),
      ...freePorts,
      ...env,
    },
    encoding: 'utf8',
    timeout: 120_000,
  })
  return { status, stdout, stderr }
}

const only = ([finding]: Finding[]): Finding => finding!

test('one screen says what works, and nothing is left behind', async () => {
  await using scope = new AsyncDisposableStack()
  const folder = await temporary(scope)
  const { status, stdout, stderr } = examine(folder, ['isolate'])
  assert.is(status, 0, stdout + stderr)
  assert.match(stdout, /^ {2}(ok {3}|! {4})isolate {5}V8 \d/m)
  assert.match(stdout, /^ {2}- {4}gvisor {6}runsc is not on PATH\n +→ npm run setup -- gvisor$/m)
  assert.match(stdout, `Node        ${process.versions.node}`)
  assert.match(stdout, /nats-server \d+\.\d+/)
  for (const what of ['data', 'cache', 'clock', 'http', 'nats'])
    assert.match(stdout, new RegExp(`^ .* ${what} `, 'm'))
  const lines = stdout.split('\n')
  assert.ok(lines.length < 50, `${lines.length} lines`)
  assert.match(stdout, 'all that is wanted works')
  assert.equal(readdirSync(folder), [])
})

test('an isolation that is wanted and cannot be had makes the exit code 1, with what brings it', async () => {
  await using scope = new AsyncDisposableStack()
  const folder = await temporary(scope)
  const env = { DOCKER_HOST: `unix://${folder}/none.sock`, VULCAN_ISOLATIONS: 'isolate,docker' }
  const { status, stdout } = examine(folder, [], env)
  assert.is(status, 1, stdout)
  assert.match(stdout, /^ {2}BAD {2}docker /m)
  assert.match(stdout, '→')
  assert.match(stdout, 'npm run setup -- docker')
  assert.match(stdout, 'not working: docker')
})

test('what is no isolation, or no setting, is said', async () => {
  await using scope = new AsyncDisposableStack()
  const folder = await temporary(scope)
  const unknown = examine(folder, ['xen'])
  assert.is(unknown.status, 1)
  assert.match(unknown.stderr, 'unknown: xen')
  const wrong = examine(folder, [], { VULCAN_PORT: 'http' })
  assert.is(wrong.status, 1)
  assert.match(wrong.stderr, 'VULCAN_PORT')
})

test('a runner that never answers is given up, and is gone', async () => {
  await using scope = new AsyncDisposableStack()
  const folder = await temporary(scope)
  const script = join(folder, 'runner.mjs')
  await writeFile(
    script,
    `import { writeFileSync } from 'node:fs'
     writeFileSync(${JSON.stringify(join(folder, 'pid'))}, String(process.pid))
     process.on('SIGTERM', () => {})
     setInterval(() => {}, 1000)`,
  )
  const config = { dataDir: join(folder, 'none'), cacheDir: folder, env: process.env }
  const found = await tryIsolation('isolate', { config, wanted: true, script, timeoutMs: 3_000 })
  assert.is(found.state, 'bad')
  assert.match(found.says, 'no answer within 3 s')
  assert.ok(await gone(Number(await readFile(join(folder, 'pid'), 'utf8')), 5_000))
  assert.not.ok(existsSync(config.dataDir))
})

test('what a runner says is told: weak limits, walls that are missing, words that are none for a terminal', async () => {
  await using scope = new AsyncDisposableStack()
  const folder = await temporary(scope)
  const answers = async (probe: unknown) => {
    const script = join(folder, 'runner.mjs')
    await writeFile(
      script,
      `console.log('a log line'); console.log(${JSON.stringify(JSON.stringify(probe))})`,
    )
    const config = { dataDir: folder, cacheDir: folder, env: process.env }
    return tryIsolation('isolate', { config, wanted: true, script })
  }
  const capabilities = {
    runtimes: ['python'],
    egress: ['none'],
    walls: ['a wall'],
    missing: [{ wall: 'a moat', fix: 'dig' }],
    version: 'engine 1\u001b[31m',
    limits: { memory: 'enforced', cpu: 'not enforced' },
  }
  const weak = await answers({ available: true, capabilities })
  assert.is(weak.state, 'warn')
  assert.match(weak.says, 'not enforced: cpu')
  assert.equal(weak.fixes, ['a moat: dig'])
  assert.not.match(linesOf(weak).join('\n'), '\u001b')
  const strong = { ...capabilities, missing: [], limits: { memory: 'enforced' } }
  assert.is((await answers({ available: true, capabilities: strong })).state, 'ok')
  const none = await answers({ available: false, reason: 'no luck', fix: 'try' })
  assert.equal([none.state, none.says, none.fixes], ['bad', 'no luck', ['try', 'npm run setup']])
  assert.is((await answers({ nothing: true })).state, 'bad')
})

test('a port that another program has is bad, one where vulcan answers is not', async () => {
  await using scope = new AsyncDisposableStack()
  const port = await serve(scope, (_, response) => response.end('hello'))
  const httpOf = async (VULCAN_PORT: number) =>
    only(await checkPorts(platformConfig({ ...freePorts, VULCAN_PORT: String(VULCAN_PORT) })))
  const taken = await httpOf(port)
  assert.is(taken.state, 'bad')
  assert.match(taken.fixes!.join(), 'VULCAN_PORT')
  const vulcan = await serve(scope, (_, response) => response.end('{"backends":[]}'))
  assert.equal(
    [(await httpOf(vulcan)).state, (await httpOf(vulcan)).says],
    ['ok', `vulcan answers at 127.0.0.1:${vulcan}`],
  )
  const free = await tryPort('127.0.0.1', 0)
  assert.match((await httpOf(free)).says, 'is free')
})

test('the servers of NATS_URL are asked, and its password is not told', async () => {
  await using nats = await startNats()
  const natsOf = async (NATS_URL: string) =>
    (await checkPorts(platformConfig({ ...freePorts, NATS_URL })))[1]!
  const there = await natsOf(nats.url.replace('//', '//me:secret@'))
  assert.is(there.state, 'ok', there.says)
  assert.match(there.says, /^nats-server \d.* with JetStream at 127\.0\.0\.1:\d+$/)
  const own = { ...freePorts, VULCAN_NATS_PORT: String(nats.port) }
  const taken = (await checkPorts(platformConfig(own)))[1]!
  assert.is(taken.state, 'ok')
  assert.match(taken.says, /in use by nats-server \d.*next free one/)
  const port = await tryPort('127.0.0.1', 0)
  const nowhere = await natsOf(`nats://me:secret@127.0.0.1:${port}`)
  assert.is(nowhere.state, 'bad')
  assert.not.match(JSON.stringify([there, nowhere]), 'secret')
})

test('without a nats-server, the command that brings one is named', async () => {
  await using scope = new AsyncDisposableStack()
  const folder = await temporary(scope)
  const empty = { ...freePorts, PATH: '/nowhere', VULCAN_CACHE_DIR: folder }
  const missing = await checkNatsServer(platformConfig(empty))
  assert.equal([missing.state, missing.fixes], ['bad', ['npm run setup']])
  const elsewhere = await checkNatsServer(platformConfig({ ...empty, NATS_URL: 'nats://other:4222' }))
  assert.is(elsewhere.state, 'off')
})

test('a file system without room is bad', async () => {
  const [data, cache] = await checkDisk({ dataDir: '/proc/none', cacheDir: tmpdir() })
  assert.is(data!.state, 'bad')
  assert.match(cache!.says, /GiB free/)
})

test('a clock that disagrees with the registry’s is bad', async () => {
  await using scope = new AsyncDisposableStack()
  let ahead = 0
  const port = await serve(scope, (_, response) => {
    response.setHeader('date', new Date(Date.now() - ahead).toUTCString())
    response.end()
  })
  const clock = (registry: string) => checkClock({ ...process.env, NPM_CONFIG_REGISTRY: registry })
  const url = `http://127.0.0.1:${port}/`
  assert.match((await clock(url)).says, 'agrees')
  ahead = 90_000
  const wrong = await clock(url)
  assert.is(wrong.state, 'bad')
  assert.match(wrong.says, /^(89|90|91) s ahead/)
  const nobody = await tryPort('127.0.0.1', 0)
  assert.match((await clock(`http://127.0.0.1:${nobody}/`)).says, 'not compared')
})

test('lines are no wider than a screen, and what is bad decides the exit code', () => {
  const finding: Finding = {
    state: 'warn',
    what: 'isolate',
    says: 'word '.repeat(60),
    fixes: ['do '.repeat(80)],
  }
  const lines = linesOf(finding)
  assert.ok(lines.every((line) => line.length <= 110))
  assert.is(lines.join(' ').match(/\bword\b/g)!.length, 60)
  assert.is(lines.join(' ').match(/\bdo\b/g)!.length, 80)
  assert.is(exitCode([finding, { ...finding, state: 'off' }]), 0)
  assert.is(exitCode([finding, { ...finding, state: 'bad' }]), 1)
})

test.run()
