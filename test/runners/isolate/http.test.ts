import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { createIsolateRunner } from '../../../runners/isolate/index.ts'
import { call, output, run, sleep } from './support.ts'

const handler = (body: string, before = '') =>
  `${before}\nexport default { async fetch(request, env, ctx) { ${body} } }`
const bytes = (text: string) => new TextEncoder().encode(text)
async function* pieces(...list: (string | number)[]) {
  for (const piece of list) {
    if (typeof piece === 'number') await sleep(piece)
    else yield bytes(piece)
  }
}

test('a fetch handler sees the request, and its response comes back with the outcome', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const code = handler(`return Response.json({
      method: request.method, url: request.url, header: request.headers.get('x-a'), text: await request.text(),
      env, id: typeof ctx.id, aborted: request.signal.aborted, isRequest: request instanceof Request,
    }, { status: 201, headers: { 'x-b': 'c' } })`)
  for (const [body, text] of [
    [bytes('héllo'), 'héllo'],
    [pieces('hé', 5, 'llo'), 'héllo'],
    [null, ''],
  ] as const) {
    const { response, ...rest } = await call(runner, code, {
      request: {
        method: body === null ? 'GET' : 'POST',
        url: 'https://example.test/path?q=1',
        headers: [['x-a', 'b']],
        body,
      },
      env: { MODE: 'test' },
    })
    assert.is(rest.outcome.status, 'completed', JSON.stringify(rest.outcome))
    assert.is(rest.streamed, false)
    assert.is(response?.status, 201)
    assert.equal(
      response?.headers.filter(([name]: [string, string]) => ['x-b', 'content-type'].includes(name)).sort(),
      [
        ['content-type', 'application/json'],
        ['x-b', 'c'],
      ],
    )
    assert.equal(JSON.parse(rest.text), {
      method: body === null ? 'GET' : 'POST',
      url: 'https://example.test/path?q=1',
      header: 'b',
      text,
      env: { MODE: 'test' },
      id: 'string',
      aborted: false,
      isRequest: true,
    })
  }
})

test('an object with a fetch method, as Hono’s app is, is a handler with its receiver', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const code = `class App { answer = 'from the app'; fetch() { return new Response(this.answer) } }
    export default new App()`
  assert.is((await call(runner, code)).text, 'from the app')
})

test('Request and Response are made ready before a module that mentions them does anything', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const poison = `for (const name of ['defineProperty', 'defineProperties', 'assign', 'entries'])
    Object[name] = () => { throw new Error('poisoned') }`
  const { outcome, text } = await call(runner, handler(`return Response.json(request.method)`, poison))
  assert.is(outcome.status, 'completed', JSON.stringify(outcome))
  assert.is(text, '"GET"')
})

test('binary bodies pass unharmed both ways', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const body = Uint8Array.from({ length: 1_000 }, (_, i) => (i * 7) % 256)
  const code = handler('return new Response(await request.arrayBuffer())')
  const { outcome } = await call(runner, code, { request: { method: 'POST', body } })
  assert.equal(outcome.status === 'completed' && [...outcome.response!.body], [...body])
})

test('large bodies are streamed both ways, whole or piece by piece', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const large = 'x'.repeat(3_000_000)
  for (const body of [bytes(large), pieces(...Array.from({ length: 30 }, () => 'x'.repeat(100_000)))])
    for (const code of [
      handler('return new Response(await request.text())'),
      handler('return new Response(request.body)'),
    ]) {
      const answered = await call(runner, code, {
        request: { method: 'POST', body: body instanceof Uint8Array ? body : pieces(large) },
      })
      assert.is(answered.outcome.status, 'completed', JSON.stringify(answered.outcome))
      assert.is(answered.streamed, true)
      assert.is(answered.ended, 'end')
      assert.ok(answered.text === large, `${answered.text.length}`)
    }
})

test('events are delivered while the handler goes on', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const code = handler(`
    const encoder = new TextEncoder()
    let n = 0
    return new Response(new ReadableStream({
      async pull(controller) {
        if (n === 3) return controller.close()
        controller.enqueue(encoder.encode('data: ' + n++ + '\\n\\n'))
        await new Promise((resolve) => setTimeout(resolve, 60))
      },
    }), { headers: { 'content-type': 'text/event-stream' } })`)
  const at: number[] = []
  const { text, response, ended } = await call(runner, code, {
    onPiece: () => void at.push(performance.now()),
  })
  assert.is(text, 'data: 0\n\ndata: 1\n\ndata: 2\n\n')
  assert.equal(response?.headers, [['content-type', 'text/event-stream']])
  assert.is(ended, 'end')
  assert.ok(at.at(-1)! - at[0]! > 50)
})

