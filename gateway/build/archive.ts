/**
 * Projects as tar and zip. Whatever an archive says, what comes out is a map of relative paths to bytes within
 * limits: no links, no devices, nothing outside.
 */
import { open, readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { gunzip } from 'node:zlib'
import { Header, Parser, Pax, type ReadEntry } from 'tar'
import { type Entry, fromBuffer, type ZipFile } from 'yauzl'
import { Problem } from '../../shared/errors.ts'
import { FilePath } from '../../shared/functions.ts'

/** Path → bytes. */
export type Files = Map<string, Uint8Array>

/** What came out of an archive, or was put as text. */
export interface Project {
  files: Files
  /** Paths of the files that were marked as programs. */
  executable: Set<string>
  /** Links that were left out. */
  links: string[]
  /** A folder around everything was left out. */
  unwrapped: boolean
}

export const projectOf = (files: Files): Project => ({
  files,
  executable: new Set(),
  links: [],
  unwrapped: false,
})

export interface ArchiveLimits {
  files: number
  /** Of all files together, unpacked. */
  bytes: number
}

export const archiveLimits: ArchiveLimits = { files: 20_000, bytes: 256 * 1_048_576 }

/** Bytes of an installed file that are read at once. */
const chunkBytes = 256 * 1024
/** Longest name of a file or folder in Linux (bytes). */
const nameBytes = 255
/** Bytes of headers and padding in a tar, besides what its files hold. */
const tarOverhead = 32 * 1_048_576

const refuse = (detail: string, cause?: unknown) => new Problem('invalid_archive', { detail, cause })

export type ArchiveKind = 'tar' | 'gzip' | 'zip'

/** By its first bytes; undefined: none that is known. */
export function archiveKind(bytes: Uint8Array): ArchiveKind | undefined {
  const at = (offset: number, text: string) =>
    Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
      .subarray(offset, offset + text.length)
      .equals(Buffer.from(text, 'latin1'))
  if (at(0, '\x1f\x8b')) return 'gzip'
  if (at(0, 'PK\x03\x04') || at(0, 'PK\x05\x06')) return 'zip'
  if (at(257, 'ustar')) return 'tar'
  return undefined
}

/** Throws `invalid_archive` with what is wrong and where: a link, for one. */
export async function unpack(bytes: Uint8Array, limits = archiveLimits): Promise<Files> {
  const project = await unpackProject(bytes, limits)
  refuseLinks(project)
  return project.files
}

/** Throws `invalid_archive` where something was left out that a program could miss. */
export function refuseLinks({ links: [link] }: Project): void {
  if (link !== undefined)
    throw refuse(`${link} is a link; pack files only (with npm: no \`npm link\`, no workspaces)`)
}

/** The same, with links told rather than refused. */
export async function unpackProject(bytes: Uint8Array, limits = archiveLimits): Promise<Project> {
  const kind = archiveKind(bytes)
  const files = new Collected(limits)
  if (kind === 'zip') await readZip(bytes, files)
  else if (kind === 'gzip') await readTar(await inflate(bytes, limits.bytes + tarOverhead), files)
  else if (kind === 'tar') await readTar(bytes, files)
  else throw refuse('it is neither a tar, a gzipped tar nor a zip archive')
  return withoutFolder(files.done())
}

async function inflate(bytes: Uint8Array, limit: number): Promise<Buffer> {
  try {
    return await promisify(gunzip)(bytes, { maxOutputLength: limit })
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code === 'ERR_BUFFER_TOO_LARGE')
      throw refuse(`it unpacks to more than ${limit} bytes`, cause)
    throw refuse(`it is no intact gzip: ${(cause as Error).message}`, cause)
  }
}

/** What has come out of an archive so far. */
class Collected {
  readonly #files: Files = new Map()
  readonly #executable = new Set<string>()
  readonly #links: string[] = []
  readonly #limits: ArchiveLimits
  #count = 0
  #bytes = 0
  constructor(limits: ArchiveLimits) {
    this.#limits = limits
  }

