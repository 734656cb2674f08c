/**
 * A receiver of traces: OTLP over HTTP in protobuf, decoded by the field numbers of opentelemetry-proto 1.x
 * (`collector/trace/v1`, `trace/v1`, `common/v1`, `resource/v1`), and what tests ask of the spans it got.
 */
import { once } from 'node:events'
import { createServer, type IncomingMessage } from 'node:http'
import type { AddressInfo } from 'node:net'
import { buffer } from 'node:stream/consumers'
import { gunzipSync } from 'node:zlib'
import { PbfReader } from 'pbf'
import { until } from './shared/support.ts'

export type Value = string | number | boolean | Uint8Array | Value[] | { [key: string]: Value } | null
export type Values = Record<string, Value>

const kinds = ['unspecified', 'internal', 'server', 'client', 'producer', 'consumer'] as const
const statuses = ['unset', 'ok', 'error'] as const

export interface SpanEvent {
  name: string
  /** Milliseconds since the epoch, as all times here. */
  at: number
  attributes: Values
}

export interface SpanLink {
  traceId: string
  spanId: string
  attributes: Values
}

export interface ReceivedSpan {
  /** 32 hex digits; ids of spans have 16. */
  traceId: string
  spanId: string
  /** Undefined: it begins the trace. */
  parentSpanId: string | undefined
  /** The `sampled` flag. */
  sampled: boolean
  name: string
  kind: (typeof kinds)[number]
  start: number
  end: number
  attributes: Values
  events: SpanEvent[]
  links: SpanLink[]
  status: { code: (typeof statuses)[number]; message: string }
  /** `service.name` of its resource. */
  service: string
  resource: Values
}

/** Reads one message: `take` gets the number of each field, and reads it or leaves it. */
function message<T>(pbf: PbfReader, into: T, take: (field: number, into: T) => void): T {
  const end = pbf.readVarint() + pbf.pos
  for (let field = pbf.nextField(end); field !== 0; field = pbf.nextField(end)) take(field, into)
  return into
}

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex')
/** Nanoseconds in 64 bits, of which a double keeps all but the last quarter of a microsecond. */
const milliseconds = (pbf: PbfReader) => pbf.readFixed64() / 1e6

function readValue(pbf: PbfReader): Value {
  const holder = message<{ value: Value }>(pbf, { value: null }, (field, into) => {
    if (field === 1) into.value = pbf.readString()
    else if (field === 2) into.value = pbf.readBoolean()
    else if (field === 3) into.value = pbf.readVarint(true)
    else if (field === 4) into.value = pbf.readDouble()
    else if (field === 5)
      into.value = message<Value[]>(pbf, [], (one, list) => {
        if (one === 1) list.push(readValue(pbf))
      })
    else if (field === 6)
      into.value = message<Values>(pbf, {}, (one, values) => {
        if (one === 1) readPair(pbf, values)
      })
    else if (field === 7) into.value = pbf.readBytes()
  })
  return holder.value
}

function readPair(pbf: PbfReader, into: Values): void {
  const pair = message<{ key: string; value: Value }>(pbf, { key: '', value: null }, (field, one) => {
    if (field === 1) one.key = pbf.readString()
    else if (field === 2) one.value = readValue(pbf)
  })
  if (Object.hasOwn(into, pair.key)) throw new Error(`attribute ${pair.key} twice`)
  into[pair.key] = pair.value
}

const readEvent = (pbf: PbfReader): SpanEvent =>
  message<SpanEvent>(pbf, { name: '', at: 0, attributes: {} }, (field, event) => {
    if (field === 1) event.at = milliseconds(pbf)
    else if (field === 2) event.name = pbf.readString()
    else if (field === 3) readPair(pbf, event.attributes)
  })

const readLink = (pbf: PbfReader): SpanLink =>
  message<SpanLink>(pbf, { traceId: '', spanId: '', attributes: {} }, (field, link) => {
    if (field === 1) link.traceId = hex(pbf.readBytes())
    else if (field === 2) link.spanId = hex(pbf.readBytes())
    else if (field === 4) readPair(pbf, link.attributes)
  })

