/**
 * Writes erofs file systems: read-only, uncompressed, the same bytes for the same tree. Nothing is mounted, no program
 * runs, and root is not needed. The format is that of the kernel's `fs/erofs/erofs_fs.h`: a superblock, then inodes of
 * the extended form with small contents right behind them, then blocks of file data.
 */
import {
  type BigIntStats,
  closeSync,
  constants,
  lstatSync,
  openSync,
  readdirSync,
  readlinkSync,
  readSync,
} from 'node:fs'
import { type FileHandle, open } from 'node:fs/promises'
import { setImmediate } from 'node:timers/promises'

const blockBytes = 4096
const superblockAt = 1024
const superblockBytes = 128
const magic = 0xe0f5e1e2
const inodeBytes = 64
/** Inodes are numbered by their place, in units of so many bytes. */
const slotBytes = 32
const direntBytes = 12
/** Contents up to here stand behind their inode: both must fit one block. */
const inlineBytes = blockBytes - inodeBytes
const layouts = { plain: 0, inline: 2 }
const typeBits = { file: 0o100000, directory: 0o040000, link: 0o120000 }
/** In directory entries. */
const entryTypes = { file: 1, directory: 2, link: 7 }
/** Permission bits, set-user-id, set-group-id and sticky. */
const permissionBits = 0o7777

/** A tree with more is refused. */
const maxEntries = 1_000_000
const maxNameBytes = 255
/** What goes to the disk at once, and what a file is read by. */
const chunkBytes = 1 << 20
const zeros = Buffer.alloc(chunkBytes)
/** The event loop waits for no longer, ms. */
const stepMs = 5

/** A tree that cannot be written: what it has is not allowed, or more than there is room for. */
export class ErofsError extends Error {
  override name = 'ErofsError'
}

/** A file or directory of the host, and where it stands in the file system: `.` or a relative path. */
export interface ErofsSource {
  source: string
  path: string
}

export interface ErofsOptions {
  /** Whose the files are: as on the host, or root's. */
  owner: 'kept' | 'root'
  /** Of the whole file system. */
  maxBytes: number
}

interface Shared {
  mode: number
  uid: number
  gid: number
  /** Seconds since the epoch. */
  mtime: number
  /** Names that lead to it. */
  links: number
  /** Where its inode stands. */
  at: number
  /** Where its content begins, unless that stands behind the inode. */
  block: number
}
interface Directory extends Shared {
  kind: 'directory'
  /** By name; names and paths are strings with a byte in each character, since they need not be UTF-8. */
  entries: Map<string, Node>
  parent: Directory
  content: Buffer
}
interface File extends Shared {
  kind: 'file'
  source: string
  size: number
}
interface Link extends Shared {
  kind: 'link'
  content: Buffer
}
type Node = Directory | File | Link

/**
 * Writes a file system with `sources` from the beginning of a blank file on; what is zero is not written. Links stay as
 * they are; devices, sockets and pipes are left out. Nobody changes the sources meanwhile: a file that does change is
 * cut or filled up with zeros.
 *
 * @returns bytes of the file system
 * @throws ErofsError before anything is written, or the error of a file that cannot be read
 */
export async function writeErofs(
  sources: readonly ErofsSource[],
  file: FileHandle,
  options: ErofsOptions,
): Promise<number> {
  const pace = new Pace()
  const { root, nodes } = await scan(sources, options.owner, pace)
  const blocks = place(nodes)
  if (blocks * blockBytes > options.maxBytes)
    throw new ErofsError(`it takes ${blocks * blockBytes} bytes, and there is room for ${options.maxBytes}`)
  const output = new Output(file, pace)
  await output.at(superblockAt)
  output.take(superblockBytes).set(superblock(root, nodes.length, blocks))
  for (const node of nodes) await writeInode(node, output)
  for (const node of nodes) if (node.block > 0) await writeContent(node, output)
  await output.at(blocks * blockBytes)
  await output.flush()
  return blocks * blockBytes
}

