/** One sandbox: a process of runsc with all that hangs on it. */
import { readFileSync } from 'node:fs'
import type { Socket } from 'node:net'
import { basename } from 'node:path'
import { PassThrough } from 'node:stream'
import { finished } from 'node:stream/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { inTime } from '../deadline.ts'
import { type DiskMeter, since } from '../disk.ts'
import { type Box, BoxError, type BoxLimits, type BoxUsage, type Bytes, type Exit } from '../engine.ts'
import { type GvisorSpec, type Host, writeBundle } from './bundle.ts'
import type { CgroupLimits, CgroupUsage } from './cgroups.ts'
import { created, mebibyte, started } from './config.ts'
import { logFile, panicFile } from './launch.ts'
import { clear, type Launcher, settled } from './launcher.ts'
import { fatal, isLost, startError } from './report.ts'

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
  readonly #launcher: Launcher
  readonly #errors: Socket
  readonly #gate: Socket
  readonly #created = settling()
  readonly #started = settling()
  readonly #killed = settling()
  readonly #removed = settling()
  /** Settles when runsc has ended and has told all it had to tell. */
  readonly #ended: Promise<void>
  #state: 'creating' | 'created' | 'starting' | 'running' | 'ended' = 'creating'
  /** The user’s process was there. */
  #ran = false
  #limits: BoxLimits
  #frozen = false
  #oom = false
  #usage: CgroupUsage | undefined
  /** When the sandbox was complete. */
  #idle: CgroupUsage | undefined
  /** Of runsc, which reads and writes for the box. */
  #disks: DiskMeter | undefined
  #kept: Disposable | undefined
  #disk: Bytes | undefined
  #idleDisk: Bytes | undefined
  #killing: Promise<void> | undefined
  #removing: Promise<void> | undefined

  /** Settles when the sandbox is complete. Throws `BoxError`; nothing is left then. */
  static async create(
    host: Host,
    launcher: Launcher,
    spec: GvisorSpec,
    root: string,
    onMade: (box: GvisorBox) => void,
  ): Promise<GvisorBox> {
    const box = new GvisorBox(`${basename(host.dir)}-${launcher.id}`, launcher, spec)
    onMade(box)
    try {
      const [lower] = await settled(
        writeBundle(host, launcher.dir, spec, root),
        // Building the sandbox is our doing, and not held to the share that the user’s code has.
        launcher.cgroup.limit({ ...groupLimits(spec.limits), cpu: undefined }),
      )
      await launcher.launch({ network: spec.network, lower, sockets: spec.sockets !== undefined })
      await inTime(box.#created.promise, createMs, 'the sandbox')
      return box
    } catch (error) {
      await box.remove()
      throw engineError(box.name, error)
    }
  }

  private constructor(name: string, launcher: Launcher, spec: GvisorSpec) {
    this.name = name
    this.#launcher = launcher
    this.#spec = spec
    this.#limits = spec.limits
    const [stdin, stdout, stderr, status, gate] = launcher.pipes
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
    this.#ended = Promise.all([closed, launcher.left]).then(() => this.#onEnded())
    this.exited = this.#follow()
  }

  async start(): Promise<void> {
    if (this.#state !== 'created') throw new BoxError('engine', `${this.name} is ${this.#state}`)
    try {
      if (this.#killing !== undefined) throw new Error('it was killed')
      this.#state = 'starting'
      await this.#launcher.cgroup.limitCpu(this.#limits.cpu)
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
      await this.#launcher.cgroup.limit(this.#state === 'created' ? { ...limits, cpu: undefined } : limits)
    } catch (error) {
      throw engineError(this.name, error)
    }
  }

  async freeze(): Promise<void> {
    if (this.#killing !== undefined) return
    try {
      await this.#launcher.cgroup.freeze()
      this.#frozen = true
    } catch (error) {
      this.#giveUp(error)
    }
  }

  async thaw(): Promise<void> {
    this.#frozen = false
    await this.#launcher.cgroup.thaw().catch((error) => this.#giveUp(error))
  }

  /** Throws, unless the box is going down anyway. */
  #giveUp(error: unknown): void {
    if (this.#killing === undefined && this.#launcher.end === undefined) throw engineError(this.name, error)
  }

  /** How often its share of the cores has held it back. */
  throttled(): number {
    return this.#launcher.cgroup.throttled()
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
      disk: since(this.#idleDisk, this.#disk),
    }
  }

  /** Called again and again: under systrap a box whose memory is spent can hang instead of ending. */
  watchMemory(): void {
    if (this.#frozen || this.#oom || (this.#state !== 'starting' && this.#state !== 'running')) return
    try {
      this.#oom = this.#launcher.cgroup.oomKills() > 0
    } catch {
      // It was removed by somebody else.
    }
    // What lives in it may have ended before it is asked for.
    this.#disk = this.#disks?.read() ?? this.#disk
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
    const { pid } = this.#launcher.child
    if (pid !== undefined && this.#launcher.end === undefined) {
      const late = new AbortController()
      // What runs below runsc first: then runsc has nothing to wait for, and clears up.
      const cleared = this.#launcher.cgroup.kill(pid).then(() => this.#ended)
      await Promise.race([cleared, sleep(clearMs, undefined, late).catch(() => {})]).catch(() => {})
      late.abort()
      cleared.catch(() => {})
    }
    if (this.#launcher.end === undefined) this.#launcher.child.kill('SIGKILL')
    await this.#launcher.cgroup.kill()
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
    await clear(this.#launcher.cgroup, this.#launcher.dir)
    this.#kept?.[Symbol.dispose]()
    this.#removed.resolve()
  }

  pids(): number[] {
    const { pid } = this.#launcher.child
    const pids = this.#launcher.cgroup.pids()
    return pid === undefined || this.#launcher.end !== undefined || pids.includes(pid) ? pids : [pid, ...pids]
  }

  #onCreated(): void {
    if (this.#state !== 'creating') return
    this.#state = 'created'
    this.#kept = this.#launcher.cgroup.keepOpen()
    this.#idle = this.#launcher.cgroup.usage()
    this.#disks = this.#launcher.cgroup.diskMeter()
    this.#idleDisk = this.#disks.read()
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
    if (this.#launcher.error !== undefined) return this.#launcher.error.message
    const said =
      fatal(read(logFile(this.#launcher.dir))) ?? this.#errors.read()?.toString().trim().slice(-1_000)
    return said || `runsc ended with ${this.#launcher.end?.signal ?? this.#launcher.end?.code}`
  }

  async #follow(): Promise<Exit> {
    await this.#ended
    const { code = null } = this.#launcher.end ?? {}
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
    return isLost(read(logFile(this.#launcher.dir)), read(panicFile(this.#launcher.dir)))
  }

  #readUsage(): CgroupUsage | undefined {
    this.#usage = this.#launcher.cgroup.usage() ?? this.#usage
    this.#disk = this.#disks?.read() ?? this.#disk
    return this.#usage
  }
}

function settling(): PromiseWithResolvers<void> {
  const settler = Promise.withResolvers<void>()
  settler.promise.catch(() => {})
  return settler
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
