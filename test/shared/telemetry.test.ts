import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import pino from 'pino'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { startTracing, TelemetryOptions } from '../../shared/telemetry.ts'
import { isSampled, newSpanId, spanIdOf, traceIdOf } from '../../shared/trace.ts'
import { preciseNow, type Tracing, tracingOff } from '../../shared/tracing.ts'
import { startOtlp } from '../otlp.ts'

const traced = { service: 'vulcan-runner', id: 'isolate-test', log: pino({ level: 'silent' }) } as const
const start = (options: Partial<TelemetryOptions>, log = traced.log): Promise<Tracing> =>
  startTracing(TelemetryOptions.parse(options), { ...traced, log })

const traceId = '0af7651916cd43dd8448eb211c80319c'
const caller = (flags: string) => `00-${traceId}-b7ad6b7169203331-${flags}`

test('without an endpoint nothing is traced, and the caller’s trace goes through', async () => {
  for (const options of [
    {},
    { endpoint: 'http://127.0.0.1:9', disabled: true },
    { endpoint: 'http://127.0.0.1:9', exporter: 'none' as const },
  ])
    assert.is(
      await startTracing(
        TelemetryOptions.parse({ ...options, disabled: String(options.disabled ?? false) }),
        traced,
      ),
      tracingOff,
    )
  const server = tracingOff.begin('GET', { kind: 'server', parent: caller('01') })
  assert.is(traceIdOf(server.traceparent), traceId)
  assert.ok(isSampled(server.traceparent))
  assert.is.not(spanIdOf(server.traceparent), 'b7ad6b7169203331')
  const below = tracingOff.begin('publish', { kind: 'producer', parent: server.traceparent })
  assert.is(below.traceparent, server.traceparent)
  assert.is(below.recording, false)
})

test('a span arrives as it was: ids, kind, times, attributes, events, links, status, resource', async () => {
  await using otlp = await startOtlp()
  const began = preciseNow() - 50
  const link = `00-${'c'.repeat(32)}-${'d'.repeat(16)}-00`
  const spanId = newSpanId()
  {
    await using tracing = await start({ endpoint: `${otlp.url}/`, resourceAttributes: 'team=a%20b,broken%' })
    const span = tracing.begin('process vulcan.work', {
      kind: 'consumer',
      parent: caller('01'),
      links: [link, undefined, 'nonsense'],
      attributes: { 'messaging.system': 'nats', 'vulcan.attempt': 2, 'vulcan.nothing': undefined },
      at: began,
    })
    assert.is(traceIdOf(span.traceparent), traceId)
    assert.ok(span.recording && isSampled(span.traceparent))
    span.set({ 'vulcan.walls': ['a', 'b'], 'faas.coldstart': true, 'vulcan.ratio': 0.5 })
    span.event('retry', { 'vulcan.not_before': 'then' }, began + 10)
    span.fail('timeout', 'ran longer than its limit')
    span.end(began + 20)
    tracing.begin('guest', { kind: 'internal', parent: span.traceparent, spanId, at: began }).end(began + 1)
  }
  const [span, below] = otlp.spans
  assert.is(otlp.spans.length, 2)
  assert.is(span!.traceId, traceId)
  assert.is(span!.parentSpanId, 'b7ad6b7169203331')
  assert.is(span!.kind, 'consumer')
  assert.ok(Math.abs(span!.start - began) < 0.01 && Math.abs(span!.end - began - 20) < 0.01)
  assert.equal(span!.attributes, {
    'messaging.system': 'nats',
    'vulcan.attempt': 2,
    'vulcan.walls': ['a', 'b'],
    'faas.coldstart': true,
    'vulcan.ratio': 0.5,
    'error.type': 'timeout',
  })
  assert.is(span!.events.length, 1)
  assert.is(span!.events[0]!.name, 'retry')
  assert.ok(Math.abs(span!.events[0]!.at - began - 10) < 0.01)
  assert.equal(
    span!.links.map((one) => [one.traceId, one.spanId]),
    [['c'.repeat(32), 'd'.repeat(16)]],
  )
  assert.equal(span!.status, { code: 'error', message: 'ran longer than its limit' })
  assert.is(below!.spanId, spanId)
  assert.is(below!.parentSpanId, span!.spanId)
  assert.is(span!.service, 'vulcan-runner')
  assert.is(span!.resource['service.instance.id'], 'isolate-test')
  assert.is(span!.resource['service.namespace'], 'vulcan')
  assert.is(span!.resource.team, 'a b')
  assert.is(span!.resource['telemetry.sdk.name'], 'opentelemetry')
})

