/**
 * OpenTelemetry behind `Tracing`: the SDK’s samplers, ids, batches and exporter (OTLP over HTTP, protobuf). The one
 * file that imports it, and only where an endpoint is configured. Spans are our own (`recorded.ts`), as is their
 * encoding (`otlp.ts`): the SDK’s take three times as long, on every call of a function.
 */
import { hostname } from 'node:os'
import type { Attributes as SpanAttributes } from '@opentelemetry/api'
import type { ReadableSpan, Sampler, SpanExporter } from '@opentelemetry/sdk-trace'
import { z } from 'zod'
import type { Service } from './metrics.ts'
import { encodeSpans, type SpanContext } from './otlp.ts'
import type { Logger } from './process.ts'
import { contextOf, KeptTraces, kinds, type Owner, RecordedSpan } from './recorded.ts'
import { type Attributes, passing, type Tracing, tracingOff } from './tracing.ts'

const none: Attributes = {}
const count = (preset: number) => z.coerce.number().int().positive().default(preset)
const HttpUrl = z.url({ protocol: /^https?$/, error: 'must be an http or https URL' })
const protocol = z.literal('http/protobuf', { error: 'must be http/protobuf' }).optional()

/**
 * The variables of the OpenTelemetry specification that are read here; headers, timeout, compression and certificates
 * of the exporter (`OTEL_EXPORTER_OTLP_…`) are read by the exporter itself.
 */
export const TelemetryOptions = z.object({
  /** Base URL of an OTLP/HTTP receiver; `/v1/traces` is added. Neither this nor the next: nothing is traced. */
  endpoint: HttpUrl.optional(),
  /** The whole URL for traces. */
  tracesEndpoint: HttpUrl.optional(),
  protocol,
  tracesProtocol: protocol,
  exporter: z.enum(['otlp', 'none']).default('otlp'),
  disabled: z.stringbool().default(false),
  sampler: z
    .enum([
      'always_on',
      'always_off',
      'traceidratio',
      'parentbased_always_on',
      'parentbased_always_off',
      'parentbased_traceidratio',
    ])
    .default('parentbased_always_on'),
  /** Share of traces, for the samplers with a ratio. */
  samplerArg: z.coerce.number().min(0).max(1).default(1),
  /** `name=value`, separated by commas, percent-encoded. */
  resourceAttributes: z.string().default(''),
  /** Milliseconds that spans wait for others to leave with. */
  delayMs: count(1_000),
  /** Spans that wait at most; more are dropped, and the log says how many. */
  queueSize: count(16_384),
  batchSize: count(512),
  /** Milliseconds for one batch. */
  timeoutMs: count(30_000),
  /** Whether traces that are not sampled are exported where they fail. */
  failures: z.enum(['on', 'off']).default('on'),
})
export type TelemetryOptions = z.infer<typeof TelemetryOptions>

/** Variable of each field, as `readConfig` takes them. */
export const telemetryVariables: Record<keyof TelemetryOptions, string> = {
  endpoint: 'OTEL_EXPORTER_OTLP_ENDPOINT',
  tracesEndpoint: 'OTEL_EXPORTER_OTLP_TRACES_ENDPOINT',
  protocol: 'OTEL_EXPORTER_OTLP_PROTOCOL',
  tracesProtocol: 'OTEL_EXPORTER_OTLP_TRACES_PROTOCOL',
  exporter: 'OTEL_TRACES_EXPORTER',
  disabled: 'OTEL_SDK_DISABLED',
  sampler: 'OTEL_TRACES_SAMPLER',
  samplerArg: 'OTEL_TRACES_SAMPLER_ARG',
  resourceAttributes: 'OTEL_RESOURCE_ATTRIBUTES',
  delayMs: 'OTEL_BSP_SCHEDULE_DELAY',
  queueSize: 'OTEL_BSP_MAX_QUEUE_SIZE',
  batchSize: 'OTEL_BSP_MAX_EXPORT_BATCH_SIZE',
  timeoutMs: 'OTEL_BSP_EXPORT_TIMEOUT',
  failures: 'VULCAN_TRACE_FAILURES',
}

export interface TracedProcess {
  service: Service
  /** The process’s id, as in events and heartbeats. */
  id: string
  log: Logger
}

/** Milliseconds that the end of a process waits for its last spans to leave. */
const flushMs = 2_000
/** Milliseconds between two words on the same trouble of the exporter. */
const sayAgainMs = 60_000
/** Characters of what the SDK says, in a line of the log. */
const longestMessage = 1_024

/** Where traces are sent; undefined: nowhere. */
function endpointOf({ endpoint, tracesEndpoint, exporter, disabled }: TelemetryOptions): string | undefined {
  if (disabled || exporter === 'none') return undefined
  if (tracesEndpoint !== undefined) return tracesEndpoint
  return endpoint === undefined ? undefined : `${endpoint.replace(/\/+$/, '')}/v1/traces`
}

