/**
 * The one interface behind which every isolation stands. A runner knows nothing of the bus, of events or of
 * retries: it turns a `Job` into an `Outcome` inside a sandbox, and leaves nothing behind.
 */
import type { Capabilities } from '../shared/backends.ts'
import type { Attributes } from '../shared/tracing.ts'
import type {
  Cause,
  Digest,
  Egress,
  FunctionRef,
  HeaderList,
  Isolation,
  Limits,
  LogLine,
  MachineReceipt,
  Runtime,
  Start,
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

/** A user of a registry, as the secret that a spec names in `image_auth` has it. */
export interface RegistryAuth {
  username: string
  password: string
}

/** What is run. `sha256` is hex, of the text or of the archive’s bytes: what warm reuse is keyed by. */
export type Source =
  /** One module, or one file of the runtime’s language. */
  | { kind: 'code'; text: string; sha256: string }
  /** The files of a tar archive, plain or gzipped, or of a zip. */
  | { kind: 'archive'; sha256: string; open(): Promise<ByteSource> }
  /** An image in a registry, by tag or digest. */
  | { kind: 'image'; reference: string; auth?: RegistryAuth | undefined }
  /** An OCI or docker-save archive. */
  | { kind: 'image-archive'; sha256: string; open(): Promise<ByteSource> }

/** What a sandbox can be made ready for before there is a job. */
export interface Program {
  /** `oci`: what the image has, or, of code and archives, a root with a POSIX shell and coreutils. */
  runtime: Runtime
  source: Source
  /** A file of the source (of code: the name it is given), a command, or undefined: what the runtime takes by itself. */
  entrypoint: string | string[] | undefined
  limits: Limits
  egress: Egress
  /** Of containers: overrides those of the image. */
  workingDir: string | undefined
  user: string | undefined
}

/** One attempt at a workload, parsed, with its payload fetched. */
export interface Job extends Program {
  id: string
  /** 1 for the first. */
  attempt: number
  /** JSON text; `undefined` where the client sent none, or where `http` is set. */
  input: string | undefined
  /** Set where the code is called by HTTP, as `export default { fetch }` is. */
  http: HttpRequest | undefined
  /** With the values of its secrets. */
  env: Record<string, string>
  /** Of a deployed function: what warm sandboxes are counted and prewarmed by. */
  function: FunctionRef | undefined
  /** W3C traceparent of the attempt’s run: what code sends on, and its own spans stand under. */
  traceparent: string | undefined
  /** True where phases are wanted: measured from `prepare` on, told by `onPhase` once `run` was called. */
  traced?: boolean
}

interface Ran {
  usage: Usage
  start: Start
  /** Of the image that really ran, where one did. */
  imageDigest?: Digest
  /** Of the virtual machine, where there was one. */
  machine?: MachineReceipt
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
  /** What its start was busy with, such as `pull image`, where the code had not begun. */
  before?: string
}
export type Outcome = Completed | Failed | Stopped

/** A part of what an attempt consists of, for its trace: what a cold start spent its time on, or a span of user code. */
export interface Phase {
  /**
   * Of a cold start, in the field’s terms: `fetch bundle`, `create isolate`, `compile`, `pull image`, `unpack image`,
   * `create container`, `boot machine`, `restore machine`, `mount files`, `start handler`, `open network`,
   * `build program`; waits, `wait for turn` (its lane’s rate) and `wait for sandbox`; and `guest`, the time within the
   * sandbox from the handler’s call to its answer. Of user code: as it said. Of a fetch: its method.
   */
  name: string
  /** Of a fetch that the code made, or the runner for it. */
  kind?: 'client'
  /** Milliseconds since the epoch, with fractions. */
  start: number
  end: number
  attributes?: Attributes
  /** Set where it failed; of `guest` its cause, or `stopped` where the signal was aborted. */
  error?: string
  /** Of spans of user code and of fetches, 16 hex digits each: its own id, and that of the span it stands under where that is one of them. */
  spanId?: string
  parentSpanId?: string
}

/** What a run tells while it goes on. */
export interface RunEvents {
  /** Absent where nobody traces: measure nothing then. At most a few dozen of the platform’s own; user code’s are bounded. */
  onPhase?: ((phase: Phase) => void) | undefined
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
  prewarm(program: Program, count: number): void
  /** What it counts and measures, for `/v1/backends`: numbers by names that end in their unit, such as `restore_ms_p50`. */
  metrics?(): Record<string, number>
  /** Process ids of the sandboxes now alive, for fault injection and for counting orphans. */
  pids(): number[]
}