test('a span without a parent, or under what is none, begins a trace', async () => {
  await using otlp = await startOtlp()
  {
    await using tracing = await start({ endpoint: otlp.url })
    for (const parent of [undefined, '', 'nonsense', `00-${'0'.repeat(32)}-${'1'.repeat(16)}-01`])
      tracing.begin('GET', { kind: 'server', parent }).end()
  }
  assert.is(new Set(otlp.spans.map((span) => span.traceId)).size, 4)
  assert.ok(otlp.spans.every((span) => span.parentSpanId === undefined && !/^0+$/.test(span.traceId)))
})

test('the whole URL for traces, and the exporter’s headers, are taken from the environment', async () => {
  await using otlp = await startOtlp()
  process.env.OTEL_EXPORTER_OTLP_HEADERS = 'x-team=a'
  try {
    await using tracing = await start({
      endpoint: 'http://127.0.0.1:9',
      tracesEndpoint: `${otlp.url}/v1/traces`,
    })
    tracing.begin('GET', { kind: 'server' }).end()
  } finally {
    delete process.env.OTEL_EXPORTER_OTLP_HEADERS
  }
  assert.is(otlp.spans.length, 1)
  assert.is(otlp.requests[0]!['x-team'], 'a')
})

/** How many of `roots` traces, and of those that go on with the caller’s flags, arrive. */
async function arriving(
  options: Partial<TelemetryOptions>,
): Promise<Record<'roots' | 'sampled' | 'unsampled', number>> {
  await using otlp = await startOtlp()
  {
    await using tracing = await start({ endpoint: otlp.url, ...options })
    for (let i = 0; i < 200; i++) tracing.begin('root', { kind: 'server' }).end()
    tracing.begin('sampled', { kind: 'server', parent: caller('01') }).end()
    tracing.begin('unsampled', { kind: 'server', parent: caller('00') }).end()
  }
  const count = (name: string) => otlp.spans.filter((span) => span.name === name).length
  return { roots: count('root'), sampled: count('sampled'), unsampled: count('unsampled') }
}

test('samplers are those of the specification', async () => {
  assert.equal(await arriving({}), { roots: 200, sampled: 1, unsampled: 0 })
  assert.equal(await arriving({ sampler: 'always_on' }), { roots: 200, sampled: 1, unsampled: 1 })
  assert.equal(await arriving({ sampler: 'always_off' }), { roots: 0, sampled: 0, unsampled: 0 })
  assert.equal(await arriving({ sampler: 'parentbased_always_off' }), { roots: 0, sampled: 1, unsampled: 0 })
  const half = await arriving({ sampler: 'parentbased_traceidratio', samplerArg: 0.5 })
  assert.ok(half.roots > 40 && half.roots < 160, String(half.roots))
  assert.is(half.sampled, 1)
})

test('a trace that fails is exported though it is not sampled: what has ended, what is open, what comes later', async () => {
  await using otlp = await startOtlp()
  {
    await using tracing = await start({ endpoint: otlp.url, sampler: 'always_off' })
    const good = tracing.begin('good', { kind: 'server' })
    tracing.begin('good part', { kind: 'internal', parent: good.traceparent }).end()

    const root = tracing.begin('root', { kind: 'server' })
    assert.is(isSampled(root.traceparent), false)
    const attempt = tracing.begin('attempt 1', { kind: 'consumer', parent: root.traceparent })
    tracing.begin('earlier', { kind: 'internal', parent: attempt.traceparent }).end()
    attempt.fail('oom')
    tracing.begin('later', { kind: 'internal', parent: attempt.traceparent }).end()
    attempt.end()
    root.end()
    // All spans of the trace have ended here; it goes on.
    const next = tracing.begin('attempt 2', { kind: 'consumer', parent: root.traceparent })
    next.end()
    good.end()
  }
  assert.equal(otlp.spans.map((span) => span.name).toSorted(), [
    'attempt 1',
    'attempt 2',
    'earlier',
    'later',
    'root',
  ])
  assert.is(new Set(otlp.spans.map((span) => span.traceId)).size, 1)
  const byName = new Map(otlp.spans.map((span) => [span.name, span]))
  assert.is(byName.get('earlier')!.parentSpanId, byName.get('attempt 1')!.spanId)
  assert.is(byName.get('attempt 1')!.parentSpanId, byName.get('root')!.spanId)
  assert.ok(otlp.spans.every((span) => span.sampled))
})

