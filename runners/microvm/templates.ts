/**
 * Snapshots that machines begin from, kept on disk and shared by all processes on one cache directory. Each is made
 * once, by one process at a time, and comes to be in one step.
 */
import { createHash } from 'node:crypto'
import { mkdir, readdir, readFile, rename, rm, stat, utimes, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { z } from 'zod'
import { Locks } from '../container/images/locks.ts'
import { isAlive, thisOwner } from '../container/images/owners.ts'
import { mebibyte } from '../container/plan.ts'

const bytes = z.int().nonnegative()

/** What has to be known of a machine to go on with it. */
export const Left = z.object({
  /** Of the streams of its process; null: it has none yet. */
  running: z.object({ stdin: bytes, stdout: bytes, stderr: bytes }).nullable(),
  /** CPU time (ms) that its process had taken. */
  cpu_ms: z.number().nonnegative(),
})
export type Left = z.infer<typeof Left>

export interface Kept {
  /** The driver’s files. */
  dir: string
  left: Left
  /** It was made for whoever asked. */
  fresh: boolean
}

const leftFile = 'left.json'
/** One that nobody used for so many ms is let go. */
const unusedMs = 7 * 24 * 3_600_000
/** One that was used so many ms ago stays: somebody may be about to restore it. */
const recentMs = 10 * 60_000
const lockPollMs = 50

export class Templates {
  readonly #dir: string
  readonly #budgetBytes: number
  readonly #locks: Locks
  readonly #making = new Map<string, Promise<Kept>>()
  /** Of disk, of all that were here when that was last looked at. */
  bytes = 0
  #count = 0

  private constructor(dir: string, budgetMb: number) {
    this.#dir = dir
    this.#budgetBytes = budgetMb * mebibyte
    this.#locks = new Locks(join(dir, 'locks'))
  }

  /** `dir` is for templates alone. Removes what dead processes have left half made. */
  static async open(dir: string, budgetMb: number): Promise<Templates> {
    await mkdir(join(dir, 'locks'), { recursive: true, mode: 0o700 })
    for (const name of await readdir(dir))
      if (name.startsWith('.') && !isAlive(name.slice(1)))
        await rm(join(dir, name), { recursive: true, force: true })
    const templates = new Templates(dir, budgetMb)
    await templates.#look()
    return templates
  }

  /** The key of what is made alike. */
  static key(parts: unknown): string {
    return createHash('sha256').update(JSON.stringify(parts)).digest('hex').slice(0, 40)
  }

  /**
   * The template with this key. `make` writes it into an empty directory where there is none; several that ask for
   * the same share one making. Rejects as `make` does.
   */
  async get(key: string, make: (dir: string) => Promise<Left>): Promise<Kept> {
    const found = await this.#find(key)
    if (found !== undefined) return found
    let making = this.#making.get(key)
    if (making === undefined) {
      making = this.#make(key, make).finally(() => this.#making.delete(key))
      this.#making.set(key, making)
    }
    return await making
  }

  /** It cannot be restored: the next that asks makes it anew. */
  async drop(key: string): Promise<void> {
    await rm(join(this.#dir, key), { recursive: true, force: true })
  }

  async #find(key: string): Promise<Kept | undefined> {
    const dir = join(this.#dir, key)
    const file = join(dir, leftFile)
    try {
      const left = Left.parse(JSON.parse(await readFile(file, 'utf8')))
      const now = new Date()
      await utimes(file, now, now)
      return { dir: join(dir, 'machine'), left, fresh: false }
    } catch {
      return undefined
    }
  }

  async #make(key: string, make: (dir: string) => Promise<Left>): Promise<Kept> {
    using _lock = await this.#locks.take(key, undefined, lockPollMs)
    const found = await this.#find(key)
    if (found !== undefined) return found
    const made = join(this.#dir, `.${thisOwner}.${++this.#count}`)
    const dir = join(this.#dir, key)
    try {
      await mkdir(join(made, 'machine'), { recursive: true, mode: 0o700 })
      const left = await make(join(made, 'machine'))
      await writeFile(join(made, leftFile), JSON.stringify(Left.parse(left)))
      // What is there cannot be read.
      await rm(dir, { recursive: true, force: true })
      await rename(made, dir)
      await this.#evict().catch(() => {})
      return { dir: join(dir, 'machine'), left, fresh: true }
    } finally {
      await rm(made, { recursive: true, force: true })
    }
  }

  async #look(): Promise<{ dir: string; ageMs: number; size: number }[]> {
    const names = (await readdir(this.#dir)).filter((name) => /^[0-9a-f]{40}$/.test(name))
    const all = await Promise.all(
      names.map(async (name) => {
        const dir = join(this.#dir, name)
        const { mtimeMs } = await stat(join(dir, leftFile)).catch(() => ({ mtimeMs: 0 }))
        return { dir, ageMs: Date.now() - mtimeMs, size: await sizeOf(join(dir, 'machine')) }
      }),
    )
    this.bytes = all.reduce((sum, { size }) => sum + size, 0)
    return all
  }

  /** By age, and within the budget: those used longest ago first. */
  async #evict(): Promise<void> {
    const all = await this.#look()
    all.sort((a, b) => b.ageMs - a.ageMs)
    for (const { dir, ageMs, size } of all) {
      if (ageMs < recentMs || (ageMs < unusedMs && this.bytes <= this.#budgetBytes)) continue
      await rm(dir, { recursive: true, force: true })
      this.bytes -= size
    }
  }
}

/** Bytes on disk of the files in a directory. */
async function sizeOf(dir: string): Promise<number> {
  let total = 0
  for (const name of await readdir(dir).catch(() => []))
    total += (await stat(join(dir, name)).catch(() => ({ blocks: 0 }))).blocks * 512
  return total
}
