/**
 * Invocation of deployed functions: `ANY /fn/:name/*` by HTTP, which goes past the router, as any method and path is
 * the function’s own business; and `POST /v1/functions/:name/invocations` with JSON.
 *
 * A request’s body of known length up to 256 KiB goes into the accepted event; anything else is streamed to the
 * function while it runs, without a limit but its time. With `Prefer: respond-async` the body is kept whole, up to the
 * gateway’s limit for bodies, and so is the response.
 */
import type { IncomingMessage, ServerResponse } from 'node:http'
import { setTimeout as delay } from 'node:timers/promises'
import { RESPONSE_ALREADY_SENT } from '@hono/node-server/utils/response'
import { Hono } from 'hono'
import { Problem } from '../shared/errors.ts'
import { type EndEvent, type HttpBody, type HttpCall, isEnd } from '../shared/events.ts'
import type { GatewayExchange, GatewayExchanges, StreamedResponse } from '../shared/exchange.ts'
import { inlineBody, inlineBodyBytes, sealHeaders } from '../shared/http.ts'
import { newWorkloadId, sha256Hex } from '../shared/ids.ts'
import { begin, finish, toWorkload } from '../shared/lifecycle.ts'
import { controlSubject } from '../shared/subjects.ts'
import type { WorkloadId } from '../shared/workload.ts'
import { admit, invocationId, prepareInvocation, type Target, targetOf } from './admission.ts'
import { parseJson, requireJson, withBody, withRequestBody } from './body.ts'
import { requestHeaders, wantsUpgrade } from './headers.ts'
import { type Preference, parsePrefer } from './prefer.ts'
import type { Bindings, RequestWatch } from './requests.ts'
import { openAnswer, unsendable, writeStream, writeWhole } from './responses.ts'
import { type C, goesOn, inBackground, type RunContext, run } from './runs.ts'
import type { Wait } from './waits.ts'

export interface InvokeContext extends RunContext {
  exchanges: GatewayExchanges
}

/** Milliseconds that what is known to have been sent is given to arrive. */
const graceMs = 2_000
/** Milliseconds that a runner is given to take note that a caller is gone, and between two tries to tell it. */
const tellMs = 500
const tellAgainMs = [250, 5_000] as const

