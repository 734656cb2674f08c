/**
 * The one interface behind which every isolation stands. A runner knows nothing of the bus, of events or of
 * retries: it turns a `Job` into an `Outcome` inside a sandbox, and leaves nothing behind.
 */
import type { Capabilities } from '../shared/backends.ts'
import type { Cause, Isolation, Limits, LogLine, Runtime, Usage, WorkloadError } from '../shared/workload.ts'

export type { Capabilities } from '../shared/backends.ts'

/** One attempt at a workload, parsed, with its payload fetched. */
export interface Job {
  id: string
  /** 1 for the first. */
  attempt: number
  runtime: Runtime
  code: string
  /** Hex sha256 of `code`: what warm reuse is keyed by. */
  codeSha256: string
  /** JSON text; `undefined` where the client sent none. */
  input: string | undefined
  env: Record<string, string>
  limits: Limits
  /** W3C traceparent of the attempt. */
  traceparent: string | undefined
}

interface Ran {
  usage: Usage
  start: 'cold' | 'warm'
}
export interface Completed extends Ran {
  status: 'completed'
  /** JSON text, already checked to be JSON and within `limits.output_mb`. */
  output: string
  exitCode: number | null
}
export interface Failed extends Ran {
  status: 'failed'
  cause: Cause
  error: WorkloadError
  exitCode: number | null
}
/** The signal given to `run` was aborted and the user’s code is really dead. Who aborted knows why. */
export interface Stopped extends Ran {
  status: 'stopped'
}
export type Outcome = Completed | Failed | Stopped

export interface Prepared {
  /**
   * Runs the user’s code; called at most once. Settles only when the code no longer runs: after the signal is
   * aborted that takes at most a few hundred ms. Never rejects for what the code does; a sandbox that died is a
   * `Failed` with cause `runner_lost`, one that could not be made `backend_unavailable`.
   * `onLog` is called in the order the lines were written, before `run` settles.
   */
  run(signal: AbortSignal, onLog: (line: LogLine) => void): Promise<Outcome>
  /** Gives the sandbox back without running anything. Harmless after `run`. */
  release(): void
}

/** What a host offers for an isolation, found by trying it. */
export type Probe =
  | { available: true; capabilities: Capabilities }
  | { available: false; reason: string; fix: string }

export interface Runner extends AsyncDisposable {
  readonly isolation: Isolation
  readonly capabilities: Capabilities
  /**
   * Begins what can be done before the attempt is recorded (create, compile, restore). Never runs user code.
   * Cheap and synchronous: long work goes on in the background and is awaited by `run`.
   */
  prepare(job: Job): Prepared
  /** Process ids of the sandboxes now alive, for fault injection and for counting orphans. */
  pids(): number[]
}
