import { setTimeout as delay } from 'node:timers/promises'
import pino from 'pino'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { kill } from '../../gateway/kill.ts'
import { isEnd } from '../../shared/events.ts'
import { controlSubject } from '../../shared/subjects.ts'
import { startTracing, TelemetryOptions } from '../../shared/telemetry.ts'
import { isSampled, spanIdOf, traceIdOf, traceLinks } from '../../shared/trace.ts'
import type { Workload } from '../../shared/workload.ts'
import { type Otlp, startOtlp } from '../otlp.ts'
import { type Code, codeOf, completed, failed, untilStopped } from '../runners/support.ts'
import { ground, history, kindsOf, origin, submit, until, untilEnd } from '../shared/support.ts'
import { deploy, fetchRaw, responded } from './functions.ts'
import { call, post, type Site, site } from './support.ts'

const log = pino({ level: 'silent' })
const traceUrl = traceLinks('http://jaeger.example/')

interface Traced extends AsyncDisposable {
  here: Site
  otlp: Otlp
}

/** A gateway that traces, and a runner that does not. */
async function traced(
  options: Partial<TelemetryOptions> & { code?: Code; slots?: number } = {},
): Promise<Traced> {
  const { code, slots, ...telemetry } = options
  await using scope = new AsyncDisposableStack()
  const otlp = scope.use(await startOtlp())
  const tracing = scope.use(
    await startTracing(TelemetryOptions.parse({ endpoint: otlp.url, delayMs: 20, ...telemetry }), {
      service: 'vulcan-gateway',
      id: 'gateway-test',
      log,
    }),
  )
  const here = scope.use(
    await site({
      tracing,
      traceUrl,
      ...(code === undefined ? {} : { code }),
      ...(slots === undefined ? {} : { slots }),
    }),
  )
  const resources = scope.move()
  return { here, otlp, [Symbol.asyncDispose]: () => resources.disposeAsync() }
}

const text = { code: 'export default () => 1' }
const caller = `00-${'a'.repeat(32)}-${'b'.repeat(16)}-01`

test('a request is a span under its caller’s, publishing a span under that, and the event carries it on', async () => {
  await using both = await traced()
  const { here, otlp } = both
  const answer = await post(
    here.gateway,
    { ...text, input: 1 },
    { traceparent: caller, 'user-agent': 'test/1' },
  )
  assert.is(answer.status, 200)
  const workload = answer.body as Workload
  assert.is(workload.trace_id, 'a'.repeat(32))
  assert.is(workload.trace_url, `http://jaeger.example/trace/${'a'.repeat(32)}`)

  const trace = await otlp.trace(workload.trace_id!, (trace) => trace.has('POST /v1/workloads'))
  const server = trace.root
  assert.is(server.name, 'POST /v1/workloads')
  assert.is(server.kind, 'server')
  assert.is(server.parentSpanId, 'b'.repeat(16))
  assert.is(server.service, 'vulcan-gateway')
  const { port } = new URL(here.gateway.url)
  assert.equal(server.attributes, {
    'http.request.method': 'POST',
    'http.route': '/v1/workloads',
    'http.response.status_code': 200,
    'url.scheme': 'http',
    'url.path': '/v1/workloads',
    'server.address': '127.0.0.1',
    'server.port': Number(port),
    'client.address': '127.0.0.1',
    'network.protocol.version': '1.1',
    'user_agent.original': 'test/1',
    'vulcan.workload.id': workload.id,
    'vulcan.isolation': 'isolate',
    'vulcan.status': 'completed',
    'vulcan.attempt': 1,
  })
  assert.is(server.status.code, 'unset')
  const publish = trace.one('publish vulcan.events', server)
  assert.is(publish.kind, 'producer')
  assert.equal(publish.attributes, {
    'messaging.system': 'nats',
    'messaging.operation.name': 'publish',
    'messaging.operation.type': 'send',
    'messaging.destination.name': 'vulcan.events',
    'messaging.destination.template': 'vulcan.events.{workload}.accepted.{isolation}.{target}',
    'messaging.message.id': `${workload.id}.accepted.0`,
    'vulcan.workload.id': workload.id,
  })
  const [accepted] = await history(here.on.bus, workload.id)
  assert.is(accepted!.event.traceparent, `00-${publish.traceId}-${publish.spanId}-01`)
  assert.is(answer.headers.get('traceparent'), `00-${server.traceId}-${server.spanId}-01`)
})

