import { randomBytes } from 'node:crypto'
import { connect } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { HttpRequest } from '../../runners/runner.ts'
import { isEnd } from '../../shared/events.ts'
import { Registry } from '../../shared/registry.ts'
import { EVENTS } from '../../shared/topology.ts'
import { type Code, completed, failed, startWorker, untilStopped } from '../runners/support.ts'
import { history, kindsOf, until } from '../shared/support.ts'
import { deploy, drain, fetchRaw, open, read, responded, versionId } from './functions.ts'
import { call, post, site, startDispatcher } from './support.ts'

const header = (request: HttpRequest, name: string) =>
  request.headers.filter(([one]) => one === name).map(([, value]) => value)

/** Answers with what was asked. */
const echo: Code = async ({ http, env }) =>
  responded(
    200,
    JSON.stringify({
      method: http!.method,
      url: http!.url,
      headers: http!.headers,
      body: (await drain(http!.body)).toString(),
      env,
    }),
    [['content-type', 'application/json']],
  )

test('every method reaches the function, with path, query and body, and its answer comes back', async () => {
  await using here = await site({ code: echo })
  const version = await deploy(here.gateway, 'hello', { spec: { env: { MODE: 'x' } } })
  for (const method of ['GET', 'POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS', 'PURGE']) {
    const body = method === 'GET' || method === 'OPTIONS' ? undefined : `body of ${method}`
    const answer = await fetchRaw(here.gateway, '/fn/hello/a/b%20c?x=1&x=2', {
      method,
      ...(body === undefined ? {} : { body, headers: { 'content-length': Buffer.byteLength(body) } }),
    })
    assert.is(answer.status, 200, method)
    const seen = JSON.parse(answer.body.toString())
    assert.is(seen.method, method)
    assert.is(seen.url, `${here.gateway.url}/a/b%20c?x=1&x=2`)
    assert.is(seen.body, body ?? '')
    assert.equal(seen.env, { MODE: 'x' })
    assert.is(answer.headers['x-vulcan-version'], version.version)
    assert.match(answer.headers.traceparent as string, /^00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]$/)
    const workload = await here.gateway.bus.lastEvent(answer.headers['x-vulcan-workload-id'] as string)
    assert.is(workload?.event.type, 'vulcan.workload.completed')
  }
  const head = await fetchRaw(here.gateway, '/fn/hello', { method: 'HEAD' })
  assert.is(head.status, 200)
  assert.is(head.body.byteLength, 0)
  assert.is(here.worker.runner.ran.at(-1)!.http!.method, 'HEAD')
  assert.is(here.worker.runner.ran.at(-1)!.http!.url, `${here.gateway.url}/`)
  assert.equal(here.worker.runner.ran[0]!.function, {
    name: 'hello',
    version: version.version,
    ref: 'latest',
  })
})

test('headers pass both ways, but for those of the connection and of the platform', async () => {
  await using here = await site({
    code: ({ http }) =>
      responded(418, 'short', [
        ['set-cookie', 'a=1'],
        ['set-cookie', 'b=2; HttpOnly'],
        ['connection', 'x-hop'],
        ['x-hop', 'no'],
        ['keep-alive', 'timeout=1'],
        ['x-vulcan-version', 'forged'],
        ['content-length', '9999'],
        ['x-echo', header(http!, 'x-mine').join('|')],
      ]),
  })
  await deploy(here.gateway, 'hello')
  const answer = await fetchRaw(here.gateway, '/fn/hello/', {
    headers: {
      'X-Mine': ['1', '2'],
      connection: 'keep-alive, x-hop',
      'x-hop': 'mine',
      te: 'trailers',
      upgrade: 'h2c',
      'x-vulcan-gateway': 'forged',
      'x-forwarded-for': '192.0.2.1',
      'x-forwarded-proto': 'https',
      cookie: 'session=s3cr3t',
      authorization: 'Bearer s3cr3t',
      traceparent: '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01',
    },
  })
  assert.is(answer.status, 418)
  assert.is(answer.body.toString(), 'short')
  assert.equal(answer.headers['set-cookie'], ['a=1', 'b=2; HttpOnly'])
  assert.is(answer.headers['x-echo'], '1|2')
  assert.is(answer.headers['x-hop'], undefined)
  assert.is(answer.headers['content-length'], '5')
  assert.is(answer.headers['x-vulcan-version'], versionId(1))
  assert.match(answer.headers.traceparent as string, '0af7651916cd43dd8448eb211c80319c')
  const seen = here.worker.runner.ran[0]!.http!
  assert.equal(header(seen, 'cookie'), ['session=s3cr3t'])
  assert.equal(header(seen, 'authorization'), ['Bearer s3cr3t'])
  assert.equal(header(seen, 'x-forwarded-for'), ['192.0.2.1, 127.0.0.1'])
  assert.equal(header(seen, 'x-forwarded-proto'), ['https'])
  assert.is(header(seen, 'traceparent').length, 1)
  assert.match(header(seen, 'traceparent')[0]!, '0af7651916cd43dd8448eb211c80319c')
  for (const name of ['x-hop', 'connection', 'te', 'upgrade', 'x-vulcan-gateway'])
    assert.equal(header(seen, name), [], name)
})

