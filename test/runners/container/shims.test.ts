/** The shims and the runner’s end of them, over boxes that are processes of this host. */
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { LogLine } from '../../../shared/workload.ts'
import { failure, output, run } from './jobs.ts'
import { localRunner, localTest } from './local-engine.ts'

const local = await localRunner()
const { runner } = local
test.after(async () => local[Symbol.asyncDispose]())

const python = { runtime: 'python' } as const
const shown = (lines: LogLine[]) => lines.map(({ level, stream, text }) => `${level} ${stream} ${text}`)

localTest('node: input, ctx, env, output', async () => {
  const text = `export default (input, ctx) => ({ input, keys: Object.keys(ctx).sort(), id: ctx.id, attempt: ctx.attempt,
    trace: ctx.traceparent, env: ctx.env.A, process: process.env.A, aborted: ctx.signal.aborted, cwd: process.cwd() })`
  const found = (await output(runner, text, {
    id: 'w1',
    attempt: 2,
    input: { x: [1, null] },
    env: { A: 'b' },
    traceparent: '00-a-b-01',
  })) as Record<string, unknown>
  assert.equal(found, {
    input: { x: [1, null] },
    keys: [
      ...['attempt', 'env', 'id', 'log', 'passThroughOnException', 'signal', 'span', 'traceparent'],
      'waitUntil',
    ],
    id: 'w1',
    attempt: 2,
    trace: '00-a-b-01',
    env: 'b',
    process: 'b',
    aborted: false,
    cwd: '/workspace',
  })
})

localTest('node: CommonJS, ES modules, TypeScript, no input, no output', async () => {
  assert.is(await output(runner, 'module.exports = (i) => i + 1', { input: 1 }), 2)
  assert.is(await output(runner, 'exports.__esModule = true; exports.default = (i) => i', { input: 3 }), 3)
  const typed = 'type T = { n: number }\nexport default ({ n }: T): number => n'
  assert.is(await output(runner, typed, { runtime: 'typescript', input: { n: 4 } }), 4)
  assert.equal(await output(runner, 'export default (...args) => [args[0] === undefined, args.length]'), [
    true,
    2,
  ])
  assert.is(await output(runner, 'export default () => {}'), null)
})

localTest('python: input, ctx, env, output, async', async () => {
  const text = `import os
def handler(input, ctx):
    return [input, ctx.id, ctx.attempt, ctx.traceparent, ctx.env["A"], os.environ["A"], ctx.signal.aborted, os.getcwd()]`
  const found = await output(runner, text, { ...python, id: 'w1', input: { é: 1 }, env: { A: 'b' } })
  assert.equal(found, [{ é: 1 }, 'w1', 1, null, 'b', 'b', false, '/workspace'])
  const later = 'import asyncio\nasync def handler(input, ctx):\n    await asyncio.sleep(0)\n    return input'
  assert.is(await output(runner, later, { ...python, input: 'ok' }), 'ok')
  assert.is(await output(runner, 'def handler(input):\n    return input', { ...python, input: 7 }), 7)
  assert.is(await output(runner, 'def handler(input, ctx):\n    pass', python), null)
})

localTest('node: lines keep their order, level and stream', async () => {
  const { lines } = await run(
    runner,
    `console.log('at load')
    export default async (input, ctx) => {
      console.log('a %d', 1, { b: 2 }); console.warn('w'); console.error('e'); console.debug('d'); console.info('two\\nlines')
      process.stdout.write('half '); process.stdout.write('whole\\n'); process.stderr.write('no end')
      ctx.log('ctx'); ctx.log.warn('ctx warns')
    }`,
  )
  assert.equal(shown(lines), [
    'info console at load',
    'info console a 1 { b: 2 }',
    'warn console w',
    'error console e',
    'debug console d',
    'info console two\nlines',
    'info stdout half whole',
    'info console ctx',
    'warn console ctx warns',
    'error stderr no end',
  ])
})

