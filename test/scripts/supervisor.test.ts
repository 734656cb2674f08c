import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readFileSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { gone, startTime } from '../../scripts/process-identity.ts'
import { NotReadyError, type ProcessSpec, Supervisor } from '../../scripts/supervisor.ts'

const backoff = { minMs: 20, maxMs: 80, resetMs: 300 }

/** A process that runs `code` in Node. */
const node = (name: string, code: string): ProcessSpec => ({
  name,
  command: process.execPath,
  args: ['-e', code],
  env: { PATH: process.env.PATH },
})
const forever = 'setInterval(() => {}, 1000); console.log("up")'

async function until<T>(look: () => T | undefined | false, ms = 5_000): Promise<T> {
  const deadline = performance.now() + ms
  for (;;) {
    const value = look()
    if (value) return value
    if (performance.now() > deadline) throw new Error(`not within ${ms} ms: ${look}`)
    await sleep(5)
  }
}

test('what dies is started again, with a wait that doubles and starts over after a long life', async () => {
  const lines: string[] = []
  await using supervisor = new Supervisor({ log: (line) => lines.push(line), backoff })
  await supervisor.start(node('worker', forever))
  for (let death = 0; death < 4; death++) {
    const pid = await until(() => supervisor.pid('worker'))
    process.kill(pid, 'SIGKILL')
    await until(() => supervisor.pid('worker') !== pid)
  }
  await until(() => supervisor.pid('worker'))
  await sleep(backoff.resetMs + 50)
  process.kill(supervisor.pid('worker')!, 'SIGKILL')
  await until(() => lines.filter((line) => line.includes('SIGKILL')).length === 5)
  const waits = lines.flatMap((line) => /again in (\d+) ms/.exec(line)?.[1] ?? [])
  assert.equal(waits, ['20', '40', '80', '80', '20'])
})

test('processes are stopped in reverse order, each with the time it needs', async () => {
  await using supervisor = new Supervisor({ log: () => {}, backoff })
  const lines: string[] = []
  await using ordered = new Supervisor({ log: (line) => lines.push(line), backoff })
  const polite = `process.on('SIGTERM', () => setTimeout(() => { console.log('bye'); process.exit() }, 50)); ${forever}`
  for (const name of ['first', 'second', 'third', 'between']) {
    await ordered.start({
      ...node(name, polite),
      ...(name === 'between' ? { behind: 'second' } : {}),
      ready: async () => void (await until(() => lines.includes(`${name} | up`))),
    })
  }
  await Promise.all([ordered.stop(), ordered.stop()])
  assert.equal(
    lines.filter((line) => line.endsWith('bye')),
    ['third | bye', 'between | bye', 'second | bye', 'first | bye'],
  )
  await supervisor.stop()
})

test('a process that ignores SIGTERM is killed after the grace, with its own children', async () => {
  const lines: string[] = []
  await using supervisor = new Supervisor({ log: (line) => lines.push(line), backoff, graceMs: 100 })
  const stubborn = `process.on('SIGTERM', () => {});
    const child = require('child_process').spawn('sleep', ['1000']); console.log('child', child.pid); ${forever}`
  await supervisor.start(node('stubborn', stubborn))
  const child = Number(await until(() => lines.map((line) => /child (\d+)/.exec(line)?.[1]).find(Boolean)))
  const pid = supervisor.pid('stubborn')!
  await until(() => lines.includes('stubborn | up'))
  await supervisor.stop()
  assert.ok(await gone(pid, 1_000))
  assert.ok(await gone(child, 1_000))
})

test('the children of a process that dies do not outlive it', async () => {
  const lines: string[] = []
  await using supervisor = new Supervisor({ log: (line) => lines.push(line), backoff })
  const parent = `const child = require('child_process').spawn('sleep', ['1000']); console.log('child', child.pid); ${forever}`
  await supervisor.start(node('parent', parent))
  const child = Number(await until(() => lines.map((line) => /child (\d+)/.exec(line)?.[1]).find(Boolean)))
  process.kill(supervisor.pid('parent')!, 'SIGKILL')
  assert.ok(await gone(child, 1_000))
})

test('pids are on record while processes run', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  await using scope = new AsyncDisposableStack()
  scope.defer(() => rm(folder, { recursive: true }))
  const pidsFile = join(folder, 'pids.json')
  await using supervisor = new Supervisor({ log: () => {}, backoff, pidsFile })
  await supervisor.start(node('a', forever))
  await supervisor.start(node('b', forever))
  const expected = { a: supervisor.pid('a'), b: supervisor.pid('b') }
  assert.equal(JSON.parse(readFileSync(pidsFile, 'utf8')), expected)
  await supervisor.stop()
  assert.not.ok(existsSync(pidsFile))
})

test('a process that keeps ending before it is ready is given up, with its last lines', async () => {
  await using supervisor = new Supervisor({ log: () => {}, backoff })
  try {
    await supervisor.start({
      ...node('broken', 'console.error("no such database"); process.exit(3)'),
      ready: (signal) => sleep(10_000, undefined, { signal }),
    })
    assert.unreachable()
  } catch (error) {
    assert.instance(error, NotReadyError)
    assert.match((error as Error).message, 'exited with code 3')
    assert.match((error as Error).message, 'no such database')
  }
})

test('a process that is never ready is stopped at its deadline', async () => {
  await using supervisor = new Supervisor({ log: () => {}, backoff })
  const start = supervisor.start({
    ...node('slow', forever),
    ready: (signal) => sleep(10_000, undefined, { signal }),
    readyTimeoutMs: 200,
  })
  const pid = supervisor.pid('slow')!
  try {
    await start
    assert.unreachable()
  } catch (error) {
    assert.match((error as Error).message, 'slow was not ready within 200 ms')
  }
  assert.ok(await gone(pid, 1_000))
})

test('a supervisor that is killed leaves no process', async () => {
  const module = new URL('../../scripts/supervisor.ts', import.meta.url).href
  const code = `
    import { Supervisor } from '${module}'
    const supervisor = new Supervisor({ log: () => {} })
    for (const name of ['a', 'b']) {
      await supervisor.start({ name, command: process.execPath, args: ['-e', 'setInterval(() => {}, 1000)'], env: {} })
    }
    console.log(JSON.stringify([supervisor.pid('a'), supervisor.pid('b')]))`
  const parent = spawn(process.execPath, ['--input-type=module', '-e', code], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const [line] = await once(createInterface(parent.stdout), 'line')
  const pids = JSON.parse(line) as number[]
  // Long enough for setpriv to have become the process itself.
  await sleep(100)
  for (const pid of pids) assert.ok(startTime(pid))
  parent.kill('SIGKILL')
  for (const pid of pids) assert.ok(await gone(pid, 2_000))
})

test.run()
