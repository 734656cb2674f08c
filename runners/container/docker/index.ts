/** Boxes that are containers of a Docker Engine. */
import { randomBytes } from 'node:crypto'
import { rm } from 'node:fs/promises'
import { createInterface } from 'node:readline'
import type { Readable } from 'node:stream'
import type { ContainerCreateOptions } from 'dockerode'
import type { LimitReport } from '../../../shared/backends.ts'
import {
  type Box,
  BoxError,
  type BoxLimits,
  type BoxSpec,
  type Engine,
  type EngineOptions,
  type Network,
} from '../engine.ts'
import { unmeasured } from '../phases.ts'
import { Api, ApiError, answerMs } from './api.ts'
import { type DockerBox, openBox } from './box.ts'
import type { Groups } from './cgroup.ts'
import { namePrefix, ownerLabel, ownLabels } from './identity.ts'
import { Images } from './images.ts'
import { ownDirectory, removeAbandoned, removeContainer } from './janitor.ts'
import { createOptions, holderOptions } from './options.ts'
import { ensureProbeImage, probeLimits, probeNetwork } from './probe.ts'

/** What could not be removed is tried again, ms. */
const againMs = 5_000
/** What the engine did not answer it may do so much later, ms. */
const doubtMs = 5 * 60_000
/** Leftovers of others that have ended since, and images that nobody uses, ms. */
const janitorMs = 10 * 60_000

export interface DockerOptions extends EngineOptions {
  /** `unix:///path` or `tcp://127.0.0.1:port`; default: unix:///var/run/docker.sock. */
  host?: string
  /** Of those the engine knows, such as `runsc`; default: the engine’s own choice. */
  runtime?: string
  /** How long the engine may take over an answer, ms. */
  answerMs?: number
}

/**
 * Tries the engine, removes what ended processes of vulcan left in it, and finds out what it enforces. Throws
 * `BoxError` where no box can be had, with the reason.
 */
export async function createDocker(options: DockerOptions): Promise<Engine> {
  await using scope = new AsyncDisposableStack()
  const api = new Api(options.host, options.answerMs ?? answerMs)
  const directory = await ownDirectory(options.stateDir, options.owner)
  scope.defer(() => rm(directory, { recursive: true, force: true }))
  const info = (await api.call('reach the Docker Engine', () => api.docker.info())) as Info
  if (info.OSType !== 'linux')
    throw new BoxError('engine', `the Docker Engine runs ${info.OSType}, not linux, containers`)
  await removeAbandoned(api)
  const engine = new DockerEngine(api, options, info, directory)
  scope.use(engine)
  await engine.begin()
  scope.move()
  return engine
}

/** What is used of `GET /info`. */
interface Info {
  ServerVersion: string
  Driver: string
  CgroupVersion?: string
  DefaultRuntime: string
  NCPU: number
  OSType: string
  InitBinary?: string
  SecurityOptions?: string[]
}

/** A container in the engine. */
interface Made {
  id: string
  name: string
}

class DockerEngine implements Engine {
  readonly version: string
  readonly walls: string[]
  readonly missing: { wall: string; fix: string }[] = []
  limits: LimitReport = {}
  egress: Engine['egress'] = ['none']
  readonly #api: Api
  readonly #options: DockerOptions
  readonly #cores: number
  readonly #guestKernel: boolean
  readonly #directory: string
  readonly #images: Images
  readonly #labels: Record<string, string>
  readonly #boxes = new Set<DockerBox>()
  /** Ids of containers that lacked memory. */
  readonly #lacking = new Set<string>()
  /** Of containers that are wanted, also while the engine makes them. */
  readonly #names = new Set<string>()
  /** Until then (ms) there may be containers that nobody wants: not removed, or made after all. */
  #inDoubtUntil = 0
  readonly #timers: NodeJS.Timeout[] = []
  #events: Readable | undefined
  /** Of the image that boxes of our own are made of. */
  #probeRef: string | undefined
  #init: boolean
  #direct = false
  #groups: Groups | undefined
  #disposed: Promise<void> | undefined

