/** The headers of messages between runner and sandbox child: see `shared/guest.ts`. */
import type { ResponseHead } from '../../shared/guest.ts'
import type { Cause } from '../../shared/workload.ts'

export interface RunHeader {
  /** What warm reuse is keyed by: see `isolateKey`. */
  key: string
  typescript: boolean
  memory_mb: number
  /** MiB that the isolates kept warm in this child may hold together, from now on. */
  warm_mb: number
  output_bytes: number
  /** A response that is whole at once and has at most so many bytes comes back with `done`. */
  inline_bytes: number
  /** Of a call by HTTP: the request’s body follows as stream 0. */
  follows?: boolean
  /** Of `prepare`: keep the isolate when others are let go for their memory. */
  keep?: boolean
  /** The time of the call itself is wanted. */
  traced?: true
  /** Sent while another run is under way: it begins after that, and only with its claim (`claims.ts`). */
  ahead?: true
}

export const phaseNames = ['create isolate', 'compile', 'guest'] as const
export type PhaseName = (typeof phaseNames)[number]

export interface DoneHeader {
  status: 'completed' | 'failed' | 'stopped'
  cause: Cause | null
  message: string | null
  stack: string | null
  start: 'cold' | 'warm'
  cpu_ms: number
  /** From the call to its end, as the child saw it. */
  wall_ms: number
  memory_mb: number
  /** Keys whose isolates are no longer held. */
  dropped: string[]
  /**
   * By the machine’s monotonic clock, ms: from when to when the isolate was made and its code compiled, where that
   * was for this run; and the call, where that is wanted.
   */
  phases?: [name: PhaseName, start: number, end: number][]
  /** The process still works for this run, and should take no other. */
  worn?: true
  /** Of a call by HTTP whose response was not sent by `respond`. */
  response?: ResponseHead
}
