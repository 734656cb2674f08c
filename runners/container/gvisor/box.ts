/** One sandbox: a process of runsc with all that hangs on it. */
import type { ChildProcess } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { rm } from 'node:fs/promises'
import type { Socket } from 'node:net'
import { basename, join } from 'node:path'
import { PassThrough } from 'node:stream'
import { finished } from 'node:stream/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Box, BoxError, type BoxLimits, type BoxUsage, type Exit } from '../engine.ts'
import { type GvisorSpec, type Host, writeBundle } from './bundle.ts'
import type { Cgroup, CgroupLimits, CgroupUsage } from './cgroups.ts'
import { created, mebibyte, started } from './config.ts'
import { launchArgs, logFile, panicFile } from './launch.ts'
import { fatal, isLost, startError } from './report.ts'
import { readers, spawnWithPipes } from './spawn.ts'

/** A sandbox that is not complete, or has not started its process, after so many ms is given up. */
const createMs = 30_000
const startMs = 30_000
/** After a kill runsc clears up behind the sandbox and ends by itself; where it does not in so many ms, it is killed. */
const clearMs = 400
/** What a box wrote before it was killed can be read for so many ms more. */
const drainMs = 250

/**
 * Memory (MiB) that a box may take beyond its limit, for runsc itself. 17 were measured for an idle one, and half a
 * MiB for each process in it. The sentry collects its garbage late: one program started after the other brings it to
 * 150 before it does, which a box of 128 must survive. A single process gets some 45 MiB more than `memoryMb`.
 */
export const overheadMb = 64
/**
 * Threads of the host for one of the box, and for runsc itself, with much to spare: running into this limit crashes
 * the sentry. It is only there for those who find a way around RLIMIT_NPROC.
 */
const tasksPerPid = 8
const ownTasks = 512

const groupLimits = (limits: BoxLimits): CgroupLimits => ({
  memoryBytes: (limits.memoryMb + overheadMb) * mebibyte,
  cpu: limits.cpu,
  tasks: limits.pids * tasksPerPid + ownTasks,
})

export class GvisorBox implements Box {
  readonly name: string
  readonly stdin: Socket
  readonly stdout: Socket
  readonly stderr = new PassThrough()
  readonly exited: Promise<Exit>
  readonly #spec: GvisorSpec
  readonly #dir: string
  readonly #cgroup: Cgroup
  readonly #child: ChildProcess
  readonly #errors: Socket
  readonly #gate: Socket
  readonly #created = settling()
  readonly #started = settling()
  readonly #killed = settling()
  readonly #removed = settling()
  /** Settles when runsc has ended and has told all it had to tell. */
  readonly #ended: Promise<void>
  #state: 'creating' | 'created' | 'starting' | 'running' | 'ended' = 'creating'
  /** How the process that runs runsc ended. */
  #end: { code: number | null; signal: NodeJS.Signals | null } | undefined
  /** The user’s process was there. */
  #ran = false
  #limits: BoxLimits
  #frozen = false
  #oom = false
  #usage: CgroupUsage | undefined
  /** When the sandbox was complete. */
  #idle: CgroupUsage | undefined
  #killing: Promise<void> | undefined
  #removing: Promise<void> | undefined

