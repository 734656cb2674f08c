/** The routes that make, wait for, stop and repeat workloads. */
import type { HttpBindings } from '@hono/node-server'
import { type Context, Hono } from 'hono'
import { Problem } from '../shared/errors.ts'
import { type AcceptedEvent, type EndEvent, isEnd, makeEvent } from '../shared/events.ts'
import { newWorkloadId } from '../shared/ids.ts'
import { begin, finish, hasEnded, toWorkload, type WorkloadRecord } from '../shared/lifecycle.ts'
import { continueTrace } from '../shared/trace.ts'
import { type Workload, WorkloadId } from '../shared/workload.ts'
import { type AdmissionContext, admit, type Candidate, prepare } from './admission.ts'
import { parseJson, requireJson, withBody } from './body.ts'
import { kill } from './kill.ts'
import { type Preference, parsePrefer } from './prefer.ts'
import type { Reads } from './reads.ts'
import type { Waits } from './waits.ts'

export interface WorkloadRoutes extends AdmissionContext {
  waits: Waits
  reads: Reads
  /** Largest body in bytes. */
  maxBodyBytes: number
  /** Longest that one request waits, in seconds; after that it is answered 202. */
  maxWaitS: number
}

type C = Context<{ Bindings: HttpBindings }>

const inBackground: Preference = { waitS: 0, applied: undefined }

