import pino from 'pino'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { RunnerMetrics } from '../../runners/metrics.ts'
import type { AcceptedEvent, LogEvent } from '../../shared/events.ts'
import { Lane } from '../../shared/functions.ts'
import { digestOf, newWorkloadId } from '../../shared/ids.ts'
import { Registry } from '../../shared/registry.ts'
import { Secrets } from '../../shared/secrets.ts'
import { acceptedSubject, controlSubject, eventSubject, logSubject } from '../../shared/subjects.ts'
import { startTracing, TelemetryOptions } from '../../shared/telemetry.ts'
import { ensureLane, LOGS } from '../../shared/topology.ts'
import { preciseNow } from '../../shared/tracing.ts'
import { type ReceivedSpan, startOtlp, type Trace } from '../otlp.ts'
import {
  acceptedEvent,
  bareEnd,
  type Ground,
  ground,
  history,
  kindsOf,
  until,
  untilEnd,
} from '../shared/support.ts'
import { type Code, completed, failed, line, startWorker, testBox, untilStopped } from './support.ts'

const traceId = '0af7651916cd43dd8448eb211c80319c'
const gatewaySpan = 'b7ad6b7169203331'
const sampled = `00-${traceId}-${gatewaySpan}-01`
const unsampled = `00-${traceId}-${gatewaySpan}-00`
const killSpan = '00f067aa0ba902b7'

/** A server, a receiver of traces, and a worker that sends there. */
async function traced(code: Code, options: Partial<TelemetryOptions> = {}) {
  await using scope = new AsyncDisposableStack()
  const on = scope.use(await ground())
  const otlp = scope.use(await startOtlp())
  const log = pino({ level: 'silent' })
  const telemetry = TelemetryOptions.parse({ endpoint: otlp.url, delayMs: 50, ...options })
  const tracing = scope.use(await startTracing(telemetry, { service: 'vulcan-runner', id: 'r1', log }))
  const metrics = new RunnerMetrics('r1', 'isolate')
  const worker = scope.use(await startWorker(on, code, { tracing, metrics }))
  const resources = scope.move()
  return { ...on, otlp, tracing, metrics, worker, [Symbol.asyncDispose]: () => resources.disposeAsync() }
}

/** Stores an accepted event that carries `traceparent`. */
async function submit(
  on: Pick<Ground, 'bus'>,
  spec: Record<string, unknown> = {},
  over: Partial<AcceptedEvent['data']> = {},
  traceparent = sampled,
): Promise<string> {
  const event = { ...acceptedEvent(spec, newWorkloadId(), over), traceparent }
  const target = over.target ?? 'any'
  const stored = await on.bus.publishEvent(acceptedSubject(event.subject, 'isolate', target), event, 0)
  assert.ok(stored.stored)
  return event.subject
}

const idOf = (traceparent: string | undefined) => traceparent?.split('-')[2]
const eventsOf = async (on: Ground, id: string) => (await history(on.bus, id)).map(({ event }) => event)
const isDone = (kind: string) => (trace: Trace) =>
  trace.has(`publish ${kind}`) && trace.has('process vulcan.work')
const names = (spans: ReceivedSpan[]) => spans.map(({ name }) => name)
const links = (span: ReceivedSpan) => span.links.map(({ spanId }) => spanId)