/** `sources` as one tree; its nodes in the order in which they are written. */
async function scan(sources: readonly ErofsSource[], owner: 'kept' | 'root', pace: Pace) {
  const root = emptyDirectory()
  const pending: { directory: Directory; source: string }[] = []
  /** Files with more than one name, by device and inode. */
  const linked = new Map<string, File>()
  const nodeOf = (source: string, stat: BigIntStats, parent: Directory): Node | undefined => {
    const shared = {
      mode: Number(stat.mode) & permissionBits,
      uid: owner === 'root' ? 0 : Number(stat.uid),
      gid: owner === 'root' ? 0 : Number(stat.gid),
      mtime: Math.max(0, Math.floor(Number(stat.mtimeMs) / 1000)),
      links: 1,
      at: 0,
      block: 0,
    }
    if (stat.isDirectory()) {
      const directory: Directory = {
        kind: 'directory',
        ...shared,
        links: 2,
        entries: new Map(),
        parent,
        content: none,
      }
      pending.push({ directory, source })
      return directory
    }
    if (stat.isSymbolicLink())
      // Links get their time when a tree is unpacked, which is another each time.
      return {
        kind: 'link',
        ...shared,
        mtime: 0,
        content: readlinkSync(bytesOf(source), { encoding: 'buffer' }),
      }
    if (!stat.isFile()) return undefined
    const key = `${stat.dev}:${stat.ino}`
    const known = stat.nlink > 1n ? linked.get(key) : undefined
    if (known !== undefined) {
      known.links++
      return known
    }
    const node: File = { kind: 'file', ...shared, source, size: Number(stat.size) }
    if (stat.nlink > 1n) linked.set(key, node)
    return node
  }

  for (const { source, path } of sources) {
    const steps = stepsOf(path)
    const name = steps.pop()
    const host = Buffer.from(source).toString('latin1')
    const stat = lstatSync(source, { bigint: true })
    if (name === undefined) {
      if (!stat.isDirectory()) throw new ErofsError(`${source} is no directory, and cannot be the root`)
      root.mode = Number(stat.mode) & permissionBits
      if (owner === 'kept') Object.assign(root, { uid: Number(stat.uid), gid: Number(stat.gid) })
      root.mtime = Math.max(0, Math.floor(Number(stat.mtimeMs) / 1000))
      pending.push({ directory: root, source: host })
      continue
    }
    let parent = root
    for (const step of steps) {
      const next = parent.entries.get(step) ?? add(parent, step, emptyDirectory(parent))
      if (next.kind !== 'directory') throw new ErofsError(`two sources meet at ${path}`)
      parent = next
    }
    if (parent.entries.has(name)) throw new ErofsError(`two sources meet at ${path}`)
    const node = nodeOf(host, stat, parent)
    if (node === undefined) throw new ErofsError(`${source} is neither file, directory nor link`)
    add(parent, name, node)
  }

  let count = 0
  for (let next = pending.pop(); next !== undefined; next = pending.pop()) {
    const { directory, source } = next
    for (const name of readdirSync(bytesOf(source), { encoding: 'latin1' })) {
      if (++count > maxEntries) throw new ErofsError(`it has more than ${maxEntries} entries`)
      const path = `${source}/${name}`
      if (directory.entries.has(name)) throw new ErofsError(`two sources meet at ${name}`)
      const node = nodeOf(path, lstatSync(bytesOf(path), { bigint: true }), directory)
      if (node !== undefined) add(directory, name, node)
      if (pace.isDue) await pace.rest()
    }
  }

  // The root comes first: its number has 16 bits.
  const nodes = new Set<Node>([root])
  for (const node of nodes) {
    if (node.kind !== 'directory') continue
    node.entries = new Map([...node.entries].sort(([a], [b]) => (a < b ? -1 : 1)))
    for (const child of node.entries.values()) nodes.add(child)
  }
  return { root, nodes: [...nodes] }
}

const none = Buffer.alloc(0)
const bytesOf = (path: string) => Buffer.from(path, 'latin1')

function emptyDirectory(parent?: Directory): Directory {
  const shared = { mode: 0o755, uid: 0, gid: 0, mtime: 0, links: 2, at: 0, block: 0 }
  const directory = {
    kind: 'directory',
    ...shared,
    entries: new Map(),
    content: none,
  } as unknown as Directory
  directory.parent = parent ?? directory
  return directory
}

function add(parent: Directory, name: string, node: Node): Node {
  parent.entries.set(name, node)
  if (node.kind === 'directory') parent.links++
  return node
}

