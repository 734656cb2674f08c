/** One virtual machine: a process of QEMU with all that hangs on it. */
import { readFileSync } from 'node:fs'
import { chmod } from 'node:fs/promises'
import type { Duplex } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import type { CgroupUsage } from '../../container/gvisor/cgroups.ts'
import {
  type Machine,
  MachineError,
  type MachineOptions,
  type MachineShape,
  type Template,
} from '../driver.ts'
import { nameOf } from '../owners.ts'
import { incomingUri, type TemplateMemory, takesReadOnlyMemory } from './arguments.ts'
import { Qmp } from './qmp.ts'
import { ignoreShared, saveState } from './save.ts'
import { type Beginning, type Host, mebibyte, type Started, startQemu, streamDir } from './start.ts'
import { keepMemory, memoryFile, readManifest, stateFile, writeManifest } from './template.ts'

/** QEMU speaks within 30 ms, and within seconds where everything else runs too. */
const startMs = 20_000
const restoreMs = 60_000
const consoleBytes = 16 * 1024
const complaintBytes = 4 * 1024
/** Of device state: 80 KiB were measured. */
const maxStateBytes = 64 * mebibyte
/** Its sockets close before QEMU is gone; that is waited for to hear why, ms. */
const lastWordsMs = 500
/** USER_HZ (proc(5)): times in /proc are in hundredths of a second. */
const tickMs = 10

type End = { code: number | null; signal: NodeJS.Signals | null }

export class QemuMachine implements Machine {
  readonly pid: number
  readonly channel: Duplex
  readonly exited: Promise<End>
  readonly #host: Host
  readonly #name: string
  readonly #shape: MachineShape
  readonly #dir: string
  readonly #started: Started
  readonly #qmp: Qmp
  #console = ''
  #complaint = ''
  #hasEnded = false
  #usage: CgroupUsage | undefined

