import { readFileSync } from 'node:fs'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { createIsolateRunner } from '../../../runners/isolate/index.ts'
import { call as callHttp, hearing, job, output, run, sleep } from './support.ts'

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
  const outcome = await runner.prepare(job(code)).run(
    new AbortController().signal,
    hearing((line) => lines.push(line)),
  )
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

test('an isolate is replaced after 20,000 calls', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  let last: unknown
  for (let i = 0; i < 20_000; i++) last = await output(runner, counter)
  assert.is(last, 20_000)
  assert.is(await output(runner, counter), 1)
})

test('what was prepared is run, and what was prepared in vain harms nobody', async () => {
  await using runner = await createIsolateRunner({ min: 2, max: 2 })
  const prepared = Array.from({ length: 6 }, (_, i) => runner.prepare(job(`export default () => ${i}`)))
  prepared[0]!.release()
  prepared[0]!.release()
  const broken = runner.prepare(job('export default ('))
  const outcomes = await Promise.all(
    [...prepared.slice(1), broken].map((each) => each.run(new AbortController().signal, hearing())),
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

test('prewarmed code is warm at its first call, on as many children as asked for', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 4 })
  const slow = job(
    'export default async () => { await new Promise((resolve) => setTimeout(resolve, 100)); return 1 }',
  )
  runner.prewarm(slow, 3)
  for (let i = 0; i < 100 && runner.pids().length < 3; i++) await sleep(50)
  await sleep(400)
  const starts = async (count: number, of = slow) =>
    (
      await Promise.all(
        Array.from({ length: count }, () => runner.prepare(of).run(new AbortController().signal, hearing())),
      )
    ).map(({ start }) => start)
  assert.equal(await starts(3), ['warm', 'warm', 'warm'])
  assert.equal(await starts(1, job('export default () => 2')), ['cold'])
})

test('prewarming runs none of the user’s code, and code that cannot run is refused as ever', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  runner.prewarm(job('console.log("evaluated"); while (true) {}\nexport default () => 1'), 1)
  runner.prewarm(job('export default ('), 1)
  await sleep(300)
  assert.is(await output(runner, 'export default () => "next"'), 'next')
  const { outcome } = await run(runner, 'export default (')
  assert.is(outcome.status === 'failed' && outcome.cause, 'invalid_workload')
})

test('what is prewarmed stays when others are let go for their memory', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1, warmMb: 24 })
  const kept = job('let n = 0; export default () => ++n')
  runner.prewarm(kept, 1)
  await sleep(200)
  const call = async () =>
    JSON.parse(
      (await runner
        .prepare(kept)
        .run(new AbortController().signal, hearing())
        .then((outcome) => (outcome.status === 'completed' ? outcome.output : '0'))) as string,
    )
  assert.is(await call(), 1)
  for (let i = 0; i < 40; i++) await output(runner, `export default () => ${i}`)
  assert.is(await call(), 2)
  runner.prewarm(kept, 0)
  for (let i = 100; i < 140; i++) await output(runner, `export default () => ${i}`)
  assert.is(await call(), 1)
})

test('an isolate that grows is replaced', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  const leaky = `const held = []; let n = 0
    export default () => { held.push(Array.from({ length: 200_000 }, (_, i) => [i])); return ++n }`
  let last = 0
  let restarted = false
  for (let i = 0; i < 12 && !restarted; i++) {
    const n = (await output(runner, leaky, { limits: { memory_mb: 512 } })) as number
    restarted = n <= last
    last = n
  }
  assert.ok(restarted, `${last} calls and no new isolate`)
})

test('calls by HTTP of many codes over few children stay within their memory', async () => {
  await using runner = await createIsolateRunner({ min: 2, max: 2, warmMb: 128 })
  const rss = () =>
    runner
      .pids()
      .reduce((sum, pid) => sum + Number(readFileSync(`/proc/${pid}/statm`, 'utf8').split(' ')[1]) / 256, 0)
  const round = async (from: number, count: number) => {
    for (let i = from; i < from + count; i++) {
      const { text } = await callHttp(
        runner,
        `export default { fetch: async (request) => Response.json({ n: ${i}, at: new URL(request.url).pathname }) }`,
      )
      assert.is(text, `{"n":${i},"at":"/"}`)
    }
  }
  await round(0, 150)
  const before = rss()
  await round(150, 350)
  const after = rss()
  assert.ok(after < before * 1.35 + 20, `${before} MiB, then ${after} MiB`)
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
