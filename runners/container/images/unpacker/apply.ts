/** Applies layers to a directory, by the OCI layer specification. Runs in the jail: everything here is synchronous. */
import * as fs from 'node:fs'
import { Refusal, type TarEntry, type TarHandler } from './tar.ts'
import { checkSymlink, clean, type Directory, type Inode, quote, Tree } from './tree.ts'

export interface ApplyOptions {
  /** Absolute; an empty directory that nobody else writes to. */
  root: string
  /** Give files the owners they have in the image; needs root. */
  owners: boolean
  /** Entries of all layers together. */
  maxEntries: number
}

const whiteout = '.wh.'
const opaque = '.wh..wh..opq'
/** Taken on the disk by an inode with no bytes of its own, and the unit of those with: ext4’s default, near enough. */
const diskBlock = 4_096
const maxId = 0xffff_fffe

/** Within what a file system can keep: seconds since 1970 in 34 bits (ext4). */
const time = ({ mtime }: TarEntry) => Math.min(Math.max(mtime, -(2 ** 31)), 2 ** 33)

export class Applier implements TarHandler {
  readonly #options: ApplyOptions
  readonly #tree: Tree
  /** Bytes of disk that the root takes. */
  #bytes = diskBlock
  #entries = 0
  #file: { descriptor: number; entry: TarEntry } | undefined