  /** Settles when the sandbox is complete. Throws `BoxError`; nothing is left then. */
  static async create(
    host: Host,
    id: string,
    spec: GvisorSpec,
    root: string,
    onMade: (box: GvisorBox) => void,
  ): Promise<GvisorBox> {
    const name = `${basename(host.dir)}-${id}`
    const dir = join(host.dir, id)
    const cgroup = host.cgroup.child(id)
    let box: GvisorBox | undefined
    try {
      const [paths, lower] = await settled(
        host.pipes.take(readers.length),
        writeBundle(host, dir, spec, root),
        // Building the sandbox is our doing, and not held to the share that the user’s code has.
        cgroup.make().then(() => cgroup.limit({ ...groupLimits(spec.limits), cpu: undefined })),
      )
      const { runsc, platform } = host
      const sockets = spec.sockets !== undefined
      const { network } = spec
      const args = launchArgs({ runsc, platform, id, dir, network, lower, sockets })
      box = new GvisorBox(name, dir, cgroup, spec, paths, args)
      onMade(box)
      await Promise.all([box.#admit(), inTime(box.#created.promise, createMs, 'the sandbox')])
      return box
    } catch (error) {
      if (box !== undefined) await box.remove()
      else await clear(cgroup, dir)
      throw engineError(name, error)
    }
  }

  private constructor(
    name: string,
    dir: string,
    cgroup: Cgroup,
    spec: GvisorSpec,
    paths: string[],
    args: string[],
  ) {
    this.name = name
    this.#dir = dir
    this.#cgroup = cgroup
    this.#spec = spec
    this.#limits = spec.limits
    const { child, ours } = spawnWithPipes(paths, args)
    this.#child = child
    const [stdin, stdout, stderr, status, gate] = ours
    this.stdin = stdin
    this.stdout = stdout
    // What comes here before the user’s process runs is runsc’s own complaint.
    this.#errors = stderr
    this.#gate = gate
    let told = ''
    status.setEncoding('latin1').on('data', (piece: string) => {
      told = (told + piece).slice(-16)
      if (told.includes(created)) this.#onCreated()
      if (told.includes(started)) this.#onStarted()
    })
    const closed = finished(status, { writable: false }).catch(() => {})
    const left = new Promise<void>((resolve) => {
      child.once('exit', (code, signal) => {
        this.#end = { code, signal }
        resolve()
      })
      child.once('error', (error) => {
        this.#created.reject(error)
        // What was never there has no end either.
        if (child.pid === undefined) resolve()
      })
    })
    this.#ended = Promise.all([closed, left]).then(() => this.#onEnded())
    this.exited = this.#follow()
  }

  /** Puts it into its control groups, while what comes before runsc still runs. */
  async #admit(): Promise<void> {
    const { pid } = this.#child
    if (pid === undefined) return
    try {
      await this.#cgroup.join(pid)
      this.#gate.write('\n')
    } catch (error) {
      // One that has ended says why itself.
      if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error
    }
  }

  async start(): Promise<void> {
    if (this.#state !== 'created') throw new BoxError('engine', `${this.name} is ${this.#state}`)
    try {
      if (this.#killing !== undefined) throw new Error('it was killed')
      this.#state = 'starting'
      await this.#cgroup.limitCpu(this.#limits.cpu)
      this.#gate.write('\n')
      await inTime(this.#started.promise, startMs, 'its start')
    } catch (error) {
      await this.kill()
      throw engineError(this.name, error)
    }
  }

  /**
   * Memory and cpu hold from now on. What is fixed when the sandbox is made stays: pids, the size of /tmp, that of a
   * file, and the memory that the box believes to have.
   */
  async update({ memoryMb, cpu }: BoxLimits): Promise<void> {
    this.#limits = { ...this.#limits, memoryMb, cpu }
    const limits = groupLimits(this.#limits)
    try {
      await this.#cgroup.limit(this.#state === 'created' ? { ...limits, cpu: undefined } : limits)
    } catch (error) {
      throw engineError(this.name, error)
    }
  }

  async freeze(): Promise<void> {
    if (this.#killing !== undefined) return
    try {
      await this.#cgroup.freeze()
      this.#frozen = true
    } catch (error) {
      this.#giveUp(error)
    }
  }

  async thaw(): Promise<void> {
    this.#frozen = false
    await this.#cgroup.thaw().catch((error) => this.#giveUp(error))
  }

  /** Throws, unless the box is going down anyway. */
  #giveUp(error: unknown): void {
    if (this.#killing === undefined && this.#end === undefined) throw engineError(this.name, error)
  }

  /** How often its share of the cores has held it back. */
  throttled(): number {
    return this.#cgroup.throttled()
  }

  /** Of the user’s code: what the sandbox took by the time it was complete is left out. */
  async usage(): Promise<BoxUsage> {
    const usage = this.#readUsage()
    if (usage === undefined || this.#idle === undefined) return { cpuMs: null, memoryPeakMb: null }
    const { cpuMs, memoryPeakBytes, oomKills } = usage
    const { cpuMs: idleMs, memoryBytes: idleBytes } = this.#idle
    return {
      cpuMs: Math.max(0, cpuMs - idleMs),
      memoryPeakMb: memoryPeakBytes === null ? null : Math.max(0, memoryPeakBytes - idleBytes) / mebibyte,
      oomKills,
    }
  }

  /** Called again and again: under systrap a box whose memory is spent can hang instead of ending. */
  watchMemory(): void {
    if (this.#frozen || this.#oom || (this.#state !== 'starting' && this.#state !== 'running')) return
    try {
      this.#oom = this.#cgroup.oomKills() > 0
    } catch {
      // It was removed by somebody else.
    }
    if (this.#oom) this.kill().catch(() => {})
  }

  /** Settles when nothing of it is left. */
  get removed(): Promise<void> {
    return this.#removed.promise
  }

  kill(): Promise<void> {
    this.#killed.resolve()
    return this.#sweep()
  }

  /** Kills what there is, whoever asks. */
  #sweep(): Promise<void> {
    this.#killing ??= this.#sweepOnce()
    return this.#killing
  }

  async #sweepOnce(): Promise<void> {
    this.#readUsage()
    const { pid } = this.#child
    if (pid !== undefined && this.#end === undefined) {
      const late = new AbortController()
      // What runs below runsc first: then runsc has nothing to wait for, and clears up.
      const cleared = this.#cgroup.kill(pid).then(() => this.#ended)
      await Promise.race([cleared, sleep(clearMs, undefined, late).catch(() => {})]).catch(() => {})
      late.abort()
      cleared.catch(() => {})
    }
    if (this.#end === undefined) this.#child.kill('SIGKILL')
    await this.#cgroup.kill()
    await this.#ended
  }

  remove(): Promise<void> {
    this.#removing ??= this.#remove()
    return this.#removing
  }

  async #remove(): Promise<void> {
    const isDead = await this.kill().then(
      () => true,
      () => false,
    )
    // What nobody has read by now is not waited for.
    for (const stream of [this.stdin, this.stdout, this.#errors, this.stderr]) stream.destroy()
    if (isDead) await this.exited
    this.#readUsage()
    await clear(this.#cgroup, this.#dir)
    this.#removed.resolve()
  }

  pids(): number[] {
    const { pid } = this.#child
    const pids = this.#cgroup.pids()
    return pid === undefined || this.#end !== undefined || pids.includes(pid) ? pids : [pid, ...pids]
  }

  #onCreated(): void {
    if (this.#state !== 'creating') return
    this.#state = 'created'
    this.#idle = this.#cgroup.usage()
    this.#created.resolve()
  }

  #onStarted(): void {
    if (this.#state !== 'starting') return
    this.#state = 'running'
    this.#ran = true
    this.#errors.pipe(this.stderr)
    this.#started.resolve()
  }

  #onEnded(): void {
    this.#state = 'ended'
    this.#gate.destroy()
    if (this.#ran) return
    const why = this.#complaint()
    this.#errors.destroy()
    this.stderr.end()
    this.#created.reject(new Error(why))
    this.#started.reject(startError(this.name, this.#spec, why))
  }

  /** What runsc, or what should have run it, said at its end. */
  #complaint(): string {
    if (this.#killing !== undefined) return 'it was killed'
    const said = fatal(read(logFile(this.#dir))) ?? this.#errors.read()?.toString().trim().slice(-1_000)
    return said || `runsc ended with ${this.#end?.signal ?? this.#end?.code}`
  }

  async #follow(): Promise<Exit> {
    await this.#ended
    const { code = null } = this.#end ?? {}
    const ownEnd = this.#killing === undefined
    const isOdd = this.#ran && code !== 0 && (code === null || this.#isLost())
    // Nothing of it runs any more, unless the one who killed runsc did no more than that.
    await this.#sweep().catch(() => {})
    const oom = this.#oom || (this.#readUsage()?.oomKills ?? 0) > 0
    const taken = [this.stdout, this.stderr].map((stream) =>
      finished(stream, { writable: false }).catch(() => {}),
    )
    await Promise.race([Promise.all(taken), this.#killed.promise.then(() => sleep(drainMs))])
    return { code: code ?? 128 + 9, oom, ...(ownEnd && isOdd && !oom ? { lost: true } : {}) }
  }

  #isLost(): boolean {
    return isLost(read(logFile(this.#dir)), read(panicFile(this.#dir)))
  }

  #readUsage(): CgroupUsage | undefined {
    this.#usage = this.#cgroup.usage() ?? this.#usage
    return this.#usage
  }
}

async function clear(cgroup: Cgroup, dir: string): Promise<void> {
  await Promise.all([
    // What resists is found by the next start.
    cgroup.removeTree().catch(() => {}),
    rm(dir, { recursive: true, force: true }).catch(() => {}),
  ])
}

/** Like `Promise.all`, but nothing goes on when it throws. */
async function settled<T extends unknown[]>(...promises: { [K in keyof T]: Promise<T[K]> }): Promise<T> {
  await Promise.allSettled(promises)
  return (await Promise.all(promises)) as T
}

function settling(): PromiseWithResolvers<void> {
  const settler = Promise.withResolvers<void>()
  settler.promise.catch(() => {})
  return settler
}

async function inTime(promise: Promise<void>, ms: number, what: string): Promise<void> {
  const late = new AbortController()
  const overdue = sleep(ms, undefined, late).then(() => {
    throw new Error(`${what} took more than ${ms} ms`)
  })
  overdue.catch(() => {})
  try {
    await Promise.race([promise, overdue])
  } finally {
    late.abort()
  }
}

function engineError(name: string, error: unknown): BoxError {
  if (error instanceof BoxError) return error
  return new BoxError('engine', `${name}: ${(error as Error).message}`, { cause: error })
}

/** Empty where it is not there. */
function read(file: string): string {
  try {
    return readFileSync(file, 'utf8')
  } catch {
    return ''
  }
}