localTest('python: print, stderr, logging, buffers', async () => {
  const { lines } = await run(
    runner,
    `import logging, sys
print("at load")
def handler(input, ctx):
    print("a", 1)
    print("half", end="")
    print(" whole", file=sys.stdout, flush=True)
    sys.stderr.write("e\\n")
    logging.warning("logged")
    sys.stdout.buffer.write(b"bytes\\n")
    ctx.log("ctx")
    ctx.log.error("ctx errs")
    print("no end", end="")`,
    python,
  )
  assert.equal(shown(lines), [
    'info stdout at load',
    'info stdout a 1',
    'info stdout half whole',
    'error stderr e',
    'error stderr WARNING:root:logged',
    'info stdout bytes',
    'info console ctx',
    'error console ctx errs',
    'info stdout no end',
  ])
})

localTest('what code and its children write to the descriptors themselves are lines of the run', async () => {
  const node = `import { execFileSync, spawnSync } from 'node:child_process'
    import { writeSync } from 'node:fs'
    export default (input) => {
      writeSync(1, 'one ' + input + '\\n'); writeSync(2, 'two')
      spawnSync('sh', ['-c', 'echo out; echo err >&2'], { stdio: 'inherit' })
      return execFileSync('echo', ['piped']).toString()
    }`
  for (const n of [1, 2, 3]) {
    const { outcome, texts } = await run(runner, node, { input: n })
    assert.is(outcome.status === 'completed' && outcome.output, '"piped\\n"')
    assert.equal(texts, [`one ${n}`, 'twoout', 'err'])
  }
  const text = `import os, subprocess, sys
def handler(input, ctx):
    os.write(1, b"one\\n")
    subprocess.run(["sh", "-c", "echo out; echo err >&2"])
    pid = os.fork()
    print("parent" if pid else "child")
    if pid:
        os.waitpid(pid, 0)
    return pid > 0`
  const { outcome, texts } = await run(runner, text, python)
  assert.is(outcome.status === 'completed' && outcome.output, 'true')
  assert.equal([...texts].sort(), ['child', 'err', 'one', 'out', 'parent'])
})

localTest('children do not get the descriptors of the protocol', async () => {
  const seen = `import { execFileSync } from 'node:child_process'
    export default () => execFileSync('sh', ['-c', 'ls /proc/self/fd']).toString().split('\\n').includes('4')`
  assert.is(await output(runner, seen), false)
  const text = `import subprocess
def handler(input, ctx):
    return subprocess.run(["ls", "/proc/self/fd"], capture_output=True, text=True).stdout.split()`
  const found = (await output(runner, text, python)) as string[]
  assert.not.ok(found.includes('4'))
})

localTest('lines are cut, not lost', async () => {
  const { lines } = await run(
    runner,
    `import { writeSync } from 'node:fs'
    export default () => { console.log('é'.repeat(50000)); writeSync(1, 'x'.repeat(200000) + '\\n'); return 1 }`,
  )
  for (const { text } of lines) {
    assert.match(text, /\[line cut: it had \d+ bytes\]$/)
    assert.ok(Buffer.byteLength(text) < 66_000)
  }
  assert.is(lines.length, 2)
})

