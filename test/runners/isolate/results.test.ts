import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { createIsolateRunner, probeIsolate } from '../../../runners/isolate/index.ts'
import { failure, hearing, output, run } from './support.ts'

test('a probe names the engine, the runtimes and the walls', async () => {
  const probe = await probeIsolate()
  if (!probe.available) throw new Error(probe.reason)
  assert.match(probe.capabilities.version, /^V8 \d+\.\d+/)
  assert.equal(probe.capabilities.runtimes, ['javascript', 'typescript'])
  assert.ok(probe.capabilities.walls.includes('node-permissions'))
})

test('a handler gets its input and its result is the output', async () => {
  await using runner = await createIsolateRunner()
  assert.equal(await output(runner, 'export default (input) => ({ y: input.x * 2 })', { input: { x: 21 } }), {
    y: 42,
  })
  assert.equal(await output(runner, 'export default (input) => typeof input'), 'undefined')
  assert.equal(await output(runner, 'export default (input) => input', { input: null }), null)
  assert.equal(await output(runner, 'export default () => {}'), null)
  assert.equal(await output(runner, 'export default () => "é\\u2028\\ud800"'), 'é\u2028\ud800')
  assert.equal(await output(runner, 'const f = (i) => i + 1\nexport { f as default }', { input: 1 }), 2)
  assert.equal(
    await output(runner, 'export default class extends Object {}').catch((error) => /user_error/.test(error)),
    true,
  )
})

test('large input and output pass unharmed', async () => {
  await using runner = await createIsolateRunner()
  const input = Array.from({ length: 20_000 }, (_, i) => ({ i, text: `línea ${i} ${'x'.repeat(40)}` }))
  assert.equal(await output(runner, 'export default (input) => input', { input }), input)
})

test('async handlers, timers and top-level await settle', async () => {
  await using runner = await createIsolateRunner()
  const code = `
    const early = await new Promise((resolve) => setTimeout(resolve, 5, 'early'))
    export default async (input) => {
      const seen = [early]
      queueMicrotask(() => seen.push('micro'))
      await null
      await new Promise((resolve) => setTimeout((a, b) => { seen.push(a + b); resolve() }, 5, 'a', 'b'))
      const cancelled = setTimeout(() => seen.push('never'), 1)
      clearTimeout(cancelled)
      await new Promise((resolve) => {
        let n = 0
        const every = setInterval(() => { seen.push(n); if (++n === 3) { clearInterval(every); resolve() } }, 2)
      })
      await new Promise((resolve) => setTimeout(resolve, 10))
      return seen
    }`
  assert.equal(await output(runner, code), ['early', 'micro', 'ab', 0, 1, 2])
  assert.equal(
    await output(runner, 'export default () => ({ then(resolve) { resolve("thenable") } })'),
    'thenable',
  )
  assert.equal(
    await output(
      runner,
      'export default async () => (await WebAssembly.instantiate(new Uint8Array([0,97,115,109,1,0,0,0]))).instance instanceof WebAssembly.Instance',
    ),
    true,
  )
})

test('ctx tells what the handler may know', async () => {
  await using runner = await createIsolateRunner()
  const traceparent = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'
  const code = `export default (input, ctx) => {
    let frozen = false
    try { ctx.env.MODE = 'other' } catch { frozen = true }
    const { signal } = ctx
    signal.throwIfAborted()
    return { id: ctx.id, attempt: ctx.attempt, env: ctx.env, traceparent: ctx.traceparent, frozen,
      aborted: signal.aborted, reason: String(signal.reason), name: signal.constructor.name }
  }`
  const options = {
    id: '0199aaaa-0000-7000-8000-000000000001',
    attempt: 3,
    env: { MODE: 'test' },
    traceparent,
  }
  assert.equal(await output(runner, code, options), {
    id: options.id,
    attempt: 3,
    env: { MODE: 'test' },
    traceparent,
    frozen: true,
    aborted: false,
    reason: 'undefined',
    name: 'AbortSignal',
  })
})

