/**
 * slirp4netns: a process that takes what comes out of a namespace and makes the connections anew, as a process of the
 * host would. So the host needs no forwarding, no interface and no rule of ours. It ends when the pipe to this process
 * does, and keeps no rights but its network.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import type { Readable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import { toolEnv } from './namespace.ts'
import { outside, outsideRange } from './rules.ts'

/**
 * Bytes, the largest there is: slirp4netns carries more than twice as much as with 1,500. Of every interface on the
 * way, because it pays no heed to what the other end can take, and fragments are slow.
 */
export const mtu = 65_520
const readyMs = 10_000
/** Between its end and the next start: doubled each time that it did not live as long as the longest. */
const shortestPauseMs = 50
const longestPauseMs = 10_000

export class WayOut implements AsyncDisposable {
  readonly #namespace: string
  readonly #closing = new AbortController()
  #process: ChildProcess
  #kept: Promise<void>

  private constructor(namespace: string, process: ChildProcess) {
    this.#namespace = namespace
    this.#process = process
    this.#kept = this.#keep()
  }

  /** Of the namespace with that path. Throws where it does not start. */
  static async open(namespace: string): Promise<WayOut> {
    // On a busy host it has been seen to fail once and to start the next time.
    const process = await start(namespace).catch(async () => {
      await sleep(shortestPauseMs)
      return await start(namespace)
    })
    return new WayOut(namespace, process)
  }

  get pid(): number | undefined {
    return this.#process.pid
  }

  /** It reads what hostile code sends: should it ever fall, there is a new one before long. */
  async #keep(): Promise<void> {
    const { signal } = this.#closing
    let pauseMs = shortestPauseMs
    while (!signal.aborted) {
      const begun = performance.now()
      if (isRunning(this.#process)) await once(this.#process, 'exit', { signal }).catch(() => {})
      if (signal.aborted) return
      const lived = performance.now() - begun
      pauseMs = lived > longestPauseMs ? shortestPauseMs : Math.min(pauseMs * 2, longestPauseMs)
      await sleep(pauseMs, undefined, { signal, ref: false }).catch(() => {})
      if (signal.aborted) return
      this.#process = await start(this.#namespace).catch(() => this.#process)
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closing.abort()
    await this.#kept
    await end(this.#process)
  }
}

const isRunning = ({ exitCode, signalCode }: ChildProcess) => exitCode === null && signalCode === null

async function end(process: ChildProcess): Promise<void> {
  if (!isRunning(process)) return
  process.kill('SIGKILL')
  await once(process, 'exit')
}

async function start(namespace: string): Promise<ChildProcess> {
  const args = [
    // Its own sandbox lets go of shared mounts, such as those below /run/netns, for the whole host.
    ...['--mount', '--propagation=private', '--'],
    ...['slirp4netns', '--configure', `--mtu=${mtu}`, `--cidr=${outsideRange}`],
    ...['--disable-host-loopback', '--enable-sandbox', '--enable-seccomp'],
    ...['--ready-fd=3', '--exit-fd=4', '--netns-type=path', namespace, outside],
  ]
  const child = spawn('unshare', args, {
    env: toolEnv,
    stdio: ['ignore', 'ignore', 'pipe', 'pipe', 'pipe'],
    // A Ctrl-C on the terminal is for the runner, which lets go of it when nothing needs it any more.
    detached: true,
  })
  let complaint = ''
  child.stderr!.setEncoding('utf8').on('data', (text: string) => {
    complaint = (complaint + text).slice(-4_000)
  })
  const ready = child.stdio[3] as Readable
  for (const pipe of child.stdio.slice(3) as Readable[]) pipe.on('error', () => {})
  const over = AbortSignal.timeout(readyMs)
  try {
    await once(child, 'spawn')
    // Ends without a word where slirp4netns does.
    await once(ready, 'readable', { signal: over })
    if (ready.readableLength > 0) return child
    if (isRunning(child)) await once(child, 'exit', { signal: over })
    throw new Error(`slirp4netns failed (${child.signalCode ?? child.exitCode}): ${complaint.trim()}`)
  } catch (error) {
    if (child.pid !== undefined) await end(child)
    throw over.aborted ? new Error(`slirp4netns was not ready after ${readyMs / 1000} s`) : error
  }
}
