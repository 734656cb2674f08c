/**
 * Archives of workloads: tar, gzipped tar and zip, unpacked once each into directories that boxes see read-only.
 * What is in them is hostile: nothing is written outside, and nothing without a bound.
 */
import { createReadStream } from 'node:fs'
import {
  chmod,
  link,
  lstat,
  mkdir,
  open,
  readdir,
  readlink,
  rename,
  rm,
  symlink,
  writeFile,
} from 'node:fs/promises'
import { dirname, join } from 'node:path'
import type { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { createGunzip } from 'node:zlib'
import { Parser, type ReadEntry } from 'tar'
import { type Entry, open as openZip, type ZipFile } from 'yauzl'
import type { Source } from '../runner.ts'
import { writeHashed } from './hashed-file.ts'
import { unmeasured } from './phases.ts'
import { staysInside } from './rootfs.ts'

/** The archive cannot be used; the message says what is wrong with it. */
export class ArchiveError extends Error {
  override name = 'ArchiveError'
}

export interface ArchiveLimits {
  /** Of the archive itself. */
  packedBytes: number
  /** Of all files together, unpacked. */
  bytes: number
  /** Files, directories and links. */
  entries: number
  /** Steps taken along links, all together, to see that they stay inside. */
  lookups: number
}

/** What a file, directory or link takes on disk beside its content, about. */
const entryBytes = 4_096

export const archiveLimits: ArchiveLimits = {
  packedBytes: 512 * 1_048_576,
  bytes: 1024 * 1_048_576,
  entries: 100_000,
  lookups: 500_000,
}

/** An unpacked archive. What is held is not evicted. */
export interface Archive extends Disposable {
  /** Absolute; to be mounted read-only. */
  path: string
  entries: number
}

type ArchiveSource = Pick<Extract<Source, { kind: 'archive' }>, 'sha256' | 'open'>

interface Kept {
  unpacked: Promise<{ path: string; entries: number; bytes: number }>
  holders: number
  bytes: number
}

/** A cache in a directory of this process alone. */
export class Archives implements AsyncDisposable {
  readonly #dir: string
  readonly #budgetBytes: number
  readonly #limits: ArchiveLimits
  /** By digest, the longest unused first. */
  readonly #kept = new Map<string, Kept>()

  constructor(dir: string, budgetMb: number, limits = archiveLimits) {
    this.#dir = dir
    this.#budgetBytes = budgetMb * 1_048_576
    this.#limits = limits
  }

  /** Throws `ArchiveError`. Several that want the same share one unpacking. */
  async get(source: ArchiveSource, phases = unmeasured): Promise<Archive> {
    const { sha256 } = source
    let kept = this.#kept.get(sha256)
    if (kept === undefined) {
      kept = { unpacked: this.#unpack(source), holders: 0, bytes: 0 }
      kept.unpacked.then(
        ({ bytes }) => {
          kept!.bytes = bytes
        },
        () => this.#kept.delete(sha256),
      )
    } else this.#kept.delete(sha256)
    this.#kept.set(sha256, kept)
    const mine = kept
    mine.holders++
    const release = () => {
      mine.holders--
      void this.#evict()
    }
    try {
      const isHere = mine.bytes > 0
      const { path, entries } = await (isHere
        ? mine.unpacked
        : phases.measure('fetch bundle', () => mine.unpacked))
      void this.#evict()
      return { path, entries, [Symbol.dispose]: once(release) }
    } catch (error) {
      release()
      throw error
    }
  }

  async #unpack({ sha256, open }: ArchiveSource) {
    const packed = join(this.#dir, `${sha256}.packed`)
    const work = join(this.#dir, `${sha256}.unpacking`)
    await mkdir(this.#dir, { recursive: true })
    try {
      const maxBytes = this.#limits.packedBytes
      const tooLarge = () => new ArchiveError(`the archive has more than ${maxBytes} bytes`)
      const got = await writeHashed(packed, await open(), { maxBytes, tooLarge })
      if (got.sha256 !== sha256) throw new Error('what came of the archive is not what its digest says')
      await mkdir(work)
      await chmod(work, 0o755)
      const size = await unpack(packed, work, this.#limits)
      const path = join(this.#dir, sha256)
      await rename(work, path)
      return { path, entries: size.entries, bytes: size.bytes + size.entries * entryBytes }
    } finally {
      await rm(packed, { force: true })
      await rm(work, { recursive: true, force: true })
    }
  }

  /** Bytes of all that is here. */
  get bytes(): number {
    let total = 0
    for (const { bytes } of this.#kept.values()) total += bytes
    return total
  }

  async #evict(): Promise<void> {
    let total = this.bytes
    for (const [sha256, kept] of this.#kept) {
      if (total <= this.#budgetBytes) return
      if (kept.holders > 0 || kept.bytes === 0) continue
      total -= kept.bytes
      this.#kept.delete(sha256)
      // Under another name first: it may be wanted again before all of it is gone.
      const old = join(this.#dir, `${sha256}.${Date.now()}.old`)
      await rename(join(this.#dir, sha256), old).catch(() => {})
      // What resists goes with the directory.
      await rm(old, { recursive: true, force: true }).catch(() => {})
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.allSettled([...this.#kept.values()].map(({ unpacked }) => unpacked))
    await rm(this.#dir, { recursive: true, force: true })
  }
}

function once(run: () => void): () => void {
  let done = false
  return () => {
    if (done) return
    done = true
    run()
  }
}

/** The same files in another directory of the same file system, by hard links: for boxes that see it already. */
export async function linkInto(from: string, to: string): Promise<void> {
  for (const entry of await readdir(from, { withFileTypes: true })) {
    const [source, target] = [join(from, entry.name), join(to, entry.name)]
    if (entry.isDirectory()) {
      await mkdir(target)
      await linkInto(source, target)
    } else if (entry.isSymbolicLink()) await symlink(await readlink(source), target)
    else await link(source, target)
  }
}

const magics = {
  gzip: Buffer.from([0x1f, 0x8b]),
  zstd: Buffer.from([0x28, 0xb5, 0x2f, 0xfd]),
  zip: Buffer.from('PK\x03\x04', 'latin1'),
  emptyZip: Buffer.from('PK\x05\x06', 'latin1'),
  tar: Buffer.from('ustar', 'latin1'),
}
const tarMagicAt = 257

async function unpack(packed: string, dir: string, limits: ArchiveLimits) {
  const head = Buffer.alloc(512)
  {
    await using file = await open(packed)
    await file.read(head, 0, head.length, 0)
  }
  const begins = (magic: Buffer, at = 0) => head.subarray(at, at + magic.length).equals(magic)
  const tree = new Tree(dir, limits)
  try {
    if (begins(magics.zip) || begins(magics.emptyZip)) await readZip(packed, tree)
    else if (begins(magics.gzip)) await readTar(gunzipped(packed), tree, limits)
    else if (begins(magics.tar, tarMagicAt)) await readTar(createReadStream(packed), tree, limits)
    else throw new ArchiveError('the archive is neither a tar, a gzipped tar nor a zip')
    return await tree.done()
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException
    // Of our own disk, not of the archive.
    if (error instanceof ArchiveError || code === 'ENOSPC' || code === 'EDQUOT' || code === 'EMFILE')
      throw error
    throw new ArchiveError(`the archive is not intact: ${message}`, { cause: error })
  }
}

/** Whichever of the two streams ends early takes the other with it. */
function gunzipped(packed: string): Readable {
  const gunzip = createGunzip()
  pipeline(createReadStream(packed), gunzip).catch(() => {})
  return gunzip
}

/** Longest name of a file and of a path in Linux (bytes). */
const nameBytes = 255
const pathBytes = 4_095

/** What has come out of an archive so far. Links are made last, so that nothing is written through one. */
class Tree {
  readonly #dir: string
  readonly #limits: ArchiveLimits
  readonly #directories = new Set<string>()
  readonly #links = new Map<string, string>()
  readonly #hardLinks: { path: string; target: string }[] = []
  #entries = 0
  #bytes = 0

  constructor(dir: string, limits: ArchiveLimits) {
    this.#dir = dir
    this.#limits = limits
  }

  #count(size: number): void {
    if (++this.#entries > this.#limits.entries)
      throw new ArchiveError(`the archive has more than ${this.#limits.entries} entries`)
    this.#bytes += size
    if (this.#bytes > this.#limits.bytes)
      throw new ArchiveError(`the archive unpacks to more than ${this.#limits.bytes} bytes`)
  }

  async directory(name: string): Promise<void> {
    const path = checkedPath(name)
    if (path === '' || this.#directories.has(path)) this.#count(0)
    else await this.#makeDirectory(path)
  }

  /** With those above it, of which each counts. Readable for everybody, whatever the umask of this process. */
  async #makeDirectory(path: string): Promise<void> {
    if (path === '.' || this.#directories.has(path)) return
    await this.#makeDirectory(dirname(path))
    this.#count(0)
    const at = join(this.#dir, path)
    await mkdir(at).catch((error: NodeJS.ErrnoException) => {
      if (error.code === 'EEXIST') throw new ArchiveError(`${path} is both a file and a directory`)
      throw error
    })
    await chmod(at, 0o755)
    this.#directories.add(path)
  }

  /** `size` may be less than what comes: then reading must fail. */
  async file(
    name: string,
    size: number,
    executable: boolean,
    content: AsyncIterable<Uint8Array>,
  ): Promise<void> {
    this.#count(size)
    const path = checkedPath(name)
    if (path === '') throw new ArchiveError('the archive has a file without a name')
    const at = join(this.#dir, path)
    await this.#makeDirectory(dirname(path))
    const stat = await lstat(at).catch(() => undefined)
    if (stat?.isDirectory()) throw new ArchiveError(`${path} is both a file and a directory`)
    // The last of several is meant.
    if (stat !== undefined) await rm(at)
    const mode = executable ? 0o755 : 0o644
    // Through a pipeline: what comes may fail while the file is still being opened.
    await pipeline(content, (chunks) => writeFile(at, chunks, { flag: 'wx', mode }))
    await chmod(at, mode)
  }

  hardLink(name: string, target: string): void {
    this.#count(0)
    this.#hardLinks.push({ path: checkedPath(name), target: checkedPath(target) })
  }

  symbolicLink(name: string, target: string): void {
    this.#count(0)
    if (target === '' || Buffer.byteLength(target) > pathBytes || target.includes('\0'))
      throw new ArchiveError(`${name} is a link to nowhere`)
    this.#links.set(checkedPath(name), target)
  }

  async done(): Promise<{ entries: number; bytes: number }> {
    for (const { path, target } of this.#hardLinks) {
      await this.#makeDirectory(dirname(path))
      const stat = await lstat(join(this.#dir, target)).catch(() => undefined)
      if (!stat?.isFile())
        throw new ArchiveError(`${path} is a link to ${target}, which is not in the archive`)
      await this.#place(path, (at) => link(join(this.#dir, target), at))
    }
    // All directories first: afterwards a path may lead through a link.
    for (const path of this.#links.keys()) await this.#makeDirectory(dirname(path))
    for (const [path, target] of this.#links) await this.#place(path, (at) => symlink(target, at))
    const lookups = { left: this.#limits.lookups }
    for (const [path, target] of this.#links)
      if (!(await staysInside(this.#dir, path, target, lookups))) {
        if (lookups.left <= 0) throw new ArchiveError('the links of the archive lead too far')
        throw new ArchiveError(`${path} is a link out of the archive, or one that leads nowhere: ${target}`)
      }
    return { entries: this.#entries, bytes: this.#bytes }
  }

  async #place(path: string, make: (at: string) => Promise<void>): Promise<void> {
    const at = join(this.#dir, path)
    const stat = await lstat(at).catch(() => undefined)
    if (stat?.isDirectory()) throw new ArchiveError(`${path} is both a link and a directory`)
    if (stat !== undefined) await rm(at)
    await make(at)
  }
}

/** Relative, without `..`; empty for the root itself. Throws `ArchiveError`. */
function checkedPath(name: string): string {
  const steps = name.split('/').filter((step) => step !== '' && step !== '.')
  const sound =
    !name.startsWith('/') &&
    !/[\0\\]/.test(name) &&
    Buffer.byteLength(name) <= pathBytes &&
    steps.every((step) => step !== '..' && Buffer.byteLength(step) <= nameBytes)
  if (!sound)
    throw new ArchiveError(`${JSON.stringify(name.slice(0, 200))}: a path must be relative, without .. in it`)
  return steps.join('/')
}

const fileTypes = new Set(['File', 'OldFile', 'ContiguousFile'])
const passedOver = new Set(['GlobalExtendedHeader', 'ExtendedHeader', 'NextFileHasLongPath'])
/** Bytes of headers and padding for each entry of a tar, at most. */
const tarOverhead = 64 * 1024

async function readTar(bytes: Readable, tree: Tree, limits: ArchiveLimits): Promise<void> {
  const parser = new Parser({ strict: true })
  let failure: unknown
  /** Entries are written one after the other. */
  let writing = Promise.resolve()
  /** Of the parser, or by a failure: then it may wait for ever for an entry that nobody reads. */
  const ended = Promise.withResolvers<void>()
  const fail = (error: unknown) => {
    failure ??= error
    bytes.destroy()
    ended.resolve()
  }
  parser.on('end', ended.resolve)
  parser.on('error', fail)
  parser.on('entry', (entry: ReadEntry) => {
    writing = writing
      .then(() => (failure === undefined ? takeTarEntry(entry, tree) : undefined))
      .catch((error: unknown) => {
        fail(error)
      })
      .finally(() => entry.resume())
  })
  let total = 0
  const most = limits.bytes + limits.entries * 1024 + tarOverhead
  let head = Buffer.alloc(0)
  try {
    for await (const piece of bytes as AsyncIterable<Buffer>) {
      let chunk = piece
      if (total === 0) {
        head = Buffer.concat([head, piece])
        // The first piece may be shorter than what a compressed archive begins with.
        if (head.length < magics.zstd.length) continue
        chunk = head
        if ([magics.gzip, magics.zstd].some((magic) => chunk.subarray(0, magic.length).equals(magic)))
          // The parser would unpack it once more, without a limit.
          throw new ArchiveError('the archive is compressed twice, or by zstd')
      }
      total += chunk.length
      if (total > most) throw new ArchiveError(`the archive unpacks to more than ${limits.bytes} bytes`)
      if (failure !== undefined) break
      if (!parser.write(chunk))
        await new Promise<void>((resolve) => {
          parser.once('drain', resolve)
          void ended.promise.then(resolve)
        })
    }
  } catch (error) {
    failure ??= error
  }
  if (failure === undefined && total === 0) failure = new ArchiveError('there is no tar in the archive')
  if (failure === undefined) {
    parser.end()
    await ended.promise
  }
  await writing
  if (failure !== undefined) throw failure
}

async function takeTarEntry(entry: ReadEntry, tree: Tree): Promise<void> {
  const { type, path, linkpath = '', size, mode = 0 } = entry
  if (passedOver.has(type)) return
  if (type === 'Directory' || type === 'GNUDumpDir') return await tree.directory(path)
  if (type === 'SymbolicLink') return tree.symbolicLink(path, linkpath)
  if (type === 'Link') return tree.hardLink(path, linkpath)
  if (!fileTypes.has(type)) throw new ArchiveError(`${path} is a ${type}`)
  await tree.file(path, size, (mode & 0o111) !== 0, entry as unknown as AsyncIterable<Uint8Array>)
}

/** File type bits of a Unix mode, which zip keeps in the upper half of the external attributes. */
const typeMask = 0o170000
const [symbolic, directory, regular] = [0o120000, 0o040000, 0o100000]

async function readZip(packed: string, tree: Tree): Promise<void> {
  const zip = await new Promise<ZipFile>((resolve, reject) =>
    openZip(packed, { lazyEntries: true, strictFileNames: true, autoClose: false }, (error, opened) =>
      error === null ? resolve(opened) : reject(error),
    ),
  )
  const read = (entry: Entry) =>
    new Promise<Readable>((resolve, reject) =>
      zip.openReadStream(entry, (error, stream) => (error === null ? resolve(stream) : reject(error))),
    )
  const take = async (entry: Entry) => {
    const mode = entry.externalFileAttributes >>> 16
    const type = mode & typeMask
    if ((entry.generalPurposeBitFlag & 1) === 1) throw new ArchiveError(`${entry.fileName} is encrypted`)
    if (entry.fileName.endsWith('/')) return await tree.directory(entry.fileName)
    if (type === symbolic) {
      if (entry.uncompressedSize > pathBytes) throw new ArchiveError(`${entry.fileName} is a link to nowhere`)
      const target = Buffer.concat(await (await read(entry)).toArray())
      return tree.symbolicLink(entry.fileName, target.toString())
    }
    if (type !== 0 && type !== regular && type !== directory)
      throw new ArchiveError(`${entry.fileName} is no file`)
    // The stream fails where it brings more than the entry says.
    await tree.file(entry.fileName, entry.uncompressedSize, (mode & 0o111) !== 0, await read(entry))
  }
  try {
    await new Promise<void>((resolve, reject) => {
      zip.on('entry', (entry: Entry) => take(entry).then(() => zip.readEntry(), reject))
      zip.on('end', resolve)
      zip.on('error', reject)
      zip.readEntry()
    })
  } finally {
    zip.close()
  }
}

/** Writes a source of code as the one file of a directory. */
export async function writeCode(dir: string, name: string, text: string): Promise<void> {
  const path = join(dir, name)
  await writeFile(path, text, { flag: 'wx' })
  await chmod(path, 0o644)
}
