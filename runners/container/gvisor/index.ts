/** The engine `gvisor`: boxes are sandboxes of Debian’s runsc. */
import { execFile } from 'node:child_process'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import type { LimitReport } from '../../../shared/backends.ts'
import { BoxError, type Engine, type EngineOptions } from '../engine.ts'
import { findProgram } from '../images/processes.ts'
import { unmeasured } from '../phases.ts'
import { GvisorBox } from './box.ts'
import type { GvisorSpec, Host } from './bundle.ts'
import { Cgroup, findHierarchy } from './cgroups.ts'
import type { Platform } from './launch.ts'
import { LauncherStock } from './launcher.ts'
import { recordOwner, removeDeadOwners, removeOwner } from './owners.ts'
import { PipeStock } from './pipes.ts'
import { probeLimits, trialImage } from './probe.ts'
import { programsEnv } from './programs.ts'
import { hostsFile, resolvFile } from './root.ts'

export type { GvisorSpec, Sockets } from './bundle.ts'

export interface GvisorOptions extends EngineOptions {
  /** Path of runsc; looked for where Debian has programs where it is left out. */
  runsc?: string
  /** Tried in this order; systrap is faster, and works on fewer kernels. */
  platforms?: readonly Platform[]
  /** Path of the control group that those of all owners are in. */
  cgroupParent?: string
  /** Launchers that stand ready for boxes to come. */
  launchers?: number
}

/** An engine whose boxes can be told more than others’. */
export interface GvisorEngine extends Engine {
  readonly platform: Platform
  create(spec: GvisorSpec): Promise<GvisorBox>
}

const execute = promisify(execFile)
const versionMs = 10_000
/** Memory of running boxes is looked at so often (ms). */
const watchMs = 100
const allPlatforms: readonly Platform[] = ['systrap', 'ptrace']
const tools = ['setpriv', 'unshare', 'nsenter', 'mount', 'mkfifo', 'sh']
/**
 * Removes what dead owners left, and finds out by trying how runsc runs here and which limits hold; that takes about
 * a second. Throws an Error that says what is missing.
 */
export async function createGvisor(options: GvisorOptions): Promise<GvisorEngine> {
  const { owner, stateDir, platforms = allPlatforms, cgroupParent = '/vulcan', launchers = 2 } = options
  const { runsc, busybox } = findTools(options)
  const dir = join(stateDir, owner)
  const hierarchy = findHierarchy()
  const cgroup = new Cgroup(hierarchy, join(cgroupParent, owner))
  await mkdir(stateDir, { recursive: true, mode: 0o700 })
  await using scope = new AsyncDisposableStack()
  await recordOwner(stateDir, owner, cgroup.path)
  scope.defer(() => new Cgroup(hierarchy, cgroupParent).removeIfEmpty())
  scope.defer(() => removeOwner(stateDir, hierarchy, { name: owner, cgroup: cgroup.path }))
  await removeDeadOwners(stateDir, hierarchy)
  await cgroup.makeParent().catch((error) => {
    throw new Error(`control groups cannot be made below ${cgroupParent}: ${error.message}`, { cause: error })
  })

  const files = { hosts: join(dir, 'hosts'), resolvConf: join(dir, 'resolv.conf') }
  const [pipes, image, version] = await Promise.all([
    PipeStock.open(join(dir, 'pipes')),
    trialImage(join(dir, 'trial'), busybox),
    versionOf(runsc),
    writeFile(files.hosts, hostsFile([])),
    writeFile(files.resolvConf, resolvFile([])),
  ])
  const errors: string[] = []
  for (const platform of platforms) {
    const engine = new Runsc(version, { runsc, platform, dir, cgroup, pipes, launchers, ...files })
    try {
      await engine.probe((create) => probeLimits(create, image))
      const resources = scope.move()
      engine.onClose(() => resources.disposeAsync())
      return engine
    } catch (error) {
      await engine[Symbol.asyncDispose]()
      errors.push(`${platform}: ${(error as Error).message}`)
    }
  }
  throw new Error(`runsc cannot run a sandbox here (${errors.join('; ')})`)
}