  constructor(api: Api, options: DockerOptions, info: Info, directory: string) {
    this.#api = api
    this.#options = options
    this.#cores = info.NCPU
    this.#directory = directory
    this.#images = new Images(api, directory)
    this.#labels = ownLabels(options.owner)
    this.#init = (info.InitBinary ?? '') !== ''
    const runtime = options.runtime ?? info.DefaultRuntime
    this.#guestKernel = /runsc|gvisor/.test(runtime)
    this.version = `Docker Engine ${info.ServerVersion} (${runtime}, ${info.Driver}, cgroup v${info.CgroupVersion ?? 1})`
    this.walls = [runtime, 'no capabilities', 'no new privileges', 'private namespaces']
    for (const [name, wall, fix] of [
      ['seccomp', 'seccomp', 'run a Docker Engine and a kernel with seccomp, and its default profile'],
      ['apparmor', 'apparmor', 'a kernel with AppArmor and its tools: apt-get install apparmor'],
      ['userns', 'user namespaces', 'set "userns-remap": "default" in /etc/docker/daemon.json'],
    ] as const) {
      const has = info.SecurityOptions?.some(
        (one) => one.startsWith(`name=${name}`) && !one.includes('unconfined'),
      )
      if (has) this.walls.push(wall)
      else this.missing.push({ wall, fix })
    }
  }

