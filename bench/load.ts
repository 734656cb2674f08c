/** Load from this process: `connections` requests in flight over keep-alive HTTP, latencies kept one by one. */
import { Pool } from 'undici'

export interface LoadResult {
  /** Requests per second. */
  rate: number
  /** Milliseconds. */
  p50: number
  p99: number
  requests: number
  errors: number
}

export interface LoadOptions {
  origin: string
  path: string
  /** The same for every request, or made for each. */
  body: string | (() => string)
  connections: number
  seconds: number
  /** Status that counts as success. */
  expect: number
}

export const percentile = (sorted: readonly number[], p: number): number =>
  sorted[Math.min(sorted.length - 1, Math.floor((sorted.length * p) / 100))] ?? Number.NaN

export function summarise(latencies: number[], seconds: number, errors: number): LoadResult {
  latencies.sort((a, b) => a - b)
  return {
    rate: latencies.length / seconds,
    p50: percentile(latencies, 50),
    p99: percentile(latencies, 99),
    requests: latencies.length,
    errors,
  }
}

export async function load(options: LoadOptions): Promise<LoadResult> {
  const { origin, path, body, connections, seconds, expect } = options
  const pool = new Pool(origin, { connections, pipelining: 1, headersTimeout: 60_000, bodyTimeout: 60_000 })
  const latencies: number[] = []
  let errors = 0
  const start = performance.now()
  const end = start + seconds * 1_000
  const client = async () => {
    while (performance.now() < end) {
      const before = performance.now()
      try {
        const answer = await pool.request({
          path,
          method: 'POST',
          body: typeof body === 'string' ? body : body(),
          headers: { 'content-type': 'application/json' },
        })
        await answer.body.dump()
        if (answer.statusCode !== expect) errors++
        else latencies.push(performance.now() - before)
      } catch {
        errors++
      }
    }
  }
  await Promise.all(Array.from({ length: connections }, client))
  const took = (performance.now() - start) / 1_000
  await pool.close()
  return summarise(latencies, took, errors)
}
