// timeout: 120
import type { IncomingMessage } from 'node:http'
import { hostname } from 'node:os'
import { Ajv2020 } from 'ajv/dist/2020.js'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { announceUnavailable } from '../../runners/worker.ts'
import { backendKey, Heartbeat } from '../../shared/backends.ts'
import { problems } from '../../shared/errors.ts'
import { eventJsonSchemas } from '../../shared/events.ts'
import { newWorkloadId } from '../../shared/ids.ts'
import { acceptedSubject, runnerSubject } from '../../shared/subjects.ts'
import { Isolation } from '../../shared/workload.ts'
import { capabilities, completed, startWorker } from '../runners/support.ts'
import { acceptedEvent, ground, until } from '../shared/support.ts'
import {
  backendOf,
  call,
  type Json,
  post,
  site,
  startDispatcher,
  startGateway,
  untilKnown,
} from './support.ts'

test('before any runner came, every isolation is unavailable and says what would bring it', async () => {
  await using on = await ground()
  await using gateway = await startGateway(on)
  const { status, body } = await call(gateway, 'GET', '/v1/backends')
  assert.is(status, 200)
  assert.equal(
    body.backends.map(({ isolation, available, runners }: Json) => [isolation, available, runners]),
    ['isolate', 'gvisor', 'docker', 'microvm'].map((isolation) => [isolation, false, []]),
  )
  assert.match(body.backends[0].reason, 'no isolate runner has been seen')
  assert.match(body.backends[0].fix, 'runners/main.ts isolate')
  const refused = await post(gateway, { code: 'x' })
  assert.is(refused.body.code, 'isolation_unavailable')
  const ready = await call(gateway, 'GET', '/readyz')
  assert.is(ready.status, 503)
  assert.ok(ready.headers.has('retry-after'))
  assert.match(ready.body.parts.runners, 'no runner is alive')
  assert.is(ready.body.parts.bus, 'ok')
})

test('runners are listed while they live, with capabilities; the isolation stays known after the last has left', async () => {
  await using on = await ground()
  await using gateway = await startGateway(on)
  const first = await startWorker(on, () => completed(), { slots: 3 })
  await untilKnown(gateway)
  const second = await startWorker(on, () => completed(), { slots: 5 })
  await until('both', () => backendOf(gateway, 'isolate').runners.length === 2 || undefined)
  const isolate = async () => (await call(gateway, 'GET', '/v1/backends')).body.backends[0]
  const both = await isolate()
  assert.ok(both.available)
  assert.is(both.reason, null)
  assert.equal(both.capabilities.runtimes, ['javascript', 'typescript'])
  assert.equal(
    both.runners.map(({ runner, slots }: Json) => [runner, slots]).sort(),
    [
      [first.id, 3],
      [second.id, 5],
    ].sort(),
  )
  assert.is(both.runners[0].pid, process.pid)
  await first.stop()
  await until('the first to leave', () => backendOf(gateway, 'isolate').runners.length === 1 || undefined)
  await second.stop()
  await until('the second to leave', () => backendOf(gateway, 'isolate').runners.length === 0 || undefined)
  assert.ok((await isolate()).available)
  await first[Symbol.asyncDispose]()
  await second[Symbol.asyncDispose]()
})

test('a host that cannot offer an isolation says why; one that can is used all the same', async () => {
  await using on = await ground()
  await using gateway = await startGateway(on)
  const stop = new AbortController()
  const options = { runnerId: 'isolate-0', isolation: 'isolate' as const, replicas: 1 }
  const told = announceUnavailable(
    on.bus,
    options,
    { available: false, reason: 'no engine', fix: 'bring one' },
    stop.signal,
  )
  await until('the word', () => backendOf(gateway, 'isolate').reason === 'no engine' || undefined)
  const { body } = await call(gateway, 'GET', '/v1/backends')
  assert.equal(
    [body.backends[0].available, body.backends[0].reason, body.backends[0].fix, body.backends[0].runners],
    [false, 'no engine', 'bring one', []],
  )
  const refused = await post(gateway, { code: 'x' })
  assert.match(refused.body.detail, 'no engine; bring one')
  await using _ = await startWorker(on, () => completed('yes'))
  await untilKnown(gateway)
  assert.is((await post(gateway, { code: 'x' })).body.output, 'yes')
  stop.abort()
  await told
})