test('an aborted run hears of it by ctx.signal and ends as stopped', async () => {
  await using runner = await createIsolateRunner()
  const code = `export default (input, ctx) => new Promise(() => {
    ctx.signal.onabort = () => console.log('onabort', ctx.signal.aborted)
    const gone = () => console.log('removed')
    ctx.signal.addEventListener('abort', gone)
    ctx.signal.removeEventListener('abort', gone)
    ctx.signal.addEventListener('abort', (event) => console.log(event.type, ctx.signal.reason.name))
    ctx.signal.addEventListener('abort', { handleEvent: () => console.log('object') })
  })`
  const { outcome, lines, ms } = await run(runner, code, { timeoutMs: 100 })
  assert.is(outcome.status, 'stopped')
  assert.ok(ms < 1_100, `${ms}`)
  assert.equal(
    lines.map((line) => line.text),
    ['onabort true', 'abort AbortError', 'object'],
  )
})

test('a run whose signal is aborted already never starts', async () => {
  await using runner = await createIsolateRunner()
  const { outcome, lines } = await run(runner, 'console.log("ran"); export default () => 1', {
    timeoutMs: 0,
  }).then(async () => {
    const prepared = runner.prepare(
      (await import('./support.ts')).job('console.log("ran"); export default () => 1'),
    )
    const lines: unknown[] = []
    return {
      outcome: await prepared.run(
        AbortSignal.abort(),
        hearing((line) => lines.push(line)),
      ),
      lines,
    }
  })
  assert.is(outcome.status, 'stopped')
  assert.is(lines.length, 0)
})

test('console and ctx.log write lines with level, time and order', async () => {
  await using runner = await createIsolateRunner()
  const code = `export default async (input, ctx) => {
    console.debug('debug'); console.log('log %s %d %j', 'a', 1.5, { b: 1 }, 'rest'); console.info('info')
    console.warn('warn'); console.error('error'); console.assert(true, 'no'); console.assert(false, 'assert')
    ctx.log('ctx'); ctx.log.debug('d'); ctx.log.info('i'); ctx.log.warn('w'); ctx.log.error('e')
    await new Promise((resolve) => setTimeout(resolve, 2))
    console.group('group'); console.log('inner'); console.groupEnd(); console.count(); console.count('x')
    console.log()
  }`
  const { lines } = await run(runner, code)
  assert.equal(
    lines.map((line) => `${line.level} ${line.text}`),
    [
      'debug debug',
      'info log a 1.5 {"b":1} rest',
      'info info',
      'warn warn',
      'error error',
      'error Assertion failed: assert',
      'info ctx',
      'debug d',
      'info i',
      'warn w',
      'error e',
      'info group',
      'info   inner',
      'info default: 1',
      'info x: 1',
      'info ',
    ],
  )
  for (const line of lines) {
    assert.is(line.stream, 'console')
    assert.ok(Math.abs(Date.parse(line.time) - Date.now()) < 60_000)
  }
})

test('values are shown as Node would in spirit', async () => {
  await using runner = await createIsolateRunner()
  const shown = async (expression: string) =>
    (await run(runner, `export default () => { console.log(${expression}) }`)).lines[0]?.text
  assert.is(
    await shown('1, -0, 2n, true, null, undefined, Symbol("s"), "plain"'),
    '1 -0 2n true null undefined Symbol(s) plain',
  )
  assert.is(
    await shown('{ a: 1, "b-c": "it", d: { e: { f: { g: 1 } } } }'),
    "{ a: 1, 'b-c': 'it', d: { e: { f: [Object] } } }",
  )
  assert.is(await shown('[1, , "x", [2, [3, [4]]]]'), "[ 1, <empty>, 'x', [ 2, [ 3, [Array] ] ] ]")
  assert.is(
    await shown('new Map([["k", { v: 1 }]]), new Set([1, 2])'),
    "Map(1) { 'k' => { v: 1 } } Set(2) { 1, 2 }",
  )
  assert.is(await shown('new Date(0), new Date(NaN), /a+/gi'), '1970-01-01T00:00:00.000Z Invalid Date /a+/gi')
  assert.is(
    await shown('function named() {}, class Foo {}, () => {}'),
    '[Function: named] [class Foo] [Function: (anonymous)]',
  )
  assert.is(
    await shown('new (class Foo { x = 1 })(), Object.create(null)'),
    'Foo { x: 1 } [Object: null prototype] {}',
  )
  assert.is(
    await shown('new Uint8Array([1, 2]), new ArrayBuffer(3)'),
    'Uint8Array(2) [ 1, 2 ] ArrayBuffer { byteLength: 3 }',
  )
  assert.is(
    await shown('(() => { const a = { n: 1 }; a.self = a; return a })()'),
    '{ n: 1, self: [Circular] }',
  )
  assert.is(await shown('{ get secret() { throw new Error() } }'), '{ secret: [Getter] }')
  assert.match(
    (await shown('new TypeError("bad", { cause: "why" })')) ?? '',
    /^TypeError: bad\n {4}at default \(index\.js:1:\d+\).*\[cause\]: 'why' }$/s,
  )
  assert.is(await shown('new Proxy({}, { ownKeys() { throw 1 } })'), '[value that cannot be shown]')
})