test('binary bodies come through unchanged, both ways', async () => {
  await using here = await site({ code: async ({ http }) => responded(200, await drain(http!.body)) })
  await deploy(here.gateway, 'mirror')
  const samples = [Buffer.from([0]), Buffer.from('\ufeffbom'), Buffer.alloc(60_000, 1), randomBytes(60_000)]
  for (const body of samples) {
    const answer = await fetchRaw(here.gateway, '/fn/mirror', { method: 'POST', body })
    assert.ok(answer.body.equals(body), `${body.byteLength} bytes`)
  }
})

test('a body of a quarter MiB of control characters is kept with the event', async () => {
  await using here = await site({
    code: async ({ http }) => responded(200, String((await drain(http!.body)).length)),
  })
  await deploy(here.gateway, 'count')
  const body = Buffer.alloc(256 * 1024, 1)
  const answer = await fetchRaw(here.gateway, '/fn/count', {
    method: 'POST',
    body,
    headers: { 'content-length': body.length },
  })
  assert.is(answer.body.toString(), String(body.length))
})

test('20 MB up and 20 MB down are streamed, each held back by its reader', async () => {
  const size = 20 * 1_000_000
  let sent = 0
  await using here = await site({
    code: async ({ http }, _signal, _log, respond) => {
      let seen = 0
      for await (const part of http!.body as AsyncIterable<Uint8Array>) seen += part.byteLength
      const sink = respond({ status: 201, headers: [['x-seen', String(seen)]] })
      for (; sent < size; sent += 100_000) await sink.write(Buffer.alloc(100_000, sent / 100_000))
      sink.end()
      return completed()
    },
  })
  await deploy(here.gateway, 'pipe')
  async function* upload() {
    for (let i = 0; i < 200; i++) yield Buffer.alloc(100_000, i)
  }
  const response = await open(here.gateway, '/fn/pipe', { method: 'PUT', body: upload() })
  assert.is(response.statusCode, 201)
  assert.is(response.headers['x-seen'], String(size))
  // Nobody reads: what is under way fills the window and the sockets, and no more is taken.
  let before = -1
  await until('the writer to stand still', async () => {
    before = sent
    await delay(500)
    return before === sent && sent > 500_000 ? true : undefined
  })
  assert.ok(sent < 16_000_000, `${sent} bytes were taken though nobody read`)
  let got = 0
  for await (const part of response) {
    const bytes = part as Buffer
    assert.is(bytes[0], Math.floor(got / 100_000) % 256)
    got += bytes.byteLength
  }
  assert.is(got, size)
})

test('an upload waits for the function that reads it', async () => {
  const gate = Promise.withResolvers<void>()
  await using here = await site({
    code: async ({ http }) => {
      const body = (http!.body as AsyncIterable<Uint8Array>)[Symbol.asyncIterator]()
      await body.next()
      await gate.promise
      let chunks = 1
      while (!(await body.next()).done) chunks++
      return responded(200, String(chunks))
    },
  })
  await deploy(here.gateway, 'slow')
  let produced = 0
  async function* upload() {
    for (; produced < 300; produced++) yield Buffer.alloc(100_000)
  }
  const answering = open(here.gateway, '/fn/slow', { method: 'POST', body: upload() })
  let before = -1
  await until('the upload to stand still', async () => {
    before = produced
    await delay(500)
    return before === produced && produced > 0 ? true : undefined
  })
  assert.ok(produced < 250, `${produced} pieces were taken though one was read`)
  gate.resolve()
  const answer = await read(await answering)
  assert.is(answer.status, 200)
  assert.ok(Number(answer.body) >= 300)
})

