/** What stands in the headers of messages between a runner and the shim in a container: see `shared/guest.ts`. */
import type { ResponseHead } from '../../shared/guest.ts'
import type { Cause } from '../../shared/workload.ts'

/** Of `run`. A shim is given the same source with every run. */
export interface RunHeader {
  /** The directory that holds the source’s files, absolute. */
  root: string
  /** A file, from there or absolute; null: what the runtime takes by itself. */
  entry: string | null
  output_bytes: number
  /** A response that is whole at once and has at most so many bytes comes back with `done`. */
  inline_bytes: number
  /** Of a call by HTTP: the request’s body follows as stream 0. */
  follows?: true
  /** Of the first run after a snapshot: hex that random generators are seeded with; the shim goes to `root` then. */
  seed?: string
  /**
   * The files of a program that nobody sent: written below `root`, run once, and forgotten with all it left. None:
   * they are there already, and stay.
   */
  rehearsal?: Record<string, string>
  /** Written to standard error when the run is over, as `markOf` has it: what came before belongs to the run. */
  mark: string
}

/** The `ctx` of a run, as JSON text. */
export interface RunContext {
  id: string
  attempt: number
  traceparent: string | null
  /** Spans are wanted. */
  traced?: true
  env: Record<string, string>
}

/** Of `done`. `stopped` only after a cancel. */
export interface DoneHeader {
  status: 'completed' | 'failed' | 'stopped'
  /** Of `shimCauses`; null unless failed. */
  cause: Cause | null
  message: string | null
  stack: string | null
  /** When the handler was called and when it was through, where spans are wanted: ms since the run came. */
  guest?: [called: number, through: number]
  /** The process should take no other run. */
  worn?: true
  /** Of a call by HTTP whose response was not sent by `respond`. */
  response?: ResponseHead
}

/** Causes that a shim may name; any other is made up. */
export const shimCauses: ReadonlySet<Cause> = new Set<Cause>([
  'user_error',
  'invalid_workload',
  'output_invalid',
  'output_too_large',
])

/** Where the line that ends a run on standard error begins and ends. */
export const markStart = '\0vulcan:'
export const markOf = (mark: string) => `${markStart}${mark}\n`

/** The largest message of a shim apart from its output: a line, a head, or an error with its stack. */
export const maxChatterBytes = 256 * 1024

/** Where a box finds what is not the image’s. */
export const inBox = {
  /** The files of a source of code or archive; the working directory. */
  workspace: '/workspace',
  nodeShim: '/.vulcan/shim.mjs',
  pythonShim: '/.vulcan/shim.py',
  /** Programs of ours that a box was rehearsed with. */
  rehearsal: '/.vulcan/rehearsal',
  /** Named by VULCAN_RESULT. */
  result: '/.vulcan/result',
  /** A Go program that was built here. */
  program: '/.vulcan/program',
} as const

/** A line is written to which stream of the container, third part of `log`; left out: `console`. */
export const streams = ['console', 'stdout', 'stderr'] as const

/** V8’s last words where its heap is full. */
export const memorySpent = (stderr: string): boolean =>
  /FATAL ERROR: .*(?:heap out of memory|Allocation failed)/.test(stderr)
