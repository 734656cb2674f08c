/**
 * The root file system as it comes to be, in memory. Every name in an archive is looked up here, links and all, as a
 * process inside the root would; the disk is only ever told paths that consist of directories this tree has made.
 * So whatever an archive says, nothing is written through a link.
 */
import { Refusal, type TarEntry } from './tar.ts'

export interface Inode {
  /** Taken on the disk, bytes. */
  bytes: number
  links: number
}

interface Common {
  parent: Directory
  name: string
  /** The last that named it. */
  layer: number
}
export interface Directory {
  kind: 'directory'
  /** Undefined: the root. */
  parent: Directory | undefined
  name: string
  layer: number
  /** Below the root’s own place, beginning with a slash; empty: the root. */
  path: string
  children: Map<string, Node>
  /** Set when all is there: what is put into a directory changes its own time. */
  mtime: number | undefined
}
export type Node =
  | Directory
  | (Common & { kind: 'file'; inode: Inode })
  | (Common & { kind: 'symlink'; target: string })
  /** A device or a FIFO: known, and not made. */
  | (Common & { kind: 'left-out' })

/** What the tree has done to the disk; paths as those of `Directory`. */
export interface Disk {
  makeDirectory(path: string): void
  /** Anything but a directory; `freed` bytes of disk become free by it. */
  remove(path: string, freed: number): void
  /** Empty by now. */
  removeDirectory(path: string): void
}

/** Of a path below the root, bytes: with the place of the root before it, it stays below the kernel’s 4,096. */
const maxPath = 3_000
/** Linux’s own (path_resolution(7)). */
const maxLinks = 40
/** NAME_MAX. */
const maxName = 255

export const pathOf = (node: { parent: Directory | undefined; name: string }): string =>
  node.parent === undefined ? '' : `${node.parent.path}/${node.name}`

/** The components of a path from the root, `..` resolved by its text. Throws `Refusal` where it climbs out. */
export function clean(path: string, what: string, from: readonly string[] = []): string[] {
  const parts = [...from]
  for (const part of path.split('/')) {
    if (part === '' || part === '.') continue
    if (part !== '..') parts.push(part)
    else if (parts.pop() === undefined) throw new Refusal(`${what} ${quote(path)} climbs out of the root`)
  }
  return parts
}

/** Names are bytes here; the message has them as text. */
export const quote = (name: string) => JSON.stringify(Buffer.from(name, 'latin1').toString().slice(0, 300))

export class Tree {
  readonly root: Directory
  readonly #disk: Disk
  #layer = 0

  constructor(disk: Disk) {
    this.#disk = disk
    this.root = {
      kind: 'directory',
      parent: undefined,
      name: '',
      layer: 0,
      path: '',
      children: new Map(),
      mtime: undefined,
    }
  }

  /** Counted from 1. */
  startLayer(layer: number): void {
    this.#layer = layer
  }

  /**
   * The directory to which the path leads. What is missing on the way is made where `make` is given.
   *
   * @throws Refusal where a file stands in the way, or the links never end
   */
  directory(parts: readonly string[], make: boolean): Directory | undefined {
    let at = this.root
    let links = 0
    const ahead = parts.toReversed()
    for (let part = ahead.pop(); part !== undefined; part = ahead.pop()) {
      if (part === '' || part === '.') continue
      if (part === '..') {
        at = at.parent ?? this.root
        continue
      }
      const child = at.children.get(part)
      if (child?.kind === 'directory') at = child
      else if (child?.kind === 'symlink') {
        if (++links > maxLinks) throw new Refusal(`too many links on the way to ${quote(parts.join('/'))}`)
        ahead.push(...child.target.split('/').reverse())
        if (child.target.startsWith('/')) at = this.root
      } else if (!make) return undefined
      else if (child)
        throw new Refusal(`${quote(pathOf(child))} is not a directory, and something is to be put into it`)
      else at = this.makeDirectory(at, part)
    }
    return at
  }

  /** A new one, where nothing is. */
  makeDirectory(parent: Directory, name: string): Directory {
    const path = this.#fits(parent, name)
    this.#disk.makeDirectory(path)
    const made: Directory = {
      kind: 'directory',
      parent,
      name,
      layer: this.#layer,
      path,
      children: new Map(),
      mtime: undefined,
    }
    parent.children.set(name, made)
    return made
  }

  /** Makes room for an entry and remembers it. The path to make it at. */
  put(parent: Directory, name: string, node: NewNode): string {
    const path = this.#fits(parent, name)
    const there = parent.children.get(name)
    if (there) this.remove(there)
    parent.children.set(name, { ...node, parent, name, layer: this.#layer } as Node)
    return path
  }

  /** Names it in this layer. */
  touch(node: Directory): void {
    node.layer = this.#layer
  }

  #fits(parent: Directory, name: string): string {
    const path = `${parent.path}/${name}`
    if (name.length > maxName || path.length > maxPath)
      throw new Refusal(`the name ${quote(path)} is too long`)
    return path
  }

  /** With all that is in it. */
  remove(node: Node): void {
    this.#hide(node, Number.POSITIVE_INFINITY)
  }

  /** What lower layers have put there; what this one did stays (layer specification, whiteouts). */
  whiteOut(parent: Directory, name: string): void {
    const node = parent.children.get(name)
    if (node) this.#hide(node, this.#layer)
  }

  whiteOutChildren(parent: Directory): void {
    for (const child of [...parent.children.values()]) this.#hide(child, this.#layer)
  }

  /** Without recursion: a hostile tree may be deep. */
  #hide(top: Node, before: number): void {
    const order: Node[] = [top]
    for (let i = 0; i < order.length; i++) {
      const node = order[i]!
      if (node.kind === 'directory') for (const child of node.children.values()) order.push(child)
    }
    for (const node of order.reverse()) {
      if (node.layer >= before) continue
      if (node.kind === 'directory') {
        if (node.children.size > 0) continue
        this.#disk.removeDirectory(node.path)
      } else {
        const freed = node.kind === 'file' && --node.inode.links === 0 ? node.inode.bytes : 0
        if (node.kind !== 'left-out') this.#disk.remove(pathOf(node), freed)
      }
      node.parent!.children.delete(node.name)
    }
  }

  /** Every directory, those within others first. */
  directories(): Directory[] {
    const order: Directory[] = [this.root]
    for (let i = 0; i < order.length; i++)
      for (const child of order[i]!.children.values()) if (child.kind === 'directory') order.push(child)
    return order.reverse()
  }
}

export type NewNode =
  | { kind: 'file'; inode: Inode }
  | { kind: 'symlink'; target: string }
  | { kind: 'left-out' }

/** Where a symbolic link may point: anywhere within the root, by its text, as Docker has it. Throws `Refusal`. */
export function checkSymlink(entry: TarEntry, parent: Directory): void {
  if (entry.target === '') throw new Refusal(`the link ${quote(entry.path)} leads nowhere`)
  if (entry.target.length > 4_095) throw new Refusal(`the link ${quote(entry.path)} is too long`)
  const from = entry.target.startsWith('/') ? [] : parent.path.split('/').slice(1)
  clean(entry.target, `the link ${quote(entry.path)} to`, from)
}
