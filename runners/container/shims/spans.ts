/** `ctx.span`, and what is told of outgoing fetches: part of the shim for Node. */
import {
  maxSpanAttributes,
  maxSpanKey,
  maxSpans,
  maxSpanText,
  maxSpanValue,
  type SpanAttributes,
  type SpanBegin,
  type SpanEnd,
} from '../../../shared/guest.ts'

/** Milliseconds of a clock that goes forward only; not the user’s, who may change what is global. */
export const now: () => number = performance.now.bind(performance)

/** A run, as far as its spans go. */
export interface Traced {
  readonly ctx: { traceparent: string | null; traced?: true }
  /** `now()` when it came. */
  readonly began: number
  /** Spans so far. */
  spans: number
}

/** What the function of a span is given. */
export interface Span {
  /** What is sent on, so that what follows stands under this span; undefined where the run has none. */
  readonly traceparent: string | undefined
  set(attributes: unknown): void
  /** As `ctx.span`, below this one. */
  span<T>(name: unknown, fn: (span: Span) => T, attributes?: unknown): T
}

export interface SpanHost<R extends Traced> {
  /** Nothing where the run is over. */
  post(run: R, span: SpanBegin | SpanEnd): void
  isLive(run: R): boolean
  /** 16 hex digits. */
  newId(): string
  describe(error: unknown): string
}

/** Bounded, so that what is sent is; what no attribute can be is left out. */
function attributesOf(value: unknown): SpanAttributes | undefined {
  if (typeof value !== 'object' || value === null) return undefined
  const kept: SpanAttributes = {}
  for (const [key, one] of Object.entries(value).slice(0, maxSpanAttributes)) {
    if (key.length > maxSpanKey) continue
    if (typeof one === 'string') kept[key] = one.length > maxSpanValue ? `[${one.length} characters]` : one
    else if (typeof one === 'number' || typeof one === 'boolean') kept[key] = one
  }
  return kept
}

const isThenable = (value: unknown): value is PromiseLike<unknown> =>
  typeof value === 'object' && value !== null && typeof (value as { then?: unknown }).then === 'function'

interface Open {
  id: string
  traceparent: string
  end(attributes?: SpanAttributes, error?: string): void
}

export class Spans<R extends Traced> {
  readonly #host: SpanHost<R>

  constructor(host: SpanHost<R>) {
    this.#host = host
  }