export function workloadRoutes(routes: WorkloadRoutes): Hono<{ Bindings: HttpBindings }> {
  const { bus, waits, reads, roster } = routes
  const app = new Hono<{ Bindings: HttpBindings }>()
  const origin = { source: `/vulcan/gateways/${routes.gatewayId}` }

  app.post('/', async (c) => {
    const preference = parsePrefer(c.req.header('prefer'))
    return run(c, await candidateOf(c), preference)
  })
  app.post('/async', async (c) => run(c, await candidateOf(c), inBackground))

  // An id that is none never reaches a subject.
  app.use('/:id/*', async (c, next) => {
    const id = c.req.param('id')
    if (!WorkloadId.safeParse(id).success) throw notFound(id)
    await next()
  })
  app.get('/', (c) => reads.forward(c))
  app.get('/:id', (c) => reads.forward(c))
  app.get('/:id/logs', (c) => reads.forward(c))

  const stop = async (c: C) => {
    const id = c.req.param('id')!
    let end = await kill(bus, id, roster.lost, origin)
    if (end === undefined) {
      // The stream did not know it: it ended before what the stream keeps, or is only just being accepted.
      const workload = await known(id)
      if (!hasEnded(workload.status)) end = await kill(bus, id, roster.lost, origin)
      if (end === undefined) return c.json(workload)
    }
    waits.settle(id, end)
    return c.json(await ended(id, end))
  }
  app.post('/:id/kill', stop)
  app.delete('/:id', stop)

  app.post('/:id/rerun', async (c) => {
    const preference = parsePrefer(c.req.header('prefer'))
    const first = (await bus.acceptedEvent(c.req.param('id')))?.event as AcceptedEvent | undefined
    const record = first === undefined ? await recordOf(c.req.param('id')) : undefined
    const trace = continueTrace(c.req.header('traceparent'))
    const id = newWorkloadId()
    const from = first?.data ?? record!
    const event = makeEvent(
      'accepted',
      id,
      0,
      {
        spec: from.spec,
        payload: from.payload,
        isolation: from.isolation,
        target: 'any',
        routing_reason: from.routing_reason,
        request_sha256: from.request_sha256,
        trace_id: trace.traceId,
        rerun_of: c.req.param('id'),
      },
      { ...origin, traceparent: trace.traceparent },
    ) as AcceptedEvent
    if (from.payload !== null && (await routes.blobs.size(from.payload.blob)) === undefined)
      throw new Problem('blob_not_found', { detail: `its payload ${from.payload.blob} is no longer stored` })
    return run(c, { id, event }, preference.applied === undefined ? inBackground : preference)
  })

  return app

  function candidateOf(c: C): Promise<Candidate> {
    requireJson(c)
    return withBody(c, routes.maxBodyBytes, (body) =>
      prepare(routes, body, parseJson(body), {
        idempotencyKey: c.req.header('idempotency-key'),
        traceparent: c.req.header('traceparent'),
      }),
    )
  }

  /** Publishes, then answers with the end, or with 202 when it has not come in time. */
  async function run(c: C, candidate: Candidate, preference: Preference): Promise<Response> {
    const { id } = candidate
    const wanted = preference.waitS !== 0
    const wait = wanted ? waits.begin(id) : undefined
    try {
      const admitted = await admit(routes, candidate)
      const accepted = admitted.outcome === 'known' ? admitted.event : candidate.event
      const record = begin(accepted, admitted.seq)
      if (preference.applied !== undefined) c.header('Preference-Applied', preference.applied)
      if (admitted.outcome === 'known') c.header('Idempotency-Replayed', 'true')
      let end: EndEvent | undefined
      if (admitted.outcome === 'known') {
        const last = await bus.lastEvent(id)
        if (last !== undefined && isEnd(last.event)) end = last.event
      }
      if (wait !== undefined) end ??= await patiently(c, wait, preference.waitS)
      const finished = end === undefined ? undefined : await answer(finish(record, end, admitted.seq + 1))
      if (finished !== undefined && wanted) return c.json(finished)
      c.header('Location', `/v1/workloads/${id}`)
      if (finished !== undefined) return c.json(finished, 202)
      if (!wanted && admitted.outcome === 'accepted') return c.json(toWorkload(record), 202)
      return c.json(
        (await reads.json<Workload>(`/v1/workloads/${id}`).catch(() => undefined)) ?? toWorkload(record),
        202,
      )
    } finally {
      wait?.giveUp()
    }
  }

  /** The end, or undefined once the client’s patience or the client itself is gone. */
  function patiently(
    c: C,
    wait: ReturnType<Waits['begin']>,
    waitS: number | undefined,
  ): Promise<EndEvent | undefined> {
    const seconds = Math.min(waitS ?? routes.maxWaitS, routes.maxWaitS)
    const timer = setTimeout(wait.giveUp, seconds * 1_000)
    const { outgoing } = c.env
    outgoing.once('close', wait.giveUp)
    // A client that went away earlier has said so already.
    if (outgoing.closed || outgoing.destroyed) wait.giveUp()
    return wait.ended.finally(() => {
      clearTimeout(timer)
      outgoing.off('close', wait.giveUp)
    })
  }

  /** The public answer, its output fetched where it stands in a blob. */
  async function answer(record: WorkloadRecord): Promise<Workload> {
    if (record.output_blob === null) return toWorkload(record)
    const bytes = await routes.blobs.get(record.output_blob!.blob)
    return toWorkload(record, bytes === undefined ? null : JSON.parse(Buffer.from(bytes).toString()))
  }

  async function ended(id: WorkloadId, end: EndEvent): Promise<Workload> {
    const accepted = await bus.acceptedEvent(id)
    if (accepted === undefined) return await known(id)
    return await answer(finish(begin(accepted.event as AcceptedEvent, accepted.seq), end, accepted.seq + 1))
  }

  async function known(id: WorkloadId): Promise<Workload> {
    const workload = await reads.json<Workload>(`/v1/workloads/${encodeURIComponent(id)}`)
    if (workload === undefined) throw notFound(id)
    return workload
  }

  async function recordOf(id: WorkloadId): Promise<WorkloadRecord> {
    const record = await reads.json<WorkloadRecord>(`/internal/workloads/${encodeURIComponent(id)}`)
    if (record === undefined) throw notFound(id)
    return record
  }
}

const notFound = (id: string) => new Problem('workload_not_found', { detail: `there is no workload ${id}` })
