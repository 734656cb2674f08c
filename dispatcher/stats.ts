/** `GET /v1/stats`. Counts come from an index, durations from a bounded sample, and both are kept for a moment. */
import { and, count, desc, gte, isNotNull } from 'drizzle-orm'
import type { Distribution, Stats } from '../shared/reads.ts'
import { Isolation, Status } from '../shared/workload.ts'
import type { Database } from './database.ts'
import { counters, workloads } from './schema.ts'

/** The newest ended workloads that durations are taken from; reading more would hold up the fold. */
const sampleSize = 10_000

const round = (ms: number): number => Math.round(ms * 1_000) / 1_000

/** Percentiles by the nearest-rank method. */
export function distribution(values: number[]): Distribution {
  if (values.length === 0) return { count: 0, mean: null, p50: null, p95: null, p99: null }
  const sorted = Float64Array.from(values).sort()
  const rank = (p: number) => round(sorted[Math.max(0, Math.ceil((p / 100) * sorted.length) - 1)]!)
  const mean = round(sorted.reduce((total, value) => total + value, 0) / sorted.length)
  return { count: sorted.length, mean, p50: rank(50), p95: rank(95), p99: rank(99) }
}

const noCounts = (): Record<Status, number> =>
  Object.fromEntries(Status.options.map((status) => [status, 0])) as Record<Status, number>

export async function readStats({ orm }: Database, since: Date): Promise<Stats> {
  const { isolation, status, durationMs, queueMs, endedAt } = workloads
  const counted = await orm
    .select({ isolation, status, n: count() })
    .from(workloads)
    .groupBy(isolation, status)
  const sample = await orm
    .select({ isolation, durationMs, queueMs })
    .from(workloads)
    .where(and(isNotNull(endedAt), gte(endedAt, since.toISOString())))
    .orderBy(desc(endedAt))
    .limit(sampleSize + 1)
  const refused = await orm.select().from(counters)

  const counts = noCounts()
  const byIsolation: Stats['by_isolation'] = {}
  for (const name of Isolation.options) {
    const mine = counted.filter((row) => row.isolation === name)
    if (mine.length === 0) continue
    const own = noCounts()
    for (const row of mine) {
      own[row.status] += row.n
      counts[row.status] += row.n
    }
    const ended = sample.slice(0, sampleSize).filter((row) => row.isolation === name)
    const numbers = (values: (number | null)[]) => distribution(values.filter((value) => value !== null))
    byIsolation[name] = {
      counts: own,
      duration_ms: numbers(ended.map((row) => row.durationMs)),
      queue_ms: numbers(ended.map((row) => row.queueMs)),
    }
  }
  const group = (prefix: string): Record<string, number> =>
    Object.fromEntries(
      refused
        .filter(({ name }) => name.startsWith(prefix))
        .map(({ name, value }) => [name.slice(prefix.length), value]),
    )
  const total = (group: Record<string, number>) => Object.values(group).reduce((sum, n) => sum + n, 0)
  const late = group('events.late.')
  const illegal = group('events.illegal.')
  const decided = counts.completed + counts.failed
  return {
    since: since.toISOString(),
    counts,
    by_isolation: byIsolation,
    success_rate: decided === 0 ? null : counts.completed / decided,
    sample: { size: Math.min(sample.length, sampleSize), truncated: sample.length > sampleSize },
    late: { total: total(late), by_status: late },
    illegal: { total: total(illegal), by_move: illegal },
    invalid: total(group('events.invalid')) + total(group('logs.invalid')),
  }
}
