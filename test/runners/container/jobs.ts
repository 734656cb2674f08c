/** Jobs with defaults, and runs with their lines, for tests of container runners. */
import { createHash, randomUUID } from 'node:crypto'
import * as assert from 'uvu/assert'
import type {
  Failed,
  HttpRequest,
  HttpResponse,
  Job,
  Outcome,
  Phase,
  Runner,
  Source,
} from '../../../runners/runner.ts'
import { type Cause, Limits, type LogLine } from '../../../shared/workload.ts'

export type JobOptions = Partial<Omit<Job, 'input' | 'limits' | 'source'>> & {
  input?: unknown
  limits?: Partial<Job['limits']>
}

const sha256 = (bytes: string | Uint8Array) => createHash('sha256').update(bytes).digest('hex')

export const code = (text: string): Source => ({ kind: 'code', text, sha256: sha256(text) })
export const archive = (bytes: Uint8Array): Extract<Source, { kind: 'archive' }> => ({
  kind: 'archive',
  sha256: sha256(bytes),
  async open() {
    return (async function* () {
      for (let at = 0; at < bytes.length; at += 60_000) yield bytes.subarray(at, at + 60_000)
    })()
  },
})

export function job(source: Source | string, { input, limits, ...rest }: JobOptions = {}): Job {
  return {
    id: randomUUID(),
    attempt: 1,
    runtime: 'node',
    source: typeof source === 'string' ? code(source) : source,
    entrypoint: undefined,
    input: input === undefined ? undefined : JSON.stringify(input),
    http: undefined,
    env: {},
    workingDir: undefined,
    user: undefined,
    egress: 'none',
    function: undefined,
    limits: { ...Limits.parse({}), ...limits },
    traceparent: undefined,
    ...rest,
  }
}

export interface Ran {
  outcome: Outcome
  lines: LogLine[]
  texts: string[]
  /** Milliseconds from call to outcome. */
  ms: number
  response: HttpResponse | undefined
  body: Buffer
  /** Whether the response came by `respond` rather than with the outcome. */
  streamed: boolean
  /** Where `traced` was set. */
  phases: Phase[]
  /** What the sink was told in the end. */
  ended: 'end' | 'fail' | undefined
}

export type RunOptions = JobOptions & {
  request?: Partial<HttpRequest>
  timeoutMs?: number
  signal?: AbortSignal
  onLine?: (line: LogLine) => void
  /** Called with each piece of a response that comes piece by piece; waited for. */
  onPiece?: (bytes: Uint8Array) => Promise<void> | void
}

/** Runs to the outcome; aborts after `timeoutMs`. */
export async function run(
  runner: Runner,
  source: Source | string,
  { timeoutMs = 60_000, request, signal, onLine, onPiece, ...options }: RunOptions = {},
): Promise<Ran> {
  const lines: LogLine[] = []
  const phases: Phase[] = []
  const pieces: Uint8Array[] = []
  const ran: Pick<Ran, 'response' | 'streamed' | 'ended'> = {
    response: undefined,
    streamed: false,
    ended: undefined,
  }
  const http: HttpRequest | undefined =
    request === undefined
      ? undefined
      : {
          method: 'GET',
          url: 'http://example.test/',
          headers: [],
          body: null,
          gone: new AbortController().signal,
          ...request,
        }
  const stop = new AbortController()
  signal?.addEventListener('abort', () => stop.abort(signal.reason))
  const timer = setTimeout(() => stop.abort('timeout'), timeoutMs)
  const start = performance.now()
  try {
    const outcome = await runner.prepare({ ...job(source, options), http }).run(stop.signal, {
      onPhase: options.traced === true ? (phase) => phases.push(phase) : undefined,
      onLog(line) {
        lines.push(line)
        onLine?.(line)
      },
      respond(head) {
        ran.response = head
        ran.streamed = true
        return {
          async write(bytes) {
            await onPiece?.(bytes)
            pieces.push(Uint8Array.from(bytes))
          },
          end() {
            ran.ended ??= 'end'
          },
          fail() {
            ran.ended ??= 'fail'
          },
        }
      },
    })
    const ms = performance.now() - start
    if (outcome.status === 'completed' && outcome.response !== undefined) {
      ran.response = outcome.response
      pieces.push(outcome.response.body)
    }
    const texts = lines.map(({ text }) => text)
    return { outcome, lines, texts, phases, ms, ...ran, body: Buffer.concat(pieces) }
  } finally {
    clearTimeout(timer)
  }
}

export async function output(
  runner: Runner,
  source: Source | string,
  options: RunOptions = {},
): Promise<unknown> {
  const { outcome } = await run(runner, source, options)
  if (outcome.status !== 'completed') throw new Error(`did not complete: ${JSON.stringify(outcome)}`)
  return JSON.parse(outcome.output)
}

export async function failure(
  runner: Runner,
  source: Source | string,
  cause: Cause,
  options: RunOptions = {},
): Promise<Failed> {
  const { outcome } = await run(runner, source, options)
  if (outcome.status !== 'failed') throw new Error(`did not fail: ${JSON.stringify(outcome)}`)
  assert.is(outcome.cause, cause, JSON.stringify(outcome))
  return outcome
}

export const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms))