function readSpan(pbf: PbfReader): ReceivedSpan {
  const empty: ReceivedSpan = {
    traceId: '',
    spanId: '',
    parentSpanId: undefined,
    sampled: false,
    name: '',
    kind: 'unspecified',
    start: 0,
    end: 0,
    attributes: {},
    events: [],
    links: [],
    status: { code: 'unset', message: '' },
    service: '',
    resource: {},
  }
  return message(pbf, empty, (field, span) => {
    if (field === 1) span.traceId = hex(pbf.readBytes())
    else if (field === 2) span.spanId = hex(pbf.readBytes())
    else if (field === 4) span.parentSpanId = hex(pbf.readBytes()) || undefined
    else if (field === 5) span.name = pbf.readString()
    else if (field === 6) span.kind = kinds[pbf.readVarint()] ?? 'unspecified'
    else if (field === 7) span.start = milliseconds(pbf)
    else if (field === 8) span.end = milliseconds(pbf)
    else if (field === 9) readPair(pbf, span.attributes)
    else if (field === 11) span.events.push(readEvent(pbf))
    else if (field === 13) span.links.push(readLink(pbf))
    else if (field === 15)
      message(pbf, span.status, (one, status) => {
        if (one === 2) status.message = pbf.readString()
        else if (one === 3) status.code = statuses[pbf.readVarint()] ?? 'unset'
      })
    else if (field === 16) span.sampled = (pbf.readFixed32() & 1) === 1
  })
}

/** The spans of one `ExportTraceServiceRequest`. */
export function decodeTraces(bytes: Uint8Array): ReceivedSpan[] {
  const found: ReceivedSpan[] = []
  const pbf = new PbfReader(bytes)
  for (let field = pbf.nextField(); field !== 0; field = pbf.nextField()) {
    if (field !== 1) continue
    const resource: Values = {}
    const spans = message<ReceivedSpan[]>(pbf, [], (part, list) => {
      if (part === 1)
        message(pbf, resource, (one, values) => {
          if (one === 1) readPair(pbf, values)
        })
      else if (part === 2)
        message(pbf, list, (one) => {
          if (one === 2) list.push(readSpan(pbf))
        })
    })
    for (const span of spans)
      found.push({ ...span, resource, service: String(resource['service.name'] ?? '') })
  }
  return found
}

export interface Otlp extends AsyncDisposable {
  /** Base URL, as `OTEL_EXPORTER_OTLP_ENDPOINT` takes it. */
  readonly url: string
  /** What a process needs to send here all that it has, soon. */
  readonly env: Record<string, string>
  /** In the order in which they came; empty where they are swallowed. */
  readonly spans: ReceivedSpan[]
  /** Headers of each request, and how much they brought, in bytes. */
  readonly requests: IncomingMessage['headers'][]
  readonly bytes: number
  of(traceId: string): ReceivedSpan[]
  /**
   * The trace once it has everything that `has` looks for; throws after `timeoutMs` (20 s unless given) with all that
   * came of it.
   */
  trace(traceId: string, has: (trace: Trace) => unknown, timeoutMs?: number): Promise<Trace>
  /** Answers all requests with this HTTP status from now on; those that are refused are not kept. */
  answer(status: number): void
}

