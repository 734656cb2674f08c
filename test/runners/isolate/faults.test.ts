import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { EgressGate } from '../../../runners/egress.ts'
import { createIsolateRunner } from '../../../runners/isolate/index.ts'
import { Pool } from '../../../runners/isolate/pool.ts'
import { childMarker } from '../../../runners/isolate/walls.ts'
import { encodeMessage, kinds } from '../../../shared/guest.ts'
import { failure, hearing, isAlive, job, output, run, sleep } from './support.ts'

const alive = (pid: number) => isAlive(pid, (path) => readFileSync(path, 'utf8'))
const childrenOf = (pid: number) =>
  readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').split(' ').filter(Boolean).map(Number)
/** Processes of the isolate runner that belong to nobody any more. */
const orphans = () =>
  readdirSync('/proc').filter((name) => {
    if (!/^\d+$/.test(name)) return false
    try {
      const stat = readFileSync(`/proc/${name}/stat`, 'utf8')
      return (
        readFileSync(`/proc/${name}/cmdline`, 'utf8').split('\0').includes(childMarker) &&
        stat.slice(stat.lastIndexOf(')') + 2).split(' ')[1] === '1'
      )
    } catch {
      return false
    }
  })
/** Settles when they are dead, and this process knows. */
const killAll = async (pids: number[]) => {
  for (const pid of pids) process.kill(pid, 'SIGKILL')
  while (pids.some(alive)) await sleep(5)
  await sleep(20)
}
const never = () => new AbortController().signal
const busy = 'console.log("running"); export default () => { while (true) {} }'
const sleeper = 'console.log("running"); export default () => new Promise(() => {})'

for (const [what, code] of [
  ['a busy loop', busy],
  ['a pending promise', sleeper],
] as const) {
  for (const which of ['outer', 'inner'] as const) {
    test(`a child whose ${which} process is killed during ${what} is runner_lost, and the pool recovers`, async () => {
      await using runner = await createIsolateRunner({ min: 1, max: 1 })
      const outcome = await runner.prepare(job(code)).run(
        never(),
        hearing(() => {
          process.kill(runner.pids().at(which === 'outer' ? 0 : -1)!, 'SIGKILL')
        }),
      )
      assert.is(outcome.status === 'failed' && outcome.cause, 'runner_lost')
      assert.match(JSON.stringify(outcome), /signal (?:SIGKILL|9)/)
      assert.is(await output(runner, 'export default () => "next"'), 'next')
    })
  }
}

test('children killed while idle are replaced', async () => {
  await using runner = await createIsolateRunner({ min: 2, max: 2 })
  for (let round = 0; round < 3; round++) {
    await killAll(runner.pids())
    assert.is(await output(runner, 'export default () => "next"'), 'next')
  }
})

test('a stopped run is really dead when it settles', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  let pids: number[] = []
  const stop = new AbortController()
  const outcome = await runner.prepare(job(busy)).run(
    stop.signal,
    hearing(() => {
      pids = runner.pids()
      stop.abort()
    }),
  )
  assert.is(outcome.status, 'stopped')
  assert.ok(pids.length > 0)
  assert.equal(pids.filter(alive), [])
})

test('a killed run does not cost the next workload a start', async () => {
  await using runner = await createIsolateRunner({ min: 2, max: 4 })
  const { outcome } = await run(runner, busy, { timeoutMs: 300 })
  assert.is(outcome.status, 'stopped')
  const code = 'export default () => "next"'
  const { ms } = await run(runner, code)
  assert.ok(ms < 100, `${ms}`)
})

test('closing the runner ends what runs and leaves no process', async () => {
  const runner = await createIsolateRunner({ min: 2 })
  const running = [busy, sleeper].map((code) => runner.prepare(job(code)).run(never(), hearing()))
  await sleep(100)
  const pids = runner.pids()
  await runner[Symbol.asyncDispose]()
  for (const outcome of await Promise.all(running))
    assert.is(outcome.status === 'failed' && outcome.cause, 'runner_lost')
  assert.equal(pids.filter(alive), [])
  await failure(runner, 'export default () => 1', 'backend_unavailable')
})

test('children killed at any moment of their start leave no process and no slot behind', async () => {
  const runner = await createIsolateRunner({ min: 2, max: 4 })
  const mine = () => childrenOf(process.pid)
  for (let round = 0; round < 60; round++) {
    for (const pid of mine()) process.kill(pid, 'SIGKILL')
    await sleep(Math.random() * 30)
  }
  await killAll(mine())
  const inputs = [1, 2, 3, 4, 5, 6]
  const code =
    'export default async (n) => { await new Promise((resolve) => setTimeout(resolve, 50)); return n }'
  assert.equal(await Promise.all(inputs.map((input) => output(runner, code, { input }))), inputs)
  await runner[Symbol.asyncDispose]()
  assert.equal(mine(), [])
  // An orphan is found half a second after its parent has died, or by the next runner that starts.
  await (await createIsolateRunner({ min: 1 }))[Symbol.asyncDispose]()
  assert.equal(orphans(), [])
})