/** What a host says of isolates, live or as its last word. */
const word = (host: string, over: Partial<Heartbeat> = {}): Heartbeat => ({
  runner: `isolate-${host}`,
  isolation: 'isolate',
  available: true,
  reason: null,
  fix: null,
  capabilities: { ...capabilities, version: host },
  slots: 1,
  active: 0,
  metrics: {},
  metrics_url: null,
  host,
  pid: 1,
  started_at: new Date().toISOString(),
  leaving: false,
  ...over,
})
test('what a runner measures stands beside it; one of an older version measures nothing', async () => {
  await using on = await ground()
  await using gateway = await startGateway(on)
  const { metrics: _, ...older } = word('older')
  const newer = word('newer', { metrics: { restore_ms_p50: 64.5 } })
  for (const beat of [newer, older]) on.bus.send(runnerSubject(beat.runner), JSON.stringify(beat))
  const { runners } = await until('both', () => {
    const backend = backendOf(gateway, 'isolate')
    return backend.runners.length === 2 ? backend : undefined
  })
  assert.equal(Object.fromEntries(runners.map(({ host, metrics }) => [host, metrics])), {
    newer: { restore_ms_p50: 64.5 },
    older: {},
  })
})

const cannot = { available: false, reason: 'no engine', fix: 'bring one', capabilities: null }

test('what one host cannot offer another still can, whoever said it last, also for a new gateway', async () => {
  await using on = await ground()
  const kv = await on.bus.backends(1)
  const say = (beat: Heartbeat) => kv.put(backendKey(beat), JSON.stringify(beat))
  await say(word('b', cannot))
  await say(word('a'))
  await say(word('c', cannot))
  await using gateway = await startGateway(on)
  await until('the word', () => gateway.roster.ability('isolate').available || undefined)
  assert.is(gateway.roster.ability('isolate').capabilities!.version, 'a')
  assert.is((await post(gateway, { code: 'x' }, {}, '/v1/workloads/async')).status, 202)

  // The only one that could says that it no longer can.
  await say(word('a', cannot))
  await until('the change', () => !gateway.roster.ability('isolate').available || undefined)
  assert.is(gateway.roster.ability('isolate').reason, 'no engine')
  assert.is((await post(gateway, { code: 'x' })).status, 422)
})

test('a runner that lives is believed before the last word of a host; ability and backends say the same', async () => {
  await using on = await ground()
  const kv = await on.bus.backends(1)
  const say = (beat: Heartbeat) => kv.put(backendKey(beat), JSON.stringify(beat))
  await say(word('known'))
  await using gateway = await startGateway(on)
  await until('the word', () => gateway.roster.ability('isolate').available || undefined)
  const same = () => {
    const { isolation, available, reason, fix, capabilities } = gateway.roster.ability('isolate')
    const { runners, ...backend } = backendOf(gateway, 'isolate')
    assert.equal(backend, { isolation, available, reason, fix, capabilities })
    return { runners: runners.length, version: capabilities?.version }
  }
  assert.equal(same(), { runners: 0, version: 'known' })
  on.bus.send(runnerSubject('isolate-0'), JSON.stringify(word('broken', { ...cannot, runner: 'isolate-0' })))
  on.bus.send(runnerSubject('isolate-live'), JSON.stringify(word('live')))
  await until('the heartbeat', () => same().runners === 1 || undefined)
  assert.equal(same(), { runners: 1, version: 'live' })
  on.bus.send(runnerSubject('isolate-live'), JSON.stringify(word('live', { leaving: true })))
  await until('the leave', () => same().runners === 0 || undefined)
  assert.equal(same(), { runners: 0, version: 'known' })
  assert.equal(
    gateway.roster.backends().map(({ isolation }) => isolation),
    Isolation.options,
  )
})

