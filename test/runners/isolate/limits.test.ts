import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { createIsolateRunner } from '../../../runners/isolate/index.ts'
import type { Cause } from '../../../shared/workload.ts'
import { output, run } from './support.ts'

/** What each of these ends as; `stopped` is what the consume loop records as a timeout. */
const runaways: Record<string, { body: string; ends: (Cause | 'stopped')[] }> = {
  'while (true) {}': { body: 'while (true) {}', ends: ['stopped'] },
  'a busy loop in a timer': {
    body: 'setTimeout(() => { while (true) {} }); await new Promise(() => {})',
    ends: ['stopped'],
  },
  'a promise that never settles': { body: 'await new Promise(() => {})', ends: ['stopped'] },
  'an endless promise chain': { body: 'for (;;) await null', ends: ['stopped'] },
  'an endless promise chain that nobody awaits': {
    body: '(async () => { for (;;) await null })(); return 1',
    ends: ['stopped'],
  },
  'an endless interval': { body: 'setInterval(() => {}, 1); await new Promise(() => {})', ends: ['stopped'] },
  'a regular expression that backtracks': {
    body: 'return /^(a+)+$/.test("a".repeat(50) + "b")',
    ends: ['stopped'],
  },
  'an abort listener that never returns': {
    body: 'ctx.signal.addEventListener("abort", () => { while (true) {} }); await new Promise(() => {})',
    ends: ['stopped'],
  },
  'a toJSON that never returns': { body: 'return { toJSON() { while (true) {} } }', ends: ['stopped'] },
  'an error whose message never returns': {
    body: 'throw { get message() { while (true) {} } }',
    ends: ['stopped'],
  },
  'waiting on shared memory': {
    body: 'Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0)',
    ends: ['stopped'],
  },
  'an endless array of objects': { body: 'const a = []; for (;;) a.push({ x: 1 })', ends: ['oom'] },
  'an endless array of numbers': { body: 'const a = []; for (;;) a.push(1)', ends: ['oom'] },
  'an endless map': { body: 'const m = new Map(); for (let i = 0; ; i++) m.set(i, [i])', ends: ['oom'] },
  'an endless array in promises': {
    body: 'const a = []; for (;;) { a.push(new Array(1000).fill(1)); await null }',
    ends: ['oom'],
  },
  'giant flat strings': {
    body: 'const a = []; for (let i = 0; ; i++) { const s = String(i).padEnd(1e7, "x" + i); a.push([...s.slice(0, 10), s].join("")) }',
    ends: ['oom'],
  },
  'a string flattened to hundreds of MB': {
    body: 'let s = "é\\u0100".repeat(1.2e8); return JSON.stringify([s, s.charCodeAt(5)]).length + s.split("x").join("y").toUpperCase().length',
    ends: ['oom'],
  },
  'a giant ArrayBuffer': {
    body: 'return new Uint8Array(new ArrayBuffer(2e9)).fill(1).length',
    ends: ['oom'],
  },
  'giant ArrayBuffers, caught': {
    body: 'const a = []; for (;;) try { a.push(new Uint8Array(1e6).fill(1)) } catch { for (;;) a.push({}) }',
    ends: ['oom'],
  },
  'giant WebAssembly memories': {
    body: 'const a = []; for (let i = 0; i < 40; i++) { const m = new WebAssembly.Memory({ initial: 1000, maximum: 1000, shared: i % 2 > 0 }); new Uint8Array(m.buffer).fill(1); a.push(m) }; await new Promise(() => {})',
    ends: ['oom', 'user_error'],
  },
  'infinite recursion': { body: 'const f = () => f() + 1; return f()', ends: ['user_error'] },
  'a string longer than any may be': { body: 'return "x".repeat(2 ** 30)', ends: ['user_error'] },
}

for (const [name, { body, ends }] of Object.entries(runaways)) {
  test(`${name} ends with the right cause, and the next workload works`, async () => {
    await using runner = await createIsolateRunner({ max: 4 })
    const timeoutMs = ends.includes('stopped') ? 400 : 20_000
    const { outcome, ms } = await run(runner, `export default async (input, ctx) => { ${body} }`, {
      timeoutMs,
    })
    const end = outcome.status === 'failed' ? outcome.cause : outcome.status
    assert.ok(ends.includes(end as Cause), `${JSON.stringify(outcome)} after ${ms} ms`)
    assert.ok(ms < timeoutMs + 1_000, `${ms}`)
    assert.is(await output(runner, 'export default () => "next"'), 'next')
  })
}

test('recursion that logs on its way down ends as a RangeError of the user’s', async () => {
  await using runner = await createIsolateRunner()
  const code =
    'let n = 0; const f = () => { n++; if (n % 500 === 0) console.log(n); f() }\nexport default () => f()'
  const { outcome, lines } = await run(runner, code)
  assert.is(outcome.status === 'failed' && outcome.cause, 'user_error')
  assert.match(JSON.stringify(outcome), /Maximum call stack size exceeded/)
  assert.ok(lines.length > 3)
})

test('more timers than anyone needs are refused', async () => {
  await using runner = await createIsolateRunner()
  const code = 'export default () => { for (let i = 0; i < 1e6; i++) setTimeout(() => {}, 1e6) }'
  const { outcome } = await run(runner, code)
  assert.match(JSON.stringify(outcome), /more than 10000 timers/)
})

test('a stopped run leaves the others alone', async () => {
  await using runner = await createIsolateRunner({ max: 8 })
  const slow =
    'export default async (n) => { await new Promise((resolve) => setTimeout(resolve, 600)); return n }'
  const [, ...others] = await Promise.all([
    run(runner, 'export default () => { while (true) {} }', { timeoutMs: 300 }),
    ...[1, 2, 3, 4].map((input) => output(runner, slow, { input })),
  ])
  assert.equal(others, [1, 2, 3, 4])
})

test('many sleepers run at once, many short runs share few children', async () => {
  await using runner = await createIsolateRunner({ min: 2, max: 16, idleMs: 400 })
  const one = async () => new Set(runner.pids()).size
  const atRest = await one()
  await Promise.all(
    Array.from({ length: 200 }, (_, input) => output(runner, 'export default (n) => n', { input })),
  )
  assert.ok((await one()) <= atRest * 2.5, `${await one()} after ${atRest}`)
  const sleeper = 'export default async () => { await new Promise((resolve) => setTimeout(resolve, 1500)) }'
  const start = performance.now()
  await Promise.all(Array.from({ length: 12 }, () => output(runner, sleeper)))
  const took = performance.now() - start
  assert.ok(took < 12 * 1500 * 0.5, `${took}`)
  await new Promise((resolve) => setTimeout(resolve, 1_500))
  assert.is(await one(), atRest)
})

test.run()