test('a call of a function says which, and never its query or its headers', async () => {
  await using both = await traced({ code: () => responded(200, 'hello') })
  const { here, otlp } = both
  const version = await deploy(here.gateway, 'hello')
  const answer = await fetchRaw(here.gateway, '/fn/hello/a/b?key=hunter22', {
    headers: { authorization: 'Bearer hunter22' },
  })
  assert.is(answer.body.toString(), 'hello')
  const traceparent = answer.headers.traceparent as string
  const trace = await otlp.trace(traceIdOf(traceparent), (trace) => trace.has('GET /fn/:name'))
  const server = trace.root
  assert.is(server.spanId, spanIdOf(traceparent))
  assert.is(server.attributes['url.path'], '/fn/hello/a/b')
  assert.is(server.attributes['http.route'], '/fn/:name')
  assert.is(server.attributes['faas.invoked_name'], 'hello')
  assert.is(server.attributes['faas.trigger'], 'http')
  assert.is(server.attributes['vulcan.version'], version.version)
  assert.is(server.attributes['vulcan.workload.id'], answer.headers['x-vulcan-workload-id'])
  trace.one('publish vulcan.events', server)
  assert.not.match(JSON.stringify(otlp.spans), /hunter22/)
})

test('a workload that fails makes its request’s span one, with its cause', async () => {
  await using both = await traced({ code: () => failed('oom') })
  const { here, otlp } = both
  const { status, body } = await post(here.gateway, text)
  assert.is(status, 200)
  const trace = await otlp.trace(body.trace_id, (trace) => trace.has('POST /v1/workloads'))
  assert.is(trace.root.status.code, 'error')
  assert.is(trace.root.attributes['error.type'], 'oom')
  assert.is(trace.root.attributes['vulcan.cause'], 'oom')

  await deploy(here.gateway, 'broken')
  const called = await fetchRaw(here.gateway, '/fn/broken')
  assert.is(called.status, 502)
  const other = await otlp.trace(traceIdOf(called.headers.traceparent as string), (trace) =>
    trace.has('GET /fn/:name'),
  )
  assert.is(other.root.attributes['error.type'], 'oom')
  assert.is(other.root.attributes['http.response.status_code'], 502)
})

test('what a client did wrong is no error of the span; what went wrong here is', async () => {
  await using both = await traced({ code: () => responded(503, 'busy') })
  const { here, otlp } = both
  await deploy(here.gateway, 'busy')
  const asked: [method: string, path: string, name: string, status: number, code: string][] = [
    ['POST', '/v1/workloads', 'POST /v1/workloads', 422, 'unset'],
    ['GET', '/fn/nothing', 'GET /fn/:name', 404, 'unset'],
    ['GET', '/v1/nothing', 'GET', 404, 'unset'],
    ['DELETE', '/v1/workloads', 'DELETE', 405, 'unset'],
    ['GET', '/v1/workloads?limit=1', 'GET /v1/workloads', 503, 'error'],
    ['GET', '/fn/busy', 'GET /fn/:name', 503, 'error'],
  ]
  for (const [method, path, name, status, code] of asked) {
    const answer = await call(here.gateway, method, path, method === 'POST' ? { body: {} } : {})
    assert.is(answer.status, status, path)
    const traceparent = answer.headers.get('traceparent')!
    const trace = await otlp.trace(traceIdOf(traceparent), (trace) =>
      trace.spans.some(({ kind }) => kind === 'server'),
    )
    assert.is(trace.root.name, name)
    assert.is(trace.root.spanId, spanIdOf(traceparent))
    assert.is(trace.root.attributes['http.response.status_code'], status, path)
    assert.is(trace.root.status.code, code, path)
    assert.is(trace.root.attributes['error.type'], code === 'error' ? String(status) : undefined, path)
  }
})

