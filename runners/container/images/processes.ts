import { type SpawnOptions, spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { delimiter, isAbsolute, join } from 'node:path'

export interface Ran {
  /** Null where a signal ended it. */
  code: number | null
  stdout: Buffer
  /** Its end, as text. */
  stderr: string
}

export interface RunOptions {
  signal: AbortSignal
  env: Record<string, string>
  input?: string
  /** Of standard output, bytes; a process that writes more is ended. */
  maxOutput: number
}

const keptErrors = 8_000

/**
 * Runs a program to its end. An abort kills it and rejects with the signal’s reason once it is dead; so does an error
 * of the start.
 */
export function run(file: string, args: string[], options: RunOptions): Promise<Ran> {
  const { signal, env, input, maxOutput } = options
  return new Promise((resolve, reject) => {
    if (signal.aborted) return reject(signal.reason)
    const settings: SpawnOptions = { env, stdio: [input === undefined ? 'ignore' : 'pipe', 'pipe', 'pipe'] }
    const child = spawn(file, args, settings)
    const pieces: Buffer[] = []
    let size = 0
    let stderr = ''
    const kill = () => child.kill('SIGKILL')
    signal.addEventListener('abort', kill, { once: true })
    child.stdout!.on('data', (piece: Buffer) => {
      size += piece.length
      if (size > maxOutput) kill()
      else pieces.push(piece)
    })
    child.stderr!.setEncoding('utf8').on('data', (piece: string) => {
      stderr = (stderr + piece).slice(-keptErrors)
    })
    child.once('error', (error) => {
      signal.removeEventListener('abort', kill)
      reject(error)
    })
    child.once('close', (code) => {
      signal.removeEventListener('abort', kill)
      if (signal.aborted) reject(signal.reason)
      else resolve({ code, stdout: Buffer.concat(pieces), stderr })
    })
    // A process that is gone before it has read: its end says more than the broken pipe.
    child.stdin?.on('error', () => {})
    child.stdin?.end(input)
  })
}

/** Where Debian and most others keep programs. */
export const searchPath = [
  '/usr/local/sbin',
  '/usr/local/bin',
  '/usr/sbin',
  '/usr/bin',
  '/sbin',
  '/bin',
].join(delimiter)

/** The path of a program, or undefined. */
export function findProgram(name: string): string | undefined {
  if (isAbsolute(name)) return existsSync(name) ? name : undefined
  return searchPath
    .split(delimiter)
    .map((dir) => join(dir, name))
    .find((path) => existsSync(path))
}