test('a function may answer without reading its request, or only its beginning', async () => {
  await using here = await site({
    code: async ({ http }) => {
      if (http!.url.endsWith('/some'))
        for await (const part of http!.body as AsyncIterable<Uint8Array>) {
          if (part.byteLength > 0) break
        }
      return responded(413, 'too much')
    },
  })
  await deploy(here.gateway, 'early')
  async function* upload() {
    for (let i = 0; i < 40; i++) yield Buffer.alloc(100_000)
  }
  for (const path of ['/none', '/some'])
    for (let i = 0; i < 5; i++) {
      const answer = await fetchRaw(here.gateway, `/fn/early${path}`, { method: 'POST', body: upload() })
      assert.is(answer.status, 413)
      assert.is(answer.body.toString(), 'too much')
    }
})

test('a caller who breaks its upload off ends the body as broken', async () => {
  const ended = Promise.withResolvers<string>()
  await using here = await site({
    code: async ({ http }) => {
      await drain(http!.body).catch((error) => ended.resolve(error.message))
      return responded(200)
    },
  })
  await deploy(here.gateway, 'broken')
  const stop = new AbortController()
  async function* upload() {
    yield Buffer.alloc(100_000)
    await until('it runs', () => here.worker.runner.ran.length === 1 || undefined)
    stop.abort()
    await delay(10_000, undefined, { ref: false })
  }
  const body = ReadableStream.from(upload())
  await fetch(`${here.gateway.url}/fn/broken`, {
    method: 'POST',
    body,
    duplex: 'half',
    signal: stop.signal,
  } as RequestInit).catch(() => {})
  assert.match(await ended.promise, /gone|broke/)
})

test('server-sent events arrive one by one, while the function runs', async () => {
  const next = Promise.withResolvers<void>()
  await using here = await site({
    code: async (_job, _signal, _log, respond) => {
      const sink = respond({ status: 200, headers: [['content-type', 'text/event-stream']] })
      await sink.write(Buffer.from('data: 1\n\n'))
      await next.promise
      await sink.write(Buffer.from('data: 2\n\n'))
      sink.end()
      return completed()
    },
  })
  await deploy(here.gateway, 'events')
  const response = await open(here.gateway, '/fn/events')
  assert.is(response.headers['content-type'], 'text/event-stream')
  const parts = response[Symbol.asyncIterator]()
  assert.is(String((await parts.next()).value), 'data: 1\n\n')
  next.resolve()
  assert.is(String((await parts.next()).value), 'data: 2\n\n')
  assert.is((await parts.next()).done, true)
  const id = response.headers['x-vulcan-workload-id'] as string
  const end = await until('the end', async () => {
    const last = await here.gateway.bus.lastEvent(id)
    return last?.event.type === 'vulcan.workload.completed' ? last.event : undefined
  })
  assert.equal(end.data.response, {
    status: 200,
    headers: [['content-type', 'text/event-stream']],
    sealed: null,
    body: 'live',
  })
})

test('a caller who goes away aborts the request and breaks the response off, and the function ends by itself', async () => {
  const written = Promise.withResolvers<string>()
  await using here = await site({
    code: async ({ http }, _signal, _log, respond) => {
      const sink = respond({ status: 200, headers: [] })
      await sink.write(Buffer.from('first'))
      await new Promise((resolve) => http!.gone.addEventListener('abort', resolve))
      await sink.write(Buffer.from('more')).catch((error) => written.resolve(error.message))
      return completed()
    },
  })
  await deploy(here.gateway, 'gone')
  const response = await open(here.gateway, '/fn/gone')
  const id = response.headers['x-vulcan-workload-id'] as string
  response.destroy()
  assert.match(await written.promise, 'gone')
  await until(
    'the end',
    async () =>
      (await here.gateway.bus.lastEvent(id))?.event.type === 'vulcan.workload.completed' || undefined,
  )
  await until(
    'nothing left over',
    () => (here.gateway.waits.size === 0 && here.gateway.exchanges.size === 0) || undefined,
  )
})