test('a runner’s last word is kept for its host, and that of a host that cannot leaves it alone', async () => {
  await using on = await ground()
  const worker = await startWorker(on, () => completed())
  await worker.stop()
  await worker[Symbol.asyncDispose]()
  const kv = await on.bus.backends(1)
  const own = backendKey({ isolation: 'isolate', host: hostname() })
  assert.ok(Heartbeat.parse((await kv.get(own))!.json()).available)
  await kv.put(backendKey(word('other')), JSON.stringify(word('other', cannot)))
  await using gateway = await startGateway(on)
  await until('the words', () => gateway.roster.ability('isolate').available || undefined)
})

test('reads go to the dispatcher as they came, and its answers back as they are', async () => {
  const asked: { method: string; url: string; headers: IncomingMessage['headers'] }[] = []
  await using dispatcher = await startDispatcher((request, response) => {
    asked.push({ method: request.method!, url: request.url!, headers: request.headers })
    response.writeHead(request.url!.includes('limit=0') ? 400 : 200, {
      'content-type': 'application/json; charset=utf-8',
      'x-internal': 'secret',
      'retry-after': '7',
    })
    response.end(`{"url":${JSON.stringify(request.url)}}`)
  })
  await using on = await ground()
  await using gateway = await startGateway(on, { dispatcherUrl: dispatcher.url })
  const id = newWorkloadId()
  for (const path of [
    '/v1/workloads?status=failed,killed&label=team%3Da&limit=5',
    '/v1/workloads?limit=0',
    `/v1/workloads/${id}`,
    `/v1/workloads/${id}/logs?limit=10&cursor=17-3`,
    '/v1/stats?since=2026-01-01T00:00:00Z',
  ]) {
    const answer = await call(gateway, 'GET', path, {
      headers: { accept: 'application/json', 'last-event-id': '17-3', authorization: 'x' },
    })
    assert.is(answer.status, path.includes('limit=0') ? 400 : 200)
    assert.is(answer.body.url, path)
    assert.is(answer.headers.get('content-type'), 'application/json; charset=utf-8')
    assert.is(answer.headers.get('retry-after'), '7')
    assert.is(answer.headers.get('x-internal'), null)
    const { headers, method } = asked.at(-1)!
    assert.is(method, 'GET')
    assert.is(headers['last-event-id'], '17-3')
    assert.is(headers.accept, 'application/json')
    assert.is(headers.authorization, undefined)
  }
})

test('a log stream is handed on line by line, and closed at the dispatcher when the client goes', async () => {
  let closed = false
  let write = (_: string) => {}
  await using dispatcher = await startDispatcher((request, response) => {
    assert.is(request.headers.accept, 'text/event-stream')
    response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-cache' })
    response.write('id: 1-1\nevent: log\ndata: first\n\n')
    write = (text) => response.write(text)
    response.on('close', () => {
      closed = true
    })
  })
  await using on = await ground()
  await using gateway = await startGateway(on, { dispatcherUrl: dispatcher.url })
  const leaving = new AbortController()
  const answer = await fetch(`${gateway.url}/v1/workloads/${newWorkloadId()}/logs`, {
    headers: { accept: 'text/event-stream' },
    signal: leaving.signal,
  })
  assert.is(answer.headers.get('content-type'), 'text/event-stream')
  assert.is(answer.headers.get('cache-control'), 'no-cache')
  const reader = answer.body!.pipeThrough(new TextDecoderStream()).getReader()
  assert.match((await reader.read()).value!, 'data: first')
  write('data: second\n\n')
  assert.match((await reader.read()).value!, 'data: second')
  leaving.abort()
  await reader.read().catch(() => {})
  await until('the close', () => closed || undefined)
})

test('a dispatcher that is away is 503 with Retry-After for reads; running goes on', async () => {
  await using here = await site()
  for (const path of ['/v1/workloads', `/v1/workloads/${newWorkloadId()}`, '/v1/stats']) {
    const answer = await call(here.gateway, 'GET', path)
    assert.is(answer.status, 503)
    assert.is(answer.body.code, 'database_unavailable')
    assert.is(answer.headers.get('retry-after'), '1')
  }
  assert.is((await post(here.gateway, { code: 'x' })).status, 200)
  const ready = await call(here.gateway, 'GET', '/readyz')
  assert.is(ready.status, 503)
  assert.match(ready.body.parts.database, 'cannot be reached')
  assert.is(ready.body.parts.runners, 'ok')
})