for (const options of [{}, { bwrap: false }]) {
  test(`no child survives the SIGKILL of its runner by a second (${JSON.stringify(options)})`, async () => {
    const owner = spawn(
      process.execPath,
      [new URL('owner.ts', import.meta.url).pathname, JSON.stringify(options)],
      {
        stdio: ['ignore', 'pipe', 'inherit'],
      },
    )
    const [line] = await once(owner.stdout, 'data')
    const { pids, walls } = JSON.parse(String(line)) as { pids: number[]; walls: string[] }
    assert.is(walls.includes('bubblewrap'), options.bwrap === undefined)
    assert.ok(pids.length >= 2 && pids.every(alive))
    owner.kill('SIGKILL')
    await once(owner, 'exit')
    await sleep(1_000)
    assert.equal(pids.filter(alive), [])
  })
}

test('without bubblewrap it still runs, and says what is missing', async () => {
  for (const bwrap of [false, '/bin/false', '/nowhere/bwrap'] as const) {
    await using runner = await createIsolateRunner({ bwrap, min: 1 })
    const { walls, missing } = runner.capabilities
    assert.equal(walls, ['node-permissions', 'rlimits'])
    assert.ok(missing.some(({ wall }) => wall === 'seccomp'))
    assert.is(missing[0]?.wall, 'bubblewrap')
    assert.match(missing[0]?.fix ?? '', /install bubblewrap/)
    assert.is(await output(runner, 'export default () => 1 + 1'), 2)
  }
})

test('behind bubblewrap a child has no network, no environment, no writable file and no descriptor but its pipes', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  assert.ok(runner.capabilities.walls.includes('bubblewrap'))
  const pids = runner.pids()
  const inner = pids.at(-1)!
  // bubblewrap says where it changed to, and nothing else.
  for (const pid of pids) assert.match(readFileSync(`/proc/${pid}/environ`, 'latin1'), /^(?:PWD=\/\0)?$/)
  for (const namespace of ['net', 'pid', 'mnt', 'ipc', 'user', 'uts'])
    assert.is.not(
      readlinkSync(`/proc/${inner}/ns/${namespace}`),
      readlinkSync(`/proc/self/ns/${namespace}`),
      namespace,
    )
  const interfaces = readFileSync(`/proc/${inner}/net/dev`, 'utf8').trim().split('\n').slice(2)
  assert.equal(
    interfaces.map((line) => line.trim().split(':')[0]),
    ['lo'],
  )
  const mounts = readFileSync(`/proc/${inner}/mounts`, 'utf8').trim().split('\n')
  for (const mount of mounts) {
    const [, at, type, flags] = mount.split(' ')
    const harmless = at === '/proc' || type === 'devpts' || /^\/dev\/\w+$/.test(at!)
    assert.ok(harmless || flags!.split(',').includes('ro'), mount)
  }
  const status = readFileSync(`/proc/${inner}/status`, 'utf8')
  assert.match(status, /^CapEff:\t0+$/m)
  assert.match(status, /^CapBnd:\t0+$/m)
  assert.match(status, /^NoNewPrivs:\t1$/m)
  const descriptors = readdirSync(`/proc/${inner}/fd`).map((fd) => ({
    fd: Number(fd),
    target: readlinkSync(`/proc/${inner}/fd/${fd}`),
  }))
  for (const { fd, target } of descriptors) {
    // What it may begin by itself: it can read there, and open it by no other way.
    if (/vulcan-claims-.* \(deleted\)$/.test(target)) {
      assert.is(fd, 4)
      assert.match(readFileSync(`/proc/${inner}/fdinfo/4`, 'utf8'), /^flags:\t\d*0$/m)
      assert.is(statSync(`/proc/${inner}/fd/4`).mode & 0o777, 0)
      continue
    }
    assert.ok(
      /^(?:socket|pipe):/.test(target)
        ? fd <= 2 || /^pipe:/.test(target)
        : /^anon_inode:|^\/dev\/null$/.test(target),
      `${fd} ${target}`,
    )
  }
})

