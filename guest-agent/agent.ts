/**
 * The agent: the first process of a virtual machine. It readies the machine, does what the runner asks for by frames
 * (shared/machine.ts), and powers off when it is told to, or when it is spoken to in any other way.
 */

import * as os from 'quickjs:os'
import * as linux from 'vulcan:linux'
import { MachineFrameError, machineKinds, machineProtocol, type Ready } from '../shared/machine.ts'
import { boot, bootOption } from './boot.ts'
import { Channel } from './channel.ts'
import { enterAgentGroup, jobUsage } from './group.ts'
import { Life } from './life.ts'
import { Loop } from './loop.ts'
import { mountFromJobDrive } from './mounts.ts'
import { configureNetwork } from './network.ts'
import { put } from './places.ts'
import {
  bytesOfHex,
  configureOf,
  creditOf,
  fields,
  mountSpecs,
  parse,
  putOf,
  startOf,
  warmOf,
  whole,
} from './requests.ts'
import { mountRoot, resizeScratch } from './root.ts'
import { HostError } from './streams.ts'
import { AgentError, check, log, writeAll } from './system.ts'
import { warm } from './warm.ts'

const maxPingBytes = 64

class Agent {
  readonly #loop = new Loop()
  readonly #channel: Channel
  readonly #life: Life
  /** The host has spoken. */
  #known = false
  /** The file of the last `put`. */
  #file: number | undefined

  readonly #acts: Record<number, (payload: Uint8Array, stream: number) => void> = {
    [machineKinds.configure]: (payload) => this.#configure(payload),
    [machineKinds.put]: (payload) => this.#put(payload),
    [machineKinds.more]: (payload) => this.#append(payload),
    [machineKinds.mount]: (payload) => this.#mount(payload),
    [machineKinds.start]: (payload) => this.#life.start(startOf(parse(payload))),
    [machineKinds.signal]: (payload) => this.#life.signal(whole(fields(parse(payload)).signal)),
    [machineKinds.ask]: () => this.#channel.sendJson(machineKinds.usage, jobUsage()),
    [machineKinds.ping]: (payload) => this.#pong(payload),
    [machineKinds.off]: () => linux.powerOff(),
    [machineKinds.warm]: (payload) => warm(warmOf(parse(payload))),
    [machineKinds.data]: (payload, stream) => this.#life.takeInput(stream, payload),
    [machineKinds.end]: (_payload, stream) => this.#life.endInput(stream),
    [machineKinds.credit]: (payload, stream) => this.#life.credit(stream, creditOf(payload)),
  }

  constructor() {
    const transport = bootOption('vulcan.channel') === 'vsock' ? 'vsock' : 'port'
    this.#channel = new Channel(this.#loop, transport, {
      onFrame: (kind, stream, payload) => this.#take(kind, stream, payload),
      onHost: () => this.#greet(),
      onRoom: () => this.#life.refresh(),
    })
    this.#life = new Life(this.#loop, this.#channel)
    if (transport === 'port') this.#greet()
  }

  run(): never {
    return this.#loop.run()
  }

  /** Once: a machine that was restored has been greeted as a template. */
  #greet(): void {
    if (this.#known || this.#channel === undefined) return
    const ready: Ready = { protocol: machineProtocol, kernel: linux.release() }
    this.#channel.sendJson(machineKinds.ready, ready)
  }

  #take(kind: number, stream: number, payload: Uint8Array): void {
    this.#known = true
    try {
      this.#do(kind, stream, payload)
    } catch (error) {
      if (!(error instanceof AgentError)) throw error
      log(error.message)
      this.#closeFile()
      this.#channel.sendJson(machineKinds.failed, { fault: error.fault, message: error.message })
    }
  }

  #do(kind: number, stream: number, payload: Uint8Array): void {
    if (kind !== machineKinds.more) this.#closeFile()
    const act = this.#acts[kind]
    if (act === undefined) throw new HostError(`a frame of kind ${kind}`)
    act(payload, stream)
  }

  #configure(payload: Uint8Array): void {
    const { time_ms, entropy, network, mounts, disk_mb } = configureOf(parse(payload))
    check(linux.setTime(time_ms), 'clock')
    check(linux.addEntropy(bytesOfHex(entropy).buffer as ArrayBuffer), 'entropy')
    resizeScratch(disk_mb)
    configureNetwork(network)
    mountFromJobDrive(mounts)
    this.#channel.send(machineKinds.configured)
  }

  #mount(payload: Uint8Array): void {
    mountFromJobDrive(mountSpecs(parse(payload)))
    this.#channel.send(machineKinds.mounted)
  }

  #pong(payload: Uint8Array): void {
    if (payload.length > maxPingBytes) throw new HostError('a long ping')
    this.#channel.send(machineKinds.pong, payload)
  }

  #put(payload: Uint8Array): void {
    const { header, bytes } = putOf(payload)
    this.#file = put(header)
    if (bytes.length > 0) this.#append(bytes)
  }

  #append(bytes: Uint8Array): void {
    // Of a file that could not be made the host has been told already.
    if (this.#file !== undefined) writeAll(this.#file, bytes, 'put')
  }

  #closeFile(): void {
    if (this.#file !== undefined) os.close(this.#file)
    this.#file = undefined
  }
}

try {
  boot()
  enterAgentGroup()
  mountRoot()
  new Agent().run()
} catch (error) {
  const isHosts = error instanceof HostError || error instanceof MachineFrameError
  log(isHosts ? `the host is not to be understood: ${error.message}` : `${error}\n${(error as Error).stack}`)
  linux.powerOff()
}