/** `/fn/name`, `/fn/name@ref`, with or without a path below; also as an absolute URL, as RFC 9112 lets it be. */
const pattern = /^(?:https?:\/\/[^/?#]*)?\/fn\/([^/?#]+)/

/** `POST /v1/functions/:name/invocations` and `…/invocations/async`: the body is the input itself. */
export function invocationRoutes(context: InvokeContext): Hono<{ Bindings: Bindings }> {
  const app = new Hono<{ Bindings: Bindings }>()
  app.post('/:name/invocations', (c) => invokeJson(c, parsePrefer(c.req.header('prefer'))))
  app.post('/:name/invocations/async', (c) => invokeJson(c, inBackground))
  return app

  async function invokeJson(c: C, preference: Preference): Promise<Response> {
    const { name, ref } = parseTarget(c.req.param('name')!)
    const target = targetOf(context, name, c.req.query('ref') ?? ref)
    const candidate = await withBody(c, context.maxBodyBytes, async (body) => {
      if (body.byteLength > 0) requireJson(c)
      const input = body.byteLength > 0 ? parseJson(body) : undefined
      return await prepareInvocation(
        context,
        target,
        { input },
        {
          id: invocationId(name, c.req.header('idempotency-key')),
          requestSha256: sha256Hex(body),
          watch: c.env.watch,
        },
      )
    })
    c.header('x-vulcan-version', target.version.version)
    return await run(context, c, candidate, preference)
  }
}

/** `name@ref`, as it stands in a path. */
function parseTarget(segment: string): { name: string; ref: string | undefined } {
  let text = segment
  if (segment.includes('%'))
    try {
      text = decodeURIComponent(segment)
    } catch {
      // What cannot be decoded is the name of no function.
    }
  const at = text.indexOf('@')
  return at < 0 ? { name: text, ref: undefined } : { name: text.slice(0, at), ref: text.slice(at + 1) }
}

/** True for what `invoker` answers. */
export const isInvocation = (incoming: IncomingMessage | undefined): boolean =>
  incoming?.url !== undefined && pattern.test(incoming.url)

/** One call in hand. */
interface Call {
  id: WorkloadId
  method: string
  target: Target
  request: Request
  incoming: IncomingMessage
  outgoing: ServerResponse
  watch: RequestWatch
}

/** Answers `ANY /fn/…`. Rejects with a `Problem`; where a workload exists, its id is among the headers by then. */
export function invoker(context: InvokeContext): (request: Request, env: Bindings) => Promise<Response> {
  const { bus, blobs, box, waits, exchanges, maxBodyBytes, maxWaitS, gatewayId } = context

  return async (request, env) => {
    const incoming = env.incoming as IncomingMessage
    const outgoing = env.outgoing as ServerResponse
    if (wantsUpgrade(incoming))
      throw new Problem('upgrade_unsupported', {
        detail: 'functions are called by HTTP requests, not by WebSocket',
      })
    if (!URL.canParse(request.url))
      throw new Problem('invalid_header', { detail: 'it names no host that a URL can have', field: 'Host' })
    const { name, ref } = parseTarget(pattern.exec(incoming.url!)![1]!)
    const target = targetOf(context, name, ref)
    const method = incoming.method ?? 'GET'
    const { prefer } = incoming.headers
    const preference =
      typeof prefer === 'string' && /respond-async/i.test(prefer) ? parsePrefer(prefer) : undefined
    const call = { method, target, request, incoming, outgoing, watch: env.watch }
    // The word may stand in another preference, or be a part of one.
    return preference?.applied?.split(', ').includes('respond-async') === true
      ? await answerLater(call, preference)
      : await answerNow({ ...call, id: newWorkloadId() })
  }

  /** The caller waits; the response goes out as it comes. */
  async function answerNow(call: Call): Promise<Response> {
    const { id, incoming, outgoing, target, watch } = call
    const kept = await readInline(incoming)
    // A caller who went away while it sent its request has asked for nothing.
    if (kept === 'gone') return RESPONSE_ALREADY_SENT
    const body: HttpBody = kept === 'live' ? 'live' : inlineBody(kept)
    const requestSha256 = kept === 'live' ? '' : sha256Hex(kept)
    const candidate = await prepareInvocation(
      context,
      target,
      { http: httpCall(call, body, gatewayId) },
      { id, requestSha256, watch },
    )
    const ours = ourHeaders(call)
    const wait = waits.begin(id)
    const exchange = exchanges.open(id)
    // What the function leaves unread must not take the connection, and with it the response, down.
    if (body === 'live') exchange.offer(incoming.iterator({ destroyOnReturn: false }))
    let gone = false
    const onClose = () => {
      if (outgoing.writableFinished) return
      gone = true
      void tellGone(id, wait, exchange)
    }
    try {
      await admit(context, candidate)
      outgoing.once('close', onClose)
      if (outgoing.destroyed) onClose()
      await answer(call, wait, exchange, ours)
    } catch (error) {
      if (gone) return RESPONSE_ALREADY_SENT
      if (!outgoing.headersSent && error instanceof Problem)
        for (const [header, value] of Object.entries(ours)) outgoing.setHeader(header, value)
      throw error
    } finally {
      // Whoever tells that the caller is gone looks after these.
      if (!gone) {
        outgoing.off('close', onClose)
        wait.giveUp()
        exchange.close()
      }
    }
    return RESPONSE_ALREADY_SENT
  }

  async function answer(
    { id, method, outgoing, target, watch }: Call,
    wait: Wait,
    exchange: GatewayExchange,
    ours: Record<string, string>,
  ): Promise<void> {
    let tooLong = false
    const patience = setTimeout(() => {
      tooLong = true
      wait.giveUp()
    }, maxWaitS * 1_000)
    let first = await Promise.race([exchange.answered, wait.ended]).finally(() => clearTimeout(patience))
    if (isEndOf(first) && first.data.response?.body === 'live')
      first = (await Promise.race([exchange.answered, delay(graceMs, undefined, { ref: false })])) ?? first
    if (outgoing.destroyed) return
    try {
      if (first === undefined && !tooLong)
        throw new Problem('invocation_stopped', {
          detail: `the gateway was stopped before the function answered; workload ${id} goes on`,
          retryAfterS: 1,
        })
      if (first === undefined)
        throw new Problem('invocation_timeout', {
          detail: `the function did not answer; workload ${id} may still do so`,
        })
      if (!isEndOf(first)) {
        // Where the end is known, nothing more is on its way.
        const { body } = first
        wait.beLenient()
        void wait.ended.then(async (end) => {
          if (end === undefined) return
          watch.ended(end)
          await delay(graceMs, undefined, { ref: false })
          body.break('the function ended before its response did')
        })
        return await writeStream(outgoing, method, first, ours)
      }
      watch.ended(first)
      const { response } = first.data
      // What was streamed and has not come by now never will.
      if (response == null || response.body === 'live') throw failureOf(first, target)
      writeWhole(outgoing, method, await openAnswer({ blobs, box }, id, response), ours)
    } catch (cause) {
      if (cause instanceof Problem || outgoing.headersSent) throw cause
      throw unsendable(id, cause)
    }
  }

  /** Until it has ended: it may still be waiting in the queue, or be tried again. */
  async function tellGone(id: WorkloadId, wait: Wait, exchange: GatewayExchange): Promise<void> {
    let over = false
    void wait.ended.then(() => {
      over = true
    })
    const [first, longest] = tellAgainMs
    const deadline = Date.now() + maxWaitS * 1_000
    for (let pause: number = first; !over && Date.now() < deadline; pause = Math.min(pause * 2, longest)) {
      if ((await bus.ask(controlSubject(id), '{"action":"gone"}', tellMs)) !== undefined) {
        exchange.close()
        wait.beLenient()
        pause = longest
      }
      await Promise.race([wait.ended, delay(pause, undefined, { ref: false })])
    }
    wait.giveUp()
    exchange.close()
  }

  /** The caller is told the workload; its response is fetched later. */
  async function answerLater(call: Omit<Call, 'id'>, preference: Preference): Promise<Response> {
    const { method, request, incoming, target, watch } = call
    const { name } = target.version
    const id = invocationId(name, one(incoming.headers['idempotency-key']))
    const candidate = await withRequestBody(request, maxBodyBytes, async (bytes) => {
      const body = bytes.byteLength > inlineBodyBytes ? await blobs.put(bytes) : inlineBody(bytes)
      const path = request.url.slice(request.url.indexOf('/', 8))
      return await prepareInvocation(
        context,
        target,
        { http: httpCall({ ...call, id }, body, null) },
        {
          id,
          requestSha256: sha256Hex(Buffer.concat([Buffer.from(`${method} ${path}\n`), bytes])),
          watch,
        },
      )
    })
    const wait = preference.waitS ? waits.begin(id) : undefined
    try {
      const admitted = await admit(context, candidate)
      const accepted = admitted.outcome === 'known' ? admitted.event : candidate.event
      const headers: Record<string, string> = {
        ...ourHeaders({ ...call, id }),
        'preference-applied': preference.applied!,
        location: `/v1/workloads/${id}`,
        ...(admitted.outcome === 'known' ? { 'idempotency-replayed': 'true' } : {}),
      }
      let end = admitted.outcome === 'known' ? (await bus.lastEvent(id))?.event : undefined
      if (end !== undefined && !isEnd(end)) end = undefined
      if (wait !== undefined && end === undefined) {
        const timer = setTimeout(wait.giveUp, Math.min(preference.waitS!, maxWaitS) * 1_000)
        call.outgoing.once('close', wait.giveUp)
        end = await wait.ended.finally(() => clearTimeout(timer))
      }
      if (end !== undefined && isEnd(end)) watch.ended(end)
      else goesOn(watch, waits, id)
      if (wait !== undefined && end !== undefined && isEnd(end)) {
        if (end.data.response == null) throw failureOf(end, target)
        const whole = await openAnswer({ blobs, box }, id, end.data.response)
        try {
          writeWhole(call.outgoing, method, whole, headers)
        } catch (cause) {
          throw unsendable(id, cause)
        }
        return RESPONSE_ALREADY_SENT
      }
      let record = begin(accepted, admitted.seq)
      if (end !== undefined && isEnd(end)) record = finish(record, end, admitted.seq + 1)
      return new Response(JSON.stringify(toWorkload(record, record.output, context.traceUrl)), {
        status: 202,
        headers: { ...headers, 'content-type': 'application/json' },
      })
    } finally {
      wait?.giveUp()
    }
  }

  function httpCall(
    { id, method, request, incoming }: Call,
    body: HttpBody,
    gateway: string | null,
  ): HttpCall {
    return { method, url: request.url, ...sealHeaders(requestHeaders(incoming), box, id), body, gateway }
  }
}

const one = (value: string | string[] | undefined) => (Array.isArray(value) ? value[0] : value)

const isEndOf = (first: EndEvent | StreamedResponse | undefined): first is EndEvent =>
  first !== undefined && 'specversion' in first

const ourHeaders = ({ id, target, watch }: Call) => ({
  'x-vulcan-workload-id': id,
  'x-vulcan-version': target.version.version,
  traceparent: watch.span.traceparent,
})

/** What a caller is told of a function that ended without an answer: the cause, not what its code said. */
function failureOf(end: EndEvent, { version: { name } }: Target): Problem {
  const { cause } = end.data
  const id = end.subject
  switch (cause) {
    case 'timeout':
      return new Problem('invocation_timeout', {
        detail: `function ${name} ran longer than its limit; see workload ${id}`,
      })
    case 'killed':
    case 'runner_lost':
    case 'backend_unavailable':
    case 'disk_full':
      return new Problem('invocation_stopped', {
        detail: `function ${name} was stopped before it answered (${cause}); see workload ${id}`,
        retryAfterS: 1,
      })
    case null:
      return new Problem('invocation_failed', {
        detail: `function ${name} ended, and no response by HTTP came of it; see workload ${id}`,
      })
    default:
      return new Problem('invocation_failed', {
        detail: `function ${name} failed before it answered (${cause}); see workload ${id}`,
      })
  }
}

/** The body, where its length is known and small; `live` where it is to be streamed. */
async function readInline(incoming: IncomingMessage): Promise<Buffer | 'live' | 'gone'> {
  const { headers } = incoming
  if (headers['transfer-encoding'] !== undefined) return 'live'
  const length = Number(headers['content-length'] ?? 0)
  if (length === 0) return empty
  if (length > inlineBodyBytes) return 'live'
  return await new Promise((resolve) => {
    const parts: Buffer[] = []
    const settle = (result: Buffer | 'gone') => {
      incoming.off('data', onData)
      incoming.off('end', onEnd)
      incoming.off('close', onGone)
      incoming.off('error', onGone)
      resolve(result)
    }
    const onData = (part: Buffer) => void parts.push(part)
    const onEnd = () => settle(parts.length === 1 ? parts[0]! : Buffer.concat(parts))
    const onGone = () => settle('gone')
    incoming.on('data', onData)
    incoming.on('end', onEnd)
    incoming.on('close', onGone)
    incoming.on('error', onGone)
  })
}
const empty = Buffer.alloc(0)
