/** One machine with the process in it, from its start to its removal. */
import { randomBytes } from 'node:crypto'
import { closeSync, constants, openSync, writeSync } from 'node:fs'
import { rm } from 'node:fs/promises'
import type { Readable, Writable } from 'node:stream'
import { finished } from 'node:stream/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { writeJobDrive } from '../../rootfs/index.ts'
import type { MachineNetwork, MountSpec } from '../../shared/machine.ts'
import { inTime } from '../container/deadline.ts'
import { atLeast, diskOfProcesses, since } from '../container/disk.ts'
import {
  type Box,
  BoxError,
  type BoxLimits,
  type BoxSpec,
  type BoxUsage,
  type Bytes,
  type Exit,
  type Mount,
} from '../container/engine.ts'
import { unmeasured } from '../container/phases.ts'
import { inBox } from '../container/protocol.ts'
import { AgentFailed, Channel, type ProcessEnd } from './channel.ts'
import { jobDriveBytes, type Machine } from './driver.ts'
import { smallTree } from './small-tree.ts'
import type { Left } from './templates.ts'

/** The agent of a machine that was started from its kernel has so many ms to come up: under emulation, on a busy host. */
const bootMs = 60_000
/**
 * A kernel is busy with itself for so many ms after its start: it chooses a clock, makes threads, begins to skip ticks.
 * What a snapshot is taken before, each machine restored from it does again.
 */
const settleMs = 2_500
/** What is asked of the agent is done after so many ms, or never. */
const answerMs = 30_000
/** What a process has used is asked for so long (ms); then what the machine has used is told. */
const usageMs = 2_000
/** Looked after so often, ms. */
export const watchMs = 1_000
/** A machine of which nothing was heard in so many looks is asked whether it lives, */
const quietLooks = 3
/** and is given up after so many. */
const deadLooks = 25
/** What a process wrote before it was killed can be read for so many ms more. */
const drainMs = 250
/** A machine that has closed its channel has so many ms to end, and to have its end explained. */
const lastWordMs = 500

/**
 * The clock of machines that are to be snapshots runs ahead by so much (ms). OpenSSL’s generator, whose state is in
 * the snapshot, seeds itself anew where the clock has gone back since it did so last (ossl_prov_drbg_generate), and
 * it can be told to by nothing else.
 */
const aheadMs = 10 * 365 * 24 * 3_600_000

export interface BoxParts {
  name: string
  /** Of this box alone; removed with it. */
  dir: string
  /** Already there, blank. */
  jobDrive: string
  machine: Machine
  spec: BoxSpec
  /** Of the template it goes on from; undefined: its kernel was started. */
  left: Left | undefined
  /** It is to be a template. */
  isTemplate: boolean
  vmm: string
  start: 'boot' | 'restore'
  network: MachineNetwork | null
  /** `ms`: what it took to take it away. */
  onRemoved(ms: number): void
  /** From a question to the answer of the agent. */
  onRoundTrip(ms: number): void
}

export class MicrovmBox implements Box {
  readonly name: string
  readonly stdin: Writable
  readonly stdout: Readable
  readonly stderr: Readable
  readonly exited: Promise<Exit>
  readonly resumed: boolean
  readonly machine: { vmm: string; start: 'boot' | 'restore' }
  readonly #parts: BoxParts
  readonly #machine: Machine
  readonly #channel: Channel
  readonly #exit = Promise.withResolvers<Exit>()
  readonly #killed = Promise.withResolvers<void>()
  /** CPU time (ms) that was taken before the box was made. */
  readonly #earlierMs: number
  readonly #madeAt = performance.now()
  #state: 'made' | 'running' | 'ended' = 'made'
  #limits: BoxLimits
  #usage: BoxUsage = { cpuMs: null, memoryPeakMb: null }
  /** Bytes that its VMM had read and written before the box was made, and has by now. */
  #earlierDisk: Bytes | undefined
  #disk: Bytes | undefined
  /** Descriptor of the file that the result is written to, and where that is in the machine. */
  #result: number | undefined
  #resultTarget: string | null = null
  #driveUsed = false
  #provided = 0
  #frozen = false
  /** The VMM runs no more. */
  #gone = false
  /** Looks since something was heard. */
  #quiet = 0
  #heardAt = 0
  #killing: Promise<void> | undefined
  #removing: Promise<void> | undefined

