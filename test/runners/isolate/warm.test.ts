import { readFileSync } from 'node:fs'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { createIsolateRunner } from '../../../runners/isolate/index.ts'
import { job, output, run, sleep } from './support.ts'

const counter = 'let n = 0; export default () => ++n'

test('the same code finds its module state again, other code and other limits do not', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  assert.equal([await output(runner, counter), await output(runner, counter)], [1, 2])
  assert.is(await output(runner, `${counter} // other`), 1)
  assert.is(await output(runner, counter, { limits: { memory_mb: 64 } }), 1)
  assert.is(await output(runner, counter), 3)
})

test('nothing one code does to the globals reaches another', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  const poison = `export default () => {
    globalThis.leak = 'leaked'; Object.prototype.polluted = 1; Array.prototype.map = () => 'poisoned'
    JSON.stringify = () => '"poisoned"'; Promise.prototype.then = () => {}; console.log = () => {}
  }`
  await run(runner, poison)
  const { outcome, lines } = await run(
    runner,
    'export default async () => { await null; console.log("x"); return [typeof leak, {}.polluted, [1].map((x) => x + 1)] }',
  )
  assert.is(outcome.status === 'completed' && outcome.output, '["undefined",null,[2]]')
  assert.is(lines.length, 1)
})

test('input, ctx and env are of one call only', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  const code = `
    const seen = []
    export default (input, ctx) => {
      seen.push([input, ctx.env.SECRET ?? null, ctx])
      ctx.extra = (ctx.extra ?? 0) + 1
      return { secret: ctx.env.SECRET ?? null, extra: ctx.extra, same: seen.length > 1 && seen[0][2] === ctx,
        inGlobals: JSON.stringify(Object.getOwnPropertyNames(globalThis).map((k) => String(globalThis[k]))).includes('hush') }
    }`
  const first = await output(runner, code, { env: { SECRET: 'hush' } })
  const second = await output(runner, code)
  assert.equal(first, { secret: 'hush', extra: 1, same: false, inGlobals: false })
  assert.equal(second, { secret: null, extra: 1, same: false, inGlobals: false })
})

test('nothing of a call runs after its end: timers, intervals, microtasks', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  const code = `
    globalThis.late = globalThis.late ?? []
    export default async (input, ctx) => {
      if (input === 'look') { await new Promise((resolve) => setTimeout(resolve, 60)); return late }
      setTimeout(() => { late.push('timeout'); console.log('late') }, 10)
      setInterval(() => { late.push('interval'); console.log('late') }, 5)
      Promise.resolve().then(() => setTimeout(() => late.push('from a microtask'), 5))
      ;(async () => { for (let i = 0; i < 100; i++) await null; setTimeout(() => late.push('after the end'), 1) })()
      return 1
    }`
  const lines: unknown[] = []
  const outcome = await runner
    .prepare(job(code))
    .run(new AbortController().signal, (line) => lines.push(line))
  assert.is(outcome.status, 'completed')
  await sleep(60)
  assert.equal(await output(runner, code, { input: 'look' }), [])
  assert.equal(lines, [])
})

test('a ctx of an ended call is mute', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  const code = `let old; export default (input, ctx) => { old?.log('from the old one'); old = ctx; ctx.log('mine') }`
  await run(runner, code)
  const { lines } = await run(runner, code)
  assert.equal(
    lines.map((line) => line.text),
    ['mine'],
  )
})

test('finalizers and waitAsync, which run without a call, are not there', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  assert.equal(
    await output(
      runner,
      'export default () => [typeof FinalizationRegistry, typeof Atomics.waitAsync, typeof __vulcan_loaded]',
    ),
    ['undefined', 'undefined', 'undefined'],
  )
})

test('an isolate is replaced after an uncaught exception, a stop and an oom, but not after a throw', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  const code = `let n = 0; export default async (input) => {
    n++
    if (input === 'throw') throw new Error('x')
    if (input === 'uncaught') { setTimeout(() => { throw new Error('x') }); await new Promise(() => {}) }
    if (input === 'hang') await new Promise(() => {})
    if (input === 'oom') { const a = []; for (;;) a.push({}) }
    return n
  }`
  assert.is(await output(runner, code), 1)
  await run(runner, code, { input: 'throw' })
  assert.is(await output(runner, code), 3)
  for (const input of ['uncaught', 'hang', 'oom']) {
    await run(runner, code, { input, timeoutMs: input === 'hang' ? 50 : 20_000 })
    assert.is(await output(runner, code), 1, input)
  }
})

test('an isolate is replaced after 1,000 calls', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  let last: unknown
  for (let i = 0; i < 1_000; i++) last = await output(runner, counter)
  assert.is(last, 1_000)
  assert.is(await output(runner, counter), 1)
})

test('what was prepared is run, and what was prepared in vain harms nobody', async () => {
  await using runner = await createIsolateRunner({ min: 2, max: 2 })
  const prepared = Array.from({ length: 6 }, (_, i) => runner.prepare(job(`export default () => ${i}`)))
  prepared[0]!.release()
  prepared[0]!.release()
  const broken = runner.prepare(job('export default ('))
  const outcomes = await Promise.all(
    [...prepared.slice(1), broken].map((each) => each.run(new AbortController().signal, () => {})),
  )
  assert.equal(
    outcomes.map((outcome) => (outcome.status === 'completed' ? outcome.output : outcome.status)),
    ['1', '2', '3', '4', '5', 'failed'],
  )
  prepared[3]!.release()
  assert.is(await output(runner, 'export default () => "next"'), 'next')
})

test('preparing runs none of the user’s code', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  const prepared = runner.prepare(job('console.log("evaluated"); while (true) {}\nexport default () => 1'))
  await sleep(200)
  prepared.release()
  assert.is(await output(runner, 'export default () => "next"'), 'next')
})

test('many codes over few children stay within their memory', async () => {
  await using runner = await createIsolateRunner({ min: 2, max: 2 })
  const rss = () => {
    let total = 0
    for (const pid of runner.pids())
      total += Number(readFileSync(`/proc/${pid}/statm`, 'utf8').split(' ')[1]) / 256
    return total
  }
  const round = async (from: number, count: number) => {
    for (let i = from; i < from + count; i++)
      assert.is(
        await output(runner, `const held = new Array(20_000).fill(${i}); export default () => held[7]`),
        i,
      )
  }
  await round(0, 200)
  const before = rss()
  await round(200, 800)
  const after = rss()
  assert.ok(after < before * 1.35 + 20, `${before} MiB, then ${after} MiB`)
})

test('1,000 calls of one code leave the memory about flat', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  const rss = () =>
    runner
      .pids()
      .reduce((sum, pid) => sum + Number(readFileSync(`/proc/${pid}/statm`, 'utf8').split(' ')[1]) / 256, 0)
  const code = 'export default (input) => ({ got: input.list.length })'
  const input = { list: Array.from({ length: 500 }, (_, i) => `entry ${i}`) }
  for (let i = 0; i < 200; i++) await output(runner, code, { input })
  const before = rss()
  for (let i = 0; i < 1_000; i++) await output(runner, code, { input })
  const after = rss()
  assert.ok(after < before * 1.2 + 10, `${before} MiB, then ${after} MiB`)
})

test.run()
