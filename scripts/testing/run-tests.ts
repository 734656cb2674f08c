import { spawn } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { globSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { stripVTControlCharacters } from 'node:util'
import { processesStartedWith, signal as send } from '../process-identity.ts'
import { type Report, reportMark } from './report.ts'

export type Counts = { passed: number; failed: number; skipped: number }

export type RunOptions = {
  /** Files, relative to `root`. */
  files: string[]
  root: string
  /** For a file that names none in a `// timeout: <seconds>` near its top. */
  timeoutMs: number
  log: (line: string) => void
  /** Files at once; default 1. */
  lanes?: number
  /** Show output while it comes, not only that of a failed file. */
  live?: boolean
  /**
   * Up to so many failed files are run once more at the end, alone, and count by that: a machine that was busy with
   * something else fails nobody. Both runs are told. Where more have failed, all stay failed. Default 0.
   */
  again?: number
  /** Gives up: what runs is killed and the rest is not run. */
  signal?: AbortSignal
}

type FileResult = Counts & {
  /** Why the file is not green; empty when it is. */
  problems: string[]
  /** `<name>: <reason>` of each skipped test. */
  skips: string[]
  output: string
}

/** Marks every process that a test file starts, directly or not. */
const markName = 'VULCAN_TEST_RUN'
/** What a finished test file may still need to end its processes. */
const leftoverGraceMs = 2_000

/** Test files under `root` whose path holds one of the `filters`, all where there is none. */
export function findTests(root: string, pattern: string, filters: string[]): string[] {
  const files = globSync(pattern, { cwd: root }).sort()
  return files.filter((file) => filters.length === 0 || filters.some((filter) => file.includes(filter)))
}

/** Runs each file in a process of its own and prints a line for each. */
export async function runTests(options: RunOptions): Promise<Counts> {
  const { log, signal, lanes = 1, again = 0 } = options
  const files = [...options.files]
  const results = new Map<string, FileResult>()
  const run = async (file: string) => {
    const begun = performance.now()
    const result = await runFile(file, options)
    const seconds = ((performance.now() - begun) / 1000).toFixed(1)
    if (!isGreen(result) && !options.live) log(result.output)
    log(`${isGreen(result) ? 'ok  ' : 'FAIL'}  ${file}  ${closingLine(result)}  (${seconds} s)`)
    for (const problem of result.problems) log(`      ${problem}`)
    results.set(file, result)
  }
  // From both ends: neighbours are often after the same thing, such as control groups or a core for a machine.
  const lane = async (next: () => string | undefined) => {
    for (let file = next(); file !== undefined && !signal?.aborted; file = next()) await run(file)
  }
  await Promise.all(
    Array.from({ length: lanes }, (_, n) => lane(() => (n % 2 === 0 ? files.shift() : files.pop()))),
  )
  const failed = [...results].filter(([, result]) => !isGreen(result))
  const unsteady: string[] = []
  if (failed.length <= again)
    for (const [file, first] of failed) {
      if (signal?.aborted) break
      log(`again ${file}`)
      await run(file)
      if (isGreen(results.get(file)!))
        unsteady.push(
          ...first.problems.map((problem) => `UNSTEADY  ${file}  ${problem}; passed when run again`),
        )
    }
  const total: Counts = { passed: 0, failed: 0, skipped: 0 }
  const [skips, failures]: [string[], string[]] = [[], []]
  for (const [file, result] of results) {
    total.passed += result.passed
    total.failed += result.failed
    total.skipped += result.skipped
    skips.push(...result.skips.map((skip) => `SKIP  ${file}  ${skip}`))
    failures.push(...result.problems.map((problem) => `FAIL  ${file}  ${problem}`))
  }
  log('')
  for (const line of [...skips, ...unsteady, ...failures]) log(line)
  return total
}

const isGreen = ({ problems }: FileResult): boolean => problems.length === 0

export const closingLine = ({ passed, failed, skipped }: Counts) =>
  `${passed} passed, ${failed} failed, ${skipped} skipped`

async function runFile(file: string, options: RunOptions): Promise<FileResult> {
  const path = join(options.root, file)
  const mark = randomUUID()
  const { FORCE_COLOR: _, ...env } = process.env
  const child = spawn(
    process.execPath,
    ['--import', new URL('./uvu-preload.ts', import.meta.url).href, path],
    {
      cwd: options.root,
      env: { ...env, NO_COLOR: '1', [markName]: mark },
      stdio: ['ignore', 'pipe', 'pipe'],
      // A group of its own: what the file leaves running is killed with it.
      detached: true,
    },
  )
  const closed = once(child, 'close')
  let output = ''
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8').on('data', (chunk: string) => {
      output += chunk
      if (options.live) process.stdout.write(chunk)
    })
  }
  const timeoutMs = ownTimeoutMs(path) ?? options.timeoutMs
  const over = AbortSignal.any([
    ...(options.signal ? [options.signal] : []),
    ...(Number.isFinite(timeoutMs) ? [AbortSignal.timeout(timeoutMs)] : []),
  ])
  const cut = () => void send(-child.pid!, 'SIGKILL')
  over.addEventListener('abort', cut, { once: true })
  const [code, signal] = (await once(child, 'exit')) as [number | null, NodeJS.Signals | null]
  over.removeEventListener('abort', cut)
  cut()

  const leftovers = await endLeftovers(mark, over.aborted ? 0 : leftoverGraceMs)
  // A process outside the group that was not marked may hold the pipes open.
  await Promise.race([closed, sleep(1_000, undefined, { ref: false })])

  const problems: string[] = []
  if (options.signal?.aborted) problems.push('interrupted')
  else if (over.aborted) problems.push(`did not end within ${timeoutMs / 1000} s`)
  else if (signal) problems.push(`was ended by ${signal}`)
  else if (code !== 0) problems.push(`exited with code ${code}`)
  if (leftovers.length > 0 && !over.aborted) problems.push(`left processes behind: ${leftovers.join('; ')}`)
  return judge(stripVTControlCharacters(output), problems)
}

