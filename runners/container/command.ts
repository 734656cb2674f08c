/** Runs a command in a box: input on its standard input, lines while it runs, a result when it ends well. */
import { constants } from 'node:fs'
import { open, stat } from 'node:fs/promises'
import { preciseNow } from '../../shared/tracing.ts'
import type { LogLine } from '../../shared/workload.ts'
import type { Box, Exit } from './engine.ts'
import { LineSplitter, Pace } from './lines.ts'
import { type Phases, unmeasured } from './phases.ts'

export interface CommandOptions {
  /** JSON text; undefined: nothing comes. */
  input: string | undefined
  /** The file on this host that the command finds as VULCAN_RESULT. */
  result: string
  outputBytes: number
  /** Who measures it. */
  phases?: Phases
  onLine(line: Pick<LogLine, 'level' | 'stream' | 'text'>): void
}

export type CommandEnd =
  /** `output` is JSON text. */
  | { kind: 'exited'; exit: Exit; output: string | undefined }
  /** The result is larger than `outputBytes`; said of the result alone, not of lines. */
  | { kind: 'too_large'; exit: Exit; size: string }

/** How often, in ms, it is looked how large the result has become. */
const watchMs = 100

/** Starts the box, and settles when its first process has ended or the box was killed. Rejects with `BoxError`. */
export async function runCommand(box: Box, options: CommandOptions): Promise<CommandEnd> {
  const { input, result, outputBytes, phases = unmeasured, onLine } = options
  const stdout = new Collected(outputBytes)
  const streams = (['stdout', 'stderr'] as const).map((name) => {
    const level = name === 'stdout' ? 'info' : 'error'
    const lines = new LineSplitter((text) => onLine({ level, stream: name, text }))
    const pace = new Pace(box[name])
    box[name].on('error', () => {})
    box[name].on('data', (chunk: Buffer) => {
      if (name === 'stdout') stdout.push(chunk)
      pace.spend(lines.push(chunk))
    })
    return lines
  })
  box.stdin.on('error', () => {})
  await phases.measure('start handler', () => box.start())
  phases.started('cold')
  const began = preciseNow()
  box.stdin.end(input ?? '')
  let overgrown = false
  const watch = setInterval(() => {
    stat(result).then(
      ({ blocks }) => {
        if (blocks * 512 <= outputBytes + 1_048_576 || overgrown) return
        overgrown = true
        box.kill().catch(() => {})
      },
      () => {},
    )
  }, watchMs)
  const exit = await box.exited
  clearInterval(watch)
  phases.add({
    ...{ name: 'guest', start: began, end: preciseNow() },
    ...(exit.code === 0 ? {} : { error: `exit code ${exit.code}` }),
  })
  for (const lines of streams) lines.end()
  if (overgrown) return { kind: 'too_large', exit, size: `more than ${outputBytes}` }
  if (exit.code !== 0) return { kind: 'exited', exit, output: undefined }
  const written = await readResult(result, outputBytes)
  const bytes = written.length > 0 ? written : stdout.bytes()
  if (bytes === undefined) return { kind: 'too_large', exit, size: String(stdout.size) }
  const output = toJson(bytes)
  const size = Buffer.byteLength(output)
  return size > outputBytes
    ? { kind: 'too_large', exit, size: String(size) }
    : { kind: 'exited', exit, output }
}

/** As JSON if all of it parses, else as text; nothing at all is null. */
function toJson(bytes: Buffer): string {
  const text = bytes.toString()
  if (text === '') return 'null'
  try {
    JSON.parse(text)
    return text
  } catch {
    return JSON.stringify(text)
  }
}

/** At most one byte more than `limit`. */
async function readResult(path: string, limit: number): Promise<Buffer> {
  await using file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW)
  const { size } = await file.stat()
  const buffer = Buffer.alloc(Math.min(size, limit + 1))
  let at = 0
  while (at < buffer.length) {
    const { bytesRead } = await file.read(buffer, at, buffer.length - at, at)
    if (bytesRead === 0) break
    at += bytesRead
  }
  return buffer.subarray(0, at)
}

/** What was written to standard output, as long as it can be a result. */
class Collected {
  size = 0
  readonly #limit: number
  #parts: Buffer[] = []
  constructor(limit: number) {
    this.#limit = limit
  }

  push(chunk: Buffer): void {
    this.size += chunk.length
    if (this.size > this.#limit) this.#parts = []
    else this.#parts.push(Buffer.from(chunk))
  }

  /** Undefined where it was too much. */
  bytes(): Buffer | undefined {
    return this.size > this.#limit ? undefined : Buffer.concat(this.#parts)
  }
}
