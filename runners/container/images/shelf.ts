/**
 * The store on disk, shared by all runner processes that use its directory:
 *
 *     blobs/sha256/<hex>       layers, configs, manifests
 *     layouts/<hex>/           an image that is whole: an OCI layout with one manifest, its blobs a link to `blobs`
 *     roots/<hex>/             its root file system
 *     holds/<hex>.<owner>      a process that uses it
 *     known/<hex>              a name, by its digest, that leads to an image for good
 *     locks/                   see locks.ts
 *     tmp/<owner>.<n>/         what is on the way
 *
 * What stands at its place is whole: it was made in `tmp` and renamed. Steps that must not meet another’s (placing,
 * holding, evicting) are short, synchronous and behind one lock.
 */
import { createHash } from 'node:crypto'
import {
  chmodSync,
  existsSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from 'node:fs'
import { rm } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { killNamed } from './leftovers.ts'
import { Locks } from './locks.ts'
import { type Descriptor, type Manifest, mediaTypes, parseManifest } from './manifests.ts'
import { isAlive, thisOwner } from './owners.ts'

const folders = ['blobs/sha256', 'layouts', 'roots', 'holds', 'known', 'locks', 'tmp']
/** How often the time of last use is written down, ms. */
const usedEveryMs = 60_000
/** A process keeps its hold on an image for so long after the last use, ms. */
const holdMs = 10_000

const thisBoot = readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim()

/** Stands in the layout of an image whose root is unpacked. */
interface Unpacked {
  /** Of disk. */
  bytes: number
  /** The kernel’s boot id then. */
  boot: string
}

export const hexOf = (digest: string) => digest.slice('sha256:'.length)

interface Held {
  count: number
  used: number
  timer: NodeJS.Timeout | undefined
}

export class Shelf {
  readonly dir: string
  readonly locks: Locks
  /** Of all images, blobs and roots, when that was last looked at; undefined: not yet. */
  bytes: number | undefined
  /** Images whose hold of this process is on disk. */
  readonly #held = new Map<string, Held>()
  readonly #removals = new Set<Promise<void>>()
  #temporaries = 0

  constructor(dir: string) {
    this.dir = dir
    mkdirSync(dir, { recursive: true, mode: 0o700 })
    // Roots within have set-user-id programs of strangers: nobody else may come near them.
    chmodSync(dir, 0o700)
    for (const folder of folders) mkdirSync(join(dir, folder), { recursive: true })
    this.locks = new Locks(join(dir, 'locks'))
  }

  blob(hex: string): string {
    return join(this.dir, 'blobs/sha256', hex)
  }
  layout(hex: string): string {
    return join(this.dir, 'layouts', hex)
  }
  root(hex: string): string {
    return join(this.dir, 'roots', hex)
  }

  /** Runs a short synchronous step that no other process’s step meets. */
  async #alone<T>(step: () => T): Promise<T> {
    using _ = await this.locks.take('shelf', undefined, 2)
    return step()
  }

  /** A directory of this process’s own, gone when it is disposed of, or when this process is dead. */
  temporary(): { path: string } & AsyncDisposable {
    const path = join(this.dir, 'tmp', `${thisOwner}.${this.#temporaries++}`)
    mkdirSync(path, { mode: 0o700 })
    return { path, [Symbol.asyncDispose]: () => clear(path) }
  }

  /** Holds an image that is here. False where it is not. */
  async hold(hex: string): Promise<boolean> {
    if (this.#count(hex)) return true
    return this.#alone(() => existsSync(this.layout(hex)) && this.#beginHold(hex))
  }

  #count(hex: string): boolean {
    const held = this.#held.get(hex)
    if (held === undefined || !existsSync(this.layout(hex))) return false
    held.count++
    clearTimeout(held.timer)
    held.timer = undefined
    this.#markUsed(hex, held)
    return true
  }

  #beginHold(hex: string): true {
    if (this.#count(hex)) return true
    writeFileSync(this.#holdOf(hex), '')
    const held: Held = { count: 1, used: 0, timer: undefined }
    this.#held.set(hex, held)
    this.#markUsed(hex, held)
    return true
  }

  #holdOf(hex: string): string {
    return join(this.dir, 'holds', `${hex}.${thisOwner}`)
  }

  #markUsed(hex: string, held: Held): void {
    const now = Date.now()
    if (now - held.used < usedEveryMs) return
    held.used = now
    utimesSync(this.layout(hex), now / 1_000, now / 1_000)
  }

  release(hex: string): void {
    const held = this.#held.get(hex)
    if (held === undefined || --held.count > 0) return
    held.timer = setTimeout(() => this.#endHold(hex), holdMs).unref()
  }

  #endHold(hex: string): void {
    clearTimeout(this.#held.get(hex)?.timer)
    this.#held.delete(hex)
    rmSync(this.#holdOf(hex), { force: true })
  }

  /**
   * Puts an image in its place and holds it: its blobs and manifest, which lie in `from` under their hex digests, all
   * verified.
   */
  async place(hex: string, manifest: Buffer, blobs: string[], from: string): Promise<void> {
    const layout = join(from, 'layout')
    mkdirSync(layout)
    writeFileSync(join(from, hex), manifest)
    writeFileSync(join(layout, 'oci-layout'), JSON.stringify({ imageLayoutVersion: '1.0.0' }))
    const mediaType = (JSON.parse(manifest.toString()) as Manifest).mediaType ?? mediaTypes.manifest
    const descriptor = { mediaType, digest: `sha256:${hex}`, size: manifest.length }
    const index = { schemaVersion: 2, mediaType: mediaTypes.index, manifests: [descriptor] }
    writeFileSync(join(layout, 'index.json'), JSON.stringify(index))
    symlinkSync('../../blobs', join(layout, 'blobs'))
    await this.#alone(() => {
      for (const blob of new Set([hex, ...blobs]))
        unlessThere(() => linkSync(join(from, blob), this.blob(blob)))
      unlessThere(() => renameSync(layout, this.layout(hex)))
      this.#beginHold(hex)
    })
  }

  /** Puts an unpacked root in its place; `bytes` of disk. The image is held. */
  async placeRoot(hex: string, from: string, bytes: number): Promise<void> {
    await this.#alone(() => {
      unlessThere(() => renameSync(from, this.root(hex)))
      writeFileSync(
        join(this.layout(hex), 'unpacked'),
        JSON.stringify({ bytes, boot: thisBoot } satisfies Unpacked),
      )
    })
  }

  /** The manifest of an image that is held. */
  manifest(hex: string): Buffer {
    return readFileSync(this.blob(hex))
  }

  /** To which image a name leads that always means the same, if that is known and the image is here. */
  known(name: string): string | undefined {
    try {
      const hex = readFileSync(this.#knownAt(name), 'utf8')
      return existsSync(this.layout(hex)) ? hex : undefined
    } catch {
      return undefined
    }
  }

  remember(name: string, hex: string): void {
    const path = this.#knownAt(name)
    const beside = join(this.dir, 'tmp', `${thisOwner}.known${this.#temporaries++}`)
    writeFileSync(beside, hex)
    renameSync(beside, path)
  }

  #knownAt(name: string): string {
    return join(this.dir, 'known', createHash('sha256').update(name).digest('hex'))
  }

  /** Takes a damaged blob away, with the images that are of no use without it. */
  async discard(blob: string): Promise<void> {
    await this.#alone(() => {
      for (const hex of readdirSync(join(this.dir, 'layouts')))
        if (!existsSync(this.root(hex)) && this.#blobsOf(hex)?.some(({ digest }) => hexOf(digest) === blob))
          this.#remove(hex)
      rmSync(this.blob(blob), { force: true })
    })
  }

  /** Config and layers; undefined where the manifest itself is gone. */
  #blobsOf(hex: string): Descriptor[] | undefined {
    try {
      const { config, layers } = parseManifest(this.manifest(hex), hex) as Manifest
      return [config, ...layers]
    } catch {
      return undefined
    }
  }

  /** Bytes of all images, blobs and roots. */
  #total(): number {
    const blobs = readdirSync(join(this.dir, 'blobs/sha256'))
    const roots = readdirSync(join(this.dir, 'roots')).map((hex) => this.#unpacked(hex).bytes)
    return [...blobs.map((hex) => sizeOf(this.blob(hex))), ...roots].reduce((sum, size) => sum + size, 0)
  }

  #unpacked(hex: string): Unpacked {
    try {
      return JSON.parse(readFileSync(join(this.layout(hex), 'unpacked'), 'utf8'))
    } catch {
      return { bytes: 0, boot: '' }
    }
  }

  /** Lets go of images that nobody holds, least lately used first, until all together have at most `bytes`. */
  async evict(bytes: number | ((total: number) => number)): Promise<void> {
    await this.#alone(() => {
      let total = this.#total()
      this.bytes = total
      const wanted = typeof bytes === 'number' ? bytes : bytes(total)
      if (total <= wanted) return
      const holds = readdirSync(join(this.dir, 'holds'))
      const isHeld = (hex: string) =>
        (this.#held.get(hex)?.count ?? 0) > 0 ||
        holds.some((hold) => {
          const owner = hold.slice(hex.length + 1)
          return hold.startsWith(`${hex}.`) && owner !== thisOwner && isAlive(owner)
        })
      const images = readdirSync(join(this.dir, 'layouts'))
        .map((hex) => ({ hex, used: statSync(this.layout(hex)).mtimeMs }))
        .sort((a, b) => a.used - b.used)
      for (const { hex } of images) {
        if (total <= wanted) break
        if (isHeld(hex)) continue
        this.#endHold(hex)
        total -= this.#unpacked(hex).bytes
        this.#remove(hex)
        total -= this.#sweepBlobs()
        this.bytes = total
      }
    })
  }

  #remove(hex: string): void {
    this.#moveAside([
      ['layout', this.layout(hex)],
      ['root', this.root(hex)],
    ])
  }

  /** Out of sight at once, and removed in the background. */
  #moveAside(what: [name: string, path: string][]): void {
    const aside = join(this.dir, 'tmp', `${thisOwner}.${this.#temporaries++}`)
    mkdirSync(aside)
    for (const [name, path] of what) if (existsSync(path)) renameSync(path, join(aside, name))
    const removal = clear(aside).finally(() => this.#removals.delete(removal))
    this.#removals.add(removal)
  }

  /** Removes blobs that no image names. Bytes freed. */
  #sweepBlobs(): number {
    const wanted = new Set<string>()
    for (const hex of readdirSync(join(this.dir, 'layouts'))) {
      wanted.add(hex)
      for (const { digest } of this.#blobsOf(hex) ?? []) wanted.add(hexOf(digest))
    }
    let freed = 0
    for (const hex of readdirSync(join(this.dir, 'blobs/sha256'))) {
      if (wanted.has(hex)) continue
      freed += sizeOf(this.blob(hex))
      rmSync(this.blob(hex), { force: true })
    }
    return freed
  }

  /** Takes away what dead processes have left. */
  async tidy(): Promise<void> {
    const temporaries = join(this.dir, 'tmp')
    for (const name of readdirSync(temporaries)) {
      if (isAlive(name)) continue
      killNamed(join(temporaries, name))
      await clear(join(temporaries, name))
    }
    for (const name of readdirSync(join(this.dir, 'locks'))) {
      // A name with a dot was one process’s own; it lost it between two lines.
      if (name.startsWith('.') && !isAlive(name.slice(1)))
        rmSync(join(this.dir, 'locks', name), { force: true })
    }
    await this.#alone(() => {
      for (const hold of readdirSync(join(this.dir, 'holds')))
        if (!isAlive(hold.slice(hold.indexOf('.') + 1)))
          rmSync(join(this.dir, 'holds', hold), { force: true })
      // Nothing is flushed to the disk: after a loss of power a file may be shorter than it was.
      for (const hex of readdirSync(join(this.dir, 'roots')))
        if (this.#unpacked(hex).boot !== thisBoot) this.#moveAside([['root', this.root(hex)]])
      for (const hex of readdirSync(join(this.dir, 'layouts')))
        if (!this.#blobsOf(hex)?.every(({ digest, size }) => sizeOf(this.blob(hexOf(digest))) === size))
          this.#remove(hex)
      this.#sweepBlobs()
      for (const name of readdirSync(join(this.dir, 'known'))) {
        const path = join(this.dir, 'known', name)
        if (!existsSync(this.layout(readFileSync(path, 'utf8')))) rmSync(path, { force: true })
      }
    })
  }

  /** Gives up all holds of this process, when what is being removed is gone. */
  async close(): Promise<void> {
    for (const hex of [...this.#held.keys()]) this.#endHold(hex)
    await Promise.all(this.#removals)
  }
}

function unlessThere(step: () => void): void {
  try {
    step()
  } catch (error) {
    if (!['EEXIST', 'ENOTEMPTY'].includes((error as NodeJS.ErrnoException).code ?? '')) throw error
  }
}

const sizeOf = (path: string): number => statSync(path, { throwIfNoEntry: false })?.size ?? 0

/** Removes a tree; a process that is just dying may still put something into it. */
async function clear(path: string): Promise<void> {
  for (let tries = 0; ; tries++) {
    try {
      return await rm(path, { recursive: true, force: true, maxRetries: 5, retryDelay: 20 })
    } catch (error) {
      if (tries === 3) throw error
      await sleep(100)
    }
  }
}