test('the questions of machines are not traced', async () => {
  await using both = await traced()
  const { here, otlp } = both
  for (const path of ['/healthz', '/readyz', '/v1/backends']) await call(here.gateway, 'GET', path)
  await until('the last of them', () => otlp.spans.length > 0 || undefined)
  assert.equal(
    otlp.spans.map(({ name }) => name),
    ['GET /v1/backends'],
  )
})

test('a second request with the same idempotency key has a span of its own, and the first’s trace in its answer', async () => {
  await using both = await traced()
  const { here, otlp } = both
  const first = await post(here.gateway, text, { 'idempotency-key': 'k' })
  const second = await post(here.gateway, text, { 'idempotency-key': 'k' })
  assert.is(second.body.trace_id, first.body.trace_id)
  const traceparent = second.headers.get('traceparent')!
  assert.is.not(traceIdOf(traceparent), first.body.trace_id)
  const trace = await otlp.trace(traceIdOf(traceparent), (trace) => trace.has('POST /v1/workloads'))
  assert.is(trace.one('publish vulcan.events').attributes['vulcan.replayed'], true)
})

test('a rerun is a workload of the trace that asked for it', async () => {
  await using both = await traced()
  const { here, otlp } = both
  const { body } = await post(here.gateway, text)
  const again = await call(here.gateway, 'POST', `/v1/workloads/${body.id}/rerun`, {
    headers: { prefer: 'wait=20', traceparent: caller },
  })
  assert.is(again.body.trace_id, 'a'.repeat(32))
  const trace = await otlp.trace('a'.repeat(32), (trace) => trace.has('POST /v1/workloads/:id/rerun'))
  trace.one('publish vulcan.events', trace.root)
})

test('a kill of what waits stands in the workload’s trace, linked to the request for it', async () => {
  await using both = await traced({
    slots: 1,
    code: (job, signal) => (codeOf(job) === 'holds' ? untilStopped(signal) : completed()),
  })
  const { here, otlp } = both
  const holds = await post(here.gateway, { code: 'holds' }, {}, '/v1/workloads/async')
  await until('the first', () => here.worker.runner.ran.length === 1 || undefined)
  const { body } = await post(here.gateway, text, {}, '/v1/workloads/async')
  const killed = await call(here.gateway, 'POST', `/v1/workloads/${body.id}/kill`)
  assert.is(killed.body.status, 'killed')

  const trace = await otlp.trace(body.trace_id, (trace) => trace.has('publish killed'))
  const publish = trace.one('publish killed', trace.one('publish vulcan.events'))
  assert.is(publish.status.code, 'error')
  assert.is(publish.attributes['error.type'], 'killed')
  assert.equal(
    publish.events.map(({ name }) => name),
    ['kill'],
  )
  const request = killed.headers.get('traceparent')!
  assert.equal(
    publish.links.map(({ traceId, spanId }) => [traceId, spanId]),
    [[traceIdOf(request), spanIdOf(request)]],
  )
  const asked = await otlp.trace(traceIdOf(request), (trace) => trace.has('POST /v1/workloads/:id/kill'))
  assert.is(asked.root.attributes['vulcan.workload.id'], body.id)
  const end = (await history(here.on.bus, body.id)).at(-1)!.event
  assert.is(end.traceparent, `00-${publish.traceId}-${publish.spanId}-01`)
  await call(here.gateway, 'POST', `/v1/workloads/${holds.body.id}/kill`)
})

test('a runner that is told to kill is told by which request', async () => {
  await using both = await traced({ code: (_, signal) => untilStopped(signal) })
  const { here } = both
  const { body } = await post(here.gateway, text, {}, '/v1/workloads/async')
  await until('the start', () => here.worker.runner.ran.length === 1 || undefined)
  const told: string[] = []
  here.on.bus.listen(controlSubject(body.id), (message) => void told.push(message.string()))
  await here.on.bus.flush()
  const killed = await call(here.gateway, 'DELETE', `/v1/workloads/${body.id}`)
  assert.is(killed.body.status, 'killed')
  await until('the word', () => told.length > 0 || undefined)
  assert.equal(JSON.parse(told[0]!), { action: 'kill', traceparent: killed.headers.get('traceparent') })
})

