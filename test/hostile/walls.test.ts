/**
 * Attempts of code that has left its isolate and is master of its process: what stands around that process must
 * hold by itself. Each wall is tried with the others taken away where they would answer in its place.
 */
import { readFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { createIsolateRunner } from '../../runners/isolate/index.ts'
import { type WallOptions, type Walls, wallCandidates } from '../../runners/isolate/walls.ts'
import { webBundle } from '../../runners/isolate/web/bundle.ts'
import { call, output, run, sleep } from '../runners/isolate/support.ts'
import { outputOf } from './support.ts'

const { path: web } = await webBundle()
const server = createServer((socket) => socket.on('error', () => {}).end('reached'))
await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
const { port } = server.address() as { port: number }

/** The first walls for these options, with a script of the attacker’s in place of the child’s. */
async function behind(script: string, options: WallOptions & { permission?: boolean }): Promise<unknown> {
  const walls = wallCandidates(options, web)[0] as Walls
  const args = walls.args
    .slice(
      0,
      walls.args.findIndex((arg) => arg.endsWith('isolate/child.ts') && !arg.startsWith('-')),
    )
    .filter((arg) => options.permission !== false || !/^--(?:permission|allow-)/.test(arg))
  // Bound files end with their place inside, which is not the child’s file among Node’s arguments.
  const from = args.lastIndexOf('--stack-size=3900')
  assert.ok(from > 0)
  const source = `(async () => { ${script} })().then((value) => value === undefined ? false : value, () => false).then((value) => process.stdout.write(JSON.stringify(value), () => process.exit(0)))`
  const text = await outputOf(walls.file, [...args, '-e', source], walls.extra)
  return text === '' ? false : JSON.parse(text)
}

const bare = { bwrap: false, setpriv: false, prlimit: false, seccomp: false } as const
/** Walls one by one; `control` takes all of them away. */
const walls = {
  permission: { ...bare },
  bubblewrap: { permission: false, seccomp: false, prlimit: false },
  seccomp: { permission: false, prlimit: false },
  rlimits: { ...bare, prlimit: undefined as never, permission: false },
} as const
const unseccomp = walls.bubblewrap
const none = { ...bare, permission: false }

const connect = (to: string) =>
  `return await new Promise((resolve) => { const socket = require('net').connect(${to}); socket.on('data', () => resolve(true)); socket.on('connect', () => resolve(true)); socket.on('error', () => resolve(false)); setTimeout(() => resolve(false), 1500) })`

type Wall = keyof typeof walls
const attempts: { name: string; script: string; held: Wall[]; control?: object }[] = [
  {
    name: 'read a file of the host',
    script: `return require('fs').readFileSync('/etc/passwd').length > 0`,
    held: ['permission', 'bubblewrap'],
  },
  {
    name: 'list the root of the host',
    script: `return require('fs').readdirSync('/').includes('etc')`,
    held: ['permission', 'bubblewrap'],
  },
  {
    name: 'write a file',
    script: `const f = '/tmp/vulcan-hostile-' + process.pid; require('fs').writeFileSync(f, 'x'); require('fs').unlinkSync(f); return true`,
    held: ['permission', 'bubblewrap', 'rlimits'],
  },
  {
    name: 'write its own code',
    script: `const f = process.execPath; require('fs').accessSync(f, 2); return true`,
    held: ['permission', 'bubblewrap'],
  },
  {
    name: 'read the environment of the runner',
    script: `return require('fs').readFileSync('/proc/${process.pid}/environ').length > 20`,
    held: ['permission', 'bubblewrap'],
  },
  {
    name: 'see the processes of the host',
    script: `return require('fs').readdirSync('/proc').filter((n) => /^\\d+$/.test(n)).length > 4`,
    held: ['permission', 'bubblewrap'],
  },
  {
    name: 'signal the runner',
    script: `process.kill(${process.pid}, 0); return true`,
    held: ['bubblewrap', 'seccomp'],
  },
  { name: 'signal its parent', script: `process.kill(process.ppid, 0); return true`, held: ['seccomp'] },
  {
    name: 'reach a server of the host',
    script: connect(`${port}, '127.0.0.1'`),
    held: ['permission', 'bubblewrap'],
  },
  {
    name: 'open a socket in its own network',
    script: `return await new Promise((resolve) => { const s = require('net').createServer(); s.on('error', () => resolve(false)); s.listen(0, '127.0.0.1', () => resolve(true)) })`,
    held: ['permission', 'seccomp'],
    control: unseccomp,
  },
  {
    name: 'open a datagram socket',
    script: `return await new Promise((resolve) => { const s = require('dgram').createSocket('udp4'); s.on('error', () => resolve(false)); s.bind(0, '127.0.0.1', () => resolve(true)) })`,
    held: ['permission', 'seccomp'],
    control: unseccomp,
  },
  {
    name: 'open a unix socket',
    script: `return await new Promise((resolve) => { const s = require('net').createServer(); s.on('error', () => resolve(false)); s.listen('\\0vulcan-hostile' + process.pid, () => resolve(true)) })`,
    held: ['seccomp'],
    control: unseccomp,
  },
  {
    name: 'start a process',
    script: `return require('child_process').spawnSync(process.execPath, ['-e', '0']).status === 0`,
    held: ['permission', 'seccomp'],
    control: unseccomp,
  },
  {
    name: 'start a thread of Node',
    script: `return await new Promise((resolve) => { const w = new (require('worker_threads').Worker)('0', { eval: true }); w.on('online', () => resolve(true)); w.on('error', () => resolve(false)) })`,
    held: ['permission'],
  },
  {
    name: 'open an inspector',
    script: `require('inspector').open(0, '127.0.0.1'); return require('inspector').url() !== undefined`,
    held: ['permission', 'seccomp'],
    control: unseccomp,
  },
  {
    name: 'raise its priority or lower it',
    script: `require('os').setPriority(0, 5); return true`,
    held: ['seccomp'],
    control: unseccomp,
  },
  {
    name: 'change a file’s mode',
    script: `require('fs').fchmodSync(1, 0o600); return true`,
    held: ['seccomp'],
    control: unseccomp,
  },
  { name: 'change its user', script: `process.setgroups([]); return true`, held: ['bubblewrap', 'seccomp'] },
  { name: 'be root', script: `return process.getuid() === 0`, held: ['bubblewrap'] },
  {
    name: 'open more files than it needs',
    script: `const fs = require('fs'); for (let i = 0; i < 400; i++) fs.openSync(process.execPath); return true`,
    held: ['rlimits'],
  },
  {
    name: 'find the name of the host',
    script: `return require('os').hostname() === ${JSON.stringify((await import('node:os')).hostname())}`,
    held: ['bubblewrap'],
  },
  {
    name: 'find the addresses of the host',
    script: `return Object.keys(require('os').networkInterfaces()).some((name) => name !== 'lo')`,
    held: ['bubblewrap'],
  },
  {
    name: 'find an environment',
    script: `return process.env.VULCAN_HOST_SECRET !== undefined`,
    held: ['bubblewrap'],
  },
]

const controls = new Map<string, Promise<unknown>>()
for (const { name, script, held, control = none } of attempts)
  for (const wall of held)
    test(`held by ${wall}: ${name}`, async () => {
      assert.is(await behind(script, walls[wall]), false, 'it got through')
      const key = name
      if (!controls.has(key)) controls.set(key, behind(script, control as never))
      assert.is(await controls.get(key), true, 'the control did not get through: the attempt proves nothing')
    })

/** A child killed in the midst of each kind of work. */
const work: Record<string, string> = {
  'a busy loop': 'console.log("on"); for (;;) {}',
  'a response on its way':
    'console.log("on"); return new Response(new ReadableStream({ async pull(c) { await new Promise((r) => setTimeout(r, 5)); c.enqueue(new Uint8Array(10)) } }))',
  'reading a request': 'console.log("on"); await request.text(); return new Response("x")',
  'waiting for waitUntil':
    'ctx.waitUntil(new Promise(() => {})); console.log("on"); return new Response("x")',
}
for (const [name, body] of Object.entries(work))
  for (const which of [0, 1])
    test(`held: child ${which} of two, killed during ${name}, takes the other’s call with it`, async () => {
      await using runner = await createIsolateRunner({ min: 2, max: 2 })
      const slow =
        'export default async (n) => { await new Promise((resolve) => setTimeout(resolve, 500)); return n }'
      async function* endless() {
        for (;;) {
          await sleep(10)
          yield new Uint8Array(10)
        }
      }
      const calls = [
        call(runner, `export default { async fetch(request, env, ctx) { ${body} } }`, {
          request: { method: 'POST', body: name === 'reading a request' ? endless() : null },
          timeoutMs: 900,
        }),
        run(runner, slow, { input: 7 }),
      ] as const
      await sleep(200)
      process.kill(innerPids(runner.pids())[which]!, 'SIGKILL')
      const [answered, neighbour] = await Promise.all(calls)
      const ends = [answered.outcome, neighbour.outcome].map((outcome) =>
        outcome.status === 'failed' ? outcome.cause : outcome.status,
      )
      // The one that was not killed goes on: to its end, or until it is told to stop.
      assert.ok(
        ['runner_lost,completed', 'stopped,runner_lost'].includes(String(ends)),
        JSON.stringify([answered.outcome, neighbour.outcome]),
      )
      if (answered.streamed) assert.is(answered.ended, name === 'waiting for waitUntil' ? 'end' : 'fail')
      assert.is(await output(runner, 'export default () => "next"'), 'next')
    })

test('held: a flood of lines, a cyclic and an oversize result harm anything but their own call', async () => {
  await using runner = await createIsolateRunner({ min: 2, max: 4 })
  const neighbour = output(
    runner,
    'export default async () => { await new Promise((r) => setTimeout(r, 500)); return 1 }',
  )
  const flood = await run(
    runner,
    'export default () => { for (let i = 0; i < 20000; i++) console.log("x".repeat(200)) }',
  )
  assert.is(flood.outcome.status, 'completed')
  assert.is(flood.lines.length, 20_000)
  for (const [expression, cause] of [
    ['(() => { const a = {}; a.a = a; return a })()', 'output_invalid'],
    ['"x".repeat(8_000_000)', 'output_too_large'],
    ['({ toJSON() { throw new Error("no") } })', 'output_invalid'],
    ['new Proxy({}, { ownKeys() { throw new Error("no") } })', 'output_invalid'],
    ['({ get a() { throw new Error("no") } })', 'output_invalid'],
  ] as const) {
    const { outcome } = await run(runner, `export default () => ${expression}`)
    assert.is(outcome.status === 'failed' && outcome.cause, cause, expression)
  }
  assert.is(await neighbour, 1)
})

for (const [name, body] of Object.entries({
  'a regular expression': 'return /^(a+)+$/.test("a".repeat(40) + "b")',
  'waiting on shared memory': 'return Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0)',
  'a busy loop in a stream': 'for await (const x of new ReadableStream({ pull() { for (;;) {} } }));',
  'an endless chain of promises': 'for (;;) await null',
}))
  test(`held: ${name} blocks a neighbour, or outlives its end`, async () => {
    await using runner = await createIsolateRunner({ min: 2, max: 4 })
    const blocked = run(runner, `export default async () => { ${body} }`, { timeoutMs: 600 })
    await sleep(100)
    const neighbour = await run(runner, 'export default () => 1')
    assert.is(neighbour.outcome.status, 'completed')
    assert.ok(neighbour.ms < 450, `${neighbour.ms}`)
    const { outcome, ms } = await blocked
    assert.is(outcome.status, 'stopped')
    // The control: it does not end by itself, and so was under way when the neighbour ran.
    assert.ok(ms >= 590, `${ms}`)
  })

test('held: WebAssembly memory beyond the limit', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 2 })
  const code =
    'export default (n) => { const m = new WebAssembly.Memory({ initial: n }); new Uint8Array(m.buffer).fill(1); return m.buffer.byteLength }'
  const { outcome } = await run(runner, code, { input: 8000, limits: { memory_mb: 64 } })
  assert.ok(
    outcome.status === 'failed' && ['oom', 'user_error'].includes(outcome.cause),
    JSON.stringify(outcome),
  )
  // The control: within the limit it is given.
  assert.is(await output(runner, code, { input: 100, limits: { memory_mb: 64 } }), 6_553_600)
})

test('the server of this file closes', () => {
  server.close()
})

test.run()

/** The processes that hold isolates: bubblewrap has two of its own above each. */
function innerPids(pids: number[]): number[] {
  return pids.filter((pid) => readFileSync(`/proc/${pid}/cmdline`, 'latin1').startsWith('/vulcan/node'))
}
