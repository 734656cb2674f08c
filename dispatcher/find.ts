/** Finding one workload, never older than what its client was already told. */
import { eq } from 'drizzle-orm'
import { BusUnavailable, Problem } from '../shared/errors.ts'
import { hasEnded } from '../shared/lifecycle.ts'
import { lifecycleSubjects } from '../shared/subjects.ts'
import { EVENTS } from '../shared/topology.ts'
import { WorkloadId } from '../shared/workload.ts'
import type { Live } from './live.ts'
import { workloads } from './schema.ts'

/** Milliseconds a read waits for the fold to reach what the stream holds. */
const catchUpMs = 5_000

export type FoundRow = Pick<
  typeof workloads.$inferSelect,
  'status' | 'lastSeq' | 'record' | 'output' | 'response' | 'spec'
>

export async function findRow(live: Live, id: WorkloadId): Promise<FoundRow | undefined> {
  const [row] = await live.read(({ orm }) =>
    orm
      .select({
        status: workloads.status,
        lastSeq: workloads.lastSeq,
        record: workloads.record,
        output: workloads.output,
        response: workloads.response,
        spec: workloads.spec,
      })
      .from(workloads)
      .where(eq(workloads.id, id)),
  )
  return row
}

/**
 * The row of a workload, folded up to what the stream holds of it. A row that has ended is final and answered as
 * it is; so is any row while the stream cannot be asked. Throws `workload_not_found` only when the stream has none.
 */
export async function freshRow(live: Live, id: string): Promise<FoundRow> {
  // Only an id may become part of a subject.
  if (!WorkloadId.safeParse(id).success) throw notFound(id)
  const row = await findRow(live, id)
  if (row !== undefined && hasEnded(row.status)) return row
  let last: number
  try {
    if (live.connectedBus === undefined) throw new BusUnavailable('not connected')
    last = await live.connectedBus.lastSequence(EVENTS, lifecycleSubjects(id))
  } catch (cause) {
    if (!(cause instanceof BusUnavailable)) throw cause
    if (row !== undefined) return row
    const detail = `workload ${id} is not in the database, and the event stream cannot be asked`
    throw new Problem('bus_unavailable', { detail, retryAfterS: 1, cause })
  }
  if (last === 0 && row === undefined) throw notFound(id)
  if (last <= (row?.lastSeq ?? 0)) return row!
  const reached = await live.events.reached(last, catchUpMs)
  const now = await findRow(live, id)
  if (now !== undefined) return now
  if (reached) throw notFound(id)
  const detail = `workload ${id} exists, but the database is behind: ${live.events.lag ?? 'unknown'} events to go`
  throw new Problem('database_unavailable', { detail, retryAfterS: 2 })
}

const notFound = (id: string) => new Problem('workload_not_found', { detail: `there is no workload ${id}` })