test('an attempt is one tree, and each event carries the traceparent of its span', async () => {
  let heard: string | undefined
  await using on = await traced((job, _signal, log, _respond, onPhase) => {
    heard = job.traceparent
    assert.is(job.traced, true)
    const now = preciseNow()
    onPhase!({ name: 'create isolate', start: now - 2, end: now - 1 })
    onPhase!({ name: 'guest', start: now - 1, end: now })
    const spanId = 'aaaaaaaaaaaaaaaa'
    onPhase!({ name: 'below', start: now - 0.5, end: now, spanId: 'bbbbbbbbbbbbbbbb', parentSpanId: spanId })
    onPhase!({ name: 'theirs', start: now - 1, end: now, spanId, attributes: { items: 3 } })
    log(line('a line'))
    return completed()
  })
  const version = { name: 'hello', version: 'v0123456789abcdef', ref: 'live' }
  const blob = await on.blobs.put(Buffer.from('export default 1'))
  const id = await submit(on, {}, { function: version, bundle: { ...blob, map: null } })
  await untilEnd(on.bus, id)
  const trace = await on.otlp.trace(traceId, isDone('completed'))
  const [queue, process] = [trace.one('queue'), trace.one('process vulcan.work')]
  for (const root of [queue, process]) assert.is(root.parentSpanId, gatewaySpan)
  assert.is(trace.roots.length, 2)
  const [accepted, started, end] = await eventsOf(on, id)
  assert.is(Math.round(queue.start), Date.parse(accepted!.time))
  assert.ok(queue.end <= process.start + 0.001 && process.start < process.end)
  assert.equal(names(trace.under(process)).sort(), [
    ...['create isolate', 'fetch bundle', 'publish completed', 'publish started', 'run'],
  ])
  const run = trace.one('run', process)
  assert.equal(names(trace.under(run)).sort(), ['guest', 'theirs'])
  assert.is(trace.one('below').parentSpanId, 'aaaaaaaaaaaaaaaa')
  assert.is(trace.one('theirs').attributes.items, 3)
  assert.is(heard, `00-${traceId}-${run.spanId}-01`)

  assert.is(idOf(started!.traceparent), trace.one('publish started').spanId)
  assert.is(idOf(end!.traceparent), trace.one('publish completed').spanId)
  const lines = await until('the line', async () => {
    const found = await on.bus.jsm.streams
      .getMessage(LOGS, { last_by_subj: logSubject(id) })
      .catch(() => null)
    return found === null ? undefined : (found.json() as LogEvent)
  })
  assert.is(idOf(lines.traceparent), run.spanId)

  const { attributes, kind, status } = process
  assert.is(kind, 'consumer')
  assert.is(status.code, 'unset')
  const wanted = {
    'messaging.system': 'nats',
    'messaging.operation.name': 'process',
    'messaging.operation.type': 'process',
    'messaging.destination.name': 'vulcan.work',
    'messaging.message.id': accepted!.id,
    'vulcan.workload.id': id,
    'vulcan.attempt': 1,
    'vulcan.isolation': 'isolate',
    'vulcan.runner': on.worker.id,
    'vulcan.function': 'hello',
    'vulcan.version': version.version,
    'vulcan.status': 'completed',
    'vulcan.start': 'warm',
    'faas.invocation_id': id,
    'faas.invoked_name': 'hello',
    'faas.coldstart': false,
    'faas.trigger': 'pubsub',
  }
  for (const [name, value] of Object.entries(wanted)) assert.is(attributes[name], value, name)
  assert.is(trace.one('publish completed').kind, 'producer')
  assert.is(
    trace.one('publish completed').attributes['messaging.destination.template'],
    'vulcan.events.{workload}.completed',
  )
})

test('a retry tells why and until when, and the next attempt links to it', async () => {
  await using on = await traced((job) => (job.attempt === 1 ? failed('runner_lost', 'gone') : completed()))
  const id = await submit(on, { retry: { max_attempts: 2, on: ['runner_lost'] } })
  await untilEnd(on.bus, id, 30_000)
  const trace = await on.otlp.trace(traceId, (t) => t.all('process vulcan.work').length === 2)
  const [first, second] = trace.all('process vulcan.work')
  assert.equal([first!.attributes['vulcan.attempt'], second!.attributes['vulcan.attempt']], [1, 2])
  assert.equal(
    [first!.status.code, first!.attributes['error.type'], first!.attributes['vulcan.status']],
    ['error', 'runner_lost', 'retrying'],
  )
  const events = await eventsOf(on, id)
  const retrying = events.find((event) => event.type === 'vulcan.workload.retrying')!
  const [retry] = first!.events
  assert.is(retry!.name, 'retry')
  assert.is(retry!.attributes['vulcan.not_before'], retrying.data.not_before)
  assert.is(trace.one('publish retrying', first).spanId, idOf(retrying.traceparent))
  assert.equal(links(second!), [idOf(retrying.traceparent)])
  assert.is(second!.status.code, 'unset')
  const [, waited] = trace.all('queue')
  assert.is(Math.round(waited!.start), Date.parse(retrying.time))
  assert.is(waited!.attributes['vulcan.not_before'], retrying.data.not_before)
  assert.is(trace.one('run', first).attributes['error.type'], 'runner_lost')
})