/** The timeout that a file asks for in its first ten lines, in ms. */
function ownTimeoutMs(path: string): number | undefined {
  const top = readFileSync(path, 'utf8').split('\n', 10).join('\n')
  const seconds = /^\/\/ timeout: (\d+)/m.exec(top)?.[1]
  return seconds ? Number(seconds) * 1000 : undefined
}

/** Kills what is left of a file's processes. Returns the command lines of those that were there after the grace. */
async function endLeftovers(mark: string, graceMs: number): Promise<string[]> {
  const deadline = performance.now() + graceMs
  let pids = processesStartedWith(markName, mark)
  while (pids.length > 0 && performance.now() < deadline) {
    await sleep(50)
    pids = processesStartedWith(markName, mark)
  }
  const commands = pids.map((pid) => {
    const command = readCommand(pid)
    send(pid, 'SIGKILL')
    return `${command} (${pid})`
  })
  return commands
}

function readCommand(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ').trim().slice(0, 200)
  } catch {
    return 'ended'
  }
}

/**
 * What a file's output and end amount to. uvu's exit code alone does not tell: it is 0 when a `before` hook throws.
 *
 * @param problems what is known to be wrong already
 */
export function judge(output: string, problems: string[]): FileResult {
  const skips = [...output.matchAll(/^SKIP (.+: .+)$/gm)].map(([, skip]) => skip!)
  const all = [...problems]
  const reportLine = output.split('\n').findLast((line) => line.startsWith(reportMark))
  const report: Report = reportLine
    ? JSON.parse(reportLine.slice(reportMark.length))
    : { registered: 0, failures: [] }
  const total = lastCount(output, 'Total')
  const passed = lastCount(output, 'Passed')
  const skipped = lastCount(output, 'Skipped')
  all.push(...report.failures)
  if (passed === undefined || total === undefined || skipped === undefined) {
    if (problems.length === 0) all.push(`uvu did not finish (${report.registered} tests registered)`)
    return { passed: 0, failed: Math.max(1, report.registered), skipped: 0, problems: all, skips, output }
  }
  const failed = report.registered - passed - skipped
  if (report.registered === 0) all.push('registers no tests')
  if (total + skipped !== report.registered) {
    all.push(`${report.registered} tests registered, ${total} run: is a run() missing, or too early?`)
  }
  if (failed > report.failures.length) {
    all.push(`${failed - report.failures.length} tests did not run to their end: did a hook throw?`)
  }
  if (skips.length < skipped) all.push(`${skipped - skips.length} tests skipped without a reason`)
  return {
    passed,
    failed: all.length > 0 ? Math.max(1, failed) : 0,
    skipped,
    problems: all,
    skips,
    output,
  }
}

/** A figure of uvu's closing lines; the last one, as a test may print another's output. */
function lastCount(output: string, label: string): number | undefined {
  const figures = [...output.matchAll(new RegExp(`^ +${label}: +(\\d+)$`, 'gm'))]
  const last = figures.at(-1)?.[1]
  return last === undefined ? undefined : Number(last)
}
