/** The one process tree of this machine, from its start to the last word about it. */

import * as os from 'quickjs:os'
import * as linux from 'vulcan:linux'
import {
  type Exited,
  machineChunkBytes,
  machineKinds,
  machineStreams,
  type Start,
} from '../shared/machine.ts'
import type { Channel } from './channel.ts'
import { isThrashing, jobGroup, jobUsage, keepsPeak, killJob, limitJob, signalJob } from './group.ts'
import { rootPath } from './layout.ts'
import type { Loop } from './loop.ts'
import { makeDirectory } from './places.ts'
import { makeResult } from './root.ts'
import { HostError, Inlet, Outlet } from './streams.ts'
import { AgentError, check, openFlags, pollEvents } from './system.ts'

/** Descriptors of a process: as containers have them. */
const openFiles = 65_536
/** How often the memory use is looked at where the kernel keeps no peak, ms. */
const peakMs = 200
/** How often it is looked whether the workload still gets anywhere within its memory, and for how many looks not. */
const thrashMs = 500
const thrashLooks = 6
/** Stages of linux.c’s `execute`. */
const directoryStage = 2
const commandStage = 3
/** Errno of a command that cannot be executed whatever the machine is like: ENOMEM, EMFILE, ENFILE, EIO are not. */
const machineErrors = [5, 12, 23, 24]

export class Life {
  readonly #loop: Loop
  readonly #channel: Channel
  readonly #stdin: Inlet
  #start: Start | undefined
  #pid: number | undefined
  #outlets: Outlet[] = []
  #code: number | undefined
  #resultFile: string | undefined
  /** Of the result file that is being sent. */
  #result: { fd: number; left: number } | undefined
  #over = false
  /** It was ended for want of memory, as the kernel would not. */
  #spent = false
  #thrashed = 0

  constructor(loop: Loop, channel: Channel) {
    this.#loop = loop
    this.#channel = channel
    this.#stdin = new Inlet(loop, channel, machineStreams.stdin)
    const signals = check(linux.childSignals(), 'signals')
    loop.watch(signals, pollEvents.in, () => this.#reap(signals))
  }

  /** Throws `AgentError` where it cannot be started, `HostError` where something was before. */
  start(start: Start): void {
    if (this.#start !== undefined) throw new HostError('a second start')
    this.#start = start
    makeDirectory(start.cwd)
    if (start.result !== null) this.#resultFile = makeResult(start.result, start.result_bytes)
    limitJob(start)
    const [pid, stdin, stdout, stderr] = this.#execute(start)
    this.#pid = pid
    if (!keepsPeak()) this.#watchPeak()
    this.#loop.after(thrashMs, () => this.#watchMemory())
    this.#outlets = [
      new Outlet(this.#loop, this.#channel, machineStreams.stdout, stdout, () => this.#proceed()),
      new Outlet(this.#loop, this.#channel, machineStreams.stderr, stderr, () => this.#proceed()),
    ]
    this.#channel.send(machineKinds.started)
    this.#stdin.attach(stdin)
  }

  /** Of what the host has sent for a stream. Throws `HostError`. */
  takeInput(stream: number, bytes: Uint8Array): void {
    if (stream !== machineStreams.stdin) throw new HostError(`input for stream ${stream}`)
    this.#stdin.take(bytes)
  }

  endInput(stream: number): void {
    if (stream !== machineStreams.stdin) throw new HostError(`an end of stream ${stream}`)
    this.#stdin.end()
  }

  credit(stream: number, bytes: number): void {
    const outlet = this.#outlets[stream - 1]
    if (outlet === undefined) throw new HostError(`a credit for stream ${stream}`)
    outlet.credit(bytes)
  }

  /** The channel takes more again. */
  refresh(): void {
    for (const outlet of this.#outlets) outlet.refresh()
    this.#sendResult()
  }

  signal(signal: number): void {
    if (signal < 1 || signal > 64) throw new HostError(`signal ${signal}`)
    if (this.#pid !== undefined && this.#code === undefined) signalJob(signal)
  }

  #execute({ argv, env, cwd, user, file_bytes }: Start): [number, number, number, number] {
    const plan = {
      argv,
      env: Object.entries(env).map(([name, value]) => `${name}=${value}`),
      cwd,
      root: rootPath,
      cgroup: jobGroup,
      uid: user.uid,
      gid: user.gid,
      groups: user.groups,
      fileBytes: file_bytes,
      files: openFiles,
    }
    const result = linux.execute(plan)
    const [pid, stage] = result
    if (pid > 0) return result
    const what = stage === directoryStage ? cwd : stage === commandStage ? argv[0]! : 'start'
    const isUsers = (stage === commandStage || stage === directoryStage) && !machineErrors.includes(-pid)
    throw new AgentError(`${what}: ${linux.errorText(-pid)}`, isUsers ? 'user' : 'machine')
  }

  #reap(signals: number): void {
    const drained = new ArrayBuffer(1024)
    while (os.read(signals, drained, 0, drained.byteLength) > 0);
    for (let ended = linux.reap(); ended !== null; ended = linux.reap()) {
      if (ended[0] !== this.#pid) continue
      this.#code = ended[1]
      // Whatever it has left behind ends with it, and with the last of them the streams do.
      killJob()
      this.#stdin.close()
    }
    this.#proceed()
  }

  #proceed(): void {
    if (this.#code === undefined || this.#over || this.#result !== undefined) return
    if (!this.#outlets.every((outlet) => outlet.ended)) return
    const file = this.#resultFile
    if (file === undefined) {
      this.#finish()
      return
    }
    const fd = check(os.open(file, openFlags.readonly | openFlags.closeOnExec), 'result')
    this.#result = { fd, left: this.#start!.result_bytes + 1 }
    this.#sendResult()
  }

  #sendResult(): void {
    const result = this.#result
    if (result === undefined || this.#over) return
    while (!this.#channel.full) {
      const buffer = new ArrayBuffer(Math.min(result.left, machineChunkBytes))
      const count = os.read(result.fd, buffer, 0, buffer.byteLength)
      if (count <= 0) {
        os.close(result.fd)
        this.#finish()
        return
      }
      result.left -= count
      this.#channel.send(machineKinds.result, new Uint8Array(buffer, 0, count))
    }
  }

  #finish(): void {
    this.#over = true
    const usage = jobUsage()
    if (this.#spent) usage.oom_kills++
    const exited: Exited = { code: this.#code!, oom: usage.oom_kills > 0, usage }
    this.#channel.sendJson(machineKinds.exited, exited)
  }

  #watchPeak(): void {
    if (this.#over) return
    jobUsage()
    this.#loop.after(peakMs, () => this.#watchPeak())
  }

  #watchMemory(): void {
    if (this.#over) return
    this.#thrashed = isThrashing() ? this.#thrashed + 1 : 0
    if (this.#thrashed === thrashLooks) {
      this.#spent = true
      killJob()
    }
    this.#loop.after(thrashMs, () => this.#watchMemory())
  }
}
