/**
 * Real pipes. What Node gives a child as a pipe is a pair of sockets, and a socket cannot be opened by a path: in the
 * box, `echo > /dev/stderr` would fail. Node has no call for a pipe, so named ones are made some dozens at a time,
 * opened at both ends and unlinked.
 */
import { execFile } from 'node:child_process'
import { closeSync, constants, openSync, unlinkSync } from 'node:fs'
import { mkdir } from 'node:fs/promises'
import { Socket } from 'node:net'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { programsEnv } from './programs.ts'

const run = promisify(execFile)

/** Made at once, and the rest at which more are made. */
const batch = 60
const low = 30
const mkfifoMs = 10_000

const { O_NONBLOCK, O_RDONLY, O_RDWR, O_WRONLY } = constants

export class PipeStock {
  readonly #dir: string
  #paths: string[] = []
  #made = 0
  #refill: Promise<void> | undefined

  private constructor(dir: string) {
    this.#dir = dir
  }

  static async open(dir: string): Promise<PipeStock> {
    await mkdir(dir, { recursive: true })
    return new PipeStock(dir)
  }

  /** Paths of so many pipes that nobody else has. Throws where none can be made. */
  async take(count: number): Promise<string[]> {
    while (this.#paths.length < count) await this.#more()
    const taken = this.#paths.splice(0, count)
    // The next box should not wait for it; where it fails, the next box is told.
    if (this.#paths.length < low) this.#more().catch(() => {})
    return taken
  }

  #more(): Promise<void> {
    this.#refill ??= this.#make().finally(() => {
      this.#refill = undefined
    })
    return this.#refill
  }

  async #make(): Promise<void> {
    const paths = Array.from({ length: batch }, () => join(this.#dir, String(this.#made++)))
    await run('mkfifo', ['-m', '600', ...paths], { timeout: mkfifoMs, env: programsEnv })
    this.#paths.push(...paths)
  }
}

export interface Pipe {
  ours: Socket
  /** For the child; to be closed once that is started. */
  theirs: number
}

/** Opens a pipe at both ends and takes its name away. `to`: who reads from it. */
export function openPipe(path: string, to: 'us' | 'them'): Pipe {
  // Held at both ends for a moment, so that neither of the two others waits for its counterpart.
  const both = openSync(path, O_RDWR | O_NONBLOCK)
  try {
    const theirs = openSync(path, to === 'us' ? O_WRONLY : O_RDONLY)
    const fd = openSync(path, (to === 'us' ? O_RDONLY : O_WRONLY) | O_NONBLOCK)
    const ours = new Socket({ fd, readable: to === 'us', writable: to === 'them' })
    // A counterpart that went away is seen by what else it leaves behind.
    ours.on('error', () => {})
    return { ours, theirs }
  } finally {
    closeSync(both)
    unlinkSync(path)
  }
}
