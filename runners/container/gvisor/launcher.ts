/**
 * What comes before runsc: a process with the pipes and in the control groups of a box to be, which waits to be told
 * what to run. Bringing it there takes some 12 ms, most of which the kernel spends waiting; so a few stand ready.
 */
import type { ChildProcess } from 'node:child_process'
import { mkdir, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { BoxError } from '../engine.ts'
import type { Cgroup } from './cgroups.ts'
import { type Launch, launchLines, memoryFile, type Platform, programArgs } from './launch.ts'
import type { PipeStock } from './pipes.ts'
import { type Ours, readers, spawnWithPipes } from './spawn.ts'

/** What launchers of one engine share. */
export interface LauncherHost {
  runsc: string
  platform: Platform
  /** They have their directories and groups below these. */
  dir: string
  cgroup: Cgroup
  pipes: PipeStock
  /** So many stand ready. */
  launchers: number
}

export interface End {
  code: number | null
  signal: NodeJS.Signals | null
}

/** Making one competes with the box that took the last: it is done so much later (ms), or when told. */
const refillMs = 2_000

export class Launcher {
  readonly id: string
  readonly dir: string
  readonly cgroup: Cgroup
  readonly child: ChildProcess
  readonly pipes: Ours
  /** Settles when its process, which becomes runsc’s, has ended. */
  readonly left: Promise<void>
  /** How it ended. */
  end: End | undefined
  /** Why it never was. */
  error: Error | undefined
  readonly #admitted: Promise<void>

  private constructor(
    id: string,
    dir: string,
    cgroup: Cgroup,
    { child, ours }: ReturnType<typeof spawnWithPipes>,
  ) {
    this.id = id
    this.dir = dir
    this.cgroup = cgroup
    this.child = child
    this.pipes = ours
    this.left = new Promise<void>((resolve) => {
      child.once('exit', (code, signal) => {
        this.end = { code, signal }
        resolve()
      })
      child.once('error', (error) => {
        this.error = error
        // What was never there has no end either.
        if (child.pid === undefined) resolve()
      })
    })
    this.#admitted = this.#admit()
    this.#admitted.catch(() => {})
  }

  /** Throws where it cannot be made; nothing is left then. */
  static async make(
    { runsc, platform, dir: parent, cgroup: groups, pipes }: LauncherHost,
    id: string,
  ): Promise<Launcher> {
    const dir = join(parent, id)
    const cgroup = groups.child(id)
    try {
      const [paths] = await settled(
        pipes.take(readers.length),
        cgroup.make(),
        mkdir(dir).then(() => writeFile(memoryFile(dir), '')),
      )
      const args = programArgs({ runsc, platform, id, dir })
      return new Launcher(id, dir, cgroup, spawnWithPipes(paths, args))
    } catch (error) {
      await clear(cgroup, dir)
      throw error
    }
  }

  /** Puts it into its control groups. */
  async #admit(): Promise<void> {
    const { pid } = this.child
    if (pid === undefined) return
    try {
      await this.cgroup.join(pid)
    } catch (error) {
      // One that has ended says why itself.
      if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error
    }
  }

  /** Lets it go on to runsc, once the bundle is there. Throws where it is not in its control groups. */
  async launch(launch: Launch): Promise<void> {
    const lines = launchLines(launch)
    await this.#admitted
    this.pipes[4].write(lines)
  }

  /** Of one that was told nothing; nothing is left of it. */
  async discard(): Promise<void> {
    this.child.kill('SIGKILL')
    for (const pipe of this.pipes) pipe.destroy()
    await this.left
    await clear(this.cgroup, this.dir)
  }
}

/** Launchers that stand ready. */
export class LauncherStock {
  readonly #host: LauncherHost
  readonly #ready: Launcher[] = []
  #made = 0
  #closed = false
  #refill: Promise<void> | undefined
  #timer: NodeJS.Timeout | undefined

  constructor(host: LauncherHost) {
    this.#host = host
  }

  /** One that nobody else has. Throws `BoxError` where none can be made. */
  async take(): Promise<Launcher> {
    if (this.#closed) throw new BoxError('engine', 'the engine is closed')
    this.#timer ??= setTimeout(() => this.refill(), refillMs)
    for (let launcher = this.#ready.shift(); launcher !== undefined; launcher = this.#ready.shift()) {
      if (launcher.end === undefined && launcher.error === undefined) return launcher
      await launcher.discard()
    }
    try {
      return await this.#make()
    } catch (cause) {
      throw new BoxError('engine', `no sandbox can be begun: ${(cause as Error).message}`, { cause })
    }
  }

  /** Makes up for what was taken; where that fails, the next who takes one is told. For when a box is gone. */
  refill(): void {
    clearTimeout(this.#timer)
    this.#timer = undefined
    this.#refill ??= this.#fill()
      .catch(() => {})
      .finally(() => {
        this.#refill = undefined
      })
  }

  async #fill(): Promise<void> {
    while (!this.#closed && this.#ready.length < this.#host.launchers) this.#ready.push(await this.#make())
  }

  #make(): Promise<Launcher> {
    return Launcher.make(this.#host, `b${++this.#made}`)
  }

  async close(): Promise<void> {
    this.#closed = true
    clearTimeout(this.#timer)
    await this.#refill
    await Promise.all(this.#ready.splice(0).map((launcher) => launcher.discard()))
  }
}

/** Removes the group with what is in it, and the directory. */
export async function clear(cgroup: Cgroup, dir: string): Promise<void> {
  await Promise.all([
    // What resists is found by the next start.
    cgroup.removeTree().catch(() => {}),
    rm(dir, { recursive: true, force: true }).catch(() => {}),
  ])
}

/** Like `Promise.all`, but nothing goes on when it throws. */
export async function settled<T extends unknown[]>(
  ...promises: { [K in keyof T]: Promise<T[K]> }
): Promise<T> {
  await Promise.allSettled(promises)
  return (await Promise.all(promises)) as T
}