  /** From its kernel. Throws `MachineError`; nothing is left then. */
  static async boot(host: Host, id: string, shape: MachineShape, options: MachineOptions) {
    const machine = await QemuMachine.#start(host, id, shape, options, { kind: 'boot' })
    return await machine.#whole(() =>
      Promise.all([machine.#started.admitted, machine.#qmp.call('qmp_capabilities', undefined, startMs)]),
    )
  }

  /** From a template. Throws `MachineError`; nothing is left then. */
  static async restore(host: Host, id: string, { shape, dir }: Template, options: MachineOptions) {
    const { memory } = await readManifest(dir, host.model)
    const beginning = { kind: 'restore', memory, template: dir } as const
    const machine = await QemuMachine.#start(host, id, shape, options, beginning)
    const qmp = machine.#qmp
    return await machine.#whole(() =>
      // All under way at once: a round trip is an answer of QEMU’s, and it has much to do.
      Promise.all([
        qmp.event(({ name }) => name === 'RESUME', restoreMs, 'its restoring'),
        qmp.call('qmp_capabilities', undefined, startMs),
        qmp.call('migrate-set-capabilities', { capabilities: [ignoreShared(memory === 'file')] }, startMs),
        // The guest runs when its state is there: by then it has to be held.
        machine.#started.admitted.then(() =>
          qmp.call('migrate-incoming', { uri: incomingUri(host.version) }, startMs),
        ),
      ]),
    )
  }

  static async #start(
    host: Host,
    id: string,
    shape: MachineShape,
    options: MachineOptions,
    beginning: Beginning,
  ): Promise<QemuMachine> {
    const name = nameOf(host.owner, id)
    try {
      return new QemuMachine(
        host,
        name,
        shape,
        options.dir,
        await startQemu(host, id, shape, options, beginning),
      )
    } catch (cause) {
      throw new MachineError(`${name}: ${(cause as Error).message}`, { cause })
    }
  }

  private constructor(host: Host, name: string, shape: MachineShape, dir: string, started: Started) {
    this.#host = host
    this.#name = name
    this.#shape = shape
    this.#dir = dir
    this.#started = started
    const { child, ours, cgroup, admitted, identity } = started
    this.pid = child.pid!
    this.channel = ours.agent
    // How it ended is told by `exited`.
    for (const stream of Object.values(ours)) stream.on('error', () => {})
    ours.console.setEncoding('latin1').on('data', (piece: string) => {
      this.#console = (this.#console + piece).slice(-consoleBytes)
    })
    ours.complaint.setEncoding('utf8').on('data', (piece: string) => {
      this.#complaint = (this.#complaint + piece).slice(-complaintBytes)
    })
    this.#qmp = new Qmp(ours.qmp)
    const ended = new Promise<End>((resolve) => {
      child.once('exit', (code, signal) => resolve({ code, signal }))
    })
    this.exited = ended.then(async (end) => {
      this.#hasEnded = true
      await admitted.catch(() => {})
      this.#readUsage()
      // What resists is found by the janitor.
      await cgroup?.removeTree().catch(() => {})
      host.users.giveBack(identity)
      return end
    })
  }

  console(): string {
    return this.#console
  }

  async pause(): Promise<void> {
    await this.#ask('stop')
  }

  async resume(): Promise<void> {
    await this.#ask('cont')
  }

  async #ask(command: string): Promise<void> {
    try {
      await this.#qmp.call(command)
    } catch (error) {
      throw await this.#explain(error)
    }
  }

  /** The machine is dead then: its memory is the template’s. */
  async snapshot(dir: string): Promise<void> {
    const { version, model, users } = this.#host
    try {
      // Its files are for whoever is handed them, and nobody comes to them by their paths.
      await chmod(dir, 0o700)
      const memory = await this.#save(dir)
      await this.kill()
      // QEMU before 8.2 opens for writing what it only reads.
      const mode = takesReadOnlyMemory(version) ? 0o444 : users.areOthers ? 0o666 : 0o600
      if (memory === 'file') await keepMemory(memoryFile(this.#dir), dir, mode)
      await writeManifest(dir, { model, memory })
    } catch (error) {
      const failure = await this.#explain(error)
      await this.kill()
      throw failure
    }
  }

  /** With the memory where it does not go without. */
  async #save(dir: string): Promise<TemplateMemory> {
    const to = { folder: streamDir(this.#dir), file: stateFile(dir) }
    try {
      await saveState(this.#qmp, { ...to, memory: 'file', maxBytes: maxStateBytes })
      return 'file'
    } catch (error) {
      if (this.#hasEnded) throw error
      const maxBytes = maxStateBytes + this.#shape.memoryMb * mebibyte * 1.1
      await saveState(this.#qmp, { ...to, memory: 'stream', maxBytes })
      return 'stream'
    }
  }

  async usage(): Promise<{ cpuMs: number; memoryMb: number }> {
    const { cgroup } = this.#started
    return {
      cpuMs: cgroup === undefined ? cpuMsOf(this.pid) : (this.#readUsage()?.cpuMs ?? 0),
      memoryMb: residentMb(this.pid),
    }
  }

  #readUsage(): CgroupUsage | undefined {
    this.#usage = this.#started.cgroup?.usage() ?? this.#usage
    return this.#usage
  }

  async kill(): Promise<void> {
    this.#started.child.kill('SIGKILL')
    await this.exited
  }

  /** What `begin` brings about, or nothing at all. */
  async #whole(begin: () => Promise<unknown>): Promise<this> {
    try {
      await begin()
      return this
    } catch (error) {
      const failure = await this.#explain(error)
      await this.kill()
      throw failure
    }
  }

  /** With what QEMU itself says, where it has ended over it. */
  async #explain(error: unknown): Promise<MachineError> {
    if (error instanceof MachineError) return error
    const late = new AbortController()
    await Promise.race([this.exited, sleep(lastWordsMs, undefined, late).catch(() => {})])
    late.abort()
    const said = this.#hasEnded ? this.#complaint.trim() : ''
    const why = `${this.#name}: ${(error as Error).message}`
    return new MachineError(said === '' ? why : `${why}: ${said}`, { cause: error })
  }
}

/** 0 where there is no such process. */
function residentMb(pid: number): number {
  const found = /^VmRSS:\s+(\d+) kB/m.exec(read(`/proc/${pid}/status`))
  return Number(found?.[1] ?? 0) / 1024
}

/** 0 where there is no such process. */
function cpuMsOf(pid: number): number {
  const stat = read(`/proc/${pid}/stat`)
  // The second field is the name in parentheses; the 14th and the 15th are time in user and in kernel mode.
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
  return (Number(fields[11] ?? 0) + Number(fields[12] ?? 0)) * tickMs
}

function read(file: string): string {
  try {
    return readFileSync(file, 'latin1')
  } catch {
    return ''
  }
}