test('a wall that cannot be had is named with what would bring it, and the others stay', async () => {
  for (const [options, wall] of [
    [{ seccomp: false }, 'seccomp'],
    [{ prlimit: false }, 'rlimits'],
    [{ prlimit: '/bin/false' }, 'rlimits'],
  ] as const) {
    await using runner = await createIsolateRunner({ ...options, min: 1 })
    const { walls, missing } = runner.capabilities
    assert.ok(walls.includes('bubblewrap') && !walls.includes(wall), JSON.stringify(walls))
    assert.equal(
      missing.map((one) => one.wall),
      [wall],
    )
    assert.ok(missing[0]!.fix.length > 20)
  }
})

test('behind all walls a child’s system calls are filtered, and its limits are low', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  assert.equal(runner.capabilities.walls, ['bubblewrap', 'seccomp', 'node-permissions', 'rlimits'])
  assert.equal(runner.capabilities.missing, [])
  const inner = runner.pids().at(-1)!
  const status = readFileSync(`/proc/${inner}/status`, 'utf8')
  assert.match(status, /^Seccomp:\t2$/m)
  assert.match(status, /^Uid:\t\d+/m)
  const limits = readFileSync(`/proc/${inner}/limits`, 'utf8')
  assert.match(limits, /^Max file size +0 +0/m)
  assert.match(limits, /^Max core file size +0 +0/m)
  assert.match(limits, /^Max open files +128 +128/m)
})

/** A child that says it is ready, then answers everything with these bytes. */
const liar = (...replies: Buffer[]) => {
  const hex = Buffer.concat(replies).toString('hex')
  const ready = encodeMessage(kinds.ready, 0, ['0']).toString('hex')
  const source = `process.stdout.write(Buffer.from('${ready}', 'hex'))
    process.stdin.on('data', () => process.stdout.write(Buffer.from('${hex}', 'hex')))`
  return { file: process.execPath, args: ['-e', source], names: [], missing: [] }
}
const done = (header: object, text?: string, number = 1) =>
  encodeMessage(kinds.done, number, [JSON.stringify(header), text])
const sound = { cause: null, message: null, stack: null, start: 'warm', cpu_ms: 1, memory_mb: 1, dropped: [] }

const lies: Record<string, Buffer> = {
  'a length of 4 GiB': Buffer.from([0xff, 0xff, 0xff, 0xff]),
  'a length over the output’s limit': Buffer.from([0x00, 0x80, 0x00, 0x00]),
  'a message without a head': Buffer.from([0, 0, 0, 1, 1]),
  'lengths that do not add up': Buffer.from([0, 0, 0, 14, 18, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 9]),
  'an unknown kind': encodeMessage(99 as never, 1, []),
  'an end of another run': done({ status: 'completed', ...sound }, '1', 7),
  'an end that is not JSON': encodeMessage(kinds.done, 1, ['{']),
  'an end of a made-up status': done({ ...sound, status: 'fine' }, '1'),
  'an end of a cause that is not its to name': done({
    ...sound,
    status: 'failed',
    cause: 'timeout',
    message: 'x',
  }),
  'negative usage': done({ ...sound, status: 'completed', cpu_ms: -1 }, '1'),
  'an output that is not JSON': done({ ...sound, status: 'completed' }, '{"a":'),
  'no output': done({ ...sound, status: 'completed' }),
  'a stop that nobody asked for': done({ ...sound, status: 'stopped' }),
  'a line of a made-up level': encodeMessage(kinds.log, 1, ['fatal', 'x']),
}

for (const [name, reply] of Object.entries(lies)) {
  test(`a child that sends ${name} is not believed and is killed`, async () => {
    const pool = new Pool(liar(reply), { min: 1, max: 1, idleMs: 60_000, warmMb: 64 }, new EgressGate())
    try {
      await pool.filled()
      const [pid] = pool.pids()
      const outcome = await pool.prepare({ ...job('x'), runtime: 'javascript' }).run(never(), hearing())
      assert.is(outcome.status === 'failed' && outcome.cause, 'runner_lost', JSON.stringify(outcome))
      await sleep(100)
      assert.not.ok(alive(pid!))
    } finally {
      await pool.close()
    }
  })
}

test('a child that cannot be started makes runs fail as backend_unavailable, with its last words', async () => {
  const args = ['-e', 'console.error("no such thing"); process.exit(3)']
  const pool = new Pool(
    { file: process.execPath, args, names: [], missing: [] },
    { min: 2, max: 2, idleMs: 60_000, warmMb: 64 },
    new EgressGate(),
  )
  try {
    const outcome = await pool.prepare(job('x')).run(never(), hearing())
    assert.is(outcome.status === 'failed' && outcome.cause, 'backend_unavailable')
    assert.match(JSON.stringify(outcome), /exit code 3.*no such thing/)
  } finally {
    await pool.close()
  }
})

test.run()
