/** The routes that make, wait for, stop and repeat workloads. */
import { Hono } from 'hono'
import { Problem } from '../shared/errors.ts'
import {
  type Accepted,
  type AcceptedEvent,
  type EndEvent,
  type HttpCall,
  isEnd,
  makeEvent,
} from '../shared/events.ts'
import { sealHeaders, unsealHeaders } from '../shared/http.ts'
import { newWorkloadId } from '../shared/ids.ts'
import { bodyBlob, hasEnded } from '../shared/lifecycle.ts'
import { traceIdOf } from '../shared/trace.ts'
import { tracingOff } from '../shared/tracing.ts'
import { WorkloadId } from '../shared/workload.ts'
import { blobsOf, type Candidate, prepare } from './admission.ts'
import { parseJson, requireJson, withBody } from './body.ts'
import { kill } from './kill.ts'
import { parsePrefer } from './prefer.ts'
import type { Bindings } from './requests.ts'
import { keptResponse } from './responses.ts'
import { type C, ended, inBackground, known, notFound, type RunContext, recordOf, run } from './runs.ts'

export function workloadRoutes(context: RunContext): Hono<{ Bindings: Bindings }> {
  const { bus, waits, reads, roster } = context
  const app = new Hono<{ Bindings: Bindings }>()
  const origin = { source: `/vulcan/gateways/${context.gatewayId}` }

  app.post('/', async (c) => {
    const preference = parsePrefer(c.req.header('prefer'))
    return run(context, c, await candidateOf(c), preference)
  })
  app.post('/async', async (c) => run(context, c, await candidateOf(c), inBackground))

  // An id that is none never reaches a subject.
  app.use('/:id/*', async (c, next) => {
    const id = c.req.param('id')
    if (!WorkloadId.safeParse(id).success) throw notFound(id)
    await next()
  })
  app.get('/', (c) => reads.forward(c))
  app.get('/:id', (c) => reads.forward(c))
  app.get('/:id/logs', (c) => reads.forward(c))

  app.get('/:id/response', async (c) => {
    const id = c.req.param('id')
    const last = await bus.lastEvent(id)
    if (last !== undefined && !isEnd(last.event))
      throw new Problem('response_not_found', {
        detail: `workload ${id} has not ended yet`,
        retryAfterS: 1,
      })
    const response =
      last === undefined ? (await recordOf(context, id)).response : (last.event as EndEvent).data.response
    return await keptResponse(context, id, response)
  })

  const stop = async (c: C) => {
    const id = c.req.param('id')!
    const { watch } = c.env
    watch.about(id)
    c.header('traceparent', watch.span.traceparent)
    const request = { tracing: context.tracing ?? tracingOff, traceparent: watch.span.traceparent }
    let end = await kill(bus, id, roster.lost, origin, request)
    if (end === undefined) {
      // The stream did not know it: it ended before what the stream keeps, or is only just being accepted.
      const workload = await known(context, id)
      if (!hasEnded(workload.status)) end = await kill(bus, id, roster.lost, origin, request)
      if (end === undefined) return c.json(workload)
    }
    waits.settle(id, end)
    return c.json(await ended(context, id, end))
  }
  app.post('/:id/kill', stop)
  app.delete('/:id', stop)

  app.post('/:id/rerun', async (c) => {
    const preference = parsePrefer(c.req.header('prefer'))
    const from = c.req.param('id')
    const first = (await bus.acceptedEvent(from))?.event as AcceptedEvent | undefined
    const data = first?.data ?? (await recordOf(context, from))
    const id = newWorkloadId()
    const call = repeatable(from, first, data.http != null)
    const named = blobsOf(data.spec).map(([, blob]) => ({ blob }))
    for (const blob of [data.payload, data.bundle, bodyBlob(call?.body), ...named])
      if (blob != null && (await context.blobs.size(blob.blob)) === undefined)
        throw new Problem('blob_not_found', { detail: `${blob.blob}, which it needs, is no longer stored` })
    const http = call === undefined ? undefined : resealed(call, from, id)
    const publish = c.env.watch.beginPublish(id, data)
    const event = makeEvent(
      'accepted',
      id,
      0,
      {
        spec: data.spec,
        payload: data.payload,
        isolation: data.isolation,
        target: laneNow(data.isolation, data.function) ?? 'any',
        routing_reason: data.routing_reason,
        request_sha256: data.request_sha256,
        trace_id: traceIdOf(publish.traceparent),
        rerun_of: from,
        ...(data.function == null ? {} : { function: data.function }),
        ...(data.bundle == null ? {} : { bundle: data.bundle }),
        ...(http === undefined ? {} : { http }),
      },
      { ...origin, traceparent: publish.traceparent },
    ) as AcceptedEvent
    return run(
      context,
      c,
      { id, event, publish },
      preference.applied === undefined ? inBackground : preference,
    )
  })

  return app

  function candidateOf(c: C): Promise<Candidate> {
    requireJson(c)
    return withBody(c, context.maxBodyBytes, (body) =>
      prepare(context, body, parseJson(body), {
        idempotencyKey: c.req.header('idempotency-key'),
        watch: c.env.watch,
      }),
    )
  }

  /** The queue that a function’s workloads go through now. */
  function laneNow(isolation: Accepted['isolation'], of: Accepted['function']): string | undefined {
    if (of == null) return undefined
    return context.registry.lanes().find((lane) => lane.function === of.name && lane.isolation === isolation)
      ?.lane
  }

  /** The request of a call by HTTP, its response now to be kept; throws `not_repeatable` where it is gone. */
  function repeatable(id: string, first: AcceptedEvent | undefined, http: boolean): HttpCall | undefined {
    if (!http) return undefined
    const call = first?.data.http
    if (call == null)
      throw new Problem('not_repeatable', {
        detail: `the request of ${id} is older than what the stream keeps`,
      })
    if (call.body === 'live')
      throw new Problem('not_repeatable', {
        detail: `the body of ${id} was streamed to the function and not kept`,
      })
    return { ...call, gateway: null }
  }

  /** Credentials are sealed for one workload. */
  function resealed(call: HttpCall, from: string, id: string): HttpCall {
    if (call.sealed === null) return call
    return { ...call, ...sealHeaders(unsealHeaders(call, context.box, from), context.box, id) }
  }
}
