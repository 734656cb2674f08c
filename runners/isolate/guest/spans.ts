/**
 * `ctx.span` inside the isolate. Runs there from its own source text: it may use nothing but its parameters and
 * globals.
 */

/** The call that a span belongs to. */
export interface Traced {
  /** Of the run; null where the caller of the code gave none. */
  traceparent: string | null
  traced: boolean
}

export interface Span {
  /** What is sent on, so that what follows stands under this span. */
  readonly traceparent: string | null
  set(attributes: unknown): void
  /** As `ctx.span`, below this one. */
  span(name: unknown, fn: unknown, attributes?: unknown): unknown
}

export interface SpanHost {
  /** Gives its id; undefined where there are too many already. `attributes` is JSON text of an object. */
  beginSpan(name: string, parent: string | undefined, attributes: string | undefined): string | undefined
  endSpan(id: string, attributes: string | undefined, error: string | undefined): void
}

export type OpenSpan = (
  call: Traced,
  parent: string | undefined,
  name: unknown,
  fn: unknown,
  attributes: unknown,
) => unknown

/** `isLive` says whether a call is still under way; `describe` gives the message of what was thrown. */
export function makeSpans(
  host: SpanHost,
  isLive: (call: Traced) => boolean,
  describe: (error: unknown) => string,
): OpenSpan {
  const { stringify } = JSON
  const { create, keys, freeze } = Object
  const { Promise: BasePromise, String: toText, TypeError: BaseTypeError } = globalThis
  const { beginSpan, endSpan } = host
  const uncurry = Function.prototype.bind.bind(Function.prototype.call) as (
    fn: (...args: never[]) => unknown,
  ) => (...args: unknown[]) => unknown
  const then = uncurry(BasePromise.prototype.then)
  const slice = uncurry(String.prototype.slice) as (text: string, from: number, to?: number) => string
  const settled = BasePromise.resolve.bind(BasePromise) as (value: unknown) => Promise<unknown>

  /** Adds what can be an attribute. */
  const add = (to: Record<string, unknown> | undefined, from: unknown) => {
    if (typeof from !== 'object' || from === null) return to
    const all = to ?? (create(null) as Record<string, unknown>)
    const names = keys(from)
    for (let i = 0; i < names.length; i++) {
      const value = (from as Record<string, unknown>)[names[i]!]
      if (typeof value === 'string' || typeof value === 'number' || typeof value === 'boolean')
        all[names[i]!] = value
    }
    return all
  }
  const textOf = (attributes: Record<string, unknown> | undefined) =>
    attributes === undefined ? undefined : stringify(attributes)
  const isThenable = (value: unknown) =>
    typeof value === 'object' && value !== null && typeof (value as { then?: unknown }).then === 'function'

  const open: OpenSpan = (call, parent, name, fn, attributes) => {
    if (typeof fn !== 'function') throw new BaseTypeError('ctx.span(name, fn, attributes): fn is no function')
    const id =
      call.traced && isLive(call)
        ? beginSpan(toText(name), parent, textOf(add(undefined, attributes)))
        : undefined
    const above = id ?? parent
    const { traceparent } = call
    let more: Record<string, unknown> | undefined
    let isOpen = id !== undefined
    const close = (error?: string) => {
      if (isOpen && isLive(call)) endSpan(id!, textOf(more), error)
      isOpen = false
    }
    const span: Span = freeze({
      traceparent:
        above === undefined || traceparent === null
          ? traceparent
          : `${slice(traceparent, 0, 36)}${above}${slice(traceparent, 52)}`,
      set(values: unknown) {
        if (isOpen) more = add(more, values)
      },
      span: (name: unknown, fn: unknown, attributes?: unknown) => open(call, above, name, fn, attributes),
    })
    let value: unknown
    let isLater: boolean
    try {
      value = fn(span)
      isLater = isThenable(value)
    } catch (error) {
      close(describe(error))
      throw error
    }
    if (!isLater) {
      close()
      return value
    }
    return then(
      settled(value),
      (result: unknown) => {
        close()
        return result
      },
      (error: unknown) => {
        close(describe(error))
        throw error
      },
    )
  }
  return open
}
