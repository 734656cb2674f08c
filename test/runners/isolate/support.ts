/** What the tests of the isolate runner share: jobs with defaults, and runs with their lines. */
import { createHash, randomUUID } from 'node:crypto'
import * as assert from 'uvu/assert'
import type { Failed, Job, Outcome, Runner } from '../../../runners/runner.ts'
import type { Cause, LogLine } from '../../../shared/workload.ts'

export type JobOptions = Partial<Omit<Job, 'code' | 'codeSha256' | 'input' | 'limits'>> & {
  input?: unknown
  limits?: Partial<Job['limits']>
}

export function job(code: string, { input, limits, ...rest }: JobOptions = {}): Job {
  return {
    id: randomUUID(),
    attempt: 1,
    runtime: 'javascript',
    code,
    codeSha256: createHash('sha256').update(code).digest('hex'),
    input: input === undefined ? undefined : JSON.stringify(input),
    env: {},
    limits: { timeout_s: 30, memory_mb: 128, cpu: 1, pids: 64, output_mb: 6, ...limits },
    traceparent: undefined,
    ...rest,
  }
}

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
    const outcome = await runner.prepare(job(code, rest)).run(stop.signal, (line) => lines.push(line))
    return { outcome, lines, ms: performance.now() - start }
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