test('a line over 64 KiB is cut with a note', async () => {
  await using runner = await createIsolateRunner()
  const { lines } = await run(
    runner,
    'export default () => { console.log("é".repeat(60_000)); console.log("next") }',
  )
  const [long, next] = lines
  assert.match(long!.text.slice(-60), /line cut: it had 120000 bytes/)
  assert.ok(Buffer.byteLength(long!.text) < 64 * 1024 + 100)
  assert.not.ok(long!.text.includes('\ufffd'))
  assert.is(next!.text, 'next')
})

test('100,000 lines arrive in order', async () => {
  await using runner = await createIsolateRunner()
  const { lines, outcome } = await run(
    runner,
    'export default () => { for (let i = 0; i < 100_000; i++) console.log(i) }',
  )
  assert.is(outcome.status, 'completed')
  assert.is(lines.length, 100_000)
  assert.ok(lines.every((line, i) => line.text === String(i)))
})

test('lines flow while a loop is busy', async () => {
  await using runner = await createIsolateRunner()
  const { lines, outcome } = await run(
    runner,
    'export default () => { console.log("before"); while (true) {} }',
    {
      timeoutMs: 300,
    },
  )
  assert.is(outcome.status, 'stopped')
  assert.equal(
    lines.map((line) => line.text),
    ['before'],
  )
})

test('TypeScript runs with its types stripped and its positions kept', async () => {
  await using runner = await createIsolateRunner()
  const runtime = 'typescript' as const
  const code =
    'interface In { x: number }\nexport default async (input: In): Promise<number> => input.x satisfies number'
  assert.is(await output(runner, code, { runtime, input: { x: 7 } }), 7)
  const thrown = await failure(
    runner,
    'type A = string\nexport default (input: A) => {\n  const long: Record<string, A> = {}; throw new Error("here")\n}',
    'user_error',
    { runtime },
  )
  assert.match(thrown.stack ?? '', /^Error: here\n {4}at default \(index\.ts:3:45\)$/)
})

test('code that cannot be run says why and where', async () => {
  await using runner = await createIsolateRunner()
  const message = async (code: string, runtime: 'javascript' | 'typescript' = 'javascript') =>
    (await failure(runner, code, 'invalid_workload', { runtime })).message
  assert.is(await message('\nexport default (x => {'), 'SyntaxError: Unexpected end of input (index.js:2:23)')
  assert.match(
    await message('let a = 1;\nlet a = 2; export default () => 1'),
    /already been declared \(index\.js:2:5\)/,
  )
  assert.match(
    await message('enum A { x }\nexport default () => 1', 'typescript'),
    /enum is not supported.*\(index\.ts:1:1\)/,
  )
  assert.match(await message('\nlet a: = 1\nexport default () => 1', 'typescript'), /\(index\.ts:2:8\)/)
  assert.match(await message('export const a = 1'), /no default export/)
  assert.match(await message('module.exports = () => 1').catch(() => 'default export'), /default export/)
  assert.match(await message('export default { a: 1 }'), /not a function but \{ a: 1 \}/)
  assert.match(await message('export default 3'), /not a function but a number/)
  assert.match(await message('export default { fetch: 1 }'), /not a function but \{ fetch: 1 \}/)
  assert.match(
    await message('import fs from "node:fs"\nexport default () => 1'),
    /import of "node:fs".*bundle/,
  )
})

