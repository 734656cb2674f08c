/** Forwards reads and log streams to the dispatcher, bytes unchanged. */
import type { Context } from 'hono'
import { Problem } from '../shared/errors.ts'
import type { Bindings } from './requests.ts'

/** Headers of the request that a read depends on. */
const passedOn = ['accept', 'last-event-id']
/** Headers of the answer that are the client’s business. */
const handedBack = ['content-type', 'cache-control', 'retry-after', 'link', 'x-accel-buffering']

const unavailable = (cause: unknown) =>
  new Problem('database_unavailable', { detail: 'the dispatcher cannot be reached', retryAfterS: 1, cause })

/** The bytes as they come; they end where the client goes away, which is no error. */
function untilGone(bytes: ReadableStream<Uint8Array>, gone: AbortSignal): ReadableStream<Uint8Array> {
  const reader = bytes.getReader()
  return new ReadableStream({
    async pull(controller) {
      try {
        const { done, value } = await reader.read()
        if (done) controller.close()
        else controller.enqueue(value)
      } catch (error) {
        if (gone.aborted) controller.close()
        else controller.error(error)
      }
    },
    cancel: (reason) => reader.cancel(reason),
  })
}

export interface Reads {
  /** Answers the request with what the dispatcher answers on the same path and query. */
  forward(c: Context<{ Bindings: Bindings }>): Promise<Response>
  /** One JSON document of the dispatcher; undefined on 404. Throws `database_unavailable`. */
  json<T>(path: string): Promise<T | undefined>
  /** Whether the dispatcher says that it is ready, and if not, why. */
  readiness(): Promise<{ ready: true } | { ready: false; reason: unknown }>
}

export function readsFrom(dispatcherUrl: string): Reads {
  return {
    async forward(c) {
      const { pathname, search } = new URL(c.req.url)
      const headers = new Headers({ traceparent: c.env.watch.span.traceparent })
      for (const name of passedOn) {
        const value = c.req.header(name)
        if (value !== undefined) headers.set(name, value)
      }
      let answer: Response
      try {
        answer = await fetch(`${dispatcherUrl}${pathname}${search}`, { headers, signal: c.req.raw.signal })
      } catch (cause) {
        throw unavailable(cause)
      }
      const back = new Headers()
      for (const name of handedBack) {
        const value = answer.headers.get(name)
        if (value !== null) back.set(name, value)
      }
      const body = answer.body === null ? null : untilGone(answer.body, c.req.raw.signal)
      return new Response(body, { status: answer.status, headers: back })
    },
    async json<T>(path: string) {
      try {
        const answer = await fetch(`${dispatcherUrl}${path}`, { signal: AbortSignal.timeout(10_000) })
        if (answer.status === 404) return undefined
        if (!answer.ok) throw new Error(`the dispatcher answered ${answer.status}`)
        return (await answer.json()) as T
      } catch (cause) {
        throw unavailable(cause)
      }
    },
    async readiness() {
      try {
        const answer = await fetch(`${dispatcherUrl}/readyz`, { signal: AbortSignal.timeout(5_000) })
        if (answer.ok) return { ready: true }
        const { parts } = (await answer.json()) as { parts?: unknown }
        return { ready: false, reason: parts ?? `the dispatcher answered ${answer.status}` }
      } catch {
        return { ready: false, reason: 'the dispatcher cannot be reached' }
      }
    },
  }
}
