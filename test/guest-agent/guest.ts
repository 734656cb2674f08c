/** A real machine in QEMU with the agent in it, and the runner’s side of its channel in a few lines. */
import { type ChildProcess, spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { copyFile, mkdir, mkdtemp, open, readFile, rm, symlink, truncate, writeFile } from 'node:fs/promises'
import { connect, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { buildAgent } from '../../rootfs/agent.ts'
import { writeErofs } from '../../rootfs/erofs.ts'
import { writeJobDrive } from '../../rootfs/index.ts'
import { ensureInitramfs } from '../../rootfs/initramfs.ts'
import { readParts } from '../../rootfs/parts.ts'
import { jobDriveBytes } from '../../runners/microvm/driver.ts'
import { cacheDirectory } from '../../scripts/cache-directory.ts'
import { systemPath, which } from '../../scripts/host-tools.ts'
import {
  type Configure,
  type Exited,
  encodeMachineFrame,
  type Failed,
  MachineFrames,
  type MachineKind,
  type MachineUsage,
  machineKinds,
  type Ready,
  type Start,
} from '../../shared/machine.ts'

const bootMs = 40_000
const maxBoots = 6
/** The kernel says so under load, and then stands still: emulation has given it no time to look at its clock. */
const stuck = 'could not calculate TSC khz'
const answerMs = 30_000
const memoryMb = 256

/** Why no machine can be started here; undefined where one can. */
export async function lacking(): Promise<string | undefined> {
  const missing = ['qemu-system-x86_64', 'gcc', 'busybox'].find(
    (name) => which(name, systemPath) === undefined,
  )
  if (missing !== undefined) return `${missing} is missing`
  const parts = await readParts(cacheDirectory(process.env), 'packaged')
  return parts === undefined ? 'no kernel is there: npm run setup -- microvm' : undefined
}

interface Frame {
  kind: number
  stream: number
  payload: Buffer
}

/** What one process of a machine said, and how it ended. */
export interface Ran {
  stdout: string
  stderr: string
  result: string
  exited: Exited
}

export const start = (argv: string[], more: Partial<Start> = {}): Start => ({
  argv,
  env: { PATH: '/bin' },
  cwd: '/',
  user: { uid: 1000, gid: 1000, groups: [] },
  memory_mb: 64,
  pids: 32,
  file_bytes: 2 ** 30,
  result: null,
  result_bytes: 1024,
  ...more,
})

export const shell = (script: string, more: Partial<Start> = {}): Start => start(['sh', '-c', script], more)

export class Guest implements AsyncDisposable {
  readonly dir: string
  readonly #child: ChildProcess
  readonly #exited: Promise<unknown>
  #socket: Socket
  #frames: Frame[] = []
  #wake = () => {}
  /** Credits are given for what comes, unless a test holds them back. */
  generous = true

  private constructor(dir: string, child: ChildProcess, socket: Socket) {
    this.dir = dir
    this.#child = child
    this.#exited = once(child, 'exit')
    this.#socket = socket
    this.#listen(socket)
  }

  /** Boots one. Under load emulation can lose its clock while the kernel starts, so a boot is tried more than once. */
  static async boot({ root = busyboxRoot, devices = [] as string[] } = {}): Promise<Guest> {
    const cacheDir = cacheDirectory(process.env)
    const { kernel } = (await readParts(cacheDir, 'packaged'))!
    const agent = await buildAgent({ cacheDir, log: console.log })
    const initramfs = await ensureInitramfs(cacheDir, { agent: agent.path, modules: kernel.modules })
    const parts = { kernel: kernel.vmlinux, initramfs }
    for (let attempt = 1; ; attempt++) {
      const dir = await mkdtemp(join(tmpdir(), 'vulcan-guest-'))
      const guest = await Guest.#spawn(dir, parts, root, devices).catch(async (error) => {
        await rm(dir, { recursive: true, force: true })
        throw error
      })
      try {
        await guest.#ready()
        return guest
      } catch (error) {
        const said = await guest.console()
        await guest[Symbol.asyncDispose]()
        if (attempt === maxBoots) throw new Error(`no boot: ${said.slice(-500)}`, { cause: error })
      }
    }
  }

  async #ready(): Promise<void> {
    const watch = new AbortController()
    const ready = this.next(machineKinds.ready, bootMs).finally(() => watch.abort())
    while (!watch.signal.aborted) {
      await Promise.race([sleep(200), ready])
      if ((await this.console()).includes(stuck)) throw new Error(stuck)
    }
    await ready
  }

  static async #spawn(
    dir: string,
    parts: { kernel: string; initramfs: string },
    root: (dir: string) => Promise<void>,
    devices: string[],
  ) {
    await mkdir(join(dir, 'tree'))
    await root(join(dir, 'tree'))
    const file = await open(join(dir, 'root.erofs'), 'wx')
    const source = { source: join(dir, 'tree'), path: '.' }
    await writeErofs([source], file, { owner: 'root', maxBytes: 2 ** 30 })
    await file.close()
    await writeFile(join(dir, 'job'), '')
    await truncate(join(dir, 'job'), jobDriveBytes)
    const drive = (name: string, path: string) => [
      ...['-drive', `id=${name},file=${path},format=raw,if=none,read-only=on`],
      ...['-device', `virtio-blk-device,drive=${name},serial=${name}`],
    ]
    const args = [
      ...['-nodefaults', '-no-user-config', '-nographic', '-no-reboot', '-m', String(memoryMb)],
      ...[
        '-accel',
        'tcg',
        '-M',
        'microvm,acpi=on,rtc=on',
        '-kernel',
        parts.kernel,
        '-initrd',
        parts.initramfs,
      ],
      ...['-append', `console=ttyS0 panic=-1 no_timer_check tsc_early_khz=${await clockKhz()}`],
      ...drive('root', join(dir, 'root.erofs')),
      ...drive('job', join(dir, 'job')),
      ...['-device', 'virtio-serial-device'],
      ...['-chardev', `socket,id=agent,path=${join(dir, 'agent')},server=on,wait=off`],
      ...['-device', 'virtserialport,chardev=agent,name=vulcan', '-device', 'virtio-rng-device'],
      ...devices,
      ...['-serial', `file:${join(dir, 'console')}`],
    ]
    const child = spawn('qemu-system-x86_64', args, { stdio: ['ignore', 'ignore', 'inherit'] })
    for (let waited = 0; !existsSync(join(dir, 'agent')) && waited < 10_000; waited += 20) await sleep(20)
    return new Guest(dir, child, await Guest.#connect(dir))
  }

  static async #connect(dir: string): Promise<Socket> {
    const socket = connect(join(dir, 'agent'))
    await once(socket, 'connect')
    return socket
  }

  #listen(socket: Socket): void {
    const frames = new MachineFrames()
    socket.on('error', () => {})
    socket.on('data', (chunk: Buffer) =>
      frames.push(chunk, (kind, stream, payload) => {
        this.#frames.push({ kind, stream, payload: Buffer.from(payload) })
        if (kind === machineKinds.data && this.generous) this.credit(stream, payload.length)
        this.#wake()
      }),
    )
  }

  /** The host goes away and comes back, as it does around a snapshot. */
  async reconnect(): Promise<void> {
    const gone = once(this.#socket, 'close')
    this.#socket.destroy()
    await gone
    await sleep(100)
    this.#socket = await Guest.#connect(this.dir)
    this.#listen(this.#socket)
  }

  raw(bytes: Uint8Array): void {
    this.#socket.write(bytes)
  }

  send(kind: MachineKind, payload: unknown = Buffer.alloc(0), stream = 0): void {
    const bytes = payload instanceof Uint8Array ? payload : Buffer.from(JSON.stringify(payload) ?? '')
    this.raw(encodeMachineFrame(kind, bytes, stream))
  }

  credit(stream: number, bytes: number): void {
    this.send(machineKinds.credit, Buffer.from(String(bytes)), stream)
  }

  put(path: string, kind: 'file' | 'directory' | 'link', content = '', mode = 0o644): void {
    const header = { path, kind, mode, ...(kind === 'link' ? { to: content } : {}) }
    const bytes = kind === 'file' ? content : ''
    this.send(machineKinds.put, Buffer.from(`${JSON.stringify(header)}\0${bytes}`))
  }

  /** Takes the next frame of this kind out of what has come. `failed` rejects unless it is what is waited for. */
  async next(kind: MachineKind, ms = answerMs): Promise<Frame> {
    const deadline = Date.now() + ms
    for (;;) {
      const at = this.#frames.findIndex((frame) => frame.kind === kind)
      if (at >= 0) return this.#frames.splice(at, 1)[0]!
      const failed = this.#frames.find((frame) => frame.kind === machineKinds.failed)
      if (failed !== undefined) throw new Error(`failed: ${failed.payload}`)
      const left = deadline - Date.now()
      if (left <= 0) throw new Error(`no frame of kind ${kind} within ${ms} ms; ${await this.console()}`)
      const { promise, resolve } = Promise.withResolvers<void>()
      this.#wake = resolve
      const timer = setTimeout(resolve, left)
      await promise
      clearTimeout(timer)
    }
  }

  async nextJson<T>(kind: MachineKind): Promise<T> {
    return JSON.parse((await this.next(kind)).payload.toString()) as T
  }

  failed = () => this.nextJson<Failed>(machineKinds.failed)

  async configure(more: Partial<Configure> = {}): Promise<void> {
    const configure: Configure = {
      time_ms: Date.now(),
      entropy: randomBytes(64).toString('hex'),
      network: null,
      mounts: [],
      disk_mb: 32,
      ...more,
    }
    this.send(machineKinds.configure, configure)
    await this.next(machineKinds.configured)
  }

  /** Milliseconds until the agent has answered. */
  async ping(): Promise<number> {
    const began = performance.now()
    this.send(machineKinds.ping, Buffer.from('x'))
    await this.next(machineKinds.pong)
    return performance.now() - began
  }

  async usage(): Promise<MachineUsage> {
    this.send(machineKinds.ask)
    return this.nextJson(machineKinds.usage)
  }

  async start(what: Start): Promise<void> {
    this.send(machineKinds.start, what)
    await this.next(machineKinds.started)
  }

  /** Waits for its end. */
  async finish(): Promise<Ran> {
    const exited = await this.nextJson<Exited>(machineKinds.exited)
    const collect = (kind: number, stream: number) =>
      Buffer.concat(this.#frames.filter((f) => f.kind === kind && f.stream === stream).map((f) => f.payload))
    return {
      stdout: collect(machineKinds.data, 1).toString(),
      stderr: collect(machineKinds.data, 2).toString(),
      result: collect(machineKinds.result, 0).toString(),
      exited,
    }
  }

  async run(what: Start): Promise<Ran> {
    await this.start(what)
    return this.finish()
  }

  /** Bytes of a stream that have come so far. */
  received(stream: number): number {
    const frames = this.#frames.filter((f) => f.kind === machineKinds.data && f.stream === stream)
    return frames.reduce((sum, { payload }) => sum + payload.length, 0)
  }

  /** Of a stream that has ended, or undefined within `ms`. */
  hasEnded(stream: number): boolean {
    return this.#frames.some((frame) => frame.kind === machineKinds.end && frame.stream === stream)
  }

  writeJob(mounts: { source: string; path: string }[]): Promise<number> {
    return writeJobDrive(mounts, join(this.dir, 'job'))
  }

  console = () => readFile(join(this.dir, 'console'), 'utf8').catch(() => '')

  /** Whether the machine has switched itself off by then. */
  async isOff(ms = 15_000): Promise<boolean> {
    return Promise.race([this.#exited.then(() => true), sleep(ms, false, { ref: false })])
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#socket.destroy()
    this.#child.kill('SIGKILL')
    await this.#exited
    await rm(this.dir, { recursive: true, force: true, maxRetries: 10, retryDelay: 100 })
  }
}

export const parseReady = (frame: Frame): Ready => JSON.parse(frame.payload.toString())

/** Of the host’s processor, which emulation counts with. Not known to the kernel, it measures, and fails under load. */
async function clockKhz(): Promise<number> {
  const mhz = /^cpu MHz\s*: ([\d.]+)$/m.exec(await readFile('/proc/cpuinfo', 'utf8'))?.[1]
  return Math.round(Number(mhz ?? 0) * 1_000)
}

const applets =
  'sh cat echo ls id env pwd sleep kill head tail dd mkdir mount touch ps stat wc date seq true false tr md5sum ip ln mknod grep nc timeout'

/** A root with busybox in it, which lacks /workspace, /.vulcan and the like. */
export async function busyboxRoot(dir: string): Promise<void> {
  for (const name of ['bin', 'etc', 'var']) await mkdir(join(dir, name))
  await copyFile(which('busybox', systemPath)!, join(dir, 'bin', 'busybox'))
  for (const name of applets.split(' ')) await symlink('busybox', join(dir, 'bin', name))
  await writeFile(join(dir, 'etc', 'passwd'), 'root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n')
}
