/** One Firecracker process from its jail to its end, and what it is asked. */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmodSync, chownSync, constants, lstatSync, readFileSync, readSync } from 'node:fs'
import { chmod, chown, copyFile, mkdir, rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import type { Duplex, Readable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Cgroup } from '../../container/gvisor/cgroups.ts'
import { programsEnv } from '../../container/gvisor/programs.ts'
import { type Machine, MachineError, type MachineShape } from '../driver.ts'
import { Api, type Request, resources } from './api.ts'
import {
  apiSocket,
  Held,
  type Identity,
  jailOf,
  type Launch,
  launchArgs,
  launcher,
  snapshotDir,
  vsockSocket,
} from './jailer.ts'
import type { Addresses } from './network.ts'
import { snapshotRequests } from './requests.ts'
import { VsockChannel } from './vsock.ts'

/** Where the agent listens. */
const agentPort = 1024
/** From the start of the jailer to the first answer of the API: some 50 ms on an idle host; ms. */
const startMs = 15_000
const pollMs = 3
/** Writing all memory down takes long on a slow disk; ms. */
const snapshotMs = 120_000
/** Kept of the guest’s console, and of the VMM’s complaints; bytes. */
const keptBytes = 16 * 1024
/** What a pipe holds: pipe(7). */
const pipeBytes = 64 * 1024
/** USER_HZ: clock ticks of /proc/<pid>/stat a second. */
const ticksPerSecond = 100

/** What a machine is put together from. */
export interface Parts extends Omit<Launch, keyof Identity> {
  identity: Identity
  cgroup: Cgroup
  /** Puts files into the jail, whose root this is. */
  fill(root: string): Promise<void>
  /** Carried out one after the other. */
  requests: Request[]
  shape: MachineShape
  /** Of its one interface. */
  network: Addresses | undefined
  /** Called once nothing of the machine runs any more. */
  release(): Promise<void>
}

export class FirecrackerMachine implements Machine {
  readonly pid: number
  readonly channel: Duplex
  readonly exited: Machine['exited']
  readonly network: Addresses | undefined
  readonly #parts: Parts
  readonly #api: Api
  readonly #console: Tail
  /** Where it is over: the last of it. */
  #log: string | undefined
  #killed = false
  /** By Firecracker, for a snapshot. */
  #stopped = false
  readonly #held: { log: Held; metrics: Held; snapshot: Held }

  /** Starts the VMM and sends it `requests`. Throws `MachineError`; nothing is left then. */
  static async start(parts: Parts): Promise<FirecrackerMachine> {
    await using scope = new AsyncDisposableStack()
    scope.defer(() => parts.release().catch(() => {}))
    const jail = jailOf(parts)
    scope.defer(() => rm(jail, { recursive: true, force: true }).catch(() => {}))
    const root = join(jail, 'root')
    await mkdir(root, { recursive: true, mode: 0o755 })
    const held = await furnish(root, parts)
    for (const one of Object.values(held)) scope.use(one)
    scope.defer(() => parts.cgroup.remove().catch(() => {}))
    await parts.cgroup.make()

    const args = launchArgs({ ...parts, ...parts.identity })
    const jailer = spawn(launcher, args, { env: programsEnv, stdio: 'pipe' })
    jailer.stdin.on('error', () => {})
    const [stdout, stderr] = [new Tail(jailer.stdout), new Tail(jailer.stderr)]
    const closed = once(jailer, 'close').catch(() => {})
    scope.defer(async () => {
      // It may not be in the group yet.
      jailer.kill('SIGKILL')
      await parts.cgroup.kill().catch(() => {})
      await closed
    })
    const complaint = () => stderr.text() || stdout.text() || drain(held.log)
    try {
      await once(jailer, 'spawn')
      await parts.cgroup.join(jailer.pid!)
      jailer.stdin.end('go\n')
      const socket = scope.use(await socketOf(root, closed))
      const api = scope.use(new Api(socket.path))
      await untilAnswered(api)
      for (const request of parts.requests) await api.send(request)
      const pid = await pidIn(parts.cgroup, jailer, closed)
      const vsock = scope.use(new Held(join(root, vsockSocket)))
      const ending = scope.move()
      return new FirecrackerMachine(parts, { pid, api, vsock, held, closed, ending, console: stdout })
    } catch (error) {
      if (error instanceof MachineError) throw addLog(error, held.log)
      const message = `Firecracker does not start: ${(error as Error).message}: ${complaint().trim()}`
      throw new MachineError(message, { cause: error })
    }
  }

  private constructor(parts: Parts, running: Running) {
    this.pid = running.pid
    this.exited = running.closed.then(async () => {
      this.#log = drain(running.held.log)
      // What resists is for the next start’s janitor.
      await running.ending.disposeAsync().catch(() => {})
      return { code: null, signal: this.#killed ? 'SIGKILL' : null }
    })
    this.channel = new VsockChannel(running.vsock.path, agentPort, running.closed)
    this.network = parts.network
    this.#parts = parts
    this.#api = running.api
    this.#console = running.console
    this.#held = running.held
  }

  /** Throws `MachineError`. */
  async ask(request: Request, deadlineMs?: number): Promise<unknown> {
    return await this.#api.send(request, deadlineMs)
  }

  console(): string {
    return this.#console.text()
  }

  /** What the VMM complained of since it was last asked; at most 64 KiB. */
  log(): string {
    return this.#log ?? drain(this.#held.log)
  }

  /**
   * By the control group, not the API: a machine that Firecracker itself has paused and resumed hears nothing more over
   * its vsock (1.16), or has its connections reset (before that): CHANGELOG.md of 1.17, #6100. Nothing is asked of it
   * meanwhile.
   */
  async pause(): Promise<void> {
    await this.#parts.cgroup.freeze()
  }

  async resume(): Promise<void> {
    await this.#parts.cgroup.thaw()
    if (this.#stopped) await this.ask(resources.state('Resumed'))
    this.#stopped = false
  }

  async snapshot(dir: string): Promise<void> {
    await this.#parts.cgroup.thaw()
    this.#stopped = true
    for (const request of snapshotRequests()) await this.ask(request, snapshotMs)
    const from = this.#held.snapshot.path
    for (const name of ['memory', 'state']) await takeOut(join(from, name), join(dir, name))
  }

  /** What the VMM has counted, as it writes it (docs/metrics.md): without a schema of its own. */
  async metrics(): Promise<Record<string, unknown>> {
    drain(this.#held.metrics)
    await this.ask(resources.action('FlushMetrics'))
    return JSON.parse(drain(this.#held.metrics)) as Record<string, unknown>
  }

  async usage(): Promise<{ cpuMs: number; memoryMb: number }> {
    try {
      const stat = readFileSync(`/proc/${this.pid}/stat`, 'utf8')
      // proc(5), from the third field on: utime and stime are the 14th and 15th.
      const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
      const status = readFileSync(`/proc/${this.pid}/status`, 'utf8')
      return {
        cpuMs: ((Number(fields[11]) + Number(fields[12])) * 1000) / ticksPerSecond,
        memoryMb: Number(/^VmRSS:\s+(\d+) kB$/m.exec(status)?.[1] ?? 0) / 1024,
      }
    } catch {
      return { cpuMs: 0, memoryMb: 0 }
    }
  }

  async kill(): Promise<void> {
    this.#killed ||= this.#log === undefined
    await this.#parts.cgroup.kill().catch(() => {})
    await this.exited
  }
}

interface Running {
  pid: number
  api: Api
  vsock: Held
  held: { log: Held; metrics: Held; snapshot: Held }
  /** Settles when the VMM has ended. */
  closed: Promise<unknown>
  /** All that is to be given back then. */
  ending: AsyncDisposableStack
  console: Tail
}

/** The end of what a stream says. It is read always, so that whoever writes never waits. */
class Tail {
  #pieces: Buffer[] = []
  #size = 0

  constructor(stream: Readable) {
    stream.on('error', () => {})
    stream.on('data', (piece: Buffer) => {
      this.#pieces.push(piece)
      this.#size += piece.length
      if (this.#size > 4 * keptBytes || this.#pieces.length > 1_000) this.#shorten()
    })
  }

  #shorten(): Buffer {
    const kept = Buffer.from(Buffer.concat(this.#pieces).subarray(-keptBytes))
    this.#pieces = [kept]
    this.#size = kept.length
    return kept
  }

  text(): string {
    return this.#shorten().toString()
  }
}

/** What the machine finds in its jail, and holds on what it may write there. */
async function furnish(root: string, { identity: { uid, gid }, fill }: Parts) {
  const [log, metrics, snapshot] = [join(root, 'log'), join(root, 'metrics'), join(root, snapshotDir)]
  await makePipes([log, metrics])
  await mkdir(snapshot, { mode: 0o700 })
  // A pipe that nobody empties keeps what came first; the VMM drops the rest.
  const { O_RDWR, O_NONBLOCK, O_RDONLY, O_DIRECTORY } = constants
  const held = {
    log: new Held(log, O_RDWR | O_NONBLOCK),
    metrics: new Held(metrics, O_RDWR | O_NONBLOCK),
    snapshot: new Held(snapshot, O_RDONLY | O_DIRECTORY),
  }
  try {
    for (const path of [log, metrics, snapshot]) chownSync(path, uid, gid)
    for (const path of [log, metrics]) chmodSync(path, 0o600)
    await fill(root)
    return held
  } catch (error) {
    for (const one of Object.values(held)) one[Symbol.dispose]()
    throw error
  }
}

async function makePipes(paths: string[]): Promise<void> {
  const [code] = (await once(spawn('mkfifo', paths, { env: programsEnv, stdio: 'ignore' }), 'close')) as [
    number | null,
  ]
  if (code !== 0) throw new Error(`mkfifo failed (${code})`)
}

/** All that is in a pipe now. */
function drain(pipe: Held): string {
  const buffer = Buffer.alloc(2 * pipeBytes)
  let size = 0
  try {
    while (size < buffer.length) size += readSync(pipe.descriptor, buffer, size, buffer.length - size, null)
  } catch {
    // It is empty.
  }
  return buffer.subarray(0, size).toString()
}

/** The socket of the API. Throws where the VMM ends before it is there. */
async function socketOf(root: string, closed: Promise<unknown>): Promise<Held> {
  let over = false
  closed.then(() => {
    over = true
  })
  for (const until = performance.now() + startMs; ; await sleep(pollMs)) {
    const socket = held(join(root, apiSocket))
    if (socket !== undefined) return socket
    if (over) throw new Error('it has ended')
    if (performance.now() > until) throw new Error(`no socket within ${startMs} ms`)
  }
}

/** The socket is there for a moment before anybody listens. */
async function untilAnswered(api: Api): Promise<void> {
  for (const until = performance.now() + startMs; ; await sleep(pollMs))
    try {
      await api.send(resources.instance())
      return
    } catch (error) {
      const refused = ((error as Error).cause as NodeJS.ErrnoException | undefined)?.code === 'ECONNREFUSED'
      if (!refused || performance.now() > until) throw error
    }
}

function held(path: string): Held | undefined {
  try {
    return new Held(path)
  } catch {
    return undefined
  }
}

/** The jailer ends once the VMM, in its own pid namespace, has begun: then that is all there is. */
async function pidIn(cgroup: Cgroup, jailer: ChildProcess, closed: Promise<unknown>): Promise<number> {
  if (jailer.exitCode === null && jailer.signalCode === null)
    await Promise.race([once(jailer, 'exit'), closed])
  const pid = cgroup.pids()[0]
  if (pid === undefined) throw new Error('it has ended')
  return pid
}

/**
 * Out of the reach of the VMM. It may have put anything in place of a file: only a plain one, of a single name, is
 * taken.
 */
async function takeOut(from: string, to: string): Promise<void> {
  await rename(from, to).catch(async (error: NodeJS.ErrnoException) => {
    if (error.code !== 'EXDEV') throw error
    using file = new Held(from, constants.O_RDONLY | constants.O_NONBLOCK)
    await copyFile(file.path, to, constants.COPYFILE_FICLONE)
    await rm(from)
  })
  const found = lstatSync(to)
  if (!found.isFile() || found.nlink !== 1) {
    await rm(to, { force: true })
    throw new MachineError('Firecracker has written no snapshot')
  }
  await chown(to, 0, 0)
  await chmod(to, 0o444)
}

function addLog(error: MachineError, log: Held): MachineError {
  const said = drain(log).trim()
  if (said !== '') error.message += ` (log: ${said.slice(-2_000)})`
  return error
}
