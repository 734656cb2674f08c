/**
 * For tests of what is common to all engines: boxes that are processes under bubblewrap on this host's own files,
 * and a store with the one image that they make. They have namespaces of their own and no limits.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readFileSync } from 'node:fs'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { PassThrough, type Readable, type Writable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import { assembleRunner } from '../../../runners/container/assemble.ts'
import {
  type Box,
  BoxError,
  type BoxSpec,
  type Bytes,
  type Engine,
  type Exit,
  type Image,
  type ImageConfig,
  ImageError,
  type ImageStore,
} from '../../../runners/container/engine.ts'
import { unmeasured } from '../../../runners/container/phases.ts'
import type { PoolOptions } from '../../../runners/container/pool.ts'
import { RunnerMetrics } from '../../../runners/metrics.ts'
import type { Runner } from '../../../runners/runner.ts'
import type { Digest } from '../../../shared/workload.ts'
import { skip } from '../../harness.ts'

const missing = ['/usr/bin/bwrap', '/usr/bin/python3'].filter((path) => !existsSync(path))

/** A test that such boxes are needed for. */
export const localTest = (name: string, body: () => Promise<void>) =>
  missing.length === 0 ? test(name, body) : skip(test, name, `not on this host: ${missing.join(', ')}`)

const digest: Digest = `sha256:${'0'.repeat(64)}`

export class LocalBox implements Box {
  readonly name: string
  readonly stdin: Writable = new PassThrough()
  readonly stdout: Readable = new PassThrough()
  readonly stderr: Readable = new PassThrough()
  readonly exited: Promise<Exit>
  frozen = false
  freezes = 0
  /** What the test says the kernel did. */
  oomKills = 0
  /** Bytes, as the test says. */
  disk: Bytes | undefined
  readonly spec: BoxSpec
  readonly #args: string[]
  #pid: number | undefined
  #inner: number | undefined
  #exit: (exit: Exit) => void = () => {}

  constructor(name: string, spec: BoxSpec, args: string[]) {
    this.name = name
    this.spec = spec
    this.#args = args
    this.exited = new Promise((resolve) => {
      this.#exit = (exit) => resolve({ ...exit, oom: exit.oom || this.oomKills > 0 })
    })
  }

