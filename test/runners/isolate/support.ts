/** What the tests of the isolate runner share: jobs with defaults, and runs with their lines. */
import { createHash, randomUUID } from 'node:crypto'
import * as assert from 'uvu/assert'
import type {
  Failed,
  HttpRequest,
  HttpResponse,
  Job,
  Outcome,
  RunEvents,
  Runner,
} from '../../../runners/runner.ts'
import type { Cause, LogLine } from '../../../shared/workload.ts'

export type JobOptions = Partial<Omit<Job, 'source' | 'input' | 'limits'>> & {
  input?: unknown
  limits?: Partial<Job['limits']>
}

/** A job of source text. */
export type CodeJob = Job & { source: Extract<Job['source'], { kind: 'code' }> }

export function job(code: string, { input, limits, ...rest }: JobOptions = {}): CodeJob {
  return {
    id: randomUUID(),
    attempt: 1,
    runtime: 'javascript',
    source: { kind: 'code', text: code, sha256: createHash('sha256').update(code).digest('hex') },
    entrypoint: undefined,
    workingDir: undefined,
    user: undefined,
    input: input === undefined ? undefined : JSON.stringify(input),
    http: undefined,
    env: {},
    egress: 'none',
    function: undefined,
    limits: { timeout_s: 30, memory_mb: 128, cpu: 1, pids: 64, output_mb: 6, disk_mb: 64, ...limits },
    traceparent: undefined,
    ...rest,
  }
}

/** Events of a run that answers nothing piece by piece. */
export const hearing = (onLog: (line: LogLine) => void = () => {}): RunEvents => ({
  onLog,
  respond() {
    throw new Error('a response where none was expected')
  },
})

export interface Ran {
  outcome: Outcome
  lines: LogLine[]
  /** Milliseconds from call to outcome. */
  ms: number
}

/** Runs to the outcome; aborts after `timeoutMs`. */
export async function run(
  runner: Runner,
  code: string,
  options: JobOptions & { timeoutMs?: number } = {},
): Promise<Ran> {
  const { timeoutMs = 20_000, ...rest } = options
  const lines: LogLine[] = []
  const start = performance.now()
  const stop = new AbortController()
  const timer = setTimeout(() => stop.abort('timeout'), timeoutMs)
  try {
    const outcome = await runner.prepare(job(code, rest)).run(
      stop.signal,
      hearing((line) => lines.push(line)),
    )
    return { outcome, lines, ms: performance.now() - start }
  } finally {
    clearTimeout(timer)
  }
}

export interface Answered extends Ran {
  /** Undefined where the call had no response. */
  response: HttpResponse | undefined
  text: string
  /** Whether it came by `respond` rather than with the outcome. */
  streamed: boolean
  /** What the sink was told in the end. */
  ended: 'end' | 'fail' | undefined
}

export type CallOptions = JobOptions & {
  request?: Partial<HttpRequest>
  timeoutMs?: number
  /** Called with each piece of a response that comes piece by piece; waited for. */
  onPiece?: (bytes: Uint8Array) => Promise<void> | void
}

/** Calls `code` by HTTP. */
export async function call(
  runner: Runner,
  code: string,
  { request, timeoutMs = 20_000, onPiece, ...options }: CallOptions = {},
): Promise<Answered> {
  const answered: Omit<Answered, 'outcome' | 'ms'> = {
    lines: [],
    response: undefined,
    text: '',
    streamed: false,
    ended: undefined,
  }
  const decoder = new TextDecoder()
  const http: HttpRequest = {
    method: 'GET',
    url: 'http://example.test/',
    headers: [],
    body: null,
    gone: new AbortController().signal,
    ...request,
  }
  const stop = new AbortController()
  const timer = setTimeout(() => stop.abort('timeout'), timeoutMs)
  const start = performance.now()
  try {
    const outcome = await runner.prepare({ ...job(code, options), http }).run(stop.signal, {
      onLog: (line) => answered.lines.push(line),
      respond(head) {
        answered.response = head
        answered.streamed = true
        return {
          async write(bytes) {
            await onPiece?.(bytes)
            answered.text += decoder.decode(bytes, { stream: true })
          },
          end() {
            answered.ended ??= 'end'
          },
          fail() {
            answered.ended ??= 'fail'
          },
        }
      },
    })
    if (outcome.status === 'completed' && outcome.response !== undefined) {
      answered.response = outcome.response
      answered.text = decoder.decode(outcome.response.body)
    }
    return { outcome, ...answered, ms: performance.now() - start }
  } finally {
    clearTimeout(timer)
  }
}

export async function output(runner: Runner, code: string, options: JobOptions = {}): Promise<unknown> {
  const { outcome } = await run(runner, code, options)
  if (outcome.status !== 'completed') throw new Error(`did not complete: ${JSON.stringify(outcome)}`)
  return JSON.parse(outcome.output)
}

export async function failure(
  runner: Runner,
  code: string,
  cause: Cause,
  options: JobOptions = {},
): Promise<Failed['error']> {
  const { outcome } = await run(runner, code, options)
  if (outcome.status !== 'failed') throw new Error(`did not fail: ${JSON.stringify(outcome)}`)
  assert.is(outcome.cause, cause, JSON.stringify(outcome))
  return outcome.error
}

/** The process exists and is not a zombie. */
export function isAlive(pid: number, readStat: (path: string) => string): boolean {
  try {
    return !/\) Z /.test(readStat(`/proc/${pid}/stat`))
  } catch {
    return false
  }
}

export const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms))