test('a caller who goes away while its call is queued is told of once it runs', async () => {
  const free = Promise.withResolvers<void>()
  const gone = Promise.withResolvers<void>()
  await using here = await site({
    slots: 1,
    code: async ({ http }) => {
      if (http === undefined) await free.promise
      else if (http.gone.aborted) gone.resolve()
      else http.gone.addEventListener('abort', () => gone.resolve())
      if (http !== undefined) await gone.promise
      return responded(200)
    },
  })
  await deploy(here.gateway, 'queued')
  await post(here.gateway, { code: 'x' }, {}, '/v1/workloads/async')
  await until('the slot to be taken', () => here.worker.runner.ran.length === 1 || undefined)
  const stop = new AbortController()
  const calling = fetch(`${here.gateway.url}/fn/queued`, { signal: stop.signal }).catch(() => {})
  await until('the call', () => here.gateway.exchanges.size === 1 || undefined)
  await delay(200)
  stop.abort()
  await calling
  free.resolve()
  await gone.promise
})

test('a runner that is lost in the middle of a response breaks the connection off', async () => {
  await using here = await site({
    ackWaitMs: 1_000,
    code: async (_job, signal, _log, respond) => {
      const sink = respond({ status: 200, headers: [] })
      await sink.write(Buffer.from('half'))
      return await untilStopped(signal)
    },
  })
  await deploy(here.gateway, 'lost', { spec: { retry: { max_attempts: 1 } } })
  const response = await open(here.gateway, '/fn/lost')
  await here.worker.die()
  await using second = await startWorker(here.on, () => completed())
  let error: unknown
  await read(response).catch((cause) => {
    error = cause
  })
  assert.ok(error !== undefined, 'the response looked whole')
  assert.is(second.runner.ran.length, 0)
})

test('a broker that goes away in the middle of a response breaks it off, and the workload still ends', async () => {
  let writing = true
  await using here = await site({
    code: async (_job, _signal, _log, respond) => {
      const sink = respond({ status: 200, headers: [] })
      try {
        for (let i = 0; writing; i++) {
          await sink.write(Buffer.from(`${i},`))
          await delay(20)
        }
        sink.end()
      } catch (error) {
        return failed('user_error', (error as Error).message)
      }
      return completed()
    },
  })
  await deploy(here.gateway, 'cut')
  const response = await open(here.gateway, '/fn/cut')
  const reading = read(response).then(
    () => 'whole',
    () => 'broken',
  )
  await here.on.nats.restart()
  assert.is(await reading, 'broken')
  writing = false
  const id = response.headers['x-vulcan-workload-id'] as string
  await until('the end', async () => {
    const last = await here.on.bus.lastEvent(id).catch(() => undefined)
    return last !== undefined && isEnd(last.event) ? true : undefined
  })
})

test('a retry before anything was sent starts again; after that it breaks the connection off', async () => {
  await using here = await site({
    code: async ({ attempt, http }, _signal, _log, respond) => {
      const late = http!.url.endsWith('/late')
      if (late) await respond({ status: 200, headers: [] }).write(Buffer.from(`attempt ${attempt}`))
      return attempt === 1 ? failed('internal') : responded(200, `attempt ${attempt}`)
    },
  })
  await deploy(here.gateway, 'again', { spec: { retry: { max_attempts: 3, backoff: 'none' } } })
  const answer = await fetchRaw(here.gateway, '/fn/again/early')
  assert.is(answer.body.toString(), 'attempt 2')
  const response = await open(here.gateway, '/fn/again/late')
  const broken = await read(response).then(
    () => false,
    () => true,
  )
  assert.ok(broken, 'a response that was begun anew looked whole')
})

test('a call answered later keeps request and response, small or large', async () => {
  const large = randomBytes(400_000)
  await using here = await site({
    code: async ({ http }, _signal, _log, respond) => {
      const body = await drain(http!.body)
      if (body.byteLength < 1_000)
        return responded(202, body, [
          ['set-cookie', 'a=1'],
          ['x-mine', '1'],
        ])
      const sink = respond({ status: 200, headers: [['content-type', 'image/png']] })
      for (let at = 0; at < body.byteLength; at += 50_000) await sink.write(body.subarray(at, at + 50_000))
      sink.end()
      return completed()
    },
  })
  await deploy(here.gateway, 'later')
  for (const [body, status] of [
    [Buffer.from('small'), 202],
    [large, 200],
  ] as const) {
    const accepted = await fetchRaw(here.gateway, '/fn/later/x?y', {
      method: 'POST',
      body,
      headers: { prefer: 'respond-async', 'content-length': body.length },
    })
    assert.is(accepted.status, 202)
    assert.is(accepted.headers['preference-applied'], 'respond-async')
    const workload = JSON.parse(accepted.body.toString())
    assert.is(accepted.headers.location, `/v1/workloads/${workload.id}`)
    assert.is(workload.status, 'pending')
    assert.equal(workload.http, { method: 'POST', path: '/fn/later/x', status: null })
    const answer = await until('the response', async () => {
      const found = await fetchRaw(here.gateway, `/v1/workloads/${workload.id}/response`)
      if (found.status !== 404) return found
      assert.is(JSON.parse(found.body.toString()).code, 'response_not_found')
      return undefined
    })
    assert.is(answer.status, status)
    assert.ok(answer.body.equals(body))
    if (status === 202) assert.equal(answer.headers['set-cookie'], ['a=1'])
    else assert.is(answer.headers['content-type'], 'image/png')
  }
})