  /** The path under which a file may stand; undefined: it is left out. Reserves its bytes. */
  admit(name: string, size: number): string | undefined {
    if (++this.#count > this.#limits.files) throw refuse(`it has more than ${this.#limits.files} files`)
    this.#bytes += size
    if (this.#bytes > this.#limits.bytes) throw refuse(`it unpacks to more than ${this.#limits.bytes} bytes`)
    const path = checkedPath(name)
    // What macOS adds.
    return /(^|\/)(\._[^/]*|\.DS_Store)$|^__MACOSX\//.test(path) ? undefined : path
  }

  /** Programs of packages are linked; nothing here runs them. */
  link(name: string): void {
    if (++this.#count > this.#limits.files) throw refuse(`it has more than ${this.#limits.files} files`)
    if (!/(^|\/)node_modules\/\.bin\/[^/]+$/.test(checkedPath(name))) this.#links.push(name)
  }

  put(path: string, bytes: Uint8Array, mode: number): void {
    this.#files.set(path, bytes)
    if ((mode & 0o111) === 0) this.#executable.delete(path)
    else this.#executable.add(path)
  }

  done(): Project {
    if (this.#files.size === 0 && this.#links.length === 0) throw refuse('there is no file in it')
    checkFolders(this.#files)
    return { files: this.#files, executable: this.#executable, links: this.#links, unwrapped: false }
  }
}

function checkedPath(name: string): string {
  const path = name.replace(/^(\.\/+)+/, '').replaceAll(/\/{2,}/g, '/')
  const parsed = FilePath.safeParse(path)
  if (!parsed.success || path.split('/').some((step) => Buffer.byteLength(step) > nameBytes))
    throw refuse(`${JSON.stringify(name.slice(0, 200))}: a path must be relative, without .. in it`)
  return path
}

/** No file stands where another needs a folder. Throws `invalid_archive`. */
export function checkFolders(files: Files): void {
  for (const path of files.keys())
    for (let end = path.lastIndexOf('/'); end > 0; end = path.lastIndexOf('/', end - 1))
      if (files.has(path.slice(0, end))) throw refuse(`${path.slice(0, end)} is both a file and a folder`)
}

const fileTypes = new Set(['File', 'OldFile', 'ContiguousFile'])
/** How gzip and zstd begin. */
const compressed = [
  [0x1f, 0x8b],
  [0x28, 0xb5, 0x2f, 0xfd],
]
const passedOver = new Set(['Directory', 'GNUDumpDir', 'GlobalExtendedHeader', 'ExtendedHeader'])

function readTar(bytes: Uint8Array, files: Collected): Promise<void> {
  // The parser would unpack it once more, without a limit.
  if (compressed.some((magic) => magic.every((byte, i) => bytes[i] === byte)))
    return Promise.reject(refuse('it is compressed twice, or by zstd'))
  return new Promise((resolve, reject) => {
    let failure: unknown
    const parser = new Parser({
      strict: true,
      onReadEntry(entry: ReadEntry) {
        try {
          if (failure === undefined) take(entry)
        } catch (error) {
          failure = error
        }
        entry.resume()
      },
    })
    const take = (entry: ReadEntry) => {
      if (passedOver.has(entry.type)) return
      if (entry.type === 'SymbolicLink' || entry.type === 'Link') return files.link(entry.path)
      if (!fileTypes.has(entry.type)) throw refuse(`${entry.path} is a ${entry.type}`)
      const path = files.admit(entry.path, entry.size)
      if (path === undefined) return
      const parts: Buffer[] = []
      entry.on('data', (part: Buffer) => parts.push(part))
      entry.on('end', () => files.put(path, Buffer.concat(parts), entry.mode ?? 0))
    }
    parser.on('end', () => (failure === undefined ? resolve() : reject(failure)))
    parser.on('error', (error: Error) =>
      reject(failure ?? refuse(`it is no intact tar: ${error.message}`, error)),
    )
    parser.end(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength))
  })
}

/** File type bits of a Unix mode, which zip keeps in the upper half of the external attributes. */
const typeMask = 0o170000
const symlink = 0o120000

async function readZip(bytes: Uint8Array, files: Collected): Promise<void> {
  const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const broken = (cause: unknown) =>
    cause instanceof Problem ? cause : refuse(`it is no intact zip: ${(cause as Error).message}`, cause)
  const zip = await new Promise<ZipFile>((resolve, reject) =>
    fromBuffer(buffer, { lazyEntries: true, strictFileNames: true }, (error, opened) =>
      error === null ? resolve(opened) : reject(broken(error)),
    ),
  )
  const read = (entry: Entry) =>
    new Promise<Buffer>((resolve, reject) =>
      zip.openReadStream(entry, (error, stream) => {
        if (error !== null) return reject(error)
        const parts: Buffer[] = []
        stream.on('data', (part: Buffer) => parts.push(part))
        stream.on('end', () => resolve(Buffer.concat(parts)))
        stream.on('error', reject)
      }),
    )
  const take = async (entry: Entry) => {
    if (entry.fileName.endsWith('/')) return
    const mode = entry.externalFileAttributes >>> 16
    if ((mode & typeMask) === symlink) return files.link(entry.fileName)
    if ((entry.generalPurposeBitFlag & 1) === 1) throw refuse(`${entry.fileName} is encrypted`)
    // The stream fails where it brings more than the entry says.
    const path = files.admit(entry.fileName, entry.uncompressedSize)
    if (path !== undefined) files.put(path, await read(entry), mode)
  }
  await new Promise<void>((resolve, reject) => {
    const fail = (error: unknown) => {
      zip.close()
      reject(broken(error))
    }
    zip.on('entry', (entry: Entry) => take(entry).then(() => zip.readEntry(), fail))
    zip.on('end', () => resolve())
    zip.on('error', fail)
    zip.readEntry()
  })
}

const projectFile =
  /^(package\.json|vulcan\.json|requirements\.txt|go\.mod|(src\/)?(index|main)\.([cm]?[jt]sx?|py|go))$/

/** An archive of a folder, rather than of what is in it, means the same. */
function withoutFolder(project: Project): Project {
  const { files, executable, links } = project
  const paths = [...files.keys()]
  const [first = ''] = paths
  const folder = first.slice(0, first.indexOf('/') + 1)
  if (folder === '' || folder === 'src/' || folder === 'node_modules/' || folder === 'vendor/') return project
  if (!paths.every((path) => path.startsWith(folder))) return project
  if (!paths.some((path) => projectFile.test(path.slice(folder.length)))) return project
  const without = (path: string) => path.slice(folder.length)
  return {
    files: new Map([...files].map(([path, bytes]) => [without(path), bytes])),
    executable: new Set([...executable].map(without)),
    links,
    unwrapped: true,
  }
}

const block = 512

/** Head of a file in a tar, without times and owners. */
function head(path: string, size: number, executable: boolean): Buffer {
  const mode = executable ? 0o755 : 0o644
  const header = new Header({ path, size, mode, uid: 0, gid: 0, mtime: new Date(0), type: 'File' })
  const bytes = Buffer.alloc(block)
  const needsPax = header.encode(bytes, 0)
  return needsPax ? Buffer.concat([new Pax({ path, size }).encode(), bytes]) : bytes
}

const padding = (size: number) => Buffer.alloc((block - (size % block)) % block)
const inOrder = ([a]: readonly [string, unknown], [b]: readonly [string, unknown]) => (a < b ? -1 : 1)

function* packedFiles(files: Files, executable: ReadonlySet<string>): Generator<Uint8Array> {
  for (const [path, bytes] of [...files].sort(inOrder)) {
    yield head(path, bytes.byteLength, executable.has(path))
    yield bytes
    yield padding(bytes.byteLength)
  }
}

/** The same files always give the same bytes: sorted, without times, owners or modes but whether it is a program. */
export const packed = (files: Files, executable: ReadonlySet<string> = new Set()): Buffer =>
  Buffer.concat([...packedFiles(files, executable), Buffer.alloc(2 * block)])

/** A folder of the host and where its files stand in an archive. */
export interface Folder {
  at: string
  dir: string
}

/** A project with installed folders beside its files, piece by piece. Links and other things in the folders are left out. */
export async function* packedWith(project: Project, folders: readonly Folder[]): AsyncGenerator<Uint8Array> {
  yield* packedFiles(project.files, project.executable)
  for (const { at, dir } of folders) yield* packedFolder(at, dir)
  yield Buffer.alloc(2 * block)
}

async function* packedFolder(at: string, dir: string): AsyncGenerator<Uint8Array> {
  const entries = await readdir(dir, { withFileTypes: true })
  for (const entry of entries.sort((a, b) => (a.name < b.name ? -1 : 1))) {
    const [path, from] = [`${at}/${entry.name}`, join(dir, entry.name)]
    if (entry.isDirectory()) yield* packedFolder(path, from)
    if (!entry.isFile()) continue
    await using file = await open(from)
    const { size, mode } = await file.stat()
    yield head(path, size, (mode & 0o111) !== 0)
    for (let done = 0; done < size; ) {
      const { bytesRead, buffer } = await file.read(Buffer.alloc(Math.min(chunkBytes, size - done)))
      if (bytesRead === 0) throw new Error(`${from} became shorter while it was packed`)
      yield buffer.subarray(0, bytesRead)
      done += bytesRead
    }
    yield padding(size)
  }
}