test('a timeout is read off its run: when it struck, and what was under way', async () => {
  await using on = await traced((_job, signal, _log, _respond, onPhase) => {
    const start = preciseNow()
    return untilStopped(signal).then((outcome) => {
      onPhase!({ name: 'guest', start, end: preciseNow(), error: 'stopped' })
      onPhase!({
        name: 'GET',
        kind: 'client',
        start,
        end: preciseNow(),
        spanId: 'aaaaaaaaaaaaaaaa',
        error: 'cut',
      })
      return outcome
    })
  })
  const id = await submit(on, { limits: { timeout_s: 1 } })
  await untilEnd(on.bus, id)
  const trace = await on.otlp.trace(traceId, isDone('failed'))
  const run = trace.one('run')
  assert.equal([run.status.code, run.attributes['error.type']], ['error', 'timeout'])
  assert.match(run.status.message, 'longer than its limit of 1 s')
  assert.equal(
    run.events.map(({ name }) => name),
    ['timeout'],
  )
  assert.ok(run.events[0]!.at >= run.start + 900 && run.events[0]!.at <= run.end)
  const process = trace.one('process vulcan.work')
  assert.equal(
    [process.attributes['vulcan.status'], process.attributes['vulcan.cause']],
    ['failed', 'timeout'],
  )
  assert.is(trace.one('guest', run).attributes['error.type'], 'timeout')
  const fetch = trace.one('GET', run)
  assert.equal([fetch.kind, fetch.status.code, fetch.status.message], ['client', 'error', 'cut'])
})

test('a kill is read off its run, and its end links to who asked for it', async () => {
  await using on = await traced((_job, signal) => untilStopped(signal))
  const id = await submit(on)
  await until('the run', () => on.worker.runner.ran.length > 0 || undefined)
  const request = JSON.stringify({ action: 'kill', traceparent: `00-${traceId}-${killSpan}-01` })
  assert.ok(await on.bus.ask(controlSubject(id), request, 2_000))
  const end = await untilEnd(on.bus, id)
  const trace = await on.otlp.trace(traceId, isDone('killed'))
  const run = trace.one('run')
  assert.equal([run.status.code, run.attributes['error.type']], ['error', 'killed'])
  assert.equal(
    run.events.map(({ name }) => name),
    ['kill'],
  )
  assert.equal(links(trace.one('publish killed')), [killSpan])
  assert.is(idOf(end.traceparent), trace.one('publish killed').spanId)
})

test('who takes over from a lost runner says so under the accepted event, with a link to the lost attempt', async () => {
  await using scope = new AsyncDisposableStack()
  const on = scope.use(await ground({ ackWaitMs: 1_000 }))
  const otlp = scope.use(await startOtlp())
  const log = pino({ level: 'silent' })
  const telemetry = TelemetryOptions.parse({ endpoint: otlp.url, delayMs: 50 })
  const tracing = scope.use(await startTracing(telemetry, { service: 'vulcan-runner', id: 'r2', log }))
  const dying = await startWorker(on, (_job, signal) => untilStopped(signal))
  const id = await submit(on)
  await until('the run', () => dying.runner.ran.length > 0 || undefined)
  await dying.die()
  scope.defer(() => dying[Symbol.asyncDispose]())
  scope.use(await startWorker(on, () => completed(), { tracing }))
  await untilEnd(on.bus, id, 60_000)
  const trace = await otlp.trace(traceId, isDone('completed'))
  const lost = trace.one('publish retrying')
  const [accepted, started, retrying] = await eventsOf(on, id)
  // Of a worker without tracing: all its events carry the accepted event's.
  assert.equal([accepted!.traceparent, started!.traceparent], [sampled, sampled])
  assert.equal([lost.parentSpanId, links(lost)], [gatewaySpan, [gatewaySpan]])
  assert.equal([lost.status.code, lost.attributes['error.type']], ['error', 'runner_lost'])
  assert.is(idOf(retrying!.traceparent), lost.spanId)
  const process = trace.one('process vulcan.work')
  assert.equal([process.attributes['vulcan.attempt'], links(process)], [2, [lost.spanId]])
  assert.is(process.attributes['vulcan.deliveries'], 3)
})