/** The parts of a path inside the file system, a byte in each character. */
function stepsOf(path: string): string[] {
  const steps = Buffer.from(path).toString('latin1').split('/')
  if (path === '.') return []
  const isName = (step: string) =>
    step.length > 0 && step.length <= maxNameBytes && step !== '.' && step !== '..' && !step.includes('\0')
  if (!steps.every(isName)) throw new ErofsError(`${JSON.stringify(path)} is no path of a file system`)
  return steps
}

/** Gives all nodes their places. Returns the file system's blocks. */
function place(nodes: readonly Node[]): number {
  let at = superblockAt + superblockBytes
  for (const node of nodes) {
    const size = sizeOf(node)
    const bytes = inodeBytes + (size <= inlineBytes ? size : 0)
    if ((at % blockBytes) + bytes > blockBytes) at = roundUp(at, blockBytes)
    node.at = at
    at = roundUp(at + bytes, slotBytes)
  }
  let block = Math.ceil(at / blockBytes)
  for (const node of nodes) {
    const size = sizeOf(node)
    if (size <= inlineBytes) continue
    node.block = block
    block += Math.ceil(size / blockBytes)
  }
  // Directories name their entries by place: their contents can be made only now, with the sizes that they had.
  for (const node of nodes) if (node.kind === 'directory') node.content = contentOf(node)
  return block
}

const roundUp = (value: number, unit: number) => Math.ceil(value / unit) * unit

function sizeOf(node: Node): number {
  if (node.kind === 'file') return node.size
  if (node.kind === 'link') return node.content.length
  return directorySize(entriesOf(node))
}

type Entry = [name: string, node: Node]

/** With the two that lead to itself and above, in the order of their bytes. */
function entriesOf(directory: Directory): Entry[] {
  const entries: Entry[] = [...directory.entries]
  for (const dots of [['.', directory] as Entry, ['..', directory.parent] as Entry]) {
    const behind = entries.findIndex(([name]) => name > dots[0])
    entries.splice(behind < 0 ? entries.length : behind, 0, dots)
  }
  return entries
}

/** How many entries go into each block. */
function* blocksOf(entries: readonly Entry[]): Generator<{ first: number; end: number; bytes: number }> {
  let first = 0
  let bytes = 0
  for (const [index, [name]] of entries.entries()) {
    const more = direntBytes + name.length
    if (bytes + more > blockBytes) {
      yield { first, end: index, bytes }
      first = index
      bytes = 0
    }
    bytes += more
  }
  yield { first, end: entries.length, bytes }
}

function directorySize(entries: readonly Entry[]): number {
  let size = 0
  for (const { end, bytes } of blocksOf(entries)) size += end === entries.length ? bytes : blockBytes
  return size
}

function contentOf(directory: Directory): Buffer {
  const entries = entriesOf(directory)
  const content = Buffer.alloc(directorySize(entries))
  let base = 0
  for (const { first, end } of blocksOf(entries)) {
    let nameAt = (end - first) * direntBytes
    for (let index = first; index < end; index++) {
      const [name, node] = entries[index]!
      const at = base + (index - first) * direntBytes
      content.writeBigUInt64LE(BigInt(node.at / slotBytes), at)
      content.writeUInt16LE(nameAt, at + 8)
      content[at + 10] = entryTypes[node.kind]
      content.write(name, base + nameAt, 'latin1')
      nameAt += name.length
    }
    base += blockBytes
  }
  return content
}

function superblock(root: Directory, inodes: number, blocks: number): Buffer {
  const bytes = Buffer.alloc(superblockBytes)
  bytes.writeUInt32LE(magic, 0)
  // Compatible feature 2: times are those of modification.
  bytes.writeUInt32LE(2, 8)
  bytes[12] = Math.log2(blockBytes)
  bytes.writeUInt16LE(root.at / slotBytes, 14)
  bytes.writeBigUInt64LE(BigInt(inodes), 16)
  bytes.writeUInt32LE(blocks, 36)
  return bytes
}