test('with respond-async a key stands for one workload, and a wait for its answer', async () => {
  await using here = await site({ code: async ({ http }) => responded(200, await drain(http!.body)) })
  await deploy(here.gateway, 'once')
  const send = (body: string, prefer: string) =>
    fetchRaw(here.gateway, '/fn/once', {
      method: 'POST',
      body,
      headers: { prefer, 'idempotency-key': 'k', 'content-length': body.length },
    })
  const first = await send('a', 'respond-async, wait=20')
  assert.is(first.status, 200)
  assert.is(first.body.toString(), 'a')
  const again = await send('a', 'respond-async')
  assert.is(again.status, 202)
  assert.is(again.headers['x-vulcan-workload-id'], first.headers['x-vulcan-workload-id'])
  assert.is(again.headers['idempotency-replayed'], 'true')
  const other = await send('b', 'respond-async')
  assert.is(other.status, 409)
  assert.is(here.worker.runner.ran.length, 1)
  assert.is((await send('a', 'Respond-Async')).status, 202)
  for (const prefer of ['respond-asynchronously', 'x="respond-async"', 'wait=1']) {
    const now = await send('now', prefer)
    assert.is(now.status, 200, prefer)
    assert.is(now.body.toString(), 'now')
  }
})

test('why a response cannot be fetched is said', async () => {
  await using here = await site({
    code: async ({ http, input }, _signal, _log, respond) => {
      if (http === undefined) return completed(input ?? null)
      respond({ status: 200, headers: [] }).end()
      return completed()
    },
  })
  await deploy(here.gateway, 'why')
  const live = await fetchRaw(here.gateway, '/fn/why')
  await until(
    'its end',
    async () =>
      (await history(here.gateway.bus, live.headers['x-vulcan-workload-id'] as string)).length === 3 ||
      undefined,
  )
  const plain = await post(here.gateway, { code: 'x' })
  for (const [id, why] of [
    [live.headers['x-vulcan-workload-id'], 'respond-async'],
    [plain.body.id, 'without a response'],
  ]) {
    const answer = await call(here.gateway, 'GET', `/v1/workloads/${id}/response`)
    assert.is(answer.status, 404)
    assert.is(answer.body.code, 'response_not_found')
    assert.match(answer.body.detail, why)
  }
})