test('a call by HTTP finds its run in its headers; its status and first byte stand on the spans', async () => {
  let seen: unknown
  await using on = await traced(async (job, _signal, _log, respond) => {
    seen = job.http!.headers
    const sink = respond({ status: 418, headers: [] })
    await sink.write(Buffer.from('short and stout'))
    sink.end()
    return completed()
  })
  const http = { method: 'GET', url: 'http://h/fn/a', headers: [], sealed: null, body: null, gateway: null }
  const id = await submit(on, {}, { http })
  await untilEnd(on.bus, id)
  const trace = await on.otlp.trace(traceId, isDone('completed'))
  const run = trace.one('run')
  assert.equal(seen, [['traceparent', `00-${traceId}-${run.spanId}-01`]])
  const { attributes } = trace.one('process vulcan.work')
  assert.equal([attributes['faas.trigger'], attributes['http.response.status_code']], ['http', 418])
  assert.equal(
    run.events.map(({ name }) => name),
    ['response'],
  )
})

test('what cannot run has no run, and its attempt says why', async () => {
  await using on = await traced(() => completed())
  const id = await submit(on, { secrets: ['NOWHERE'] })
  await untilEnd(on.bus, id)
  const trace = await on.otlp.trace(traceId, isDone('failed'))
  const process = trace.one('process vulcan.work')
  assert.equal(names(trace.under(process)), ['publish started', 'publish failed'])
  assert.equal([process.status.code, process.attributes['error.type']], ['error', 'invalid_workload'])
})

test('values of secrets stand in no span, however user code writes them', async () => {
  const secret = 'sup3r/s3cret'
  await using on = await traced((_job, _signal, _log, _respond, onPhase) => {
    const at = { start: preciseNow(), end: preciseNow() }
    onPhase!({
      ...at,
      name: `call ${secret}`,
      spanId: 'aaaaaaaaaaaaaaaa',
      attributes: {
        'error.type': `E ${secret}`,
        token: secret,
        'url.full': `https://example.com/${encodeURIComponent(secret)}/x`,
      },
      error: `refused ${secret}`,
    })
    return failed('user_error', `refused ${secret}`)
  })
  const secrets = await Secrets.open(on.bus, 1, await testBox())
  await secrets.put('TOKEN', secret)
  const id = await submit(on, { secrets: ['TOKEN'] })
  await untilEnd(on.bus, id)
  const trace = await on.otlp.trace(traceId, isDone('failed'))
  const span = trace.one('call [redacted: TOKEN]')
  assert.equal(
    [span.attributes.token, span.attributes['url.full'], span.status.message],
    ['[redacted: TOKEN]', 'https://example.com/[redacted: TOKEN]/x', 'refused [redacted: TOKEN]'],
  )
  const all = JSON.stringify(trace.spans)
  assert.match(all, 'redacted: TOKEN')
  assert.not.match(all, 's3cret')
  secrets.close()
})

const phases: Code = (job, _signal, _log, _respond, onPhase) => {
  const now = preciseNow()
  onPhase!({ name: 'guest', start: now - 1, end: now })
  return job.attempt === 1 && job.input === '1' ? failed('user_error') : completed()
}

test('of a trace that is not sampled only failures are exported, whole', async () => {
  await using on = await traced(phases)
  await untilEnd(on.bus, await submit(on, { input: 0 }, {}, unsampled))
  const other = unsampled.replace(traceId, 'f'.repeat(32))
  await untilEnd(on.bus, await submit(on, { input: 1 }, {}, other))
  const trace = await on.otlp.trace('f'.repeat(32), isDone('failed'))
  assert.equal(names([...trace.spans]).sort(), [
    ...['guest', 'process vulcan.work', 'publish failed', 'publish started', 'queue', 'run'],
  ])
  assert.is(on.otlp.of(traceId).length, 0)
})

test('where failures are not kept either, an unsampled trace is passed on as it came', async () => {
  let job: { traced: unknown; traceparent: unknown } | undefined
  await using on = await traced(
    (one, _signal, _log, _respond, onPhase) => {
      job = { traced: one.traced, traceparent: one.traceparent }
      assert.is(onPhase, undefined)
      return failed('user_error')
    },
    { failures: 'off' },
  )
  const id = await submit(on, {}, {}, unsampled)
  await untilEnd(on.bus, id)
  assert.equal(job, { traced: false, traceparent: unsampled })
  for (const event of await eventsOf(on, id)) assert.is(event.traceparent, unsampled)
  await untilEnd(on.bus, await submit(on, {}, {}, sampled.replace(traceId, 'e'.repeat(32))))
  await on.otlp.trace('e'.repeat(32), isDone('failed'))
  assert.is(on.otlp.of(traceId).length, 0)
})

