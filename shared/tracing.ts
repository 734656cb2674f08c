/**
 * What of tracing the rest of the platform knows: spans by W3C traceparent, without a library. `shared/telemetry.ts`
 * brings the OpenTelemetry SDK behind it where an endpoint is configured; where none is, `tracingOff` keeps traces
 * going through (the caller’s stays the caller’s) and records nothing.
 */
import { continueTrace } from './trace.ts'

export type AttributeValue = string | number | boolean | string[]
/** Names from the semantic conventions of OpenTelemetry where they have one, else `vulcan.…`. */
export type Attributes = Record<string, AttributeValue | undefined>

export interface SpanOptions {
  kind: 'server' | 'client' | 'producer' | 'consumer' | 'internal'
  /** W3C traceparent of the span this one stands under; undefined or invalid: it begins a trace. */
  parent?: string | undefined
  /** Traceparents of what it has to do with, but does not stand under. */
  links?: (string | undefined)[]
  attributes?: Attributes
  /** Milliseconds since the epoch, with fractions; default: now. */
  at?: number | undefined
  /** 16 hex digits, where who made the span elsewhere (user code) has told its id already. */
  spanId?: string
}

export interface Span {
  /** What is sent on, so that what follows stands under this span. Of one that is not recorded: its parent’s. */
  readonly traceparent: string
  /** False where nothing is kept: do not gather attributes then. */
  readonly recording: boolean
  set(attributes: Attributes): void
  event(name: string, attributes?: Attributes, at?: number): void
  /**
   * It went wrong: status `error`, attribute `error.type` (a cause of the contract, or an HTTP status). All spans
   * of this process and trace are exported then, also where the trace was not sampled.
   */
  fail(type: string, message?: string): void
  /** Exactly once; milliseconds since the epoch, default: now. */
  end(at?: number): void
}

export interface Tracing extends AsyncDisposable {
  /** False: nothing is recorded anywhere, `begin` costs an object. */
  readonly on: boolean
  begin(name: string, options: SpanOptions): Span
}

/** Milliseconds between two looks at the system’s clock, and how far ours may be off it. */
const lookMs = 1_000
const driftMs = 5
let origin = performance.timeOrigin
let lookAt = 0

/**
 * Milliseconds since the epoch, with fractions. In step with `performance.now()`, except where the system’s clock was
 * set, or the host slept: other processes would be somewhere else in time.
 */
export function preciseNow(): number {
  const now = performance.now()
  if (now >= lookAt) {
    lookAt = now + lookMs
    if (Math.abs(Date.now() - (origin + now)) > driftMs) origin = Date.now() - now
  }
  return origin + now
}

class Passing implements Span {
  readonly traceparent: string
  readonly recording = false
  constructor(traceparent: string) {
    this.traceparent = traceparent
  }
  set(): void {}
  event(): void {}
  fail(): void {}
  end(): void {}
}

/** A span that nothing is kept of: what follows stands under `traceparent`. */
export const passing = (traceparent: string): Span => new Passing(traceparent)

/** Traces go through, nothing is recorded. A span without a parent begins a trace that is not sampled. */
export const tracingOff: Tracing = {
  on: false,
  begin: (_name, { kind, parent }) =>
    // Only requests from outside may carry anything; all else stands under something of our own.
    passing(parent === undefined || kind === 'server' ? continueTrace(parent).traceparent : parent),
  async [Symbol.asyncDispose]() {},
}