test('a slow reader stops the producer', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const code = handler(`
    let made = 0
    return new Response(new ReadableStream({
      pull(controller) {
        made += 16384
        controller.enqueue(new Uint8Array(16384))
        console.log(made)
        if (made >= 8_000_000) controller.close()
      },
    }))`)
  let open = () => {}
  const gate = new Promise<void>((resolve) => {
    open = resolve
  })
  let first = true
  const answering = call(runner, code, {
    onPiece: async () => {
      if (first) {
        first = false
        await gate
      }
    },
  })
  await sleep(700)
  const { lines, text } = await (async () => {
    const seen = Date.now()
    open()
    const done = await answering
    return { ...done, lines: done.lines.filter((line) => Date.parse(line.time) < seen) }
  })()
  const made = Number(lines.at(-1)?.text)
  assert.ok(made > 0 && made < 1_000_000, `${made} bytes were made for a reader that took one piece`)
  assert.ok(text.length >= 8_000_000)
})

test('a request’s body is read no faster than the handler takes it', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  let read = 0
  async function* endless() {
    for (;;) {
      read += 10_000
      yield new Uint8Array(10_000)
    }
  }
  const code = handler(`
    const reader = request.body.getReader()
    await reader.read()
    await new Promise((resolve) => setTimeout(resolve, 300))
    return new Response('enough')`)
  const { text } = await call(runner, code, { request: { method: 'POST', body: endless() } })
  assert.is(text, 'enough')
  assert.ok(read < 1_000_000, `${read}`)
})

test('a request whose body breaks off fails where it is read', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  async function* broken() {
    yield bytes('some')
    await sleep(20)
    throw new Error('the client went away')
  }
  const code = handler(
    'try { await request.text() } catch (error) { return new Response("broke: " + error.message) }',
  )
  const { text } = await call(runner, code, { request: { method: 'POST', body: broken() } })
  assert.match(text, /broke: .*the client went away/)
})

test('request.signal aborts when the caller is gone, and the call goes on', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const gone = new AbortController()
  const code = handler(`
    console.log('waiting')
    await new Promise((resolve) => request.signal.addEventListener('abort', resolve))
    console.log('gone', request.signal.aborted, ctx.signal.aborted)
    return new Response('for nobody')`)
  setTimeout(() => gone.abort(), 150)
  const { outcome, lines } = await call(runner, code, { request: { gone: gone.signal } })
  assert.is(outcome.status, 'completed')
  assert.equal(
    lines.map((line) => line.text),
    ['waiting', 'gone true false'],
  )
})

test('request.signal that is first looked at when the caller is gone is aborted', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const gone = new AbortController()
  const code = handler(`
    await new Promise((resolve) => setTimeout(resolve, 300))
    return new Response(String([request.signal.aborted, request.signal.reason.name, ctx.signal.aborted]))`)
  setTimeout(() => gone.abort(), 150)
  const { text } = await call(runner, code, { request: { gone: gone.signal } })
  assert.is(text, 'true,AbortError,false')
})

test('a response that nobody takes any more is cancelled, and the call ends well', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const code = handler(`
    return new Response(new ReadableStream({
      async pull(controller) {
        await new Promise((resolve) => setTimeout(resolve, 5))
        controller.enqueue(new Uint8Array(100))
      },
      cancel() { console.log('cancelled') },
    }))`)
  const { outcome, lines } = await call(runner, code, {
    onPiece: () => {
      throw new Error('the client went away')
    },
  })
  assert.is(outcome.status, 'completed', JSON.stringify(outcome))
  assert.is(lines.at(-1)?.text, 'cancelled')
})

test('a stopped call fails its response, and its signals abort', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const code = handler(`
    request.signal.addEventListener('abort', () => console.log('request', request.signal.reason.name))
    ctx.signal.addEventListener('abort', () => console.log('ctx'))
    return new Response(new ReadableStream({ start(c) { c.enqueue(new Uint8Array(10)) } }))`)
  const { outcome, ended, lines } = await call(runner, code, { timeoutMs: 300 })
  assert.is(outcome.status, 'stopped')
  assert.is(ended, 'fail')
  assert.equal(lines.map((line) => line.text).sort(), ['ctx', 'request AbortError'])
})

for (const size of [200_000, 3_000_000])
  test(`a reader that takes nothing does not hold a stopped call (${size} bytes)`, async () => {
    await using runner = await createIsolateRunner({ min: 1, max: 1 })
    const code = handler(`return new Response('x'.repeat(${size}))`)
    const { outcome, ended, ms } = await call(runner, code, {
      timeoutMs: 300,
      onPiece: () => new Promise(() => {}),
    })
    assert.is(outcome.status, 'stopped')
    assert.is(ended, 'fail')
    assert.ok(ms < 2_000, `${ms}`)
    assert.is(await output(runner, 'export default () => "next"'), 'next')
  })

test('a child works for others while its response is on its way to a slow reader', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  let open = () => {}
  const gate = new Promise<void>((resolve) => {
    open = resolve
  })
  const slow = call(runner, handler(`return new Response('x'.repeat(200_000))`), { onPiece: () => gate })
  await sleep(200)
  assert.is(await output(runner, 'export default () => "next"'), 'next')
  open()
  const { outcome, text } = await slow
  assert.is(outcome.status, 'completed')
  assert.is(text.length, 200_000)
})

