/** `GET /v1/workloads`: newest first. A page ends at a sequence, so what comes in meanwhile moves nothing. */
import { and, desc, eq, exists, gte, inArray, lt, type SQL, sql } from 'drizzle-orm'
import { toWorkload } from '../shared/lifecycle.ts'
import { type ListedWorkload, type ListQuery, nextCursor, type WorkloadList } from '../shared/reads.ts'
import type { TraceLink } from '../shared/trace.ts'
import type { Database } from './database.ts'
import { toRecord } from './fold.ts'
import { workloadLabels, workloads } from './schema.ts'

/** Milliseconds by which the clocks of two gateways may differ. */
const clockSkewMs = 60_000

export async function listWorkloads(
  { orm }: Database,
  query: ListQuery,
  traceUrl: TraceLink,
): Promise<WorkloadList> {
  const filters: (SQL | undefined)[] = []
  if (query.status !== undefined) filters.push(inArray(workloads.status, query.status))
  if (query.isolation !== undefined) filters.push(inArray(workloads.isolation, query.isolation))
  if (query.function !== undefined) filters.push(eq(workloads.function, query.function))
  if (query.cursor !== undefined) filters.push(lt(workloads.acceptedSeq, query.cursor))
  if (query.since !== undefined) {
    const since = new Date(query.since)
    filters.push(gte(workloads.createdAt, since.toISOString()))
    // Rows lie in the order of acceptance; behind the newest row well before `since` nothing can match.
    const before = new Date(since.getTime() - clockSkewMs).toISOString()
    const bound = orm
      .select({ seq: workloads.acceptedSeq })
      .from(workloads)
      .where(lt(workloads.createdAt, before))
      .orderBy(desc(workloads.createdAt))
      .limit(1)
    filters.push(gte(workloads.acceptedSeq, sql`coalesce((${bound}), 0)`))
  }
  const [first, ...others] = query.label ?? []
  for (const label of others) {
    const { acceptedSeq, name, value } = workloadLabels
    const same = [eq(acceptedSeq, workloads.acceptedSeq), eq(name, label.name)]
    if (label.value !== null) same.push(eq(value, label.value))
    filters.push(
      exists(
        orm
          .select({ one: sql`1` })
          .from(workloadLabels)
          .where(and(...same)),
      ),
    )
  }

  const fields = { acceptedSeq: workloads.acceptedSeq, record: workloads.record }
  // A label’s index already lists in order and is the narrowest way in; CROSS JOIN keeps SQLite on it.
  const rows =
    first === undefined
      ? await orm
          .select(fields)
          .from(workloads)
          .where(and(...filters))
          .orderBy(desc(workloads.acceptedSeq))
          .limit(query.limit + 1)
      : await orm
          .select(fields)
          .from(workloadLabels)
          .crossJoin(workloads)
          .where(
            and(
              eq(workloads.acceptedSeq, workloadLabels.acceptedSeq),
              eq(workloadLabels.name, first.name),
              first.value === null ? undefined : eq(workloadLabels.value, first.value),
              query.cursor === undefined ? undefined : lt(workloadLabels.acceptedSeq, query.cursor),
              ...filters,
            ),
          )
          .orderBy(desc(workloadLabels.acceptedSeq))
          .limit(query.limit + 1)

  const page = rows.slice(0, query.limit)
  return {
    workloads: page.map(({ record }) => listed(record, traceUrl)),
    next_cursor: rows.length > query.limit ? nextCursor(page.at(-1)!.acceptedSeq) : null,
  }
}

function listed(record: string, traceUrl: TraceLink): ListedWorkload {
  const { output: _, ...workload } = toWorkload(
    toRecord({ record, output: null, response: null, spec: 'null' }),
    null,
    traceUrl,
  )
  return workload
}