test('a function that fails before it answers is a problem that names cause and workload, not what the code said', async () => {
  await using here = await site({
    code: ({ http }, signal) => {
      const cause = http!.url.slice(http!.url.lastIndexOf('/') + 1)
      if (cause === 'timeout' || cause === 'killed') return untilStopped(signal)
      if (cause === 'nothing') return completed()
      if (cause === 'header') return responded(200, '', [['x-bad', 'a\nb']])
      return failed(cause as 'oom', 'private words')
    },
  })
  await deploy(here.gateway, 'bad', { spec: { limits: { timeout_s: 1 }, retry: { max_attempts: 1 } } })
  for (const [cause, status, code] of [
    ['user_error', 502, 'invocation_failed'],
    ['oom', 502, 'invocation_failed'],
    ['egress_denied', 502, 'invocation_failed'],
    ['backend_unavailable', 503, 'invocation_stopped'],
    ['timeout', 504, 'invocation_timeout'],
    ['nothing', 502, 'invocation_failed'],
    ['header', 502, 'invocation_failed'],
  ] as const) {
    const answer = await fetchRaw(here.gateway, `/fn/bad/${cause}`)
    assert.is(answer.status, status, cause)
    assert.is(answer.headers['content-type'], 'application/problem+json')
    const problem = JSON.parse(answer.body.toString())
    assert.is(problem.code, code)
    const id = answer.headers['x-vulcan-workload-id'] as string
    assert.match(problem.detail, id)
    assert.not.match(problem.detail, 'private')
    assert.is(answer.headers['retry-after'], status === 503 ? '1' : undefined)
  }
  const headers = { prefer: 'respond-async, wait=20' }
  const unfit = await fetchRaw(here.gateway, '/fn/bad/header', { headers })
  assert.is(unfit.status, 502)
  assert.match(unfit.body.toString(), 'cannot be sent')
  const list = JSON.parse(unfit.body.toString()).detail as string
  const [unfitId] = /[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/.exec(list)!
  assert.is((await call(here.gateway, 'GET', `/v1/workloads/${unfitId}/response`)).status, 502)
  const killed = fetchRaw(here.gateway, '/fn/bad/killed')
  const running = await until('it runs', () =>
    here.worker.runner.ran.find(({ http }) => http!.url.endsWith('/killed')),
  )
  await call(here.gateway, 'POST', `/v1/workloads/${running.id}/kill`)
  assert.is((await killed).status, 503)
})

test('what is no call is refused: no function, deleted, no such version or alias, a WebSocket', async () => {
  await using here = await site({ code: echo })
  await deploy(here.gateway, 'here')
  await deploy(here.gateway, 'was')
  const { record, revision } = here.gateway.registry.get('was')!
  await here.gateway.registry.put({ ...record, deleted_at: new Date().toISOString() }, revision)
  for (const [path, code] of [
    ['/fn/none/', 'function_not_found'],
    ['/fn/was/', 'function_not_found'],
    [`/fn/here@${versionId(9)}/`, 'version_not_found'],
    ['/fn/here@beta/', 'alias_not_found'],
    ['/fn/%zz', 'function_not_found'],
  ]) {
    const answer = await call(here.gateway, 'GET', path!)
    assert.is(answer.status, 404, path)
    assert.is(answer.body.code, code)
  }
  assert.is((await fetchRaw(here.gateway, `/fn/here@${versionId(1)}`)).status, 200)
  const absolute = connect(Number(new URL(here.gateway.url).port), '127.0.0.1')
  absolute.write(`GET ${here.gateway.url}/fn/here/x HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n`)
  let text = ''
  for await (const part of absolute) text += part
  assert.match(text, 'HTTP/1.1 200 ')
  assert.match(text, `"url":"${here.gateway.url}/x"`)
  for (const host of ['1.2.3.999', 'xn--a-.999']) {
    const odd = await fetchRaw(here.gateway, '/fn/here', { headers: { host } })
    assert.is(odd.status, 400, host)
    assert.is(JSON.parse(odd.body.toString()).code, 'invalid_header')
  }
  const upgrade = await fetchRaw(here.gateway, '/fn/here', {
    headers: { connection: 'Upgrade', upgrade: 'websocket' },
  })
  assert.is(upgrade.status, 501)
  assert.is(JSON.parse(upgrade.body.toString()).code, 'upgrade_unsupported')
})

test('a split by weight sends about nine of ten calls one way', async () => {
  await using here = await site({ slots: 64, code: (job) => responded(200, job.function!.version) })
  await deploy(here.gateway, 'split', { version: 1 })
  await deploy(here.gateway, 'split', {
    version: 2,
    aliases: { live: { weights: { [versionId(1)]: 90, [versionId(2)]: 10 } } },
  })
  const counts: Record<string, number> = {}
  const worker = async () => {
    for (let i = 0; i < 50; i++) {
      const body = await (await fetch(`${here.gateway.url}/fn/split`)).text()
      counts[body] = (counts[body] ?? 0) + 1
    }
  }
  await Promise.all(Array.from({ length: 20 }, worker))
  // 10 % of 1,000 within six standard deviations (9.5).
  assert.ok(Math.abs(counts[versionId(2)]! - 100) < 57, JSON.stringify(counts))
  assert.is(counts[versionId(1)]! + counts[versionId(2)]!, 1_000)
})

test('credentials never stand in the stored events', async () => {
  await using here = await site({
    code: () => responded(200, 'ok', [['set-cookie', 'token=answer-s3cr3t']]),
  })
  await deploy(here.gateway, 'sealed')
  const headers = {
    authorization: 'Bearer request-s3cr3t',
    cookie: 'a=cookie-s3cr3t',
    'x-api-key': 'key-s3cr3t',
    'x-open': 'plain-to-see',
  }
  for (const prefer of ['', 'respond-async, wait=20']) {
    const answer = await fetchRaw(here.gateway, '/fn/sealed', { headers: { ...headers, prefer } })
    assert.equal(answer.headers['set-cookie'], ['token=answer-s3cr3t'])
  }
  assert.equal(header(here.worker.runner.ran[0]!.http!, 'x-api-key'), ['key-s3cr3t'])
  const { state } = await here.gateway.bus.jsm.streams.info(EVENTS)
  let all = ''
  for (let seq = 1; seq <= state.last_seq; seq++)
    all += (await here.gateway.bus.jsm.streams.getMessage(EVENTS, { seq }))!.string()
  assert.match(all, 'plain-to-see')
  assert.not.match(all, 's3cr3t')
})

test('JSON invocations: the body is the input, the answer the workload', async () => {
  await using here = await site()
  const version = await deploy(here.gateway, 'json')
  const answer = await post(
    here.gateway,
    { x: 21 },
    { 'idempotency-key': 'k' },
    '/v1/functions/json/invocations',
  )
  assert.is(answer.status, 200)
  assert.equal(answer.body.output, { x: 21 })
  assert.equal(answer.body.function, { name: 'json', version: version.version, ref: 'latest' })
  assert.is(answer.body.http, null)
  const again = await post(
    here.gateway,
    { x: 21 },
    { 'idempotency-key': 'k' },
    '/v1/functions/json/invocations',
  )
  assert.is(again.body.id, answer.body.id)
  const large = { text: 'y'.repeat(700_000) }
  const big = await post(here.gateway, large, {}, `/v1/functions/json@${version.version}/invocations`)
  assert.equal(big.body.output, large)
  assert.is(big.body.function.ref, version.version)
  const later = await post(here.gateway, null, {}, '/v1/functions/json/invocations/async?ref=latest')
  assert.is(later.status, 202)
  assert.is(later.headers.get('location'), `/v1/workloads/${later.body.id}`)
  const empty = await call(here.gateway, 'POST', '/v1/functions/json/invocations')
  assert.is(empty.status, 200)
  assert.is(empty.body.output, null)
  for (const [raw, status] of [
    ['{', 400],
    ['x', 415],
  ] as const) {
    const type = status === 415 ? 'text/plain' : 'application/json'
    const refused = await call(here.gateway, 'POST', '/v1/functions/json/invocations', {
      raw,
      headers: { 'content-type': type },
    })
    assert.is(refused.status, status)
  }
  assert.is(
    (await post(here.gateway, 1, {}, '/v1/functions/none/invocations')).body.code,
    'function_not_found',
  )
})

test('an invocation runs again where its request was kept', async () => {
  await using here = await site({ code: echo })
  await deploy(here.gateway, 'repeat')
  const first = await fetchRaw(here.gateway, '/fn/repeat/x', {
    method: 'POST',
    body: 'kept',
    headers: { authorization: 'Bearer t', 'content-length': 4 },
  })
  const id = first.headers['x-vulcan-workload-id']
  const again = await call(here.gateway, 'POST', `/v1/workloads/${id}/rerun`, {
    headers: { prefer: 'wait=20' },
  })
  assert.is(again.status, 200)
  assert.equal(again.body.http, { method: 'POST', path: '/fn/repeat/x', status: 200 })
  const seen = here.worker.runner.ran[1]!.http!
  assert.equal(header(seen, 'authorization'), ['Bearer t'])
  assert.is((await drain(seen.body)).toString(), 'kept')
  const response = await fetchRaw(here.gateway, `/v1/workloads/${again.body.id}/response`)
  assert.is(JSON.parse(response.body.toString()).body, 'kept')
  async function* upload() {
    yield Buffer.from('streamed')
  }
  const live = await fetchRaw(here.gateway, '/fn/repeat', { method: 'POST', body: upload() })
  assert.is(JSON.parse(live.body.toString()).body, 'streamed')
  const refused = await call(
    here.gateway,
    'POST',
    `/v1/workloads/${live.headers['x-vulcan-workload-id']}/rerun`,
  )
  assert.is(refused.status, 409)
  assert.is(refused.body.code, 'not_repeatable')
})

test('a function’s lane is where its work is queued, and its queue limit is asked first', async () => {
  const asked: string[] = []
  await using here = await site({
    code: echo,
    gate: {
      admit: async (name) => {
        asked.push(name)
      },
    },
  })
  await deploy(here.gateway, 'plain')
  await deploy(here.gateway, 'laned', { spec: { concurrency: 2, queue_limit: 5 } })
  assert.is((await fetchRaw(here.gateway, '/fn/plain')).status, 200)
  const accepted = await fetchRaw(here.gateway, '/fn/laned', { headers: { prefer: 'respond-async' } })
  const events = await history(here.gateway.bus, JSON.parse(accepted.body.toString()).id)
  assert.equal(kindsOf(events), ['accepted'])
  assert.is((events[0]!.event.data as { target: string }).target, 'fn-laned')
  assert.equal(asked, ['laned'])
})

test('no call fails while versions are deployed and an alias moves', async () => {
  await using here = await site({ slots: 64, code: (job) => responded(200, job.function!.version) })
  await deploy(here.gateway, 'moving', { version: 1 })
  const seen = new Set<string>()
  const statuses = new Set<number>()
  let over = false
  const caller = async () => {
    while (!over) {
      const answer = await fetch(`${here.gateway.url}/fn/moving`)
      statuses.add(answer.status)
      seen.add(await answer.text())
    }
  }
  const callers = Promise.all(Array.from({ length: 8 }, caller))
  for (let version = 2; version <= 30; version++) {
    await deploy(here.gateway, 'moving', { version, aliases: { live: { version: versionId(version) } } })
    await until(`version ${version} to answer`, () => seen.has(versionId(version)) || undefined)
  }
  // Rolled back.
  await deploy(here.gateway, 'moving', { version: 30, aliases: { live: { version: versionId(1) } } })
  const back = await fetchRaw(here.gateway, '/fn/moving')
  assert.is(back.body.toString(), versionId(1))
  over = true
  await callers
  assert.equal([...statuses], [200])
  assert.is(seen.size, 30)
})

test('a response older than the stream comes from the database', async () => {
  const id = '01890000-0000-7000-8000-000000000000'
  const response = { status: 203, headers: [['x-old', '1']], sealed: null, body: { base64: 'AAEC' } }
  await using dispatcher = await startDispatcher((request, answer) => {
    assert.is(request.url, `/internal/workloads/${id}`)
    answer.end(JSON.stringify({ id, response }))
  })
  await using here = await site({ dispatcherUrl: dispatcher.url })
  const answer = await fetchRaw(here.gateway, `/v1/workloads/${id}/response`)
  assert.is(answer.status, 203)
  assert.is(answer.headers['x-old'], '1')
  assert.ok(answer.body.equals(Buffer.from([0, 1, 2])))
})

test('what is kept has a limit: the request by the gateway, the response by the function’s own', async () => {
  await using here = await site({
    maxBodyBytes: 1_000_000,
    code: async ({ http }, _signal, _log, respond) => {
      await drain(http!.body)
      const sink = respond({ status: 200, headers: [] })
      try {
        for (let i = 0; i < 20; i++) await sink.write(Buffer.alloc(100_000))
        sink.end()
      } catch (error) {
        return failed('user_error', (error as Error).message)
      }
      return completed()
    },
  })
  await deploy(here.gateway, 'limits', { spec: { limits: { output_mb: 1 } } })
  const headers = { prefer: 'respond-async, wait=20' }
  const large = await fetchRaw(here.gateway, '/fn/limits', {
    method: 'POST',
    headers,
    body: Buffer.alloc(1_000_001),
  })
  assert.is(large.status, 413)
  assert.is(here.worker.runner.ran.length, 0)
  const answer = await fetchRaw(here.gateway, '/fn/limits', { method: 'POST', headers })
  assert.is(answer.status, 502)
  assert.match(answer.body.toString(), 'output_too_large')
  // Streamed, both are only held to their time.
  const live = await fetchRaw(here.gateway, '/fn/limits', { method: 'POST', body: Buffer.alloc(1_000_001) })
  assert.is(live.body.byteLength, 2_000_000)
})

test('another gateway knows the function too', async () => {
  await using here = await site()
  await deploy(here.gateway, 'shared')
  const registry = await Registry.open(here.on.bus, 1)
  assert.is(registry.get('shared')?.record.latest, versionId(1))
  registry.close()
})

test.run()