test('a stream that errs after its head fails the response and the call', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const code = handler(`
    let n = 0
    return new Response(new ReadableStream({
      pull(controller) { if (n++ === 0) controller.enqueue(new Uint8Array(10)); else throw new Error('broke') },
    }))`)
  const { outcome, ended } = await call(runner, code)
  assert.is(outcome.status === 'failed' && outcome.error.message, 'broke')
  assert.is(ended, 'fail')
})

test('waitUntil holds the end of the call, not the response', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const code = handler(`
    ctx.waitUntil(new Promise((resolve) => setTimeout(resolve, 200)).then(() => console.log('after')))
    ctx.waitUntil(Promise.reject(new Error('on its own')))
    return new Response('at once')`)
  let answeredAt = 0
  const started = performance.now()
  const { outcome, text, lines } = await call(runner, code, {
    onPiece: () => {
      answeredAt = performance.now()
    },
  })
  const ended = performance.now()
  assert.is(outcome.status, 'completed')
  assert.is(text, 'at once')
  assert.ok(ended - started >= 195)
  assert.ok(ended - answeredAt > 100, `${ended - answeredAt}`)
  assert.match(lines[0]?.text ?? '', /^waitUntil: Error: on its own/)
  assert.is(lines[1]?.text, 'after')
})

test('what a handler throws, and what is no response, fails the call', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const message = async (body: string) => {
    const { outcome } = await call(runner, handler(body))
    if (outcome.status !== 'failed') throw new Error(JSON.stringify(outcome))
    assert.is(outcome.cause, 'user_error')
    return outcome.error.message
  }
  assert.is(await message('throw new Error("boom")'), 'boom')
  assert.match(await message('return "text"'), /Response/)
  assert.match(await message('const r = new Response("x"); await r.text(); return r'), /TypeError/)
  const { outcome } = await call(runner, 'export default 5')
  assert.is(outcome.status === 'failed' && outcome.cause, 'invalid_workload')
})

test('a JSON handler is called by HTTP with its body or query, and answers JSON', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const code = 'export default (input) => ({ got: input === undefined ? "nothing" : input })'
  const ask = (request: object) => call(runner, code, { request })
  const json = await ask({ method: 'POST', body: bytes('{"a":[1]}') })
  assert.equal(JSON.parse(json.text), { got: { a: [1] } })
  assert.is(json.response?.status, 200)
  assert.equal(json.response?.headers, [['content-type', 'application/json']])
  assert.equal(JSON.parse((await ask({ method: 'POST', body: pieces('{"a"', ':2}') })).text), {
    got: { a: 2 },
  })
  assert.equal(JSON.parse((await ask({ url: 'http://x.test/p?a=1&b=2&b=3' })).text), {
    got: { a: '1', b: ['2', '3'] },
  })
  assert.equal(JSON.parse((await ask({ method: 'POST' })).text), { got: 'nothing' })
  const bad = await ask({ method: 'POST', body: bytes('{') })
  assert.is(bad.response?.status, 400)
  assert.match(bad.text, /not JSON/)
  const { outcome } = await call(runner, 'export default () => { throw new Error("x") }')
  assert.is(outcome.status === 'failed' && outcome.cause, 'user_error')
})

test('a fetch handler is invoked with JSON as with a POST of it', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const code = handler(`const input = await request.json()
    if (input.fail) return new Response('no such thing', { status: 404 })
    return input.text ? new Response('plain') : Response.json({ got: input, method: request.method })`)
  assert.equal(await output(runner, code, { input: { a: 1 } }), { got: { a: 1 }, method: 'POST' })
  assert.is(await output(runner, code, { input: { text: true } }), 'plain')
  const { outcome } = await run(runner, code, { input: { fail: true } })
  assert.is(
    outcome.status === 'failed' && outcome.error.message,
    'the fetch handler answered 404: no such thing',
  )
})

test('node: modules can be imported, with and without the prefix, and nothing else can', async () => {
  await using runner = await createIsolateRunner({ min: 1 })
  const code = `import { Buffer } from 'node:buffer'
    import EventEmitter, { once } from 'events'
    import * as path from 'node:path'
    import { AsyncLocalStorage } from 'node:async_hooks'
    export default () => [Buffer.from('hi').toString('hex'), typeof EventEmitter, typeof once, path.join('a', '..', 'b'), typeof AsyncLocalStorage]`
  assert.equal(await output(runner, code), ['6869', 'function', 'function', 'b', 'function'])
  for (const name of ['node:fs', 'vulcan:hook', './x.js', 'child_process', 'https://x.test/y.js']) {
    const { outcome } = await run(runner, `import ${JSON.stringify(name)}; export default () => 1`)
    assert.is(outcome.status === 'failed' && outcome.cause, 'invalid_workload', name)
  }
  const { outcome } = await run(runner, 'export default async () => { await import("node:fs") }')
  assert.match(JSON.stringify(outcome), /import\(\)/)
})

test.run()