/** Throws an Error that says what to install. */
function findTools({ runsc = 'runsc' }: GvisorOptions): { runsc: string; busybox: string } {
  if (process.getuid?.() !== 0) throw new Error('gVisor’s limits hold only where the runner is root')
  const found = { runsc: findProgram(runsc), busybox: findProgram('busybox') }
  const missing = [
    ...(found.runsc === undefined ? ['runsc'] : []),
    ...(found.busybox === undefined ? ['busybox'] : []),
    ...tools.filter((tool) => findProgram(tool) === undefined),
  ]
  if (missing.length > 0) throw new Error(`not found: ${missing.join(', ')}`)
  return { runsc: found.runsc!, busybox: found.busybox! }
}

/** Such as `20240729`. */
async function versionOf(runsc: string): Promise<string> {
  const { stdout } = await execute(runsc, ['--version'], { timeout: versionMs, env: programsEnv })
  const full = /version (\S+)/.exec(stdout)?.[1] ?? 'of unknown version'
  return /(\d{8})/.exec(full)?.[1] ?? full
}

class Runsc implements GvisorEngine {
  readonly version: string
  readonly platform: Platform
  readonly walls: string[]
  readonly missing: { wall: string; fix: string }[] = []
  readonly egress: Engine['egress'] = ['none', 'all', 'allowlist']
  limits: LimitReport = {}
  readonly #host: Host
  readonly #launchers: LauncherStock
  readonly #boxes = new Set<GvisorBox>()
  readonly #making = new Set<Promise<GvisorBox>>()
  readonly #watch: NodeJS.Timeout
  #closed: Promise<void> | undefined
  #onClose: (() => Promise<void>) | undefined

  constructor(version: string, host: Host) {
    this.version = `runsc ${version} (${host.platform})`
    this.platform = host.platform
    this.walls = [
      'gvisor',
      'seccomp',
      'private namespaces',
      'user namespaces',
      'control groups',
      'no capabilities',
      'no new privileges',
      'read-only root',
    ]
    this.#host = host
    this.#launchers = new LauncherStock(host)
    this.#watch = setInterval(() => {
      for (const box of this.#boxes) box.watchMemory()
    }, watchMs)
    this.#watch.unref()
  }

  async probe(find: (create: GvisorEngine['create']) => Promise<LimitReport>): Promise<void> {
    this.limits = await find((spec) => this.create(spec))
    for (const [limit, verdict] of Object.entries(this.limits))
      if (verdict === 'not enforced')
        this.missing.push({ wall: `limit of ${limit}`, fix: 'see docs/containers.md: control groups' })
  }

  onClose(release: () => Promise<void>): void {
    this.#onClose = release
  }

  async create(spec: GvisorSpec): Promise<GvisorBox> {
    const { phases = unmeasured } = spec
    const root = await spec.image.root(phases)
    if (this.#closed !== undefined) throw new BoxError('engine', 'the engine is closed')
    const making = phases.measure('create container', () => this.#make(spec, root))
    this.#making.add(making)
    try {
      return await making
    } finally {
      this.#making.delete(making)
    }
  }

  async #make(spec: GvisorSpec, root: string): Promise<GvisorBox> {
    const launcher = await this.#launchers.take()
    return await GvisorBox.create(this.#host, launcher, spec, root, (box) => {
      this.#boxes.add(box)
      box.removed.then(() => {
        this.#boxes.delete(box)
        this.#launchers.refill()
      })
    })
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.#closed ??= this.#close()
    return this.#closed
  }

  async #close(): Promise<void> {
    clearInterval(this.#watch)
    const removeAll = () => Promise.all([...this.#boxes].map((box) => box.remove()))
    await removeAll()
    // Those that were not there yet.
    await Promise.allSettled(this.#making)
    await removeAll()
    await this.#launchers.close()
    await this.#onClose?.()
  }
}