async function writeInode(node: Node, output: Output): Promise<void> {
  const size = sizeOf(node)
  const isInline = size <= inlineBytes && size > 0
  await output.at(node.at, inodeBytes + (isInline ? size : 0))
  const inode = output.take(inodeBytes)
  // Bit 0: the extended form.
  inode.writeUInt16LE(1 | ((isInline ? layouts.inline : layouts.plain) << 1), 0)
  inode.writeUInt16LE(typeBits[node.kind] | node.mode, 4)
  inode.writeBigUInt64LE(BigInt(size), 8)
  inode.writeUInt32LE(node.block, 16)
  inode.writeUInt32LE(node.at / slotBytes, 20)
  inode.writeUInt32LE(node.uid, 24)
  inode.writeUInt32LE(node.gid, 28)
  inode.writeBigUInt64LE(BigInt(node.mtime), 32)
  inode.writeUInt32LE(node.links, 44)
  if (!isInline) return
  if (node.kind === 'file') readWhole(node.source, output.take(size))
  else output.take(size).set(node.content)
}

async function writeContent(node: Node, output: Output): Promise<void> {
  await output.at(node.block * blockBytes)
  if (node.kind === 'file') await output.copy(node.source, node.size)
  else await output.write(node.content)
}

/** A link in the place of a file, or a pipe, is not opened or waited for. */
const readFlags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK

function readWhole(source: string, into: Buffer): void {
  const file = openSync(bytesOf(source), readFlags)
  try {
    for (let at = 0; at < into.length; ) {
      const count = readSync(file, into, at, into.length - at, at)
      if (count === 0) return
      at += count
    }
  } finally {
    closeSync(file)
  }
}

/** Bytes on their way into the file, in ascending order; what is skipped is zero. */
class Output {
  readonly #file: FileHandle
  readonly #pace: Pace
  readonly #buffer = Buffer.alloc(chunkBytes)
  /** Where the buffer begins in the file, and how much of it is filled. */
  #start = 0
  #filled = 0

  constructor(file: FileHandle, pace: Pace) {
    this.#file = file
    this.#pace = pace
  }

  /** Goes on to `position`, with room for `bytes` to be taken. */
  async at(position: number, bytes = superblockBytes): Promise<void> {
    if (this.#pace.isDue) await this.#pace.rest()
    while (position - this.#start > chunkBytes - bytes) {
      // A gap is shorter than a block, since every block has something.
      const until = Math.min(position - this.#start, chunkBytes)
      this.#filled = Math.max(this.#filled, until)
      await this.flush()
    }
    this.#filled = position - this.#start
  }

  /** The next bytes, to be filled. */
  take(bytes: number): Buffer {
    this.#filled += bytes
    return this.#buffer.subarray(this.#filled - bytes, this.#filled)
  }

  async write(bytes: Buffer): Promise<void> {
    for (let at = 0; at < bytes.length; ) {
      if (this.#filled === chunkBytes) await this.flush()
      const count = bytes.copy(this.#buffer, this.#filled, at)
      this.#filled += count
      at += count
    }
  }

  async copy(source: string, size: number): Promise<void> {
    if (size <= chunkBytes - this.#filled) return readWhole(source, this.take(size))
    const file = await open(bytesOf(source), readFlags)
    await using _close = { [Symbol.asyncDispose]: () => file.close() }
    for (let at = 0; at < size; ) {
      if (this.#filled === chunkBytes) await this.flush()
      const wanted = Math.min(size - at, chunkBytes - this.#filled)
      const { bytesRead } = await file.read(this.#buffer, this.#filled, wanted, at)
      // It has become shorter: the rest is zero, as the buffer is.
      const count = bytesRead || wanted
      this.#filled += count
      at += count
    }
  }

  async flush(): Promise<void> {
    const bytes = this.#buffer.subarray(0, this.#filled)
    const isBlank = bytes.equals(zeros.subarray(0, this.#filled))
    for (let at = 0; at < this.#filled && !isBlank; ) {
      const { bytesWritten } = await this.#file.write(bytes, at, bytes.length - at, this.#start + at)
      at += bytesWritten
    }
    this.#start += this.#filled
    this.#buffer.fill(0, 0, this.#filled)
    this.#filled = 0
  }
}

/** Small files are read synchronously, which is much faster; now and then others get their turn. */
class Pace {
  #since = performance.now()

  get isDue(): boolean {
    return performance.now() - this.#since > stepMs
  }
  async rest(): Promise<void> {
    await setImmediate()
    this.#since = performance.now()
  }
}
