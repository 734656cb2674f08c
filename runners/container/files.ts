/** The directory that belongs to this runner process: what boxes see of the host, apart from images. */
import { randomBytes } from 'node:crypto'
import { chmod, mkdir, readdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { startTime, thisBoot } from '../../shared/process-identity.ts'

/** One process of this host for good: a pid alone may be given to another. */
interface Owner {
  pid: number
  /** Field 22 of proc(5)’s stat, clock ticks since boot. */
  start: string
  /** Of this boot: ticks begin anew with the next. */
  boot: string
}

const ownerFile = 'owner.json'
/** A directory without a record is from a process that is just making it, or that died there. */
const recordMs = 60_000

async function isDead(dir: string): Promise<boolean> {
  try {
    const { pid, start, boot } = JSON.parse(await readFile(join(dir, ownerFile), 'utf8')) as Owner
    return boot !== thisBoot() || startTime(pid) !== start
  } catch {
    const { mtimeMs } = await stat(dir).catch(() => ({ mtimeMs: Date.now() }))
    return Date.now() - mtimeMs > recordMs
  }
}

export class OwnFiles implements AsyncDisposable {
  readonly path: string
  #last = 0

  private constructor(path: string) {
    this.path = path
  }

  /** Removes what dead processes left below `parent`. To be called when none of their boxes is left. */
  static async open(parent: string, owner: string): Promise<OwnFiles> {
    await mkdir(parent, { recursive: true, mode: 0o700 })
    for (const entry of await readdir(parent, { withFileTypes: true })) {
      if (!entry.isDirectory()) continue
      const dir = join(parent, entry.name)
      if (await isDead(dir)) await rm(dir, { recursive: true, force: true })
    }
    const path = join(parent, owner)
    await mkdir(path, { mode: 0o700 })
    const record: Owner = { pid: process.pid, start: startTime(process.pid) ?? '', boot: thisBoot() }
    await writeFile(join(path, `${ownerFile}.new`), JSON.stringify(record))
    await rename(join(path, `${ownerFile}.new`), join(path, ownerFile))
    return new OwnFiles(path)
  }

  /** A directory that a box may see: others may read it, and nobody but the runner write. */
  async makeDirectory(): Promise<{ path: string } & AsyncDisposable> {
    const path = join(this.path, `${++this.#last}-${randomBytes(4).toString('hex')}`)
    await mkdir(path)
    await chmod(path, 0o755)
    return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await rm(this.path, { recursive: true, force: true })
  }
}