test('ready is what the parts are', async () => {
  let status = 200
  await using dispatcher = await startDispatcher((_, response) => {
    response.writeHead(status, { 'content-type': 'application/json' })
    response.end(
      JSON.stringify({ ready: status === 200, parts: { database: { ready: false, reason: 'locked' } } }),
    )
  })
  await using here = await site({ dispatcherUrl: dispatcher.url })
  const ready = await call(here.gateway, 'GET', '/readyz')
  assert.is(ready.status, 200)
  assert.equal(ready.body, { ready: true, parts: { bus: 'ok', database: 'ok', runners: 'ok' } })
  status = 503
  const not = await call(here.gateway, 'GET', '/readyz')
  assert.is(not.status, 503)
  assert.is(not.body.parts.database.database.reason, 'locked')
  assert.equal((await call(here.gateway, 'GET', '/healthz')).body, { ok: true })
})

test('the schema of every event is served, and an event off the bus is valid by it', async () => {
  await using here = await site()
  const { body } = await call(here.gateway, 'GET', '/v1/schemas/events')
  assert.equal(body.schemas.map(({ kind }: Json) => kind).sort(), Object.keys(eventJsonSchemas()).sort())
  const ajv = new Ajv2020({ strict: false, validateFormats: false })
  const validate = new Map<string, ReturnType<typeof ajv.compile>>()
  for (const { kind, url } of body.schemas) {
    const schema = await call(here.gateway, 'GET', url)
    assert.is(schema.headers.get('content-type'), 'application/schema+json')
    validate.set(kind, ajv.compile(schema.body))
  }
  const seen: string[] = []
  here.on.bus.listen('vulcan.events.>', (message) => {
    const kind = message.subject.split('.')[3]!
    const valid = validate.get(kind)!
    assert.ok(valid(message.json()), JSON.stringify(valid.errors))
    seen.push(kind)
  })
  await here.on.bus.flush()
  await post(here.gateway, { code: 'x', input: { a: 1 } })
  await until('three events', () => seen.length === 3 || undefined)
  assert.equal(seen, ['accepted', 'started', 'completed'])
})

/** `{id}` as the document writes it, `:id` as the router does. */
const inBraces = (path: string) => path.replace(/:(\w+)/g, '{$1}')

