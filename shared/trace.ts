/** W3C trace context (https://www.w3.org/TR/trace-context/): one trace from HTTP through the bus to the sandbox. */
import { randomUUID } from 'node:crypto'

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
  const traceId = valid ? caller : randomUUID().replaceAll('-', '')
  return {
    traceId,
    traceparent: `00-${traceId}-${randomUUID().replaceAll('-', '').slice(16)}-${valid ? flags : '00'}`,
  }
}
