/**
 * The jail of one machine: a directory that is all the VMM sees, and the command line that puts it there. Firecracker’s
 * jailer gives it a user, a mount, a pid and a network namespace of its own; seccomp filters are Firecracker’s defaults.
 */
import { randomInt } from 'node:crypto'
import { closeSync, constants, fstatSync, openSync } from 'node:fs'
import { chmod, chown, copyFile, link, mkdir, rename, stat } from 'node:fs/promises'
import { basename, join } from 'node:path'

export interface Identity {
  uid: number
  gid: number
}

/** Ids that systemd’s UIDS-GIDS leaves to nobody: behind those of containers, before those of foreign images. */
const firstId = 0x7000_0000
const manyIds = 0x100_0000

/** Of one machine: another has it at the same time with a probability of 1 in 16 million. */
export function drawIdentity(): Identity {
  const id = firstId + randomInt(manyIds)
  return { uid: id, gid: id }
}

export interface Launch extends Identity {
  jailer: string
  /** Statically linked; its name is `firecracker`. */
  firecracker: string
  /** Letters, digits and hyphens; at most 64 (docs/jailer.md). */
  id: string
  /** Directory that jails are in. */
  base: string
  /** Network namespace of the VMM. */
  netns: string
  /** Largest file that the VMM may write, bytes. */
  fileBytes: number
}

/** What the VMM may have open: its devices, sockets and pipes are some dozens. */
const openFiles = 256

/**
 * Waits for a line: by then the process is in the control groups of the machine, and so is everything that comes of it.
 * Where the runner dies before, nothing starts.
 */
const script = 'read -r go && exec "$@" </dev/null'

/** Ends the jailer, until it has put the VMM in its place, with the runner’s process. */
export const launcher = 'setpriv'

/** Arguments of `launcher`. The jailer makes no control groups, of either version: it begins in those of the machine. */
export function launchArgs({ jailer, firecracker, id, uid, gid, base, netns, fileBytes }: Launch): string[] {
  return [
    ...['--pdeathsig', 'KILL', '--', '/bin/sh', '-c', script, 'sh'],
    jailer,
    ...['--id', id, '--exec-file', firecracker],
    ...['--uid', String(uid), '--gid', String(gid)],
    ...['--chroot-base-dir', base, '--netns', netns, '--new-pid-ns'],
    ...['--resource-limit', `no-file=${openFiles}`, '--resource-limit', `fsize=${fileBytes}`],
    // Until its logger is set, what it says is in the way of what the guest says.
    ...['--', '--api-sock', `/${apiSocket}`, '--level', 'Warning'],
  ]
}

export const jailOf = ({ base, firecracker, id }: Pick<Launch, 'base' | 'firecracker' | 'id'>) =>
  join(base, basename(firecracker), id)

/** Names in the jail. They are in snapshots, so they are the same in every jail. */
export const apiSocket = 'api.sock'
export const vsockSocket = 'v.sock'
export const jailed = {
  kernel: '/kernel',
  initramfs: '/initramfs',
  root: '/root.img',
  job: '/job.img',
  memory: '/template/memory',
  state: '/template/state',
  log: '/log',
  metrics: '/metrics',
  vsock: `/${vsockSocket}`,
} as const
/** Where the VMM writes a snapshot. */
export const snapshotDir = '/snapshot'

/**
 * Files that many machines read. A jail gets a hard link; where the file is on another file system, or not for every
 * user to read, it is copied once to `dir` and linked from there.
 */
export class SharedFiles {
  readonly #dir: string
  readonly #copies = new Map<string, Promise<string>>()

  constructor(dir: string) {
    this.#dir = dir
  }

  /** `file` must not change, and must outlive no copy: another file of the same name and time is taken for it. */
  async place(file: string, target: string): Promise<void> {
    const { dev, ino, mode, mtimeMs, size } = await stat(file)
    // The VMM’s user may read it, and must not be able to write it.
    if ((mode & 0o006) === 0o004 && (await linked(file, target))) return
    const key = [dev, ino, size, Math.round(mtimeMs)].join('-')
    let copy = this.#copies.get(key)
    if (copy === undefined) {
      copy = this.#copy(file, join(this.#dir, key))
      this.#copies.set(key, copy)
      copy.catch(() => this.#copies.delete(key))
    }
    await link(await copy, target)
  }

  async #copy(file: string, target: string): Promise<string> {
    await mkdir(this.#dir, { recursive: true, mode: 0o700 })
    await copyFile(file, `${target}.new`, constants.COPYFILE_FICLONE)
    await chmod(`${target}.new`, 0o444)
    await rename(`${target}.new`, target)
    return target
  }
}

/** False where the file is on another file system. */
async function linked(file: string, target: string): Promise<boolean> {
  try {
    await link(file, target)
    return true
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EXDEV') return false
    throw error
  }
}

/**
 * The job’s own drive: the caller goes on writing it, so that no copy will do. The VMM’s group may read it, and nobody
 * but root may write it. Throws where it is on another file system.
 */
export async function placeJobDrive(file: string, target: string, { gid }: Identity): Promise<void> {
  if (!(await linked(file, target))) throw new Error(`${file} is not on the file system of the jails`)
  await chown(target, 0, gid)
  await chmod(target, 0o640)
}

/** Not in Node’s constants: fcntl.h of Linux. A descriptor that names a file, and nothing more. */
const O_PATH = 0o10000000

/**
 * A file or socket of a jail, held so that nobody can put another, or a link to one, in its place: the VMM’s user owns
 * the directory. `path` is short enough for a socket (unix(7)).
 */
export class Held implements Disposable {
  #descriptor: number | undefined

  /** Throws where it is not there, or a symbolic link. */
  constructor(path: string, flags = O_PATH) {
    this.#descriptor = openSync(path, flags | constants.O_NOFOLLOW)
    // O_PATH opens a link itself.
    if (!fstatSync(this.#descriptor).isSymbolicLink()) return
    this[Symbol.dispose]()
    throw new Error(`${path} is a symbolic link`)
  }

  get descriptor(): number {
    if (this.#descriptor === undefined) throw new Error('given up')
    return this.#descriptor
  }

  get path(): string {
    return `/proc/self/fd/${this.descriptor}`
  }

  [Symbol.dispose](): void {
    if (this.#descriptor !== undefined) closeSync(this.#descriptor)
    this.#descriptor = undefined
  }
}