test('with tracing off, a kill carries on the trace that the workload came with', async () => {
  await using here = await site({ slots: 1, code: (_, signal) => untilStopped(signal) })
  const holds = await post(here.gateway, text, {}, '/v1/workloads/async')
  await until('the first', () => here.worker.runner.ran.length === 1 || undefined)
  const { body } = await post(here.gateway, text, { traceparent: caller }, '/v1/workloads/async')
  await call(here.gateway, 'POST', `/v1/workloads/${body.id}/kill`)
  const events = await history(here.on.bus, body.id)
  assert.equal(kindsOf(events), ['accepted', 'killed'])
  assert.is(traceIdOf(events[0]!.event.traceparent!), 'a'.repeat(32))
  assert.is(events[1]!.event.traceparent, events[0]!.event.traceparent)
  await call(here.gateway, 'POST', `/v1/workloads/${holds.body.id}/kill`)
})

test('events without a trace are killed without one', async () => {
  await using on = await ground()
  const { id } = await submit(on.bus)
  await kill(on.bus, id, () => false, origin)
  const events = await history(on.bus, id)
  assert.ok(events.every(({ event }) => event.traceparent === undefined))
})

test('a workload that fails after its request was answered brings the request’s spans, sampled or not', async () => {
  await using both = await traced({
    sampler: 'always_off',
    code: async (job) => {
      await delay(300)
      return codeOf(job) === 'good' ? completed() : failed('user_error')
    },
  })
  const { here, otlp } = both
  const good = await post(here.gateway, { code: 'good' }, {}, '/v1/workloads/async')
  const waited = await post(here.gateway, { code: 'good' })
  const bad = await post(here.gateway, { code: 'bad' }, {}, '/v1/workloads/async')
  assert.is(bad.status, 202)
  assert.is(isSampled(bad.headers.get('traceparent')!), false)
  await untilEnd(here.on.bus, good.body.id)
  const trace = await otlp.trace(bad.body.trace_id, (trace) => trace.has('POST /v1/workloads/async'))
  trace.one('publish vulcan.events', trace.root)
  assert.is(trace.root.attributes['error.type'], 'user_error')
  // It lasted as long as the request, not as long as the workload.
  assert.ok(trace.root.end - trace.root.start < 290, String(trace))
  for (const { body } of [good, waited]) assert.equal(otlp.of(body.trace_id), [])
})

test('a client that goes away is seen, and is no error', async () => {
  await using both = await traced({ code: (_, signal) => untilStopped(signal) })
  const { here, otlp } = both
  await deploy(here.gateway, 'slow')
  const leave = new AbortController()
  const asked = call(here.gateway, 'GET', '/fn/slow', {
    headers: { traceparent: caller },
    signal: leave.signal,
  }).catch(() => {})
  await until('the start', () => here.worker.runner.ran.length === 1 || undefined)
  leave.abort()
  await asked
  const trace = await otlp.trace('a'.repeat(32), (trace) => trace.has('GET /fn/:name'))
  assert.equal(
    trace.root.events.map(({ name }) => name),
    ['client gone'],
  )
  assert.is(trace.root.status.code, 'unset')
  assert.is(trace.root.attributes['http.response.status_code'], undefined)
})

test('workloads read later show their trace’s link as well', async () => {
  await using both = await traced()
  const { here } = both
  const { body } = await post(here.gateway, text, { traceparent: caller }, '/v1/workloads/async')
  assert.is(body.trace_url, `http://jaeger.example/trace/${'a'.repeat(32)}`)
  const end = await untilEnd(here.on.bus, body.id)
  assert.ok(isEnd(end))
  await using plain = await site()
  assert.is((await post(plain.gateway, text)).body.trace_url, null)
})

test.run()