localTest('what is thrown: message, stack of the user’s own lines', async () => {
  const node = await failure(
    runner,
    'function deep() { throw new TypeError("bad") }\nexport default () => deep()',
    'user_error',
  )
  assert.is(node.error.message, 'TypeError: bad')
  assert.match(node.error.stack!, /at deep \(file:\/\/\/workspace\/index\.mjs:1:/)
  assert.not.match(node.error.stack!, /shim/)
  const thrown = await failure(runner, 'export default () => { throw "text" }', 'user_error')
  assert.equal(thrown.error, { message: 'text', stack: null })
  const text = 'def deep():\n    raise KeyError("k")\ndef handler(input, ctx):\n    deep()'
  const { error } = await failure(runner, text, 'user_error', python)
  assert.is(error.message, "KeyError: 'k'")
  assert.match(error.stack!, /File "\/workspace\/main\.py", line 2, in deep/)
  assert.not.match(error.stack!, /shim/)
})

localTest('code that cannot be run says where', async () => {
  const bad = await failure(runner, 'const a = 1\nexport default ( => 1', 'invalid_workload')
  assert.match(bad.error.message, /SyntaxError.*index\.js:2/)
  const { error } = await failure(runner, 'x = 1\ndef handler(:\n', 'invalid_workload', python)
  assert.match(error.message, /SyntaxError.*main\.py:2/)
  for (const [text, message] of [
    ['import "nope"\nexport default () => 1', /'nope'.*\nnope is a package: deploy/],
    [
      'require("@no/pe/x"); module.exports = () => 1',
      /'@no\/pe\/x'.*\n(?:.*\n)*@no\/pe is a package: deploy/,
    ],
    ['import "./nope.js"\nexport default () => 1', /nope\.js'[^\n]*$/],
    ['export const a = 1', /no default export/],
    ['export default 5', /not a function but a number/],
  ] as const)
    assert.match((await failure(runner, text, 'invalid_workload')).error.message, message)
  assert.match((await failure(runner, 'x = 1', 'invalid_workload', python)).error.message, /no handler/)
  const missing = await failure(runner, 'import nope.inner', 'invalid_workload', python)
  assert.match(missing.error.message, /'nope'\nnope is not here: deploy.*requirements\.txt/)
  // An error of its own while it loads is its own.
  await failure(runner, 'JSON.parse("{")\nexport default () => 1', 'user_error')
  await failure(runner, 'raise ValueError("x")', 'user_error', python)
})

localTest('outputs that are none, or too large', async () => {
  await failure(runner, 'export default () => 1n', 'output_invalid')
  await failure(runner, 'export default () => () => 1', 'output_invalid')
  await failure(runner, 'def handler(i, c):\n    return {1, 2}', 'output_invalid', python)
  await failure(runner, 'def handler(i, c):\n    return float("nan")', 'output_invalid', python)
  const limits = { output_mb: 1 }
  await failure(runner, 'export default () => "x".repeat(1048576)', 'output_too_large', { limits })
  await failure(runner, 'def handler(i, c):\n    return "x" * 1048576', 'output_too_large', {
    ...python,
    limits,
  })
  const most = await output(runner, 'export default () => "x".repeat(1048574)', { limits })
  assert.is((most as string).length, 1_048_574)
})

localTest(
  'uncaught errors end the run, rejections that nobody handles are lines, exits are told by their code',
  async () => {
    const late = `let n = 0; export default (input) => input === 'again' ? ++n
    : new Promise(() => setTimeout(() => { throw new Error('late') }))`
    assert.is((await failure(runner, late, 'user_error')).error.message, 'late')
    // Nobody knows what state it is in: the next run begins anew.
    assert.is(await output(runner, late, { input: 'again' }), 1)
    const { outcome, texts } = await run(
      runner,
      'export default async () => { Promise.reject(new Error("nobody")); await new Promise((r) => setTimeout(r, 20)); return 1 }',
    )
    assert.is(outcome.status, 'completed')
    assert.match(texts[0]!, /Unhandled rejection: Error: nobody/)
    assert.is((await failure(runner, 'export default () => process.exit(7)', 'exit_code')).exitCode, 7)
    const exit = 'import sys\ndef handler(i, c):\n    sys.exit(7)'
    assert.is((await failure(runner, exit, 'exit_code', python)).exitCode, 7)
  },
)

localTest('by HTTP: fetch handlers get a Request and answer a Response', async () => {
  const echo = `export default { async fetch(request, env, ctx) {
    return new Response(request.method + ' ' + new URL(request.url).pathname + ' ' + request.headers.get('x-a') + ' ' + env.A + ' ' + await request.text(),
      { status: 201, headers: [['set-cookie', 'a=1'], ['set-cookie', 'b=2']] })
  } }`
  const { outcome, response, body, streamed } = await run(runner, echo, {
    env: { A: 'e' },
    request: {
      method: 'POST',
      url: 'http://example.test/path?q=1',
      headers: [['x-a', 'h']],
      body: Buffer.from('body'),
    },
  })
  assert.is(outcome.status, 'completed')
  assert.is(streamed, false)
  assert.is(response!.status, 201)
  assert.is(response!.headers.filter(([name]) => name === 'set-cookie').length, 2)
  assert.is(body.toString(), 'POST /path h e body')
  const bad = await failure(runner, 'export default { fetch: () => 5 }', 'user_error', { request: {} })
  assert.match(bad.error.message, /must return a Response/)
  assert.equal(
    await output(runner, 'export default { fetch: async (r) => Response.json(await r.json()) }', {
      input: [1],
    }),
    [1],
  )
})

localTest('by HTTP: bodies stream both ways, no faster than they are taken', async () => {
  let pulled = 0
  async function* upload() {
    for (let i = 0; i < 200; i++) {
      pulled += 50_000
      yield new Uint8Array(50_000).fill(i)
    }
  }
  const lazy = `export default { async fetch(request) {
    const reader = request.body.getReader(); await reader.read()
    await new Promise((r) => setTimeout(r, 300))
    let n = 0; for (;;) { const { done, value } = await reader.read(); if (done) break; n += value.length }
    return Response.json({ n })
  } }`
  const request = { method: 'POST', body: upload() }
  const running = run(runner, lazy, { request })
  await new Promise((done) => setTimeout(done, 250))
  assert.ok(pulled < 2_000_000, `${pulled} bytes were read ahead`)
  assert.is((await running).outcome.status, 'completed')
  assert.is(pulled, 10_000_000)
  const source = `let made = 0
    export default { fetch: (request) => request.url.endsWith('made') ? Response.json(made) : new Response(new ReadableStream({
      pull(c) { if (made >= 200) return c.close(); made++; c.enqueue(new Uint8Array(50000).fill(made)) } }, { highWaterMark: 0 })) }`
  let pieces = 0
  const { ended, body, streamed } = await run(runner, source, {
    request: {},
    async onPiece() {
      if (pieces++ === 0) await new Promise((done) => setTimeout(done, 200))
    },
  })
  assert.is(streamed, true)
  assert.is(ended, 'end')
  assert.is(body.length, 10_000_000)
})

localTest('by HTTP: JSON handlers of both languages', async () => {
  for (const [text, options] of [
    ['export default (input) => ({ input })', {}],
    ['def handler(input, ctx):\n    return {"input": input}', python],
  ] as const) {
    const post = await run(runner, text, {
      ...options,
      request: { method: 'POST', body: Buffer.from('{"a":1}') },
    })
    assert.is(post.response!.status, 200)
    assert.equal(post.response!.headers, [['content-type', 'application/json']])
    assert.equal(JSON.parse(post.body.toString()), { input: { a: 1 } })
    const query = await run(runner, text, { ...options, request: { url: 'http://x.test/?a=1&b=2&b=3' } })
    assert.equal(JSON.parse(query.body.toString()), { input: { a: '1', b: ['2', '3'] } })
    const bad = await run(runner, text, { ...options, request: { method: 'POST', body: Buffer.from('{') } })
    assert.is(bad.response!.status, 400)
    assert.match(bad.body.toString(), /not JSON/)
  }
  const large = await run(runner, 'def handler(input, ctx):\n    return "x" * 300000', {
    ...python,
    request: {},
  })
  assert.is(large.streamed, true)
  assert.is(large.body.length, 300_002)
})

localTest('by HTTP: a caller who goes away aborts the request’s signal and nothing else', async () => {
  const gone = new AbortController()
  const text = `export default { fetch: (request, env, ctx) => new Promise((resolve) => {
    console.log('waiting')
    request.signal.addEventListener('abort', () => setTimeout(() => resolve(new Response('went on ' + ctx.signal.aborted)), 20))
  }) }`
  const { outcome, body } = await run(runner, text, {
    request: { gone: gone.signal },
    onLine: () => gone.abort(),
  })
  assert.is(outcome.status, 'completed')
  assert.is(body.toString(), 'went on false')
})

localTest('waitUntil: the run ends when all is done', async () => {
  const { outcome, texts } = await run(
    runner,
    `export default { fetch(request, env, ctx) {
      ctx.waitUntil(new Promise((r) => setTimeout(() => { console.log('after'); r() }, 50)))
      return new Response('now')
    } }`,
    { request: {} },
  )
  assert.is(outcome.status, 'completed')
  assert.equal(texts, ['after'])
})

localTest('a stop aborts ctx.signal, and nothing runs after it', async () => {
  const text = `export default (input, ctx) => new Promise(() => {
    ctx.signal.addEventListener('abort', () => console.log('cleaning up: ' + ctx.signal.reason.message))
    setInterval(() => console.log('tick'), 10)
  })`
  const stop = new AbortController()
  const { outcome, texts } = await run(runner, text, {
    signal: stop.signal,
    onLine: () => stop.abort('killed'),
  })
  assert.is(outcome.status, 'stopped')
  assert.is(texts.at(-1), 'cleaning up: the workload was stopped: killed')
  for (const busy of ['export default () => { for (;;); }', 'def handler(i, c):\n    while True: pass']) {
    const runtime = busy.startsWith('def') ? ('python' as const) : ('node' as const)
    const { outcome: ended, ms } = await run(runner, busy, { runtime, timeoutMs: 600 })
    assert.is(ended.status, 'stopped')
    assert.ok(ms < 5_000)
  }
})

localTest(
  'a shim that lies is killed: frames without end, runs that are not, descriptors closed',
  async () => {
    const hostile = (body: string) =>
      `import fs from 'node:fs'; export default async (input) => { ${body}; await new Promise((r) => setTimeout(r, 5000)); return 1 }`
    const lost = async (body: string, message: RegExp) =>
      assert.match((await failure(runner, hostile(body), 'runner_lost')).error.message, message)
    /** A message of a kind about run 1, with one part. */
    const frame = (kind: number, run: number, part: string) =>
      `const p = Buffer.from(${JSON.stringify(part)}), h = Buffer.alloc(18)
     h.writeUInt32BE(14 + p.length, 0); h[4] = ${kind}; h.writeUInt32BE(${run}, 5); h[13] = 1; h.writeUInt32BE(p.length, 14)
     fs.writeSync(3, Buffer.concat([h, p]))`
    await lost('fs.writeSync(3, Buffer.alloc(64, 0xff))', /a frame of 4294967295 bytes/)
    await lost('fs.writeSync(3, Buffer.alloc(64))', /without a head/)
    await lost(frame(17, 1, 'loud'), /without a level/)
    await lost(frame(18, 99, '{}'), /not under way/)
    await lost(
      frame(18, 1, '{"status":"failed","cause":"killed","message":"x","stack":null}'),
      /makes no sense/,
    )
    await lost(
      frame(18, 1, '{"status":"completed","cause":null,"message":null,"stack":null}'),
      /a result that is none/,
    )
    await lost(frame(20, 1, '{"status":200,"headers":[]}'), /nobody asked for/)
    await lost(frame(21, 1, '{}'), /a fetch/)
    await failure(runner, 'import fs from "node:fs"; export default () => { fs.closeSync(3) }', 'exit_code')
    await failure(runner, 'import os\ndef handler(i, c):\n    os.closerange(0, 9)', 'exit_code', python)
  },
)

localTest('a flood of lines is held back, and the runner goes on serving', async () => {
  const flood = `import { writeSync } from 'node:fs'
    export default () => { for (;;) { console.log('flood'); writeSync(1, 'raw '.repeat(1000) + '\\n') } }`
  let lines = 0
  const flooding = run(runner, flood, { timeoutMs: 2_500, onLine: () => lines++ })
  let served = 0
  const until = performance.now() + 1_500
  while (performance.now() < until) {
    assert.is(await output(runner, 'export default (i) => i', { input: 1 }), 1)
    served++
  }
  const { outcome } = await flooding
  assert.is(outcome.status, 'stopped', JSON.stringify(outcome))
  assert.ok(served > 5, `${served} were served`)
  assert.ok(lines < 3_000_000, `${lines} lines`)
})

test.run()