test('with tracing off nothing is measured, and every event carries the accepted one’s traceparent', async () => {
  await using on = await ground()
  let seen: unknown[] = []
  await using _ = await startWorker(on, (job, _signal, log, _respond, onPhase) => {
    seen = [job.traced, job.traceparent, onPhase]
    log(line('a line'))
    return completed()
  })
  const id = await submit(on)
  await untilEnd(on.bus, id)
  assert.equal(seen, [false, sampled, undefined])
  const events = await eventsOf(on, id)
  assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'started', 'completed'])
  for (const event of events) assert.is(event.traceparent, sampled)
})

test('an end that comes late says so, and is counted as late', async () => {
  let release = () => {}
  const held = new Promise<void>((resolve) => {
    release = resolve
  })
  await using on = await traced(() => held.then(() => completed()))
  const id = await submit(on)
  await until('the run', () => on.worker.runner.ran.length > 0 || undefined)
  const last = (await history(on.bus, id)).at(-1)!
  const ended = bareEnd('failed', id, { attempt: 1, runner: null, cause: 'runner_lost' })
  assert.ok((await on.bus.publishEvent(eventSubject(id, 'failed'), ended, last.seq)).stored)
  release()
  const trace = await on.otlp.trace(traceId, isDone('completed'))
  assert.is(trace.one('publish completed').attributes['vulcan.late'], true)
  assert.match(await on.metrics.registry.metrics(), /vulcan_attempts_total{[^}]*status="late"[^}]*} 1/)
})

test('what a lane holds back for its rate is waited for in the attempt, not in the queue', async () => {
  await using on = await traced(() => completed())
  const registry = await Registry.open(on.bus, 1)
  const lane = Lane.parse({
    lane: 'fn-slow',
    isolation: 'isolate',
    function: 'slow',
    concurrency: null,
    rate: { limit: 15, per_s: 1, burst: 1 },
  })
  await ensureLane(on.bus.jsm, on.topology, lane)
  await registry.putLane(lane)
  const ids = [await submit(on, {}, { target: lane.lane }), await submit(on, {}, { target: lane.lane })]
  for (const id of ids) await untilEnd(on.bus, id)
  const trace = await on.otlp.trace(traceId, (t) => t.all('publish completed').length === 2)
  assert.ok(trace.all('wait for turn').length >= 1)
  for (const wait of trace.all('wait for turn')) {
    const process = trace.parent(wait)!
    assert.is(process.name, 'process vulcan.work')
    assert.is(wait.start, process.start)
  }
  registry.close()
})

test('code that is in memory is not fetched again, and its absence is a failed fetch', async () => {
  await using on = await traced(() => completed())
  const blob = await on.blobs.put(Buffer.from('export default 1'))
  for (let i = 0; i < 2; i++) await untilEnd(on.bus, await submit(on, {}, { bundle: { ...blob, map: null } }))
  const gone = { blob: digestOf('never stored'), size: 1, map: null }
  await untilEnd(on.bus, await submit(on, {}, { bundle: gone }))
  const trace = await on.otlp.trace(traceId, (t) => t.all('process vulcan.work').length === 3)
  const fetches = trace.all('fetch bundle')
  assert.equal(
    fetches.map(({ status }) => status.code),
    ['unset', 'error'],
  )
  const text = await on.metrics.registry.metrics()
  assert.match(text, /vulcan_cold_start_phase_seconds_count{[^}]*phase="fetch bundle"[^}]*} 2/)
})

test('attempts, deliveries and lines are counted', async () => {
  await using on = await traced((job, _signal, log) => {
    log(line('one'))
    log(line('two'))
    return job.input === '1' ? failed('user_error') : completed()
  })
  for (const input of [0, 1, 0]) await untilEnd(on.bus, await submit(on, { input }))
  const text = await on.metrics.registry.metrics()
  for (const pattern of [
    /vulcan_deliveries_total{[^}]*delivery="first"[^}]*} 3/,
    /vulcan_attempts_total{[^}]*status="completed"[^}]*} 2/,
    /vulcan_attempts_total{[^}]*status="failed",cause="user_error"[^}]*} 1/,
    /vulcan_log_lines_total{[^}]*} 6/,
  ])
    assert.match(text, pattern)
})

test.run()
