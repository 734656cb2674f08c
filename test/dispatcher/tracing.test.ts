import { rm } from 'node:fs/promises'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { startTracing, TelemetryOptions } from '../../shared/telemetry.ts'
import { newSpanId } from '../../shared/trace.ts'
import type { Tracing } from '../../shared/tracing.ts'
import { startOtlp } from '../otlp.ts'
import { folded, makeWorld, origin, silent, until } from './support.ts'

const process = { service: 'vulcan-dispatcher', id: 'dispatcher-1', log: silent } as const
const tracingTo = (endpoint: string): Promise<Tracing> =>
  startTracing(TelemetryOptions.parse({ endpoint, delayMs: 50 }), process)

/** A trace of somebody else’s, with the traceparent of one of its spans. */
function traceOf(flags: '00' | '01') {
  const traceId = newSpanId() + newSpanId()
  return { traceId, next: () => `00-${traceId}-${newSpanId()}-${flags}` }
}

test('each end has one span of its fold, under what published it, also where the database is made anew', async () => {
  await using world = await makeWorld()
  await using otlp = await startOtlp()
  await using tracing = await tracingTo(otlp.url)
  const { publish, bus, dir } = world
  const dispatcher = await world.dispatcher({ tracing, id: process.id })
  await until('events followed', () => dispatcher.live.events.lag !== undefined)

  const good = traceOf('01')
  publish.origin = { ...origin, traceparent: good.next() }
  const id = await publish.accepted()
  await publish.started(id)
  const published = good.next()
  publish.origin = { ...origin, traceparent: published }
  const before = Date.now()
  await publish.ended(id)
  const bad = traceOf('01')
  publish.origin = { ...origin, traceparent: bad.next() }
  const error = { message: 'it took too long', stack: null }
  const failed = await publish.run({}, { cause: 'timeout', error, output: null }, 'failed')
  await folded(dispatcher, bus)

  const trace = await otlp.trace(good.traceId, (found) => found.has('fold vulcan.events'))
  const fold = trace.one('fold vulcan.events')
  assert.is(fold.parentSpanId, published.slice(36, 52))
  assert.is(fold.kind, 'consumer')
  assert.is(fold.service, 'vulcan-dispatcher')
  assert.is(fold.resource['service.instance.id'], process.id)
  assert.is(fold.status.code, 'unset')
  assert.ok(before <= fold.start + 5 && fold.start <= fold.end && fold.end <= Date.now() + 5)
  const { 'messaging.batch.message_count': batch, ...attributes } = fold.attributes
  assert.ok(Number(batch) >= 1)
  assert.equal(attributes, {
    'messaging.system': 'nats',
    'messaging.operation.name': 'fold',
    'messaging.operation.type': 'process',
    'messaging.destination.name': 'vulcan.events',
    'messaging.message.id': `${id}.completed.1`,
    'vulcan.workload.id': id,
    'vulcan.status': 'completed',
  })
  const failure = await otlp.trace(bad.traceId, (found) => found.has('fold vulcan.events'))
  const failedFold = failure.one('fold vulcan.events')
  assert.equal(failedFold.status, { code: 'error', message: 'it took too long' })
  assert.is(failedFold.attributes['error.type'], 'timeout')
  assert.is(failedFold.attributes['vulcan.cause'], 'timeout')
  assert.is(failedFold.attributes['vulcan.workload.id'], failed)

  await rm(join(dir, 'vulcan.db'))
  await until(
    'the loss noticed',
    () => dispatcher.live.database === undefined || dispatcher.live.events.seq === 0,
  )
  const later = traceOf('01')
  publish.origin = { ...origin, traceparent: later.next() }
  await publish.run()
  await folded(dispatcher, bus)
  await otlp.trace(later.traceId, (found) => found.has('fold vulcan.events'))
  assert.is(otlp.spans.length, 3)
})

