/** Spans as they are recorded, as the SDK’s batches and `otlp.ts` take them, and the traces that are kept back. */
import type { EndedSpan, HrTime, SpanContext } from './otlp.ts'
import { isTraceparent, spanIdOf, traceIdOf } from './trace.ts'
import { type Attributes, type AttributeValue, preciseNow, type Span, type SpanOptions } from './tracing.ts'

/** Characters of an attribute’s value and of a status’s message. */
const longestValue = 4_096
const longestMessage = 1_024
/** The same as the SDK’s: attributes, events and links of one span. */
const most = 128

/** As the SDK counts them. */
export const kinds = { internal: 0, server: 1, client: 2, producer: 3, consumer: 4 } as const

/** What all spans of a process share. */
export interface Owner {
  kept: KeptTraces
  resource: EndedSpan['resource']
  instrumentationScope: EndedSpan['instrumentationScope']
}

/** Undefined for what is no traceparent. */
export function contextOf(traceparent: string): SpanContext | undefined {
  if (!isTraceparent(traceparent)) return undefined
  return {
    traceId: traceIdOf(traceparent),
    spanId: spanIdOf(traceparent),
    traceFlags: Number.parseInt(traceparent.slice(53, 55), 16) & 1,
  }
}

/** From milliseconds with fractions. */
const hrTime = (ms: number): HrTime => [Math.floor(ms / 1_000), Math.floor((ms % 1_000) * 1e6)]

const cut = (value: AttributeValue): AttributeValue =>
  typeof value === 'string' && value.length > longestValue ? value.slice(0, longestValue) : value

const nothing: never[] = []
const unset = { code: 0 }

export class RecordedSpan implements Span, EndedSpan {
  readonly recording = true
  readonly traceparent: string
  readonly name: string
  readonly kind: number
  readonly parentSpanContext: SpanContext | undefined
  readonly attributes: Record<string, AttributeValue> = {}
  readonly startTime: HrTime
  readonly resource: EndedSpan['resource']
  readonly instrumentationScope: EndedSpan['instrumentationScope']
  links: { context: SpanContext }[] = nothing
  events: { name: string; time: HrTime; attributes: object }[] = nothing
  status: EndedSpan['status'] = unset
  endTime: HrTime = [0, 0]
  ended = false
  droppedAttributesCount = 0
  droppedEventsCount = 0
  droppedLinksCount = 0
  readonly #kept: KeptTraces
  readonly #context: SpanContext
  readonly #startMs: number
  #count = 0

  constructor(
    { kept, resource, instrumentationScope }: Owner,
    name: string,
    { kind, attributes, links, at = preciseNow() }: SpanOptions,
    context: SpanContext,
    parent: SpanContext | undefined,
  ) {
    this.#kept = kept
    this.#context = context
    this.#startMs = at
    this.name = name
    this.kind = kinds[kind]
    this.parentSpanContext =
      parent !== undefined && (kind === 'server' || kind === 'consumer')
        ? { ...parent, isRemote: true }
        : parent
    this.startTime = hrTime(at)
    this.resource = resource
    this.instrumentationScope = instrumentationScope
    this.traceparent = `00-${context.traceId}-${context.spanId}-0${context.traceFlags}`
    if (attributes !== undefined) this.set(attributes)
    if (links !== undefined) this.#link(links)
    kept.began(this)
  }

  spanContext(): SpanContext {
    return this.#context
  }

  set(attributes: Attributes): void {
    if (this.ended) return
    for (const name in attributes) {
      const value = attributes[name]
      if (value === undefined) continue
      if (!Object.hasOwn(this.attributes, name) && ++this.#count > most) this.droppedAttributesCount++
      else this.attributes[name] = cut(value)
    }
  }

  event(name: string, attributes: Attributes = {}, at = preciseNow()): void {
    if (this.ended) return
    if (this.events.length >= most) {
      this.droppedEventsCount++
      return
    }
    if (this.events === nothing) this.events = []
    const told: Record<string, AttributeValue> = {}
    for (const key in attributes) {
      const value = attributes[key]
      if (value !== undefined) told[key] = cut(value)
    }
    this.events.push({ name, time: hrTime(at), attributes: told })
  }

  fail(type: string, message?: string): void {
    if (this.ended) return
    this.set({ 'error.type': type })
    this.status = { code: 2, message: message?.slice(0, longestMessage) }
    this.#kept.fail(this.#context.traceId)
  }

  end(at = preciseNow()): void {
    if (this.ended) return
    this.ended = true
    // Clocks of two hosts may differ.
    this.endTime = hrTime(Math.max(at, this.#startMs))
    this.#kept.over(this)
  }

  #link(traceparents: (string | undefined)[]): void {
    for (const traceparent of traceparents) {
      const context = traceparent === undefined ? undefined : contextOf(traceparent)
      if (context === undefined) continue
      if (this.links === nothing) this.links = []
      if (this.links.length < most) this.links.push({ context })
      else this.droppedLinksCount++
    }
  }
}

interface KeptTrace {
  /** Spans that have begun and not ended. */
  open: number
  ended: RecordedSpan[]
  failed: boolean
}

/** Traces and spans that are kept at most; beyond, the oldest traces are let go. */
const mostTraces = 10_000
const mostSpans = 50_000
/** Failed traces that are remembered, for what comes later in them: the next attempt, say. */
const mostFailed = 1_000

/**
 * Hands sampled spans on. Those of other traces are kept until the last open one of their trace has ended, and handed
 * on where one of them failed.
 */
export class KeptTraces {
  readonly #next: (span: EndedSpan) => void
  readonly #traces = new Map<string, KeptTrace>()
  readonly #failed = new Set<string>()
  #spans = 0

  constructor(next: (span: EndedSpan) => void) {
    this.#next = next
  }

  began(span: RecordedSpan): void {
    const { traceId, traceFlags } = span.spanContext()
    if (traceFlags === 1) return
    let trace = this.#traces.get(traceId)
    if (trace === undefined) {
      trace = { open: 0, ended: [], failed: this.#failed.has(traceId) }
      this.#traces.set(traceId, trace)
    }
    trace.open++
    if (this.#traces.size > mostTraces || this.#spans > mostSpans)
      this.#drop(this.#traces.entries().next().value!)
  }

  over(span: RecordedSpan): void {
    const { traceId, traceFlags } = span.spanContext()
    if (traceFlags === 1) {
      this.#next(span)
      return
    }
    const trace = this.#traces.get(traceId)
    if (trace === undefined) return
    trace.open--
    if (trace.failed) this.#next(asSampled(span))
    else {
      trace.ended.push(span)
      this.#spans++
    }
    if (trace.open <= 0) this.#drop([traceId, trace])
  }

  /** All spans of the trace, those that have ended and those that will. */
  fail(traceId: string): void {
    const trace = this.#traces.get(traceId)
    if (trace === undefined || trace.failed) return
    trace.failed = true
    this.#spans -= trace.ended.length
    for (const span of trace.ended.splice(0)) this.#next(asSampled(span))
    this.#failed.add(traceId)
    if (this.#failed.size > mostFailed) this.#failed.delete(this.#failed.values().next().value!)
  }

  #drop([traceId, { ended }]: [string, KeptTrace]): void {
    this.#spans -= ended.length
    this.#traces.delete(traceId)
  }
}

/** The span as if its trace had been sampled: what follows passes over others. */
function asSampled(span: RecordedSpan): EndedSpan {
  const context = { ...span.spanContext(), traceFlags: 1 }
  return Object.create(span, { spanContext: { value: () => context } }) as EndedSpan
}