  /** Undefined where the run is not traced, is over, or has too many already. */
  begin(run: R, span: Omit<SpanBegin, 'id' | 'start' | 'name'> & { name: string }): Open | undefined {
    const { traceparent, traced } = run.ctx
    if (traced !== true || traceparent === null || run.spans >= maxSpans || !this.#host.isLive(run))
      return undefined
    run.spans++
    const id = this.#host.newId()
    this.#host.post(run, { ...span, name: span.name.slice(0, maxSpanText), id, start: now() - run.began })
    let isOpen = true
    return {
      id,
      traceparent: `${traceparent.slice(0, 36)}${id}${traceparent.slice(52)}`,
      end: (attributes, error) => {
        if (!isOpen) return
        isOpen = false
        this.#host.post(run, {
          ...{ id, end: now() - run.began },
          ...(attributes === undefined ? {} : { attributes }),
          ...(error === undefined ? {} : { error: error.slice(0, maxSpanText) }),
        })
      },
    }
  }

  /** What `fn` returns; where that is a promise the span ends with it. */
  run<T>(run: R, parent: Open | undefined, name: unknown, fn: (span: Span) => T, attributes: unknown): T {
    if (typeof fn !== 'function') throw new TypeError('ctx.span(name, fn, attributes): fn is no function')
    const given = attributesOf(attributes)
    const open = this.begin(run, {
      name: String(name),
      ...(parent === undefined ? {} : { parent: parent.id }),
      ...(given === undefined ? {} : { attributes: given }),
    })
    const above = open ?? parent
    let more: SpanAttributes | undefined
    const span: Span = {
      traceparent: above?.traceparent ?? run.ctx.traceparent ?? undefined,
      set: (values) => {
        more = attributesOf({ ...more, ...attributesOf(values) })
      },
      span: (name, fn, attributes) => this.run(run, above, name, fn, attributes),
    }
    let value: T
    try {
      value = fn(Object.freeze(span))
    } catch (error) {
      open?.end(more, this.#host.describe(error))
      throw error
    }
    if (!isThenable(value)) {
      open?.end(more)
      return value
    }
    if (open === undefined) return value
    return value.then(
      (result) => {
        open.end(more)
        return result
      },
      (error: unknown) => {
        open.end(more, this.#host.describe(error))
        throw error
      },
    ) as T
  }

  /**
   * `fetch` with the traceparent of the run under way, told as a span of kind client: below the run, or the span of the
   * same trace that its own header names. A header of another trace stays what it is.
   */
  fetchWith(inner: typeof fetch, current: () => R | undefined): typeof fetch {
    const traced = async (run: R, traceparent: string, input: FetchInput, init: RequestInit | undefined) => {
      const headers = new Headers(init?.headers ?? (input as Request).headers)
      const given = headers.get('traceparent')
      const isOurs = given !== null && given.length === traceparent.length && sameTrace(given, traceparent)
      const parent = isOurs && !given.startsWith(traceparent.slice(0, 52)) ? given.slice(36, 52) : undefined
      const { name, attributes } = requestOf(input, init)
      const span = this.begin(run, {
        ...{ name, kind: 'client', attributes },
        ...(parent !== undefined && /^[0-9a-f]{16}$/.test(parent) ? { parent } : {}),
      })
      if (given === null || isOurs) headers.set('traceparent', span?.traceparent ?? given ?? traceparent)
      try {
        const answer = await inner(input, withHeaders(init, headers))
        const { status } = answer
        const error = status >= 400 ? { 'error.type': String(status) } : {}
        span?.end(
          { 'http.response.status_code': status, ...error },
          status >= 400 ? `answered ${status}` : undefined,
        )
        return answer
      } catch (error) {
        const { code } = ((error as Error | null)?.cause ?? {}) as { code?: unknown }
        const type = typeof code === 'string' ? code : ((error as Error | null)?.name ?? 'Error')
        span?.end({ 'error.type': type }, this.#host.describe(error))
        throw error
      }
    }
    return function fetch(input: FetchInput, init: RequestInit | undefined = undefined): Promise<Response> {
      const run = current()
      const traceparent = run?.ctx.traceparent
      if (run === undefined || traceparent == null) return inner(input, init)
      return traced(run, traceparent, input, init)
    }
  }
}

type FetchInput = Parameters<typeof fetch>[0]

const sameTrace = (one: string, other: string) => one.slice(0, 36) === other.slice(0, 36)

/** A `Request` may stand for `init`, and has its fields on its prototype. */
function withHeaders(init: RequestInit | undefined, headers: Headers): RequestInit {
  if (init == null) return { headers }
  const prototype = Object.getPrototypeOf(init)
  if (prototype === Object.prototype || prototype === null) return { ...init, headers }
  return new Proxy(init, {
    get: (target, name) => (name === 'headers' ? headers : Reflect.get(target, name, target)),
  })
}

/** Of spans: a method that is none of these is the code’s own invention. */
const methods = new Set('GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH QUERY'.split(' '))

/** By the conventions for HTTP clients; without query and credentials, which may be secrets. */
function requestOf(
  input: FetchInput,
  init: RequestInit | undefined,
): { name: string; attributes: SpanAttributes } {
  const method = String(init?.method ?? (input as Request).method ?? 'GET').toUpperCase()
  const isKnown = methods.has(method)
  const attributes: SpanAttributes = { 'http.request.method': isKnown ? method : '_OTHER' }
  try {
    const { protocol, host, hostname, port, pathname } = new URL((input as Request).url ?? String(input))
    if (protocol === 'http:' || protocol === 'https:')
      Object.assign(attributes, {
        'url.full':
          pathname.length > maxSpanValue / 2 ? `${protocol}//${host}` : `${protocol}//${host}${pathname}`,
        'server.address': hostname,
        'server.port': port === '' ? (protocol === 'https:' ? 443 : 80) : Number(port),
      })
  } catch {
    // `fetch` itself says what is wrong with it.
  }
  return { name: isKnown ? method : 'HTTP', attributes }
}