test('of traces that are not sampled only failures are exported', async () => {
  await using world = await makeWorld()
  await using otlp = await startOtlp()
  await using tracing = await tracingTo(otlp.url)
  const { publish, bus } = world
  const dispatcher = await world.dispatcher({ tracing })
  await until('events followed', () => dispatcher.live.events.lag !== undefined)
  const good = traceOf('00')
  publish.origin = { ...origin, traceparent: good.next() }
  await publish.run()
  const bad = traceOf('00')
  publish.origin = { ...origin, traceparent: bad.next() }
  await publish.run({}, { cause: 'oom', output: null }, 'failed')
  publish.origin = origin
  await publish.run({}, { cause: 'oom', output: null }, 'failed')
  await folded(dispatcher, bus)
  const failure = await otlp.trace(bad.traceId, (found) => found.has('fold vulcan.events'))
  assert.is(failure.one('fold vulcan.events').attributes['error.type'], 'oom')
  assert.equal(otlp.of(good.traceId), [])
  assert.is(otlp.spans.length, 1)
})

test('what a lost runner had is ended in the trace: linked to the attempt, the end under it', async () => {
  await using world = await makeWorld()
  await using otlp = await startOtlp()
  await using tracing = await tracingTo(otlp.url)
  const { publish, bus } = world
  const dispatcher = await world.dispatcher({ tracing, lostAfterMs: 800, sweepMs: 200 })
  await until('events followed', () => dispatcher.live.events.lag !== undefined)
  const lose = async (attempts: number) => {
    const { traceId, next } = traceOf('01')
    const accepted = next()
    publish.origin = { ...origin, traceparent: accepted }
    const id = await publish.accepted({}, { spec: { retry: { max_attempts: attempts } } })
    const started = next()
    publish.origin = { ...origin, traceparent: started }
    await publish.started(id, 1, 'gone')
    return { id, traceId, accepted: accepted.slice(36, 52), started: started.slice(36, 52) }
  }
  const spent = await lose(1)
  const left = await lose(2)

  const over = await otlp.trace(
    spent.traceId,
    (found) => found.has('fold vulcan.events') && found.has('publish failed'),
  )
  const end = over.one('publish failed')
  assert.is(end.kind, 'producer')
  assert.is(end.parentSpanId, spent.accepted)
  assert.equal(
    end.links.map(({ traceId, spanId }) => [traceId, spanId]),
    [[spent.traceId, spent.started]],
  )
  assert.equal(end.status, { code: 'error', message: 'runner gone was lost while it ran' })
  assert.is(end.attributes['error.type'], 'runner_lost')
  assert.is(end.attributes['messaging.operation.type'], 'send')
  assert.is(end.attributes['vulcan.runner'], 'gone')
  assert.is(over.one('fold vulcan.events').parentSpanId, end.spanId)
  const stored = (await bus.lastEvent(spent.id))!.event
  assert.is(stored.traceparent, `00-${spent.traceId}-${end.spanId}-01`)

  const back = await otlp.trace(left.traceId, (found) => found.has('publish retrying'))
  const retry = back.one('publish retrying')
  assert.is(retry.parentSpanId, left.accepted)
  assert.is(retry.links[0]?.spanId, left.started)
  assert.is(retry.attributes['error.type'], 'runner_lost')
  const retrying = (await bus.lastEvent(left.id))!.event
  assert.is(retrying.type, 'vulcan.workload.retrying')
  assert.is(retrying.traceparent, `00-${left.traceId}-${retry.spanId}-01`)
  const { not_before } = retrying.data as { not_before: string }
  assert.equal(
    retry.events.map(({ name, attributes }) => [name, attributes]),
    [['retry', { 'vulcan.not_before': not_before }]],
  )
  assert.is(back.has('fold vulcan.events'), false, 'it has not ended')
})

test('untraced, what a lost runner had goes on in the caller’s trace', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  await world.dispatcher({ lostAfterMs: 800, sweepMs: 200 })
  const { next } = traceOf('00')
  const traceparent = next()
  publish.origin = { ...origin, traceparent }
  const id = await publish.accepted({}, { spec: { retry: { max_attempts: 1 } } })
  await publish.started(id, 1, 'gone')
  const end = await until('the end', async () => {
    const last = (await bus.lastEvent(id))!.event
    return last.type === 'vulcan.workload.failed' && last
  })
  assert.is(end.traceparent, traceparent)
})

test.run()
