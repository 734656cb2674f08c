/**
 * The one interface behind which every isolation stands. A runner knows nothing of the bus, of events or of
 * retries: it turns a `Job` into an `Outcome` inside a sandbox, and leaves nothing behind.
 */
import type { Capabilities } from '../shared/backends.ts'
import type {
  Cause,
  Egress,
  FunctionRef,
  HeaderList,
  Isolation,
  Limits,
  LogLine,
  Runtime,
  Usage,
  WorkloadError,
} from '../shared/workload.ts'

export type { Capabilities } from '../shared/backends.ts'

/** Bytes that come piece by piece: nothing is read ahead of who asks. */
export type ByteSource = AsyncIterable<Uint8Array>

/** Takes bytes piece by piece; whoever writes waits for `write` before the next. */
export interface ByteSink {
  /** Settles when the next piece is welcome; rejects where nobody takes the rest any more. */
  write(bytes: Uint8Array): Promise<void>
  end(): void
  /** The rest never comes. */
  fail(message: string): void
}

/** Called by HTTP. Names in lower case. */
export interface HttpRequest {
  method: string
  /** Absolute, below the function’s own prefix. */
  url: string
  headers: HeaderList
  /** Whole where it was kept with the event, else as it comes; null: none. */
  body: Uint8Array | ByteSource | null
  /** Aborted when the caller is gone: `request.signal`. It does not stop the attempt. */
  gone: AbortSignal
}

export interface HttpResponse {
  status: number
  headers: HeaderList
}

/** One attempt at a workload, parsed, with its payload fetched. */
export interface Job {
  id: string
  /** 1 for the first. */
  attempt: number
  runtime: Runtime
  code: string
  /** Hex sha256 of `code`: what warm reuse is keyed by. */
  codeSha256: string
  /** JSON text; `undefined` where the client sent none, or where `http` is set. */
  input: string | undefined
  /** Set where the code is called by HTTP, as `export default { fetch }` is. */
  http: HttpRequest | undefined
  /** With the values of its secrets. */
  env: Record<string, string>
  limits: Limits
  egress: Egress
  /** Of a deployed function: what warm sandboxes are counted and prewarmed by. */
  function: FunctionRef | undefined
  /** W3C traceparent of the attempt. */
  traceparent: string | undefined
}

interface Ran {
  usage: Usage
  start: 'cold' | 'warm'
}
export interface Completed extends Ran {
  status: 'completed'
  /** JSON text, already checked to be JSON and within `limits.output_mb`; `null` of a call by HTTP. */
  output: string
  exitCode: number | null
  /** Of a call by HTTP whose response did not go through `respond`: it was there at once and is small. */
  response?: HttpResponse & { body: Uint8Array }
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

/** What a run tells while it goes on. */
export interface RunEvents {
  /** In the order the lines were written, before `run` settles. */
  onLog(line: LogLine): void
  /**
   * The head of a response whose body comes piece by piece, or is larger than `inlineResponseBytes`. At most once.
   * The sink is ended or failed before `run` settles.
   */
  respond(head: HttpResponse): ByteSink
}

/** Responses up to this (bytes) that are whole at once come back with the outcome. */
export const inlineResponseBytes = 64 * 1024

export interface Prepared {
  /**
   * Runs the user’s code; called at most once. Settles only when the code no longer runs: after the signal is
   * aborted that takes at most a few hundred ms. Never rejects for what the code does; a sandbox that died is a
   * `Failed` with cause `runner_lost`, one that could not be made `backend_unavailable`.
   */
  run(signal: AbortSignal, events: RunEvents): Promise<Outcome>
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
  /** Keeps so many sandboxes ready with this code; 0 lets them go when they are wanted elsewhere. */
  prewarm(job: Pick<Job, 'runtime' | 'code' | 'codeSha256' | 'limits'>, count: number): void
  /** Process ids of the sandboxes now alive, for fault injection and for counting orphans. */
  pids(): number[]
}
