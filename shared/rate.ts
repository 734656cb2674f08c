/**
 * A rate as a cell rate algorithm (GCRA): one number, when the next start would be due if all came evenly, is the
 * whole state. Pure; times are milliseconds since the epoch with fractions, so that 1,000,000 per second fit.
 */
import { z } from 'zod'
import type { Rate } from './functions.ts'

/** What is stored of a lane’s rate. */
export const Meter = z.object({
  /** When the start after those granted would be due without a burst. */
  due: z.number(),
  /** Milliseconds between two starts when `due` was written; a rate that changed is told by it. */
  interval: z.number().positive(),
})
export type Meter = z.infer<typeof Meter>

/** Milliseconds between two starts. */
export const intervalOf = ({ limit, per_s }: Rate): number => (per_s * 1_000) / limit

/**
 * The meter as the rate now reads it: what was granted ahead of time under another rate counts as as many starts
 * under this one, at most its whole burst.
 */
function read(meter: Meter | undefined, rate: Rate, now: number): number {
  if (meter === undefined) return now
  const interval = intervalOf(rate)
  if (meter.interval === interval) return meter.due
  const ahead = Math.max(0, (meter.due - now) / meter.interval)
  return now + Math.min(ahead, rate.burst) * interval
}

export interface Grant {
  /** When each start granted is due, in order; none of them later than `now + aheadMs`. At most `wanted`. */
  starts: number[]
  /** What to store; undefined: nothing was granted. */
  meter: Meter | undefined
  /** When the first start that was not granted is due. */
  next: number
}

/** Grants up to `wanted` starts that are due within `aheadMs` from now. */
export function grant(
  meter: Meter | undefined,
  rate: Rate,
  now: number,
  wanted: number,
  aheadMs: number,
): Grant {
  const interval = intervalOf(rate)
  const tolerance = (rate.burst - 1) * interval
  const starts: number[] = []
  let due = read(meter, rate, now)
  let start = Math.max(now, due - tolerance)
  while (starts.length < wanted && start <= now + aheadMs) {
    starts.push(start)
    due = Math.max(start, due) + interval
    start = Math.max(now, due - tolerance)
  }
  return { starts, meter: starts.length === 0 ? undefined : { due, interval }, next: start }
}

/** How many starts would be due within `aheadMs` from now. */
export function startable(meter: Meter | undefined, rate: Rate, now: number, aheadMs = 0): number {
  const interval = intervalOf(rate)
  const taken = Math.max(0, read(meter, rate, now) - now) / interval
  // A hair of a start is lost to fractions.
  return Math.max(0, Math.floor(rate.burst + aheadMs / interval - taken + 1e-6))
}
