/** One container, from its creation to its removal. */
import { readFileSync } from 'node:fs'
import type { Readable, Writable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Container } from 'dockerode'
import { atLeast } from '../disk.ts'
import { type Box, BoxError, type BoxLimits, type BoxUsage, type Bytes, type Exit } from '../engine.ts'
import { type Api, ApiError } from './api.ts'
import { openStreams, type Streams } from './attach.ts'
import { type ContainerCgroup, type Counters, type Groups, groupsOf } from './cgroup.ts'
import { changeable } from './options.ts'

/**
 * Counters are gone before the end is told, so they are read again and again: after a tenth of the time that has
 * passed, within these bounds, ms.
 */
const sampleMs = { min: 20, max: 500 }
/** Word of a lack of memory may come after the word of the end, ms. */
const oomWordMs = 300
/** What is left of the output comes at once when the container has ended; silence of so many ms is its end, too. */
const silenceMs = 5_000
/** How long (ms) the output of what was killed may take to come. */
const lastWordsMs = 300
/** How long to look whether the init process could execute the command, ms. */
const execMs = 200
/** Exit code of what SIGKILL ended, as a shell says it. */
const killedCode = 137

export interface Made {
  api: Api
  id: string
  name: string
  limits: BoxLimits
  init: boolean
  cores: number
  guestKernel: boolean
  /** Whether its first process may be killed past the engine, which is at once, and when the engine is gone. */
  direct: boolean
  /** Known from an earlier box, so that even what ends at once is counted. */
  groups: Groups | undefined
  /** Whether the engine has told of a lack of memory. */
  lackedMemory: () => boolean
  /** Removes it from the engine, by and by where that does not answer now. Never rejects. */
  discard: () => Promise<void>
}

/** Of what the engine knows about a container that runs; nothing of one that does not. */
interface Statistics {
  cpu_stats?: { cpu_usage?: { total_usage?: number }; throttling_data?: { throttled_periods?: number } }
  memory_stats?: { max_usage?: number }
  blkio_stats?: { io_service_bytes_recursive?: { op?: string; value?: number }[] | null }
}

/** Attaches to a container that was not started. Throws `BoxError`. */
export async function openBox(made: Made): Promise<DockerBox> {
  const socket = await made.api.attach(made.id)
  return new DockerBox(made, (onEnd) => openStreams(socket, onEnd))
}

export class DockerBox implements Box {
  readonly name: string
  /** Where control groups were found to be, once it has started. */
  groups: Groups | undefined
  readonly exited: Promise<Exit>
  readonly #made: Made
  readonly #container: Container
  readonly #streams: Streams
  readonly #exit = Promise.withResolvers<Exit>()
  /** Settles when its processes are dead, though their output may not be read yet. Never rejects. */
  readonly #dead = Promise.withResolvers<void>()
  #limits: BoxLimits
  #starting: Promise<void> | undefined
  #watching = false
  #isDead = false
  /** How it ended, where it did so by itself. */
  #verdict: Promise<Exit> | undefined
  /** Nobody knows how it ended. */
  #lost = false
  #killed: Promise<void> | undefined
  #removed: Promise<void> | undefined
  #frozen = false
  /** Of its first process, on the host; 0: not known. */
  #pid = 0
  #cgroup: ContainerCgroup | undefined
  #counters: Counters | undefined
  #sampler: NodeJS.Timeout | undefined
  readonly #noLongerWatched = new AbortController()