  constructor(options: ApplyOptions) {
    this.#options = options
    fs.chmodSync(options.root, 0o755)
    this.#tree = new Tree({
      makeDirectory: (path) => {
        fs.mkdirSync(this.#at(path), 0o755)
        this.#bytes += diskBlock
      },
      remove: (path, freed) => {
        fs.unlinkSync(this.#at(path))
        this.#bytes -= freed
      },
      removeDirectory: (path) => {
        fs.rmdirSync(this.#at(path))
        this.#bytes -= diskBlock
      },
    })
  }

  /** Bytes on disk and entries read so far. */
  get figures() {
    return { bytes: this.#bytes, entries: this.#entries }
  }

  startLayer(number: number): void {
    this.#tree.startLayer(number)
  }

  /** As bytes: names are in whatever encoding the image has them. */
  #at(path: string): Buffer {
    return Buffer.from(this.#options.root + path, 'latin1')
  }

  entry(entry: TarEntry): void {
    if (++this.#entries > this.#options.maxEntries)
      throw new Refusal(`it has more than ${this.#options.maxEntries} entries`)
    if (entry.uid > maxId || entry.gid > maxId)
      throw new Refusal(`${quote(entry.path)} has an owner that is no id`)
    const parts = clean(entry.path, 'the path')
    const name = parts.at(-1)
    if (name === undefined) {
      if (entry.type !== 'directory') throw new Refusal('the root is to be something else than a directory')
      this.#describe(this.#tree.root, entry)
    } else if (name.startsWith(whiteout)) this.#whiteOut(parts, name, entry)
    else this.#make(this.#tree.directory(parts.slice(0, -1), true)!, name, entry)
  }

  #make(parent: Directory, name: string, entry: TarEntry): void {
    switch (entry.type) {
      case 'directory':
        this.#directory(parent, name, entry)
        break
      case 'file':
        this.#open(parent, name, entry)
        break
      case 'symlink':
        this.#symlink(parent, name, entry)
        break
      case 'link':
        this.#link(parent, name, entry)
        break
      case 'device':
      case 'fifo':
        this.#tree.put(parent, name, { kind: 'left-out' })
        break
      default:
        throw new Error(`unhandled ${entry.type satisfies never}`)
    }
  }

  data(bytes: Uint8Array): void {
    if (this.#file === undefined) return
    for (let at = 0; at < bytes.length; ) at += fs.writeSync(this.#file.descriptor, bytes, at)
  }

  end(): void {
    if (this.#file === undefined) return
    const { descriptor, entry } = this.#file
    this.#file = undefined
    if (this.#options.owners) fs.fchownSync(descriptor, entry.uid, entry.gid)
    // Behind the owner: a change of owner takes the set-user-id bit away.
    fs.fchmodSync(descriptor, entry.mode)
    fs.futimesSync(descriptor, time(entry), time(entry))
    fs.closeSync(descriptor)
  }

  /** Times of directories, which everything put into them has changed. */
  finish(): void {
    for (const { path, mtime } of this.#tree.directories())
      if (mtime !== undefined) fs.utimesSync(this.#at(path), mtime, mtime)
  }

  #whiteOut(parts: string[], name: string, entry: TarEntry): void {
    // What it would be called is no name: `.wh..` would take the directory itself away, `.wh...` the one above.
    const hidden = name.slice(whiteout.length)
    if (hidden === '' || hidden === '.' || hidden === '..')
      throw new Refusal(`the whiteout ${quote(entry.path)} hides no file`)
    const parent = this.#tree.directory(parts.slice(0, -1), false)
    if (parent === undefined) return
    if (name === opaque) this.#tree.whiteOutChildren(parent)
    // Others with the prefix twice are notes of aufs to itself.
    else if (!hidden.startsWith(whiteout)) this.#tree.whiteOut(parent, hidden)
  }

  #directory(parent: Directory, name: string, entry: TarEntry): void {
    const there = parent.children.get(name)
    if (there && there.kind !== 'directory') this.#tree.remove(there)
    this.#describe(there?.kind === 'directory' ? there : this.#tree.makeDirectory(parent, name), entry)
  }

  #describe(directory: Directory, entry: TarEntry): void {
    this.#tree.touch(directory)
    const path = this.#at(directory.path)
    if (this.#options.owners) fs.chownSync(path, entry.uid, entry.gid)
    // Without root, what its owner may not write to could neither be filled nor removed.
    fs.chmodSync(path, this.#options.owners ? entry.mode : entry.mode | 0o700)
    directory.mtime = time(entry)
  }

  #open(parent: Directory, name: string, entry: TarEntry): void {
    const inode: Inode = { bytes: diskBlock + Math.ceil(entry.size / diskBlock) * diskBlock, links: 1 }
    const path = this.#at(this.#tree.put(parent, name, { kind: 'file', inode }))
    const { O_WRONLY, O_CREAT, O_EXCL, O_NOFOLLOW } = fs.constants
    const descriptor = fs.openSync(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, 0o600)
    this.#file = { descriptor, entry }
    this.#bytes += inode.bytes
  }

  #symlink(parent: Directory, name: string, entry: TarEntry): void {
    checkSymlink(entry, parent)
    const path = this.#at(this.#tree.put(parent, name, { kind: 'symlink', target: entry.target }))
    fs.symlinkSync(Buffer.from(entry.target, 'latin1'), path)
    if (this.#options.owners) fs.lchownSync(path, entry.uid, entry.gid)
  }

  #link(parent: Directory, name: string, entry: TarEntry): void {
    const parts = clean(entry.target, `the hard link ${quote(entry.path)} to`)
    const from = this.#tree.directory(parts.slice(0, -1), false)
    const target = from?.children.get(parts.at(-1) ?? '')
    if (target === undefined || target.kind === 'directory')
      throw new Refusal(
        `the hard link ${quote(entry.path)} leads to ${quote(entry.target)}, which is no file of the image`,
      )
    if (target === parent.children.get(name)) return
    const existing = this.#at(`${from!.path}/${target.name}`)
    if (target.kind === 'left-out') {
      this.#tree.put(parent, name, { kind: 'left-out' })
      return
    }
    if (target.kind === 'symlink') {
      fs.linkSync(
        existing,
        this.#at(this.#tree.put(parent, name, { kind: 'symlink', target: target.target })),
      )
      return
    }
    const path = this.#at(this.#tree.put(parent, name, { kind: 'file', inode: target.inode }))
    target.inode.links++
    fs.linkSync(existing, path)
  }
}