  async start(): Promise<void> {
    if (missing.length > 0) throw new BoxError('engine', `not on this host: ${missing.join(', ')}`)
    if (this.spec.argv[0] === '/no/such/command') throw new BoxError('user', 'there is no /no/such/command')
    const child = spawn('bwrap', [...this.#args, '--', ...this.spec.argv], {
      env: this.spec.env,
      stdio: ['pipe', 'pipe', 'pipe', 'pipe'],
      detached: true,
    })
    this.#pid = child.pid
    this.stdin.pipe(child.stdin!)
    child.stdin!.on('error', () => {})
    child.stdout!.pipe(this.stdout as PassThrough)
    child.stderr!.pipe(this.stderr as PassThrough)
    child.on('close', (code, signal) => {
      const killed = signal !== null || code === 128 + 9
      void Promise.all([ended(this.stdout), ended(this.stderr)]).then(() =>
        this.#exit({
          code: signal === null ? code! : 128 + 9,
          oom: false,
          ...(killed ? { lost: true } : {}),
        }),
      )
    })
    const text = (await (child.stdio[3] as Readable).toArray()).join('')
    const inner = /"child-pid": (\d+)/.exec(text)?.[1]
    if (inner !== undefined) this.#inner = Number(inner)
  }

  async update(): Promise<void> {}
  async freeze(): Promise<void> {
    this.frozen = true
    this.freezes++
  }
  async thaw(): Promise<void> {
    this.frozen = false
  }
  async usage() {
    return { cpuMs: 1, memoryPeakMb: 10, oomKills: this.oomKills, disk: this.disk }
  }
  async kill(): Promise<void> {
    if (this.#pid === undefined) return this.#exit({ code: 137, oom: false })
    // The group too: a bwrap whose other half was killed before it knew of it waits for it for ever.
    for (const pid of [-this.#pid, ...this.pids()]) {
      try {
        process.kill(pid, 'SIGKILL')
      } catch {
        // It is dead already.
      }
    }
    this.stdout.resume()
    this.stderr.resume()
    await this.exited
    while (this.pids().length > 0) await sleep(5)
  }
  async remove(): Promise<void> {
    await this.kill()
  }
  pids(): number[] {
    return [this.#inner, this.#pid].filter((pid) => pid !== undefined).filter(isAlive)
  }
}

/** It exists and is not a zombie. */
function isAlive(pid: number): boolean {
  try {
    return !/\) Z /.test(readFileSync(`/proc/${pid}/stat`, 'latin1'))
  } catch {
    return false
  }
}

/** Its output has been read, or nobody reads it. */
const ended = (stream: Readable) =>
  new Promise<void>((resolve) => {
    if (stream.readableEnded || stream.destroyed) return resolve()
    stream.on('end', () => resolve())
    stream.on('close', () => resolve())
    if (stream.readableFlowing === null) stream.resume()
  })

export class LocalEngine implements Engine {
  readonly version = 'local'
  readonly walls = ['bubblewrap']
  readonly missing = []
  readonly limits = {}
  readonly egress: Engine['egress'] = ['none']
  readonly boxes: LocalBox[] = []

  async create(spec: BoxSpec): Promise<LocalBox> {
    const bind = spec.mounts.flatMap(({ source, target, readonly }) => [
      readonly ? '--ro-bind' : '--bind',
      source,
      target,
    ])
    const args = [
      ...['--unshare-all', '--die-with-parent', '--clearenv', '--info-fd', '3'],
      ...['--ro-bind', '/usr', '/usr', '--ro-bind', '/etc', '/etc', '--proc', '/proc', '--dev', '/dev'],
      ...['lib', 'lib64', 'bin', 'sbin'].flatMap((name) => ['--symlink', `usr/${name}`, `/${name}`]),
      ...['--tmpfs', '/tmp', '--ro-bind', process.execPath, '/opt/node'],
      ...['--uid', String(spec.user.uid), '--gid', String(spec.user.gid)],
      ...bind,
      ...['--dir', spec.cwd, '--chdir', spec.cwd],
      ...Object.entries(spec.env).flatMap(([name, value]) => ['--setenv', name, value]),
    ]
    const { phases = unmeasured } = spec
    return await phases.measure('create container', async () => {
      const box = new LocalBox(`local-${this.boxes.length}`, spec, args)
      this.boxes.push(box)
      return box
    })
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(this.boxes.map((box) => box.remove()))
  }
}

export const localConfig: ImageConfig = {
  entrypoint: [],
  cmd: [],
  env: { PATH: '/opt:/usr/bin:/bin' },
  workingDir: '/',
  user: '65534:65534',
}

/** An image of any reference but those that hold `missing`; one that holds `endless` never comes. */
export const localImages = (root: string): ImageStore => ({
  async get(source, signal, phases = unmeasured): Promise<Image> {
    signal.throwIfAborted()
    if (source.kind === 'reference' && source.reference.includes('missing'))
      throw new ImageError('image_not_found', `there is no image ${source.reference}`)
    if (source.kind === 'reference' && source.reference.includes('endless'))
      await phases.measure('pull image', () => once(signal, 'abort'))
    return { digest, config: localConfig, layout: root, root: async () => root, [Symbol.dispose]() {} }
  },
  async [Symbol.asyncDispose]() {},
})

/** A runner over such boxes, with a directory of its own. */
export async function localRunner(
  pool: Partial<PoolOptions> = {},
): Promise<{ runner: Runner; engine: LocalEngine; metrics: RunnerMetrics; dir: string } & AsyncDisposable> {
  const dir = await mkdtemp(join(tmpdir(), 'vulcan-local-'))
  const root = join(dir, 'root')
  await mkdir(join(root, 'etc'), { recursive: true })
  await writeFile(join(root, 'etc/passwd'), 'root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n')
  await writeFile(join(root, 'etc/group'), 'root:x:0:\nann:x:1000:\nlab:x:2000:ann\n')
  const engine = new LocalEngine()
  const metrics = new RunnerMetrics('local-test', 'gvisor')
  const runner = await assembleRunner({
    isolation: 'gvisor',
    owner: 'local-test',
    engine,
    images: localImages(root),
    networks: undefined,
    noNetworks: { reason: 'a test has none', fix: 'nothing' },
    findRuntime: async (name) => (name === 'go' ? undefined : { layout: root, digest }),
    filesDir: join(dir, 'files'),
    cacheDir: join(dir, 'cache'),
    budgetMb: 1_000,
    slots: 8,
    pool,
    metrics,
  })
  return {
    runner,
    engine,
    metrics,
    dir,
    async [Symbol.asyncDispose]() {
      await runner[Symbol.asyncDispose]()
      await rm(dir, { recursive: true, force: true })
    },
  }
}
