/**
 * What went over each wire, as the kernel counts it. There is no way to read that of a namespace without a process in
 * it: so one waits there, which ends with its pipe to this process.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Bytes } from '../engine.ts'
import { toolEnv } from './namespace.ts'

const readyMs = 10_000

export class Meter implements AsyncDisposable {
  readonly #process: ChildProcess

  private constructor(process: ChildProcess) {
    this.#process = process
  }

  /** In the namespace with that path. Throws where it does not start. */
  static async open(namespace: string): Promise<Meter> {
    // Detached, as a Ctrl-C on the terminal is for the runner.
    const child = spawn('nsenter', [`--net=${namespace}`, '--', 'cat'], {
      env: toolEnv,
      stdio: ['pipe', 'pipe', 'ignore'],
      detached: true,
    })
    const meter = new Meter(child)
    child.stdin!.on('error', () => {})
    try {
      await once(child, 'spawn')
      // What comes back shows that it is in the namespace.
      child.stdin!.write('\n')
      const ended = once(child, 'exit')
      const answered = once(child.stdout!, 'data')
      const late = sleep(readyMs, 'late', { ref: false })
      const first = await Promise.race([answered.then(() => 'answered'), ended.then(() => 'ended'), late])
      if (first !== 'answered') throw new Error('nsenter did not enter a network namespace')
      return meter
    } catch (error) {
      await meter[Symbol.asyncDispose]()
      throw error
    }
  }

  get pid(): number | undefined {
    return this.#process.exitCode === null && this.#process.signalCode === null
      ? this.#process.pid
      : undefined
  }

  /** Of what is at the other end of an interface; undefined: it is not known any more. */
  read(name: string): Bytes | undefined {
    const { pid } = this
    if (pid === undefined) return undefined
    try {
      return trafficOf(readFileSync(`/proc/${pid}/net/dev`, 'latin1'), name)
    } catch {
      return undefined
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.pid === undefined) return
    const ended = once(this.#process, 'exit')
    this.#process.kill('SIGKILL')
    await ended
  }
}

/**
 * Of /proc/net/dev (proc(5)): `name: bytes packets errs drop fifo frame compressed multicast bytes …`, first those
 * received, then those sent. What this end has received the other has sent.
 */
export function trafficOf(text: string, name: string): Bytes | undefined {
  for (const line of text.split('\n')) {
    const colon = line.indexOf(':')
    if (colon < 0 || line.slice(0, colon).trim() !== name) continue
    const fields = line
      .slice(colon + 1)
      .trim()
      .split(/\s+/)
      .map(Number)
    const [received = 0, sent = 0] = [fields[0], fields[8]]
    return { in: sent, out: received }
  }
  return undefined
}