/** The tracing of this process, once per process. Disposing it exports what is left, for at most 2 s. */
export async function startTracing(options: TelemetryOptions, traced: TracedProcess): Promise<Tracing> {
  const url = endpointOf(options)
  if (url === undefined) return tracingOff
  const [api, sdk, resources, exporter] = await Promise.all([
    import('@opentelemetry/api'),
    import('@opentelemetry/sdk-trace'),
    import('@opentelemetry/resources'),
    otlpExporter(url),
  ])
  api.diag.setLogger(troubleTeller(traced.log), {
    logLevel: api.DiagLogLevel.WARN,
    suppressOverrideMessage: true,
  })

  const resource = resources.defaultResource().merge(
    resources.resourceFromAttributes({
      'service.namespace': 'vulcan',
      'host.name': hostname(),
      'process.pid': process.pid,
      ...namedValues(options.resourceAttributes),
      'service.name': traced.service,
      'service.instance.id': traced.id,
    }),
  )
  const batches = new sdk.BatchSpanProcessor({
    exporter,
    scheduledDelayMillis: options.delayMs,
    maxQueueSize: Math.max(options.queueSize, options.batchSize),
    maxExportBatchSize: options.batchSize,
    exportTimeoutMillis: options.timeoutMs,
  })
  const kept = new KeptTraces((span) => batches.onEnd(span as ReadableSpan))
  const owner: Owner = { kept, resource, instrumentationScope: { name: 'vulcan' } }
  const ids = new sdk.RandomIdGenerator()
  const { based, root } = samplerOf(sdk, options)
  const failures = options.failures === 'on'
  const isSampled = (traceId: string, name: string, kind: number, attributes: Attributes): boolean =>
    root.shouldSample(api.ROOT_CONTEXT, traceId, name, kind, attributes as SpanAttributes, []).decision ===
    sdk.SamplingDecision.RECORD_AND_SAMPLED

  let lastParent = ''
  let lastContext: SpanContext | undefined
  /** Several spans in a row stand under the same one. */
  const contextOfParent = (parent: string): SpanContext | undefined => {
    if (parent !== lastParent) {
      lastContext = contextOf(parent)
      lastParent = parent
    }
    return lastContext
  }

  return {
    on: true,
    begin(name, begun) {
      const { kind, parent, attributes = none, spanId } = begun
      const above = parent === undefined ? undefined : contextOfParent(parent)
      const traceId = above?.traceId ?? ids.generateTraceId()
      const sampled =
        based && above !== undefined
          ? (above.traceFlags & 1) === 1
          : isSampled(traceId, name, kinds[kind], attributes)
      if (sampled || failures) {
        const context = { traceId, spanId: spanId ?? ids.generateSpanId(), traceFlags: sampled ? 1 : 0 }
        return new RecordedSpan(owner, name, begun, context, above)
      }
      return passing(
        kind === 'server' || above === undefined ? `00-${traceId}-${ids.generateSpanId()}-00` : parent!,
      )
    },
    async [Symbol.asyncDispose]() {
      // A receiver that is out of reach must not hold the process.
      const late = new Promise<void>((resolve) => setTimeout(resolve, flushMs).unref())
      await Promise.race([batches.shutdown().catch(() => {}), late])
    },
  }
}

/** The SDK’s exporter, with an encoder of our own. */
async function otlpExporter(url: string): Promise<SpanExporter> {
  const [{ OTLPExporterBase }, http, { ProtobufTraceSerializer, TraceExporterMetricsHelper }] =
    await Promise.all([
      import('@opentelemetry/otlp-exporter-base'),
      import('@opentelemetry/otlp-exporter-base/node-http'),
      import('@opentelemetry/otlp-transformer'),
    ])
  const headers = { 'Content-Type': 'application/x-protobuf' }
  const serializer: typeof ProtobufTraceSerializer = {
    serializeRequest: encodeSpans,
    deserializeResponse: ProtobufTraceSerializer.deserializeResponse,
  }
  return new OTLPExporterBase(
    http.createOtlpHttpExportDelegate(
      http.convertLegacyHttpOptions({ url }, 'TRACES', 'v1/traces', headers),
      serializer,
      'otlp_http_span_exporter',
      TraceExporterMetricsHelper,
      undefined,
    ),
  )
}

type Sdk = typeof import('@opentelemetry/sdk-trace')

/** `based`: where there is a parent, its decision holds. */
function samplerOf(sdk: Sdk, { sampler, samplerArg }: TelemetryOptions): { based: boolean; root: Sampler } {
  const based = sampler.startsWith('parentbased_')
  switch (sampler) {
    case 'always_on':
    case 'parentbased_always_on':
      return { based, root: new sdk.AlwaysOnSampler() }
    case 'always_off':
    case 'parentbased_always_off':
      return { based, root: new sdk.AlwaysOffSampler() }
    case 'traceidratio':
    case 'parentbased_traceidratio':
      return { based, root: new sdk.TraceIdRatioBasedSampler(samplerArg) }
    default:
      throw new Error(`unhandled ${sampler satisfies never}`)
  }
}

/** `OTEL_RESOURCE_ATTRIBUTES`; what cannot be decoded is left out. */
function namedValues(text: string): Record<string, string> {
  const found: Record<string, string> = {}
  for (const entry of text.split(',')) {
    const at = entry.indexOf('=')
    if (at <= 0) continue
    try {
      found[decodeURIComponent(entry.slice(0, at).trim())] = decodeURIComponent(entry.slice(at + 1).trim())
    } catch {}
  }
  return found
}

/** What the SDK has to say, in our log: while a receiver is away that is the same for every batch. */
function troubleTeller(log: Logger) {
  const said = new Map<string, number>()
  const say = (message: string) => {
    const kind = message.slice(0, 60)
    const now = performance.now()
    if (now - (said.get(kind) ?? Number.NEGATIVE_INFINITY) < sayAgainMs) return
    if (said.size > 100) said.clear()
    said.set(kind, now)
    log.warn({ reason: message.slice(0, longestMessage) }, 'traces')
  }
  const quiet = () => {}
  return { error: say, warn: say, info: quiet, debug: quiet, verbose: quiet }
}