test('with failures off, what is not sampled is not recorded: what follows stands under the parent', async () => {
  await using otlp = await startOtlp()
  {
    await using tracing = await start({ endpoint: otlp.url, failures: 'off' })
    assert.ok(tracing.on)
    const server = tracing.begin('GET', { kind: 'server', parent: caller('00') })
    assert.is(server.recording, false)
    assert.is(traceIdOf(server.traceparent), traceId)
    assert.is.not(spanIdOf(server.traceparent), 'b7ad6b7169203331')
    const below = tracing.begin('publish', { kind: 'producer', parent: server.traceparent })
    assert.is(below.traceparent, server.traceparent)
    below.fail('internal')
    below.end()
    server.end()
  }
  assert.is(otlp.spans.length, 0)
})

test('what is kept is bounded: the oldest traces are let go, the newest are there', async () => {
  await using otlp = await startOtlp()
  {
    await using tracing = await start({ endpoint: otlp.url, sampler: 'always_off' })
    const open = Array.from({ length: 12_000 }, (_, i) => tracing.begin(`trace ${i}`, { kind: 'server' }))
    for (const span of open.filter((_, i) => i < 10 || i >= 11_990)) {
      span.fail('internal')
      span.end()
    }
  }
  const names = otlp.spans.map((span) => span.name).toSorted()
  assert.equal(
    names,
    Array.from({ length: 10 }, (_, i) => `trace ${11_990 + i}`),
  )
})

test('texts are cut: attributes at 4096 characters, messages at 1024', async () => {
  await using otlp = await startOtlp()
  {
    await using tracing = await start({ endpoint: otlp.url })
    const span = tracing.begin('GET', { kind: 'server', attributes: { long: 'x'.repeat(10_000) } })
    span.fail('500', 'y'.repeat(10_000))
    span.end()
  }
  const [span] = otlp.spans
  assert.is((span!.attributes.long as string).length, 4_096)
  assert.is(span!.status.message.length, 1_024)
})

/** What a logger at `warn` writes. */
function logged() {
  const lines: { msg: string; reason: string }[] = []
  return {
    lines,
    log: pino({ level: 'warn' }, { write: (line: string) => void lines.push(JSON.parse(line)) }),
  }
}

test('a receiver that never answers holds the end of a process for seconds at most', async () => {
  const hanging = createServer(() => {})
  hanging.listen(0, '127.0.0.1')
  await once(hanging, 'listening')
  const tracing = await start({ endpoint: `http://127.0.0.1:${(hanging.address() as AddressInfo).port}` })
  tracing.begin('GET', { kind: 'server' }).end()
  const began = performance.now()
  await tracing[Symbol.asyncDispose]()
  assert.ok(performance.now() - began < 10_000)
  hanging.closeAllConnections()
  hanging.close()
})

test('a receiver that refuses is told of in the log, once and not for every batch', async () => {
  await using otlp = await startOtlp()
  otlp.answer(400)
  const { lines, log } = logged()
  {
    await using tracing = await start({ endpoint: otlp.url, delayMs: 20 }, log)
    for (let i = 0; i < 20; i++) {
      tracing.begin('GET', { kind: 'server' }).end()
      await delay(30)
    }
  }
  assert.ok(lines.length >= 1 && lines.length < 5, JSON.stringify(lines))
})

test('more spans than may wait are dropped, and the log says so', async () => {
  await using otlp = await startOtlp()
  const { lines, log } = logged()
  {
    await using tracing = await start(
      { endpoint: otlp.url, queueSize: 100, batchSize: 50, delayMs: 60_000 },
      log,
    )
    for (let i = 0; i < 5_000; i++) tracing.begin('GET', { kind: 'server' }).end()
    await delay(500)
    tracing.begin('GET', { kind: 'server' }).end()
  }
  assert.ok(otlp.spans.length < 5_000)
  assert.ok(
    lines.some(({ reason }) => /Dropped \d+ spans/.test(reason)),
    JSON.stringify(lines),
  )
})

test('bad variables are refused by name', () => {
  const refused = (options: Record<string, string>) =>
    TelemetryOptions.safeParse(options).error?.issues.map(({ path }) => path[0])
  assert.equal(refused({ endpoint: 'collector:4318' }), ['endpoint'])
  assert.equal(refused({ protocol: 'grpc' }), ['protocol'])
  assert.equal(refused({ sampler: 'jaeger_remote' }), ['sampler'])
  assert.equal(refused({ samplerArg: '2' }), ['samplerArg'])
  assert.is(refused({ endpoint: 'https://collector.example:4318', protocol: 'http/protobuf' }), undefined)
})

test('the precise clock is the system’s', async () => {
  for (let i = 0; i < 3; i++) {
    assert.ok(Math.abs(preciseNow() - Date.now()) < 1_000)
    await delay(10)
  }
  const first = preciseNow()
  await delay(20)
  assert.ok(preciseNow() - first >= 15)
})

test.run()