  /** Finds out what holds here. Throws `BoxError` where no box can be had. */
  async begin(): Promise<void> {
    await this.#listen()
    await this.#probe()
    void this.#images.evict().catch(() => {})
    const every = (ms: number, act: () => Promise<void>) => {
      const timer = setInterval(() => void act().catch(() => {}), ms)
      timer.unref()
      this.#timers.push(timer)
    }
    every(againMs, async () => {
      if (performance.now() < this.#inDoubtUntil) await this.#sweep()
    })
    every(janitorMs, () => this.#sweep())
    every(janitorMs, () => removeAbandoned(this.#api))
    every(janitorMs, () => this.#images.evict())
  }

  async #probe(): Promise<void> {
    this.#probeRef = await ensureProbeImage(this.#api, this.#directory)
    if (this.#probeRef === undefined) {
      this.#init = false
      this.missing.push({ wall: 'limits that were tried, and egress', fix: 'apt-get install busybox-static' })
      return
    }
    const ref = this.#probeRef
    const spec = (argv: string[], limits: BoxLimits, mounts: { source: string; target: string }[] = []) => ({
      argv,
      limits,
      env: { PATH: '/bin' },
      cwd: '/',
      user: { uid: 0, gid: 0, groups: [] },
      mounts: mounts.map((mount) => ({ ...mount, readonly: true })),
    })
    const tryLimits = () =>
      probeLimits((argv, limits, mounts) => this.#make(spec(argv, limits, mounts), ref), this.#directory)
    const tryNetwork = () =>
      probeNetwork((argv, limits, network) => this.#make(spec(argv, limits), ref, network)).catch(() => false)
    let joining = tryNetwork()
    const found = await tryLimits().catch((error) => {
      if (!this.#init || !String(error).includes('init')) throw error
      // Named by the engine, but not there.
      this.#init = false
      joining = tryNetwork()
      return tryLimits()
    })
    this.limits = found.limits
    this.#groups = found.groups
    this.#direct = found.visible && !this.#guestKernel
    // Without seeing its child nobody knows whether the init process could execute the command.
    this.#init &&= found.visible
    if (found.rootWritable)
      this.missing.push({ wall: 'read-only root', fix: 'a Docker Engine that keeps ReadonlyRootfs' })
    else this.walls.push('read-only root')
    if (await joining) this.egress = ['none', 'all', 'allowlist']
  }

  async create(spec: BoxSpec): Promise<Box> {
    if (this.#disposed !== undefined) throw new BoxError('engine', 'the Docker Engine is no longer used')
    const { image, phases = unmeasured } = spec
    const make = async () => {
      const ref = await this.#images.ensure(image, phases)
      return await phases.measure('create container', () => this.#make(spec, ref, spec.network))
    }
    try {
      return await make()
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 404) throw error
    }
    // Somebody has removed the image meanwhile.
    this.#images.forget(image.digest)
    return await make()
  }

  async #make(
    spec: Omit<BoxSpec, 'image' | 'network'>,
    ref: string,
    network?: Pick<Network, 'hosts' | 'nameservers' | 'join'>,
  ): Promise<DockerBox> {
    const made: Made[] = []
    const common = {
      labels: this.#labels,
      init: this.#init,
      cores: this.#cores,
      guestKernel: this.#guestKernel,
    }
    let box: DockerBox | undefined
    try {
      const holder = network === undefined ? undefined : await this.#makeHolder(network, made)
      const name = this.#newName()
      const making = { ...common, name, ref, holder, runtime: this.#options.runtime }
      const id = await this.#createContainer(createOptions(spec, making), made)
      box = await openBox({
        ...common,
        api: this.#api,
        id,
        name,
        limits: spec.limits,
        direct: this.#direct,
        groups: this.#groups,
        lackedMemory: () => this.#lacking.has(id),
        discard: async () => {
          await this.#discard(made)
          if (box !== undefined) this.#boxes.delete(box)
        },
      })
      this.#boxes.add(box)
      if (holder !== undefined) await this.#startHolder(holder, network!)
      if (this.#disposed !== undefined) throw new BoxError('engine', 'the Docker Engine is no longer used')
      return box
    } catch (error) {
      void (box?.remove() ?? this.#discard(made))
      throw error
    }
  }

  /** A container whose network others share, not started yet. */
  async #makeHolder(network: Pick<Network, 'hosts' | 'nameservers'>, made: Made[]): Promise<string> {
    if (this.#probeRef === undefined) throw new BoxError('engine', 'there is no image for holding a network')
    const making = { name: `${this.#newName()}-net`, ref: this.#probeRef, labels: this.#labels }
    return this.#createContainer(holderOptions(network, making), made)
  }

  async #startHolder(id: string, network: Pick<Network, 'join'>): Promise<void> {
    const holder = this.#api.docker.getContainer(id)
    const start = (abortSignal: AbortSignal) => holder.start({ abortSignal })
    await this.#api.call('start a network holder', start, this.#api.slowMs)
    const inspect = (abortSignal: AbortSignal) => holder.inspect({ abortSignal })
    const { State } = await this.#api.call('inspect a network holder', inspect)
    if (State.Pid === 0) throw new BoxError('engine', 'the container that holds a network has ended')
    await network.join(State.Pid)
  }

  async #createContainer(options: ContainerCreateOptions, made: Made[]): Promise<string> {
    const name = options.name!
    this.#names.add(name)
    try {
      const create = (abortSignal: AbortSignal) =>
        this.#api.docker.createContainer({ ...options, abortSignal })
      const { id } = await this.#api.call(`create ${name}`, create, this.#api.slowMs)
      made.push({ id, name })
      return id
    } catch (error) {
      this.#names.delete(name)
      this.#doubt()
      throw error
    }
  }

  readonly #newName = () => `${namePrefix}${this.#options.owner}-${randomBytes(6).toString('hex')}`

  /** Never rejects: what cannot be removed now is swept later. */
  async #discard(made: Made[]): Promise<void> {
    await Promise.all(
      made.map(async ({ id, name }) => {
        this.#names.delete(name)
        try {
          await removeContainer(this.#api, id)
        } catch {
          this.#doubt()
        }
        this.#lacking.delete(id)
      }),
    )
  }

  #doubt(): void {
    this.#inDoubtUntil = performance.now() + doubtMs
  }

  /** Removes containers of this process that nobody wants. Throws `ApiError`. */
  async #sweep(): Promise<void> {
    const labels = Object.entries(this.#labels).map(([name, value]) => `${name}=${value}`)
    const all = await this.#api.call('list containers', (abortSignal) =>
      this.#api.docker.listContainers({ all: true, filters: { label: labels }, abortSignal }),
    )
    const unwanted = all.filter(({ Names }) => !Names.some((name) => this.#names.has(name.slice(1))))
    await Promise.all(unwanted.map(({ Id }) => removeContainer(this.#api, Id)))
  }

  /** Hears of lacks of memory for as long as the engine lives. */
  async #listen(): Promise<void> {
    const filters = { type: ['container'], event: ['oom'], label: [`${ownerLabel}=${this.#options.owner}`] }
    const events = (await this.#api.call('follow events', (abortSignal) =>
      this.#api.docker.getEvents({ filters, abortSignal } as object),
    )) as Readable
    this.#events = events
    const lines = createInterface({ input: events })
    lines.on('line', (line) => {
      try {
        const { id } = JSON.parse(line) as { id?: string }
        if (id !== undefined) this.#lacking.add(id)
      } catch {
        // No event.
      }
    })
    // The stream’s errors become the reader’s, too.
    lines.on('error', () => {})
    events.on('error', () => {})
    events.once('close', () => this.#listenAgain())
  }

  #listenAgain(): void {
    if (this.#disposed !== undefined) return
    const timer = setTimeout(() => this.#listen().catch(() => this.#listenAgain()), 1_000)
    timer.unref()
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.#disposed ??= this.#dispose()
    return this.#disposed
  }

  async #dispose(): Promise<void> {
    for (const timer of this.#timers) clearInterval(timer)
    this.#events?.destroy()
    await Promise.all([...this.#boxes].map((box) => box.remove()))
    await this.#sweep().catch(() => {})
    await rm(this.#directory, { recursive: true, force: true })
  }
}