  constructor(made: Made, open: (onEnd: () => void) => Streams) {
    this.#made = made
    this.name = made.name
    this.#limits = made.limits
    this.groups = made.groups
    this.#cgroup = made.groups?.(made.id)
    this.#container = made.api.docker.getContainer(made.id)
    this.#streams = open(() => this.#sample())
    this.exited = this.#exit.promise
    // Before there is a process, the end of the connection is the end of the engine.
    void this.#streams.closed.then(() => {
      if (this.#starting === undefined) this.#lose()
    })
  }

  get stdin(): Writable {
    return this.#streams.stdin
  }
  get stdout(): Readable {
    return this.#streams.stdout
  }
  get stderr(): Readable {
    return this.#streams.stderr
  }

  start(): Promise<void> {
    this.#starting ??= this.#start()
    return this.#starting
  }

  async #start(): Promise<void> {
    if (this.#killed !== undefined || this.#isDead)
      throw new BoxError('engine', `${this.name} was stopped before it started`)
    this.#sampleFrom(performance.now())
    try {
      const start = (abortSignal: AbortSignal) => this.#container.start({ abortSignal })
      await this.#call('start', start, this.#made.api.slowMs)
    } catch (error) {
      // It may have started all the same.
      void this.kill()
      if (isUsersFault(error)) throw new BoxError('user', commandMessage(error), { cause: error })
      throw error
    }
    this.#watching = true
    const ended = this.#watch()
    await this.#look()
    if (this.#made.init) await this.#executed(ended)
  }

  /** Finds its first process and its counters. Without them it runs all the same. */
  async #look(): Promise<void> {
    try {
      const { State } = await this.#call('inspect', (abortSignal) => this.#container.inspect({ abortSignal }))
      this.#pid = State.Pid
      if (this.#pid > 0) this.groups ??= groupsOf(this.#pid, this.#made.id)
      this.#cgroup ??= this.groups?.(this.#made.id)
    } catch {
      return
    }
    this.#sample()
  }

  #sampleFrom(begun: number): void {
    if (this.#isDead) return
    this.#sample()
    const { min, max } = sampleMs
    const next = Math.min(Math.max((performance.now() - begun) / 10, min), max)
    this.#sampler = setTimeout(() => this.#sampleFrom(begun), next)
    this.#sampler.unref()
  }

  /** The init process runs always; whether it could execute the command is seen by its child, or by its end. */
  async #executed(ended: Promise<number>): Promise<void> {
    const until = performance.now() + execMs
    while (!this.#isDead && performance.now() < until) {
      const name = childName(this.#pid)
      if (name !== undefined && name !== '' && name !== 'docker-init' && name !== 'tini') return
      await Promise.race([sleep(2), ended])
    }
    if (!this.#isDead) return
    const code = await ended
    const said = /^\[FATAL tini \(\d+\)\] exec (.*) failed: (.*)$/m.exec(this.#streams.beginning())
    if ((code !== 126 && code !== 127 && code !== 1) || said === null) return
    throw new BoxError('user', `${said[1]} cannot be executed: ${said[2]}`)
  }

  /** Waits for the end and tells of it. Resolves with the exit code when the processes are dead. */
  async #watch(): Promise<number> {
    try {
      const { api, id } = this.#made
      const code = await api.exitCode(id, this.#noLongerWatched.signal)
      this.#verdict = this.#judge(code)
      this.#die()
      void this.#finish(this.#verdict)
      return code
    } catch {
      // The connection broke: whatever becomes of the container now, nobody would know.
      if (this.#killed === undefined) this.#lose()
      await this.#dead.promise
      return killedCode
    }
  }

  #lose(): void {
    this.#lost = true
    void this.kill()
  }

  async #finish(verdict: Promise<Exit>): Promise<void> {
    const exit = await verdict
    await Promise.race([this.#streams.read, this.#silence()])
    this.#exit.resolve(exit)
  }

  /** The container has ended, nobody keeps its output waiting, and there is nothing more. */
  async #silence(): Promise<void> {
    let quiet = 0
    let isClosed = false
    void this.#streams.closed.then(() => {
      isClosed = true
    })
    while (!isClosed && quiet < silenceMs) {
      await sleep(100)
      quiet = this.#streams.blocked() ? 0 : quiet + 100
    }
    this.#streams.end()
    await this.#streams.read
  }

  /** Throws nothing. */
  async #judge(code: number): Promise<Exit> {
    // Where it ended by a signal that nobody of us has sent, word of a lack of memory may still come.
    const until = performance.now() + (code === killedCode && this.#killed === undefined ? oomWordMs : 0)
    for (;;) {
      try {
        const { State } = await this.#call('inspect', (abortSignal) =>
          this.#container.inspect({ abortSignal }),
        )
        // Not always true where it should be, but never where it should not.
        if (State.OOMKilled) return { code, oom: true }
      } catch (error) {
        // An engine that goes away has ended it.
        const isGone = error instanceof ApiError && error.status === undefined
        if (isGone && this.#killed === undefined) return { code, oom: false, lost: true }
      }
      if (this.#knownLack() || performance.now() >= until) return { code, oom: this.#knownLack() }
      await sleep(20)
    }
  }

  #knownLack(): boolean {
    return (this.#counters?.oomKills ?? 0) > 0 || this.#made.lackedMemory()
  }

  #die(): void {
    this.#isDead = true
    clearTimeout(this.#sampler)
    this.#dead.resolve()
  }

  async update(limits: BoxLimits): Promise<void> {
    const { diskMb, fileBytes } = this.#made.limits
    if (limits.diskMb !== diskMb || limits.fileBytes !== fileBytes)
      throw new BoxError('engine', `${this.name}: disk and file size of a container cannot be changed`)
    await this.#call('update', (abortSignal) =>
      this.#container.update({ ...changeable(limits, this.#made), abortSignal }),
    )
    this.#limits = limits
  }

  async freeze(): Promise<void> {
    if (this.#frozen || this.#isDead) return
    await this.#call('pause', (abortSignal) => this.#container.pause({ abortSignal }))
    this.#frozen = true
  }

  async thaw(): Promise<void> {
    if (!this.#frozen) return
    if (!this.#isDead) await this.#call('unpause', (abortSignal) => this.#container.unpause({ abortSignal }))
    this.#frozen = false
  }

  async usage(): Promise<BoxUsage> {
    this.#sample()
    if (this.#counters === undefined && this.#watching && !this.#isDead) await this.#ask()
    const { cpuMs, memoryPeakMb } = this.#counters ?? { cpuMs: null, memoryPeakMb: null }
    return {
      cpuMs,
      memoryPeakMb: memoryPeakMb === null ? null : Math.min(memoryPeakMb, this.#limits.memoryMb),
      oomKills: this.#counters?.oomKills ?? (this.#knownLack() ? 1 : 0),
      disk: this.#counters?.disk,
    }
  }

  /** Asks the engine, where the counters themselves are out of sight. */
  async #ask(): Promise<void> {
    try {
      const { cpu_stats, memory_stats, blkio_stats } = await this.#statistics()
      const ns = cpu_stats?.cpu_usage?.total_usage
      if (ns === undefined) return
      const peak = memory_stats?.max_usage
      this.#counters = {
        cpuMs: ns / 1e6,
        memoryPeakMb: peak === undefined ? null : peak / 2 ** 20,
        oomKills: this.#knownLack() ? 1 : 0,
        throttled: 0,
        disk: readBlkio(blkio_stats?.io_service_bytes_recursive),
      }
    } catch {
      // Then nobody knows.
    }
  }

  /** How many times the kernel has held it back for having had its share of time. Throws `ApiError`. */
  async throttled(): Promise<number> {
    const counters = this.#cgroup?.read()
    if (counters !== undefined) return counters.throttled
    return (await this.#statistics()).cpu_stats?.throttling_data?.throttled_periods ?? 0
  }

  async #statistics(): Promise<Statistics> {
    const options = { stream: false as const, 'one-shot': true }
    const answer = await this.#call('statistics', (abortSignal) =>
      this.#container.stats(Object.assign(options, { abortSignal })),
    )
    return answer as unknown as Statistics
  }

  /** Of its first process, on this host; undefined: not to be seen from here. */
  get pid(): number | undefined {
    return this.pids().length > 0 ? this.#pid : undefined
  }

  #sample(): void {
    const counters = this.#cgroup?.read()
    if (counters === undefined) return
    this.#counters = { ...counters, disk: atLeast(this.#counters?.disk, counters.disk) }
  }

  kill(): Promise<void> {
    this.#killed ??= this.#kill()
    return this.#killed
  }

  async #kill(): Promise<void> {
    // What is about to start is killed when it has started.
    if (!this.#watching) await this.#starting?.catch(() => {})
    if (!this.#isDead && this.#starting !== undefined) await this.#stop()
    this.#die()
    if (this.#watching && !this.#lost) await this.#lastWords()
    this.#streams.end()
    this.#noLongerWatched.abort()
    const killed: Exit = { code: killedCode, oom: this.#knownLack(), ...(this.#lost ? { lost: true } : {}) }
    this.#exit.resolve((await this.#verdict) ?? killed)
  }

  /** What it said before it was killed is on its way, unless the reader does not want it. */
  async #lastWords(): Promise<void> {
    let isClosed = false
    void this.#streams.closed.then(() => {
      isClosed = true
    })
    const until = performance.now() + lastWordsMs
    while (!isClosed && !this.#streams.blocked() && performance.now() < until)
      await Promise.race([sleep(10), this.#streams.closed])
  }

  async #stop(): Promise<void> {
    await this.thaw().catch(() => {})
    this.#sample()
    if (this.#made.direct && this.#killDirectly() && (await this.#gone())) return
    try {
      await this.#call('kill', (abortSignal) => this.#container.kill({ signal: 'SIGKILL', abortSignal }))
    } catch (error) {
      // 404: it was removed; 409: it does not run.
      if (error instanceof ApiError && (error.status === 404 || error.status === 409)) return
      this.#killDirectly()
    }
    await this.#gone()
  }

  /** With its first process the kernel kills all of it. False: that cannot be done from here. */
  #killDirectly(): boolean {
    if (this.#pid === 0 || !isOf(this.#pid, this.#made.id)) return false
    try {
      process.kill(this.#pid, 'SIGKILL')
      return true
    } catch {
      return false
    }
  }

  /** Waits until none of its processes is left. False: some are, after the time that the engine has for an answer. */
  async #gone(): Promise<boolean> {
    const until = performance.now() + this.#made.api.answerMs
    while (!this.#isDead && performance.now() < until) {
      if (this.#cgroup !== undefined && this.#cgroup.pids().length === 0) return true
      await Promise.race([sleep(5), this.#dead.promise])
    }
    return this.#isDead
  }

  remove(): Promise<void> {
    this.#removed ??= this.#remove()
    return this.#removed
  }

  async #remove(): Promise<void> {
    await this.kill()
    this.#streams.destroy()
    await this.#made.discard()
  }

  pids(): number[] {
    if (this.#isDead) return []
    if (this.#cgroup !== undefined) return this.#cgroup.pids()
    return this.#pid > 0 && isOf(this.#pid, this.#made.id) ? [this.#pid] : []
  }

  #call<T>(what: string, send: (abortSignal: AbortSignal) => Promise<T>, ms?: number): Promise<T> {
    return this.#made.api.call(`${what} ${this.name}`, send, ms)
  }
}

/** Whether a process belongs to a container. */
function isOf(pid: number, id: string): boolean {
  try {
    return readFileSync(`/proc/${pid}/cgroup`, 'utf8').includes(id)
  } catch {
    return false
  }
}

/** Of the first child of a process: empty where it has none yet; undefined: there is no such process, or no way to see. */
function childName(pid: number): string | undefined {
  try {
    const [child] = readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').split(' ')
    return child === undefined || child === '' ? '' : readFileSync(`/proc/${child}/comm`, 'utf8').trim()
  } catch {
    return undefined
  }
}

/** Bytes of each disk by `op`, `read` and `write` in small letters or not. */
function readBlkio(
  list: NonNullable<Statistics['blkio_stats']>['io_service_bytes_recursive'],
): Bytes | undefined {
  if (!Array.isArray(list)) return undefined
  const sum = (wanted: string) =>
    list.reduce((total, { op, value }) => total + (op?.toLowerCase() === wanted ? (value ?? 0) : 0), 0)
  return { in: sum('read'), out: sum('write') }
}

/** runc’s words for a command that is not there or is none, where no init process stands before it. */
const isUsersFault = (error: unknown) =>
  error instanceof ApiError &&
  /executable file not found|error finding executable|exec: .*(no such file or directory|permission denied|is a directory)|exec format error/.test(
    error.message,
  )
const commandMessage = (error: unknown) => {
  const said = /(?:exec: |error finding executable )(.*?)(: unknown)?$/.exec((error as Error).message)
  return said === null ? (error as Error).message : said[1]!
}