  constructor(parts: BoxParts) {
    const { machine, left, spec } = parts
    this.#parts = parts
    this.#machine = machine
    this.name = parts.name
    this.machine = { vmm: parts.vmm, start: parts.start }
    this.resumed = left !== undefined && left.running !== null
    this.#earlierMs = left?.cpu_ms ?? 0
    this.#limits = spec.limits
    this.#channel = new Channel(machine.channel, {
      running: left?.running ?? undefined,
      onResult: (bytes) => this.#onResult(bytes),
      onExited: (end) => this.#onExited(end),
      // Where the machine is gone, it says why.
      onBroken: (message, isClosed) => {
        if (!isClosed) this.#lose(message)
        else setTimeout(() => this.#lose(message), lastWordMs)
      },
    })
    this.stdin = this.#channel.stdin
    this.stdout = this.#channel.stdout
    this.stderr = this.#channel.stderr
    if (this.resumed) this.#state = 'running'
    this.exited = this.#follow()
    void machine.exited.then(({ code, signal }) => {
      const said = lastLine(machine.console())
      this.#lose(`the machine went away (${signal ?? code})${said === '' ? '' : `: ${said}`}`)
    })
  }

  /** Everything up to the start of the process. Throws `BoxError`. */
  async prepare(): Promise<void> {
    const { left, spec } = this.#parts
    try {
      if (left === undefined) await inTime(this.#channel.ready, bootMs, 'its agent')
      const { phases = unmeasured, mounts } = spec
      const furnish = () => this.#furnish(this.resumed ? [] : mounts)
      if (this.resumed || mounts.length === 0) await furnish()
      else await phases.measure('mount files', furnish)
      if (this.#parts.isTemplate) await this.#warm()
    } catch (error) {
      throw await this.#explained(error)
    }
    this.#earlierDisk = diskOfProcesses([this.#machine.pid])
  }

  /** What each box that goes on from it would take time for: the same whoever asked for it first. */
  async #warm(): Promise<void> {
    const { template, limits } = this.#parts.spec
    this.#channel.warm({
      directories: [inBox.workspace],
      ...(template === undefined
        ? { result: inBox.result, result_bytes: limits.fileBytes }
        : { result: null, result_bytes: 0 }),
    })
    await inTime(this.#channel.ping(), bootMs, 'its files')
    await sleep(Math.max(0, this.#madeAt + settleMs - performance.now()))
  }

  async #furnish(wanted: readonly Mount[]): Promise<void> {
    const mounts: MountSpec[] = []
    const onDrive: { source: string; path: string }[] = []
    const puts: (() => void)[] = []
    for (const [i, { source, target, readonly }] of wanted.entries()) {
      if (!readonly) {
        if (this.#result !== undefined) throw new Error('a machine gives one file back')
        this.#result = openSync(source, constants.O_WRONLY | constants.O_NOFOLLOW)
        this.#resultTarget = target
        continue
      }
      const small = await smallTree(source, target)
      if (small !== undefined) puts.push(() => this.#put(small))
      else {
        onDrive.push({ source, path: String(i) })
        mounts.push({ path: String(i), target })
      }
    }
    if (onDrive.length > 0) await this.#fillDrive(onDrive)
    await inTime(this.#configure(mounts), answerMs, 'its configuration')
    for (const put of puts) put()
    if (puts.length > 0) await inTime(this.#channel.ping(), answerMs, 'its files')
  }

  async start(): Promise<void> {
    if (this.resumed) return
    if (this.#state !== 'made') throw new BoxError('engine', `${this.name} is ${this.#state}`)
    this.#state = 'running'
    const { argv, env, cwd, user } = this.#parts.spec
    const { memoryMb, pids, fileBytes } = this.#limits
    try {
      const started = this.#channel.start({
        ...{ argv, env, cwd, user, pids },
        memory_mb: memoryMb,
        file_bytes: fileBytes,
        result: this.#resultTarget,
        result_bytes: this.#resultTarget === null ? 0 : fileBytes,
      })
      await inTime(started, answerMs, 'the start')
    } catch (error) {
      const explained = await this.#explained(error)
      await this.kill()
      throw explained
    }
  }

  async provide(directory: string, target: string): Promise<void> {
    try {
      const small = await smallTree(directory, target)
      if (small !== undefined) {
        this.#put(small.filter(({ header }) => header.kind !== 'directory' || header.path !== target))
        await inTime(this.#channel.ping(), answerMs, 'its files')
        return
      }
      const path = `p${++this.#provided}`
      await this.#fillDrive([{ source: directory, path }])
      await inTime(this.#channel.mount([{ path, target }]), answerMs, 'its files')
    } catch (error) {
      throw await this.#explained(error)
    }
  }

  /** Memory and the rest are fixed when the process is started. */
  async update(limits: BoxLimits): Promise<void> {
    if (this.#state !== 'made') throw new BoxError('engine', `${this.name}: its process has started`)
    this.#limits = limits
  }

  async freeze(): Promise<void> {
    if (this.#killing !== undefined || this.#state === 'ended') return
    this.#frozen = true
    try {
      await this.#machine.pause()
    } catch (error) {
      this.#frozen = false
      this.#giveUp(error)
    }
  }

  async thaw(): Promise<void> {
    if (!this.#frozen) return
    try {
      await this.#machine.resume()
      this.#quiet = 0
      this.#frozen = false
      // Its clock has stood still. What is sent after this is seen after it.
      this.#configure([]).catch((error: Error) => this.#lose(`it could not be woken: ${error.message}`))
    } catch (error) {
      this.#giveUp(error)
    }
  }

  /** Of its process, where it answers; else of the whole machine. */
  async usage(): Promise<BoxUsage> {
    const usage = await this.#askUsage()
    return { ...usage, disk: since(this.#earlierDisk, this.#disk) }
  }

  async #askUsage(): Promise<BoxUsage> {
    if (this.#state === 'ended' || this.#frozen || this.#killing !== undefined) return this.#usage
    try {
      const asked = performance.now()
      const { cpu_ms, memory_peak_mb, oom_kills } = await inTime(this.#channel.usage(), usageMs, 'its usage')
      this.#parts.onRoundTrip(performance.now() - asked)
      this.#note(cpu_ms, memory_peak_mb, oom_kills)
    } catch {
      await this.#askMachine()
    }
    return this.#usage
  }

  /** Writes the machine down, with its process, which must be idle. It is of no use afterwards. Throws. */
  async snapshot(dir: string): Promise<Left> {
    const { cpu_ms } = await inTime(this.#channel.usage(), answerMs, 'its usage')
    // What it had to say before is here now.
    await inTime(this.#channel.ping(), answerMs, 'its answer')
    const running = this.#state === 'running' ? this.#channel.windows() : null
    await this.#machine.pause()
    this.#frozen = true
    await this.#machine.snapshot(dir)
    return { running, cpu_ms }
  }

  /** Called every `watchMs`. */
  watch(): void {
    if (this.#state !== 'running' || this.#frozen || this.#killing !== undefined) return
    if (this.#channel.heardAt !== this.#heardAt) {
      this.#heardAt = this.#channel.heardAt
      this.#quiet = 0
      return
    }
    this.#quiet++
    if (this.#quiet === quietLooks) this.#channel.ping().catch(() => {})
    if (this.#quiet >= deadLooks)
      this.#lose(`the machine has not answered for ${Math.round((deadLooks * watchMs) / 1_000)} s`)
  }

  async kill(): Promise<void> {
    this.#killed.resolve()
    await this.#sweep()
  }

  remove(): Promise<void> {
    this.#removing ??= this.#remove()
    return this.#removing
  }

  get frozen(): boolean {
    return this.#frozen
  }

  pids(): number[] {
    return this.#gone ? [] : [this.#machine.pid]
  }

  #sweep(): Promise<void> {
    this.#killing ??= (async () => {
      if (this.#state === 'running' && !this.#frozen) await this.#askMachine()
      await this.#machine.kill()
      this.#gone = true
      this.#exit.resolve({ code: 128 + 9, oom: false })
    })()
    return this.#killing
  }

  async #remove(): Promise<void> {
    const began = performance.now()
    await this.kill().catch(() => {})
    this.#channel.close()
    this.#machine.channel.destroy()
    for (const stream of [this.stdin, this.stdout, this.stderr]) stream.destroy()
    this.#closeResult()
    // What resists is found by the next start.
    await rm(this.#parts.dir, { recursive: true, force: true }).catch(() => {})
    this.#parts.onRemoved(performance.now() - began)
  }

  async #follow(): Promise<Exit> {
    const exit = await this.#exit.promise
    this.#state = 'ended'
    this.#closeResult()
    await this.#sweep().catch(() => {})
    const taken = [this.stdout, this.stderr].map((stream) =>
      finished(stream, { writable: false }).catch(() => {}),
    )
    await Promise.race([Promise.all(taken), this.#killed.promise.then(() => sleep(drainMs))])
    return exit
  }

  #onExited({ code, oom, usage }: ProcessEnd): void {
    this.#note(usage.cpu_ms, usage.memory_peak_mb, usage.oom_kills)
    this.#exit.resolve({ code, oom: oom || usage.oom_kills > 0 })
  }

  /** The machine is of no use any more, unless it was killed anyway. */
  #lose(reason: string): void {
    if (this.#killing !== undefined) return
    this.#exit.resolve({ code: 128 + 9, oom: false, lost: true, reason })
    this.#channel.close()
    this.#sweep().catch(() => {})
  }

  #onResult(bytes: Uint8Array): void {
    if (this.#result === undefined) return
    try {
      for (let at = 0; at < bytes.length; ) at += writeSync(this.#result, bytes, at)
    } catch (error) {
      this.#lose(`its result could not be written: ${(error as Error).message}`)
    }
  }

  #closeResult(): void {
    if (this.#result !== undefined) closeSync(this.#result)
    this.#result = undefined
  }

  #configure(mounts: MountSpec[]): Promise<void> {
    const { spec, network, isTemplate } = this.#parts
    return this.#channel.configure({
      time_ms: Date.now() + (isTemplate ? aheadMs : 0),
      entropy: randomBytes(64).toString('hex'),
      network,
      mounts,
      disk_mb: spec.limits.diskMb,
    })
  }

  #put(tree: NonNullable<Awaited<ReturnType<typeof smallTree>>>): void {
    for (const { header, content } of tree) this.#channel.put(header, content)
  }

  /** Before anything of it was asked for: the guest reads it once. */
  async #fillDrive(sources: { source: string; path: string }[]): Promise<void> {
    if (this.#driveUsed) throw new Error('its drive is written already')
    this.#driveUsed = true
    const bytes = await writeJobDrive(sources, this.#parts.jobDrive)
    if (bytes > jobDriveBytes) throw new Error('what the job brings is more than fits on its drive')
  }

  #note(cpuMs: number, memoryPeakMb: number, oomKills: number): void {
    this.#usage = { cpuMs: Math.max(0, cpuMs - this.#earlierMs), memoryPeakMb, oomKills }
    this.#noteDisk()
  }

  #noteDisk(): void {
    this.#disk = atLeast(this.#disk, diskOfProcesses([this.#machine.pid]))
  }

  /** Keeps what is known of memory: that of the VMM is another. */
  async #askMachine(): Promise<void> {
    this.#noteDisk()
    const asked = this.#machine.usage().then(({ cpuMs }) => {
      this.#usage = { ...this.#usage, cpuMs: Math.max(this.#usage.cpuMs ?? 0, cpuMs) }
    })
    await inTime(asked, 200, 'its usage').catch(() => {})
  }

  /** What the machine itself has said of its end says more than that its channel is closed. */
  async #explained(error: unknown): Promise<BoxError> {
    if (this.#channel.broken === undefined || this.#killing !== undefined) return this.#engineError(error)
    const { reason } = await this.#exit.promise
    return this.#engineError(reason === undefined ? error : new Error(reason, { cause: error }))
  }

  /** Throws, unless the box is going down anyway. */
  #giveUp(error: unknown): void {
    if (this.#killing === undefined && !this.#gone) throw this.#engineError(error)
  }

  #engineError(error: unknown): BoxError {
    if (error instanceof BoxError) return error
    if (error instanceof AgentFailed && error.fault === 'user')
      return new BoxError('user', error.message, { cause: error })
    return new BoxError('engine', `${this.name}: ${(error as Error).message}`, { cause: error })
  }
}

/** Of what a guest’s console said, fit for a message. */
const lastLine = (text: string): string => {
  const lines = text
    // biome-ignore lint/suspicious/noControlCharactersInRegex: that is what is taken out
    .replace(/[\0-\x09\x0b-\x1f\x7f]/g, '')
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '')
  const panic = lines.find((line) => line.includes('Kernel panic'))
  return (panic ?? lines.at(-1) ?? '').slice(-300)
}
