import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { renameSync, rmSync, writeFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { signal as send } from './process-identity.ts'

export type ProcessSpec = {
  /** Unique; prefixes the process's output and names it in the pids file. */
  name: string
  command: string
  args: string[]
  /** The whole environment, apart from `VULCAN_RESTARTS`: how often it was started again. */
  env: NodeJS.ProcessEnv
  /** Resolves when the process can be used. Without it, it is ready when it is started. */
  ready?: (signal: AbortSignal) => Promise<void>
  /** Default 60,000. */
  readyTimeoutMs?: number
  /** A process that it is stopped right before, as if it had been started right behind it. */
  behind?: string
}

export type SupervisorOptions = {
  log: (line: string) => void
  /** Kept up to date as `{"<name>": <pid>}`; absent while nothing runs. */
  pidsFile?: string
  /** Wait before a restart: `minMs`, doubling up to `maxMs`, back to `minMs` after a life of `resetMs`. */
  backoff?: { minMs: number; maxMs: number; resetMs: number }
  /** From SIGTERM to SIGKILL when stopping, each process. Default 10,000. */
  graceMs?: number
}

/** A process did not become ready when it was first started. The message ends with its last lines. */
export class NotReadyError extends Error {
  override name = 'NotReadyError'
}

/** A process that ends this often before its first readiness is not tried again. */
const maxFailedStarts = 3
const keptLines = 20

type Entry = {
  spec: ProcessSpec
  child: ChildProcess | undefined
  lastLines: string[]
  /** Aborted when the process must not be started again. */
  stopping: AbortController
  /** Aborted when it keeps ending before it was ever ready. */
  failed: AbortController
  isReady: boolean
  ends: number
  restarts: number
  done: Promise<void>
}

/**
 * Keeps processes running: what dies is started again with backoff, until `stop()` ends them in the reverse order of
 * their start. Each runs in a process group of its own, so that a terminal's Ctrl-C reaches only the supervisor, and
 * whatever is left of a group when its leader has ended is killed. Where setpriv(1) exists, the death of the
 * supervisor itself, even by SIGKILL, sends SIGTERM to every process.
 */
export class Supervisor implements AsyncDisposable {
  readonly #entries: Entry[] = []
  readonly #options: Required<Omit<SupervisorOptions, 'pidsFile'>> & { pidsFile: string | undefined }
  #stopped: Promise<void> | undefined

  constructor(options: SupervisorOptions) {
    this.#options = {
      backoff: { minMs: 100, maxMs: 5_000, resetMs: 10_000 },
      graceMs: 10_000,
      pidsFile: undefined,
      ...options,
    }
  }

  /**
   * Starts a process and waits until it is ready. A process that never was is not left behind.
   *
   * @throws NotReadyError when it is not ready in time, or ends three times before
   * @throws the signal's reason when it is aborted first
   */
  async start(spec: ProcessSpec, signal?: AbortSignal): Promise<void> {
    if (this.#stopped) throw new Error('the supervisor is stopped')
    const entry: Entry = {
      spec,
      child: undefined,
      lastLines: [],
      stopping: new AbortController(),
      failed: new AbortController(),
      isReady: false,
      ends: 0,
      restarts: 0,
      done: Promise.resolve(),
    }
    const place = this.#entries.findIndex((other) => other.spec.name === spec.behind)
    this.#entries.splice(place === -1 ? this.#entries.length : place + 1, 0, entry)
    entry.done = this.#keepRunning(entry)
    const { ready = async () => {}, readyTimeoutMs = 60_000 } = spec
    const deadline = AbortSignal.timeout(readyTimeoutMs)
    const over = AbortSignal.any([
      entry.stopping.signal,
      entry.failed.signal,
      deadline,
      ...(signal ? [signal] : []),
    ])
    try {
      await Promise.race([ready(over), aborted(over)])
      entry.isReady = true
    } catch (cause) {
      await this.#stopEntry(entry)
      this.#entries.splice(this.#entries.indexOf(entry), 1)
      signal?.throwIfAborted()
      const why = deadline.aborted ? `was not ready within ${readyTimeoutMs} ms` : (cause as Error).message
      throw new NotReadyError([`${spec.name} ${why}`, ...entry.lastLines].join('\n  '), { cause })
    }
  }

  /** The pid of a process; undefined while it waits for its restart, or when there is none of this name. */
  pid(name: string): number | undefined {
    return this.#entry(name)?.child?.pid
  }

  /** The last lines that a process wrote, oldest first, over all its lives. */
  lastLines(name: string): readonly string[] {
    return this.#entry(name)?.lastLines ?? []
  }

  /** Ends every process in reverse order: SIGTERM, and SIGKILL after the grace. Every call waits for the same end. */
  stop(): Promise<void> {
    this.#stopped ??= (async () => {
      for (const entry of this.#entries.toReversed()) await this.#stopEntry(entry)
    })()
    return this.#stopped
  }

  /** Ends one process by SIGKILL and never starts it again. */
  async abandon(name: string): Promise<void> {
    const entry = this.#entry(name)
    if (entry === undefined) return
    entry.stopping.abort(new Error('was abandoned'))
    if (entry.child?.pid) send(-entry.child.pid, 'SIGKILL')
    await entry.done
  }

  /** Ends every process at once by SIGKILL. */
  kill(): void {
    for (const { child, stopping } of this.#entries) {
      stopping.abort(new Error('was killed'))
      if (child?.pid) send(-child.pid, 'SIGKILL')
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.stop()
  }

  #entry(name: string): Entry | undefined {
    return this.#entries.find((entry) => entry.spec.name === name)
  }

  async #keepRunning(entry: Entry): Promise<void> {
    const { minMs, maxMs, resetMs } = this.#options.backoff
    const { spec, stopping, failed } = entry
    let delay = minMs
    while (!stopping.signal.aborted) {
      const born = performance.now()
      const how = await this.#runOnce(entry)
      const lived = performance.now() - born
      if (stopping.signal.aborted) return
      if (!entry.isReady && ++entry.ends >= maxFailedStarts) {
        failed.abort(new Error(`ended ${entry.ends} times before it was ready (${how})`))
        return
      }
      if (lived >= resetMs) delay = minMs
      this.#options.log(
        `${spec.name} ${how} after ${(lived / 1000).toFixed(1)} s; starting it again in ${delay} ms`,
      )
      await sleep(delay, undefined, { signal: stopping.signal }).catch(() => {})
      entry.restarts++
      delay = Math.min(delay * 2, maxMs)
    }
  }

  /** One life of a process, from spawn until nothing of its group is left. Resolves with how it ended, in words. */
  async #runOnce(entry: Entry): Promise<string> {
    const { spec, lastLines } = entry
    const [command, ...args] = [...deathSignal(), spec.command, ...spec.args]
    const env = { ...spec.env, VULCAN_RESTARTS: String(entry.restarts) }
    const child = spawn(command!, args, { env, stdio: ['ignore', 'pipe', 'pipe'], detached: true })
    entry.child = child
    this.#recordPids()
    const closed = once(child, 'close').catch(() => {})
    for (const stream of [child.stdout, child.stderr]) {
      createInterface(stream).on('line', (line) => {
        if (lastLines.push(line) > keptLines) lastLines.shift()
        this.#options.log(`${spec.name} | ${line}`)
      })
    }
    let how: string
    try {
      const [code, signal] = await once(child, 'exit')
      how = signal ? `was ended by ${signal}` : `exited with code ${code}`
    } catch (error) {
      how = `could not be started (${(error as Error).message})`
    }
    if (child.pid) send(-child.pid, 'SIGKILL')
    entry.child = undefined
    this.#recordPids()
    // A process that left the group may hold the pipes open for ever.
    await Promise.race([closed, sleep(500, undefined, { ref: false })])
    return how
  }

  async #stopEntry(entry: Entry): Promise<void> {
    entry.stopping.abort(new Error('was stopped'))
    const { child } = entry
    child?.kill('SIGTERM')
    const grace = setTimeout(() => {
      this.#options.log(`${entry.spec.name} did not end within ${this.#options.graceMs} ms; killing it`)
      if (child?.pid) send(-child.pid, 'SIGKILL')
    }, this.#options.graceMs)
    await entry.done
    clearTimeout(grace)
  }

  /** Synchronous, so that a supervisor killed in the next moment leaves a true record. */
  #recordPids(): void {
    const { pidsFile } = this.#options
    if (!pidsFile) return
    const running = this.#entries.filter((entry) => entry.child?.pid)
    if (running.length === 0) {
      rmSync(pidsFile, { force: true })
      return
    }
    const pids = Object.fromEntries(running.map((entry) => [entry.spec.name, entry.child!.pid]))
    writeFileSync(`${pidsFile}.new`, `${JSON.stringify(pids)}\n`)
    renameSync(`${pidsFile}.new`, pidsFile)
  }
}

/** Rejects with the signal's reason when it aborts. */
function aborted(signal: AbortSignal): Promise<never> {
  return new Promise((_, reject) => {
    if (signal.aborted) reject(signal.reason)
    signal.addEventListener('abort', () => reject(signal.reason), { once: true })
  })
}

let wrapper: string[] | undefined

/** The words in front of a command that make it get SIGTERM when its parent dies; none where setpriv(1) is missing. */
function deathSignal(): string[] {
  const words = ['setpriv', '--pdeathsig', 'TERM', '--']
  wrapper ??= spawnSync(words[0]!, [...words.slice(1), 'true']).status === 0 ? words : []
  return wrapper
}