test('the OpenAPI document is 3.1 and lists every route with its methods, and no other', async () => {
  await using here = await site()
  const { status, headers, body } = await call(here.gateway, 'GET', '/openapi.json')
  assert.is(status, 200)
  assert.match(headers.get('content-type')!, 'application/json')
  assert.match(body.openapi, /^3\.1\./)
  const { gatewayApp } = await import('../../gateway/app.ts')
  const { GatewayMetrics } = await import('../../gateway/metrics.ts')
  const metrics = new GatewayMetrics('g')
  const app = gatewayApp({ ...here.gateway, gatewayId: 'g', metrics } as unknown as Parameters<
    typeof gatewayApp
  >[0])
  const served = app.routes
    .filter(({ method }) => method !== 'ALL')
    .map(({ method, path }) => `${method} ${inBraces(path.replace(/(.)\/$/, '$1'))}`)
  const listed = Object.entries(body.paths as Record<string, Json>).flatMap(([path, item]) =>
    Object.keys(item).map((method) => `${method.toUpperCase()} ${path}`),
  )
  // Calls of functions go past the router.
  const calls = listed.filter((route) => / \/fn\//.test(route))
  const methods = ['DELETE', 'GET', 'HEAD', 'OPTIONS', 'PATCH', 'POST', 'PUT', 'TRACE']
  for (const path of ['/fn/{name}', '/fn/{name}/{path}'])
    assert.equal(
      calls.filter((route) => route.endsWith(` ${path}`)).sort(),
      methods.map((method) => `${method} ${path}`),
    )
  const routed = listed.filter((route) => !calls.includes(route))
  assert.equal([...new Set(routed)].sort(), [...new Set(served)].sort())
})

test('the OpenAPI document is sound: references lead somewhere, path parameters are declared, answers described', async () => {
  await using on = await ground()
  await using gateway = await startGateway(on)
  const { body } = await call(gateway, 'GET', '/openapi.json')
  const references: string[] = []
  JSON.stringify(body, (key, value) => {
    if (key === '$ref') references.push(value)
    return value
  })
  assert.ok(references.length > 10)
  for (const reference of references) {
    assert.match(reference, /^#\//)
    const found = reference
      .slice(2)
      .split('/')
      .reduce((at: Json, part) => at?.[part], body)
    assert.ok(found !== undefined, reference)
  }
  for (const [path, item] of Object.entries(body.paths as Record<string, Json>))
    for (const [method, operation] of Object.entries(item as Record<string, Json>)) {
      const where = `${method} ${path}`
      assert.type(operation.summary, 'string', where)
      const named = [...path.matchAll(/\{(\w+)\}/g)].map(([, name]) => name)
      const declared = (operation.parameters ?? []).filter((one: Json) => one.in === 'path')
      assert.equal(
        declared.map(({ name }: Json) => name),
        named,
        where,
      )
      for (const parameter of declared) assert.ok(parameter.required, where)
      for (const [status, response] of Object.entries(operation.responses as Record<string, Json>)) {
        assert.match(status, /^(?:[2-5]\d\d|default)$/)
        assert.type(response.description, 'string', `${where} ${status}`)
        if (Number(status) >= 400 && path !== '/readyz')
          assert.ok('application/problem+json' in response.content, `${where} ${status}`)
      }
    }
  const ajv = new Ajv2020({ strict: false, validateFormats: false })
  ajv.addSchema({ $id: 'https://test/openapi', components: body.components })
  for (const name of Object.keys(body.components.schemas))
    ajv.compile({ $ref: `https://test/openapi#/components/schemas/${name}` })
  assert.equal(body.components.schemas.Problem.properties.code.enum, Object.keys(problems))
})

test('what the gateway answers is valid by its own document', async () => {
  await using here = await site()
  const { body } = await call(here.gateway, 'GET', '/openapi.json')
  const ajv = new Ajv2020({ strict: false, validateFormats: false })
  ajv.addSchema({ $id: 'https://test/openapi', ...body })
  const check = (path: string, method: string, status: number, type: string, value: unknown) => {
    const pointer = ['paths', path, method, 'responses', String(status), 'content', type, 'schema']
      .map((part) => encodeURIComponent(part.replaceAll('~', '~0').replaceAll('/', '~1')))
      .join('/')
    const validate = ajv.compile({ $ref: `https://test/openapi#/${pointer}` })
    assert.ok(validate(value), `${method} ${path} ${status}: ${JSON.stringify(validate.errors)}`)
  }
  const json = 'application/json'
  const problem = 'application/problem+json'
  check('/v1/workloads', 'post', 200, json, (await post(here.gateway, { code: 'x' })).body)
  check(
    '/v1/workloads/async',
    'post',
    202,
    json,
    (await post(here.gateway, { code: 'x' }, {}, '/v1/workloads/async')).body,
  )
  check('/v1/workloads', 'post', 422, problem, (await post(here.gateway, { code: 1 })).body)
  check(
    '/v1/workloads',
    'post',
    400,
    problem,
    (await call(here.gateway, 'POST', '/v1/workloads', { raw: '{' })).body,
  )
  check('/v1/backends', 'get', 200, json, (await call(here.gateway, 'GET', '/v1/backends')).body)
  const waiting = acceptedEvent()
  await here.on.bus.publishEvent(acceptedSubject(waiting.subject, 'docker'), waiting, 0)
  check(
    '/v1/workloads/{id}',
    'delete',
    200,
    json,
    (await call(here.gateway, 'DELETE', `/v1/workloads/${waiting.subject}`)).body,
  )
})

test('a HEAD is a GET without the body', async () => {
  await using here = await site()
  const answer = await fetch(`${here.gateway.url}/healthz`, { method: 'HEAD' })
  assert.is(answer.status, 200)
  assert.is(await answer.text(), '')
})

test.run()