/** Listens on a free loopback port. `swallow`: reads what comes, and keeps nothing. */
export async function startOtlp({ swallow = false } = {}): Promise<Otlp> {
  const spans: ReceivedSpan[] = []
  const requests: IncomingMessage['headers'][] = []
  let bytes = 0
  let status = 200
  const server = createServer(async (request, response) => {
    try {
      if (request.method !== 'POST' || request.url !== '/v1/traces') return void response.writeHead(404).end()
      const body = await buffer(request)
      bytes += body.length
      if (status === 200 && !swallow) {
        requests.push(request.headers)
        if (request.headers['content-type'] !== 'application/x-protobuf')
          throw new Error(`content-type ${request.headers['content-type']}`)
        const plain = request.headers['content-encoding'] === 'gzip' ? gunzipSync(body) : body
        spans.push(...decodeTraces(plain))
      }
      response.writeHead(status, { 'content-type': 'application/x-protobuf' }).end()
    } catch (error) {
      response.writeHead(400).end(String(error))
    }
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`

  const of = (traceId: string) => spans.filter((span) => span.traceId === traceId)
  return {
    url,
    env: { OTEL_EXPORTER_OTLP_ENDPOINT: url, OTEL_BSP_SCHEDULE_DELAY: '100' },
    spans,
    requests,
    get bytes() {
      return bytes
    },
    of,
    async trace(traceId, has, timeoutMs = 20_000) {
      try {
        return await until(
          `all of trace ${traceId}`,
          () => {
            const trace = new Trace(of(traceId))
            return has(trace) ? trace : undefined
          },
          timeoutMs,
        )
      } catch (cause) {
        throw new Error(`${(cause as Error).message}; what came:\n${new Trace(of(traceId))}`, { cause })
      }
    },
    answer(next) {
      status = next
    },
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      server.close()
      await once(server, 'close')
    },
  }
}

/** All spans of one trace, and how they stand to each other. */
export class Trace {
  readonly spans: readonly ReceivedSpan[]
  readonly #byId: Map<string, ReceivedSpan>

  constructor(spans: ReceivedSpan[]) {
    this.spans = spans.toSorted((a, b) => a.start - b.start)
    this.#byId = new Map(spans.map((span) => [span.spanId, span]))
  }

  /** Undefined where the parent has not come, or is the caller’s. */
  parent(span: ReceivedSpan): ReceivedSpan | undefined {
    return span.parentSpanId === undefined ? undefined : this.#byId.get(span.parentSpanId)
  }

  /** What stands directly under a span, by when it began. */
  under(span: ReceivedSpan): ReceivedSpan[] {
    return this.spans.filter(({ parentSpanId }) => parentSpanId === span.spanId)
  }

  /** All of that name, by when they began. */
  all(name: string): ReceivedSpan[] {
    return this.spans.filter((span) => span.name === name)
  }

  has(name: string): boolean {
    return this.spans.some((span) => span.name === name)
  }

  /** The only one of that name, directly under `parent` where that is given; throws with the whole tree. */
  one(name: string, parent?: ReceivedSpan): ReceivedSpan {
    const found = this.all(name).filter(
      ({ parentSpanId }) => parent === undefined || parentSpanId === parent.spanId,
    )
    if (found.length === 1) return found[0]!
    const where = parent === undefined ? '' : ` under ${parent.name}`
    throw new Error(`${found.length} spans “${name}”${where} in:\n${this}`)
  }

  /** Spans whose parent is not among them: one where the trace is connected. */
  get roots(): ReceivedSpan[] {
    return this.spans.filter((span) => this.parent(span) === undefined)
  }

  /** The one root; throws unless every span comes from it and no id stands for two. */
  get root(): ReceivedSpan {
    if (this.#byId.size !== this.spans.length) throw new Error(`ids that stand for two spans:\n${this}`)
    const [root, ...others] = this.roots
    if (root === undefined || others.length > 0)
      throw new Error(`${this.roots.length} spans without a parent in:\n${this}`)
    const reached = new Set([root])
    for (const span of reached) for (const below of this.under(span)) reached.add(below)
    if (reached.size !== this.spans.length) throw new Error(`spans in a circle:\n${this}`)
    return root
  }

  /** The tree, a line for each span. */
  toString(): string {
    const lines: string[] = []
    const first = this.spans[0]?.start ?? 0
    const seen = new Set<ReceivedSpan>()
    const write = (span: ReceivedSpan, depth: number) => {
      if (seen.has(span)) return
      seen.add(span)
      const error = span.status.code === 'error' ? ` ERROR ${span.attributes['error.type']}` : ''
      const events = span.events.map(({ name }) => ` *${name}`).join('')
      const links = span.links.length > 0 ? ` (${span.links.length} links)` : ''
      lines.push(
        `${'  '.repeat(depth)}${span.name}  ${span.kind} ${span.service} ` +
          `${(span.start - first).toFixed(2)}…${(span.end - first).toFixed(2)} ms${error}${events}${links}`,
      )
      for (const below of this.under(span)) write(below, depth + 1)
    }
    for (const root of this.roots) write(root, 0)
    for (const span of this.spans) write(span, 0)
    return lines.join('\n')
  }
}
