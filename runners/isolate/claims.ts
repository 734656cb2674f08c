/**
 * Who begins a run that was sent to a busy child: the child, by taking the run’s claim out of a pipe, or nobody,
 * because the runner has taken the claim back to give the run to another. The kernel lets one of the two have it.
 */
import { execFileSync } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { chmodSync, closeSync, constants, openSync, readSync, unlinkSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

/** Bytes of a claim: the number of the run, big-endian. A pipe takes and gives so few all at once. */
const claimBytes = 4

/** The claim that comes next in the pipe, or undefined: there is none, the runs that are here were taken back. */
export function takeClaim(fd: number): number | undefined {
  const claim = Buffer.allocUnsafe(claimBytes)
  try {
    return readSync(fd, claim) === claimBytes ? claim.readUInt32BE(0) : undefined
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EAGAIN') return undefined
    throw error
  }
}

/** The runner’s side of one child’s claims. */
export class Claims {
  readonly #fd: number
  /** What the child inherits: it can read there, and nothing else. Closed by `given`. */
  #childFd: number | undefined

  /** Throws where the host makes no named pipes. */
  constructor() {
    const path = join(tmpdir(), `vulcan-claims-${process.pid}-${randomUUID()}`)
    execFileSync('mkfifo', ['-m', '600', path], { stdio: 'ignore', env: { PATH: '/usr/bin:/bin' } })
    try {
      this.#fd = openSync(path, constants.O_RDWR | constants.O_NONBLOCK)
      this.#childFd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK)
      // Nor by way of /proc.
      chmodSync(path, 0)
    } finally {
      unlinkSync(path)
    }
  }

  get childFd(): number | undefined {
    return this.#childFd
  }

  /** The child has been started with it. */
  given(): void {
    if (this.#childFd !== undefined) closeSync(this.#childFd)
    this.#childFd = undefined
  }

  /** Lets the child begin `run` when it comes to it. */
  offer(run: number): void {
    const claim = Buffer.allocUnsafe(claimBytes)
    claim.writeUInt32BE(run, 0)
    writeSync(this.#fd, claim)
  }

  /** The runs that the child has not begun, and now never will. */
  takeBack(): Set<number> {
    const runs = new Set<number>()
    for (;;) {
      const run = takeClaim(this.#fd)
      if (run === undefined) return runs
      runs.add(run)
    }
  }

  close(): void {
    this.given()
    closeSync(this.#fd)
  }
}
