import { type Attributes, ROOT_CONTEXT, SpanKind, SpanStatusCode, trace } from '@opentelemetry/api'
import { ProtobufTraceSerializer } from '@opentelemetry/otlp-transformer'
import { resourceFromAttributes } from '@opentelemetry/resources'
import {
  InMemorySpanExporter,
  type ReadableSpan,
  SimpleSpanProcessor,
  TracerProvider,
} from '@opentelemetry/sdk-trace'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { encodeSpans } from '../../shared/otlp.ts'
import { decodeTraces } from '../otlp.ts'
import { seeded } from './support.ts'

const seed = Number(process.env.SEED ?? Date.now() % 1_000_000)

/** What a tracer of the SDK makes, and the spans that have ended. */
function recorder(resource: Attributes = { 'service.name': 'vulcan-test', 'process.pid': 7 }) {
  const memory = new InMemorySpanExporter()
  const provider = new TracerProvider({
    resource: resourceFromAttributes(resource),
    spanLimits: { eventCountLimit: 3, linkCountLimit: 3, attributeCountLimit: 20 },
    spanProcessors: [new SimpleSpanProcessor({ exporter: memory })],
  })
  return { tracer: provider.getTracer('vulcan'), spans: () => memory.getFinishedSpans() }
}

/** The SDK’s own serializer is the measure. */
function same(spans: ReadableSpan[], message?: string): void {
  const theirs = decodeTraces(ProtobufTraceSerializer.serializeRequest(spans)!)
  assert.is(theirs.length, spans.length, message)
  assert.ok(spans.length > 0)
  assert.equal(decodeTraces(encodeSpans(spans)), theirs, message)
}

const values: Attributes[string][] = [
  '',
  'plain',
  'é',
  'ein längerer Text, der über achtundvierzig Zeichen hat: ✓ und 😀',
  'x'.repeat(127),
  'x'.repeat(128),
  'x'.repeat(20_000),
  '\ud800 alone',
  true,
  false,
  0,
  -0,
  1,
  127,
  128,
  16_384,
  2 ** 31,
  2 ** 32 + 1,
  Number.MAX_SAFE_INTEGER,
  -1,
  -(2 ** 40),
  0.5,
  -1.25,
  1e300,
  [],
  ['a', 'é', ''],
  [1, 2.5, -3],
  [true, false],
]

test('each kind of value is encoded as the SDK does', () => {
  for (const value of values) {
    const { tracer, spans } = recorder()
    const span = tracer.startSpan('name', { attributes: { value } })
    span.end()
    same(spans(), JSON.stringify(value)?.slice(0, 60))
  }
})

test('whatever spans there are, they are encoded as the SDK does', () => {
  const random = seeded(seed)
  const pick = <T>(from: readonly T[]): T => from[Math.floor(random() * from.length)]!
  const hex = (length: number) =>
    Array.from({ length }, () => Math.floor(random() * 16).toString(16))
      .join('')
      .replace(/^0+$/, '1'.repeat(length))
  const context = () => ({
    traceId: hex(32),
    spanId: hex(16),
    traceFlags: random() < 0.5 ? 1 : 0,
    isRemote: random() < 0.5,
  })
  const attributes = (most: number): Attributes =>
    Object.fromEntries(
      Array.from({ length: Math.floor(random() * most) }, (_, i) => [
        pick(['a', 'ключ', 'long.name.of.it']) + i,
        pick(values),
      ]),
    )
  for (let round = 0; round < 20; round++) {
    const { tracer, spans } = recorder({ 'service.name': 'vulcan-tëst', ...attributes(4) })
    for (let i = Math.ceil(random() * 20); i > 0; i--) {
      const parent =
        random() < 0.3 ? ROOT_CONTEXT : trace.setSpanContext(ROOT_CONTEXT, { ...context(), traceFlags: 1 })
      const began = Date.now() - random() * 1e6
      const span = tracer.startSpan(
        pick(['', 'run', 'GET /v1/workloads/:id', 'ein Späher', 'n'.repeat(200)]),
        {
          kind: pick([
            SpanKind.INTERNAL,
            SpanKind.SERVER,
            SpanKind.CLIENT,
            SpanKind.PRODUCER,
            SpanKind.CONSUMER,
          ]),
          startTime: began,
          attributes: attributes(30),
          links: Array.from({ length: Math.floor(random() * 5) }, () => ({
            context: context(),
            attributes: attributes(3),
          })),
        },
        parent,
      )
      for (let n = Math.floor(random() * 5); n > 0; n--)
        span.addEvent(pick(['kill', 'tïmeout']), attributes(4), began + random())
      if (random() < 0.4)
        span.setStatus({
          code: SpanStatusCode.ERROR,
          ...(random() < 0.5 ? {} : { message: pick(['', 'broke', 'ö'.repeat(300)]) }),
        })
      span.end(began + random() * 1e5)
    }
    same(spans(), `seed ${seed}, round ${round}`)
  }
})

test('a batch of megabytes is whole', () => {
  const { tracer, spans } = recorder()
  for (let i = 0; i < 400; i++)
    tracer.startSpan(`span ${i}`, { attributes: { text: 'x'.repeat(i * 60), also: 'é'.repeat(i) } }).end()
  assert.ok(encodeSpans(spans()).byteLength > 2 ** 22)
  same(spans())
  // And what comes after it has nothing of it.
  same(spans().slice(0, 1))
})

test('nothing is no bytes', () => {
  assert.is(encodeSpans([]).byteLength, 0)
})

test.run()
