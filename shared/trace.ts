/** W3C trace context (https://www.w3.org/TR/trace-context/): one trace from HTTP through the bus to the sandbox. */
import { randomFillSync } from 'node:crypto'

export interface TraceContext {
  /** 32 hex digits. */
  traceId: string
  /** The header to send on. */
  traceparent: string
}

const pattern = /^(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?$/

/** Continues the caller’s trace where the header is valid, else begins one. */
export function continueTrace(header: string | undefined): TraceContext {
  const match = header === undefined ? null : pattern.exec(header)
  const [, caller, parent, flags] = match ?? []
  const valid = caller !== undefined && !/^0+$/.test(caller) && !/^0+$/.test(parent!)
  const traceId = valid ? caller : randomHex(16)
  return {
    traceId,
    traceparent: `00-${traceId}-${newSpanId()}-${valid ? flags : '00'}`,
  }
}

/** Whether it is the id of a span: 16 hex digits, not all 0. */
export const isSpanId = (value: unknown): value is string =>
  typeof value === 'string' && /^(?!0{16})[0-9a-f]{16}$/.test(value)

/** Whether it is one that can be continued. */
export const isTraceparent = (value: string): boolean => {
  const match = pattern.exec(value)
  return match !== null && !/^0+$/.test(match[1]!) && !/^0+$/.test(match[2]!)
}

/** Of a valid traceparent. */
export const traceIdOf = (traceparent: string): string => traceparent.slice(3, 35)
export const spanIdOf = (traceparent: string): string => traceparent.slice(36, 52)
export const isSampled = (traceparent: string): boolean => '13579bdf'.includes(traceparent[54] ?? ' ')

/** The same trace with another span: what stands under that one. */
export const withSpanId = (traceparent: string, spanId: string): string =>
  `${traceparent.slice(0, 36)}${spanId}${traceparent.slice(52)}`

/** 16 hex digits; not all 0. */
export const newSpanId = (): string => randomHex(8)

/** Randomness is fetched for many ids at once. */
const random = Buffer.alloc(4_096)
let used = random.byteLength

/** So many bytes as hex digits, of which not all are 0: that is no id of a trace or span. */
function randomHex(bytes: number): string {
  for (;;) {
    if (used + bytes > random.byteLength) {
      randomFillSync(random)
      used = 0
    }
    used += bytes
    const digits = random.toString('hex', used - bytes, used)
    if (!/^0+$/.test(digits)) return digits
  }
}

/** What a log line says of a trace. */
export const traceFields = (traceparent: string | undefined): { trace_id?: string; span_id?: string } =>
  traceparent === undefined ? {} : { trace_id: traceIdOf(traceparent), span_id: spanIdOf(traceparent) }

/** Where a trace can be looked at; null: nobody has said where. */
export type TraceLink = (traceId: string | null) => string | null

/**
 * `template` is a URL with `{trace_id}` in it, or the base URL of a Jaeger UI.
 *
 * @example traceLinks('http://localhost:16686')('0af7…') // http://localhost:16686/trace/0af7…
 */
export function traceLinks(template: string | undefined): TraceLink {
  if (template === undefined) return () => null
  const whole = template.includes('{trace_id}')
    ? template
    : `${template.replace(/\/+$/, '')}/trace/{trace_id}`
  return (traceId) => (traceId === null ? null : whole.replaceAll('{trace_id}', traceId))
}
