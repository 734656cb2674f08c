/** Errors with a stable code. `problems` is the whole list a client can meet; each is RFC 9457 problem+json. */

/** Code → HTTP status and title. */
export const problems = {
  malformed_json: [400, 'The body is not JSON'],
  invalid_field: [422, 'A field is not acceptable'],
  invalid_query: [400, 'A query parameter is not acceptable'],
  invalid_header: [400, 'A header is not acceptable'],
  unsupported_media_type: [415, 'The body must be application/json'],
  payload_too_large: [413, 'The body is too large'],
  isolation_unavailable: [422, 'No asked-for isolation is available'],
  secret_not_found: [422, 'A named secret does not exist'],
  blob_not_found: [404, 'There is no such blob'],
  digest_mismatch: [422, 'The bytes do not have the given digest'],
  function_not_found: [404, 'There is no such function'],
  version_not_found: [404, 'There is no such version of the function'],
  alias_not_found: [404, 'There is no such alias of the function'],
  response_not_found: [404, 'The workload has no response that was kept'],
  build_failed: [422, 'The project cannot be built'],
  build_unavailable: [503, 'This host cannot build projects'],
  invalid_archive: [422, 'The archive is not acceptable'],
  function_conflict: [409, 'The function was changed at the same moment'],
  not_repeatable: [409, 'The request was not kept and cannot be sent again'],
  queue_full: [429, 'The function’s queue is full'],
  invocation_failed: [502, 'The function failed before it answered'],
  invocation_timeout: [504, 'The function did not answer in time'],
  invocation_stopped: [503, 'The function was stopped before it answered'],
  upgrade_unsupported: [501, 'Connections to functions cannot be upgraded'],
  workload_not_found: [404, 'There is no such workload'],
  not_found: [404, 'There is no such route'],
  method_not_allowed: [405, 'The route does not take this method'],
  idempotency_conflict: [409, 'The idempotency key was used with another body'],
  already_ended: [409, 'The workload has already ended'],
  bus_unavailable: [503, 'The message bus cannot be reached'],
  database_unavailable: [503, 'The database cannot be reached'],
  storage_full: [503, 'The stream has no room'],
  overloaded: [503, 'Too many large bodies at once'],
  internal: [500, 'Something went wrong inside vulcan'],
} as const satisfies Record<string, readonly [number, string]>

export type ProblemCode = keyof typeof problems

/** One of several things that are wrong: with a field, or at a place in a project’s file. */
export type ProblemPart =
  | { field: string; detail: string }
  /** Lines and columns count from 1. */
  | { detail: string; file: string | null; line: number | null; column: number | null }

export interface ProblemDetails {
  detail: string
  /** Path of the bad field, such as `limits.timeout_s`. */
  field?: string | undefined
  errors?: ProblemPart[] | undefined
  retryAfterS?: number | undefined
  cause?: unknown
}

/** What a route throws; the gateway turns it into application/problem+json. */
export class Problem extends Error {
  readonly code: ProblemCode
  readonly field: string | undefined
  readonly errors: ProblemPart[] | undefined
  /** Seconds after which trying again makes sense; undefined where it does not. */
  readonly retryAfterS: number | undefined
  constructor(code: ProblemCode, details: ProblemDetails) {
    super(details.detail, { cause: details.cause })
    this.name = 'Problem'
    this.code = code
    this.field = details.field
    this.errors = details.errors
    this.retryAfterS = details.retryAfterS
  }
  get status(): number {
    return problems[this.code][0]
  }
  toJSON() {
    return {
      type: `urn:vulcan:problem:${this.code}`,
      title: problems[this.code][1],
      status: this.status,
      code: this.code,
      detail: this.message,
      ...(this.field === undefined ? {} : { field: this.field }),
      ...(this.errors === undefined ? {} : { errors: this.errors }),
    }
  }
}

/** The bus did not answer in time or is not connected: what was published may or may not have been stored. */
export class BusUnavailable extends Error {
  readonly retryable = true
  constructor(message: string, options?: ErrorOptions) {
    super(message, options)
    this.name = 'BusUnavailable'
  }
}

/** A message is larger than the server takes; it was not sent. */
export class MessageTooLarge extends Error {
  readonly retryable = false
  constructor(message: string, options?: ErrorOptions) {
    super(message, options)
    this.name = 'MessageTooLarge'
  }
}

/** A stream refused a message for want of room. */
export class StreamFull extends Error {
  readonly retryable = true
  constructor(message: string, options?: ErrorOptions) {
    super(message, options)
    this.name = 'StreamFull'
  }
}

/** A field’s path as clients write it: `limits.timeout_s`, `isolation[1]`. */
export const fieldPath = (path: readonly PropertyKey[]): string =>
  path.reduce<string>(
    (text, part) =>
      typeof part === 'number' ? `${text}[${part}]` : text === '' ? String(part) : `${text}.${String(part)}`,
    '',
  )