test('what was thrown is the error, with the user’s own frames only', async () => {
  await using runner = await createIsolateRunner()
  const error = (body: string) =>
    failure(runner, `export default async (input, ctx) => {\n${body}\n}`, 'user_error')
  assert.equal(await error('throw new Error("boom")'), {
    message: 'boom',
    stack: 'Error: boom\n    at default (index.js:2:7)',
  })
  assert.is((await error('null.x')).message, "TypeError: Cannot read properties of null (reading 'x')")
  assert.equal(await error('throw "text"'), { message: 'text', stack: null })
  assert.equal(await error('throw { code: 5 }'), { message: '{ code: 5 }', stack: null })
  assert.equal(await error('throw null'), { message: 'null', stack: null })
  assert.equal(await error('throw undefined'), { message: 'undefined', stack: null })
  assert.equal(await error('throw Symbol("s")'), { message: 'Symbol(s)', stack: null })
  assert.is((await error('throw () => 1')).message, '[Function: (anonymous)]')
  const later = await error(
    'await null; await new Promise((resolve) => setTimeout(resolve, 2)); throw new RangeError("later")',
  )
  assert.is(later.message, 'RangeError: later')
  assert.match(later.stack ?? '', /^RangeError: later\n {4}at .*index\.js:2:\d+\)?$/)
  const uncaught = await error(
    'setTimeout(() => { throw new Error("in a timer") }, 2); await new Promise(() => {})',
  )
  assert.match(uncaught.stack ?? '', /^Error: in a timer\n {4}at index\.js:2:\d+$/)
  assert.is(
    (await error('queueMicrotask(() => { throw new Error("micro") }); await new Promise(() => {})')).message,
    'micro',
  )
  assert.is(
    (await failure(runner, 'throw new Error("top")\nexport default () => 1', 'user_error')).message,
    'top',
  )
  assert.is(
    (await failure(runner, 'await null\nthrow new Error("top later")\nexport default () => 1', 'user_error'))
      .message,
    'top later',
  )
})

test('errors that resist being read are still reported', async () => {
  await using runner = await createIsolateRunner()
  const error = (expression: string) =>
    failure(runner, `export default () => { throw ${expression} }`, 'user_error')
  await error('Object.defineProperty(new Error("x"), "message", { get() { throw 1 } })')
  await error('Object.defineProperty(new Error("x"), "stack", { get() { throw 1 } })')
  await error('new Proxy(new Error("x"), { get() { throw 1 } })')
  await error('new Proxy({}, { get() { return 5 }, ownKeys() { throw 2 } })')
  const huge = await error('new Error("x".repeat(5_000_000))')
  assert.ok(huge.message.length < 20_000)
})

test('a promise nobody handles is an error line, not a failure', async () => {
  await using runner = await createIsolateRunner()
  const { outcome, lines } = await run(
    runner,
    'export default () => { Promise.reject(new Error("alone")); return 1 }',
  )
  assert.is(outcome.status, 'completed')
  assert.is(lines[0]?.level, 'error')
  assert.match(
    lines[0]?.text ?? '',
    /^Unhandled rejection: Error: alone\n {4}at default \(index\.js:1:\d+\)$/,
  )
})

test('an output that has no JSON form is output_invalid', async () => {
  await using runner = await createIsolateRunner()
  const message = async (expression: string) =>
    (await failure(runner, `export default () => ${expression}`, 'output_invalid')).message
  assert.match(await message('{ const a = {}; a.a = a; return a }'), /circular/i)
  assert.match(await message('({ a: 1n })'), /BigInt/)
  assert.match(await message('({ toJSON() { throw new Error("no") } })'), /not JSON: no/)
  assert.match(await message('() => 1'), /a function has no JSON form/)
  assert.match(await message('Symbol("s")'), /a symbol has no JSON form/)
})

test('an output over the limit is output_too_large and says both sizes', async () => {
  await using runner = await createIsolateRunner()
  const limits = { output_mb: 1 }
  const { message } = await failure(
    runner,
    'export default () => "x".repeat(2_000_000)',
    'output_too_large',
    { limits },
  )
  assert.match(message, /2000002 bytes, the limit is 1048576/)
  // Few characters, many bytes.
  const wide = await failure(runner, 'export default () => "é".repeat(600_000)', 'output_too_large', {
    limits,
  })
  assert.match(wide.message, /1200002 bytes/)
  assert.is(
    ((await output(runner, 'export default () => "x".repeat(1_048_574)', { limits })) as string).length,
    1_048_574,
  )
})

test('usage and start are reported', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const code = 'export default () => { for (let i = 0; i < 2e7; i++); }'
  const first = (await run(runner, code)).outcome
  const second = (await run(runner, code)).outcome
  assert.is(first.start, 'cold')
  assert.is(second.start, 'warm')
  assert.ok((second.usage.cpu_ms ?? 0) > 1)
  assert.ok((second.usage.memory_peak_mb ?? 0) > 0.5)
})

test.run()
