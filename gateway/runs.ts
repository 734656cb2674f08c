/** What every route that makes a workload ends with: publish, wait as long as the client does, answer. */
import type { Context } from 'hono'
import { Problem } from '../shared/errors.ts'
import { type AcceptedEvent, type EndEvent, isEnd } from '../shared/events.ts'
import { begin, finish, toWorkload, type WorkloadRecord } from '../shared/lifecycle.ts'
import type { Workload, WorkloadId } from '../shared/workload.ts'
import { type AdmissionContext, admit, type Candidate } from './admission.ts'
import type { Preference } from './prefer.ts'
import type { Reads } from './reads.ts'
import type { Bindings, RequestWatch, Watched } from './requests.ts'
import type { Wait, Waits } from './waits.ts'

export interface RunContext extends AdmissionContext, Watched {
  waits: Waits
  reads: Reads
  /** Largest body in bytes. */
  maxBodyBytes: number
  /** Longest that one request waits, in seconds; after that it is answered 202. */
  maxWaitS: number
}

export type C = Context<{ Bindings: Bindings }>

export const inBackground: Preference = { waitS: 0, applied: undefined }

/** Publishes, then answers with the end, or with 202 when it has not come in time. */
export async function run(
  context: RunContext,
  c: C,
  candidate: Candidate,
  preference: Preference,
): Promise<Response> {
  const { bus, waits, reads, traceUrl } = context
  const { id } = candidate
  const { watch } = c.env
  const wanted = preference.waitS !== 0
  const wait = wanted ? waits.begin(id) : undefined
  try {
    const admitted = await admit(context, candidate)
    const accepted = admitted.outcome === 'known' ? admitted.event : candidate.event
    const record = begin(accepted, admitted.seq)
    c.header('traceparent', watch.span.traceparent)
    if (preference.applied !== undefined) c.header('Preference-Applied', preference.applied)
    if (admitted.outcome === 'known') c.header('Idempotency-Replayed', 'true')
    let end: EndEvent | undefined
    if (admitted.outcome === 'known') {
      const last = await bus.lastEvent(id)
      if (last !== undefined && isEnd(last.event)) end = last.event
    }
    if (wait !== undefined) end ??= await patiently(context, c, wait, preference.waitS)
    if (end === undefined) goesOn(watch, waits, id)
    else watch.ended(end)
    const finished =
      end === undefined ? undefined : await answer(context, finish(record, end, admitted.seq + 1))
    if (finished !== undefined && wanted) return c.json(finished)
    c.header('Location', `/v1/workloads/${id}`)
    if (finished !== undefined) return c.json(finished, 202)
    if (!wanted && admitted.outcome === 'accepted') return c.json(toWorkload(record, null, traceUrl), 202)
    return c.json(
      (await reads.json<Workload>(`/v1/workloads/${id}`).catch(() => undefined)) ??
        toWorkload(record, null, traceUrl),
      202,
    )
  } finally {
    wait?.giveUp()
  }
}

/** The answer is 202: what is kept of the trace waits for the end without it. */
export function goesOn(watch: RequestWatch, waits: Waits, id: WorkloadId): void {
  watch.goesOn((over) => {
    const wait = waits.begin(id)
    wait.beLenient()
    over.addEventListener('abort', wait.giveUp)
    return wait.ended
  })
}

/** The end, or undefined once the client’s patience or the client itself is gone. */
function patiently(
  { maxWaitS }: RunContext,
  c: C,
  wait: Wait,
  waitS: number | undefined,
): Promise<EndEvent | undefined> {
  const seconds = Math.min(waitS ?? maxWaitS, maxWaitS)
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
async function answer({ blobs, traceUrl }: RunContext, record: WorkloadRecord): Promise<Workload> {
  if (record.output_blob === null) return toWorkload(record, record.output, traceUrl)
  const bytes = await blobs.get(record.output_blob.blob)
  const output = bytes === undefined ? null : JSON.parse(Buffer.from(bytes).toString())
  return toWorkload(record, output, traceUrl)
}

/** The public answer for a workload of which the end is known. */
export async function ended(context: RunContext, id: WorkloadId, end: EndEvent): Promise<Workload> {
  const accepted = await context.bus.acceptedEvent(id)
  if (accepted === undefined) return await known(context, id)
  const record = begin(accepted.event as AcceptedEvent, accepted.seq)
  return await answer(context, finish(record, end, accepted.seq + 1))
}

/** The workload as the dispatcher has it. Throws `workload_not_found`. */
export async function known({ reads }: RunContext, id: WorkloadId): Promise<Workload> {
  const workload = await reads.json<Workload>(`/v1/workloads/${encodeURIComponent(id)}`)
  if (workload === undefined) throw notFound(id)
  return workload
}

/** All that the dispatcher knows of the workload. Throws `workload_not_found`. */
export async function recordOf({ reads }: RunContext, id: WorkloadId): Promise<WorkloadRecord> {
  const record = await reads.json<WorkloadRecord>(`/internal/workloads/${encodeURIComponent(id)}`)
  if (record === undefined) throw notFound(id)
  return record
}

export const notFound = (id: string) =>
  new Problem('workload_not_found', { detail: `there is no workload ${id}` })
