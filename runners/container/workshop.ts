/** Makes boxes for jobs, out of images, sources and networks. Knows neither runsc nor Docker. */
import { createHash } from 'node:crypto'
import { mkdir, open } from 'node:fs/promises'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { preciseNow } from '../../shared/tracing.ts'
import type { Digest } from '../../shared/workload.ts'
import type { RunnerMetrics } from '../metrics.ts'
import type { Job, Program } from '../runner.ts'
import { Archives, linkInto, writeCode } from './archives.ts'
import {
  type Box,
  BoxError,
  type BoxSpec,
  type Engine,
  type Image,
  type ImageStore,
  type Mount,
  type Network,
  type Networks,
} from './engine.ts'
import type { OwnFiles } from './files.ts'
import { type BuildTools, GoBuilds } from './go.ts'
import type { Shim } from './handler.ts'
import { Turns } from './images/flights.ts'
import { type Phases, unmeasured } from './phases.ts'
import {
  type Base,
  boxLimits,
  codeFile,
  commandArgv,
  commandEnv,
  type FoundUser,
  findUser,
  fitsBlank,
  handlerEnv,
  needsFiles,
  type Route,
  type RuntimeName,
  shimArgv,
  workingDirectory,
} from './plan.ts'
import { inBox, memorySpent } from './protocol.ts'
import { rehearsalKey, rehearsalPlaces, rehearse, rehearseAgain, writeRehearsal } from './rehearsal.ts'
import { readInRoot } from './rootfs.ts'
import { Sandbox } from './sandbox.ts'
import { makeShims } from './shims/bundle.ts'

export interface WorkshopOptions {
  engine: Engine
  images: ImageStore
  /** Undefined where this host has none; then `whyNot` says why. */
  networks: Networks | undefined
  whyNoNetworks: string
  files: OwnFiles
  /** The OCI layout of a runtime image; undefined where it was not built. */
  findRuntime(name: RuntimeName): Promise<{ layout: string; digest: Digest } | undefined>
  cacheDir: string
  /** What unpacked archives, and built programs, may take on disk each, MiB. */
  budgetMb: number
  metrics?: RunnerMetrics | undefined
}

/** How a box for a job is made. */
interface Making {
  /** Who measures it. */
  phases?: Phases
  /** It has time, and is to be quick when its first run comes. */
  ahead?: boolean
}

type HandlerRoute = Extract<Route, { kind: 'handler' }>
type CommandRoute = Exclude<Route, HandlerRoute>

/** The text of each, in a file and by its hash, and the directory with what it is rehearsed with. */
type Shims = Record<'node' | 'python', { file: string; sha256: string; rehearsal: string }>

/** What is missing here, and what brings it. */
export class Unavailable extends Error {
  override name = 'Unavailable'
}

/** /etc/passwd and /etc/group are read up to here. */
const maxAccountBytes = 1_048_576
/** Users of images that are remembered. */
const maxUsers = 256
/** Archives with more entries than this are mounted, rather than linked into a box that is there. */
const maxLinked = 1_000
/** Boxes made at the same time: each takes a core for a while, and more of them only make each other late. */
const makingAtOnce = Math.max(4, 2 * availableParallelism())
/** A turn that came later than after so many ms was waited for. */
const waitedMs = 5
/** A shim that is not ready after so many ms is given up. */
const readyMs = 30_000

export class Workshop implements AsyncDisposable, BuildTools {
  readonly engine: Engine
  readonly #options: WorkshopOptions
  readonly #archives: Archives
  readonly #go: GoBuilds
  readonly #shims: Shims
  /** An empty directory. */
  readonly #nothing: string
  /** By digest of the image and what names them there: what an image says never changes. */
  readonly #users = new Map<string, FoundUser>()
  /** Every box that there is, from its making to its removal. */
  readonly #sandboxes = new Set<Sandbox>()
  readonly #making = new Set<Promise<unknown>>()
  readonly #stop = new AbortController()
  readonly #turns = new Turns(makingAtOnce)
  /** Held for as long as the runner lives. */
  readonly #runtimes = new Map<RuntimeName, Promise<Image>>()

  private constructor(options: WorkshopOptions, shims: Shims, nothing: string) {
    this.engine = options.engine
    this.#options = options
    this.#shims = shims
    this.#nothing = nothing
    this.#archives = new Archives(join(options.files.path, 'archives'), options.budgetMb)
    options.metrics?.cache('archives', () => this.#archives.bytes)
    this.#go = new GoBuilds(this, join(options.cacheDir, 'go'), options.budgetMb)
  }

  static async open(options: WorkshopOptions): Promise<Workshop> {
    const texts = await makeShims()
    const dir = join(options.files.path, 'shims')
    await mkdir(dir)
    const write = async (language: 'node' | 'python', name: string) => {
      const text = texts[language]
      await writeCode(dir, name, text)
      return {
        file: join(dir, name),
        sha256: createHash('sha256').update(text).digest('hex'),
        rehearsal: await writeRehearsal(dir, language),
      }
    }
    const shims = { node: await write('node', 'shim.mjs'), python: await write('python', 'shim.py') }
    const nothing = join(dir, 'nothing')
    await mkdir(nothing)
    return new Workshop(options, shims, nothing)
  }

  get metrics(): RunnerMetrics | undefined {
    return this.#options.metrics
  }

  get files(): OwnFiles {
    return this.#options.files
  }

  /** The image of a base. Throws `ImageError` or `Unavailable`. */
  async image(base: Base, signal: AbortSignal, phases = unmeasured): Promise<Image> {
    if (typeof base !== 'string') return await this.#options.images.get(base, signal, phases)
    const image = await this.#runtime(base)
    // The runner’s own hold on it outlives this one.
    return { ...imageParts(image), root: (phases) => image.root(phases), [Symbol.dispose]() {} }
  }

  #runtime(name: RuntimeName): Promise<Image> {
    let image = this.#runtimes.get(name)
    if (image === undefined) {
      image = this.#openRuntime(name)
      this.#runtimes.set(name, image)
      // Built meanwhile, perhaps: looked for again by the next.
      image.catch(() => this.#runtimes.delete(name))
    }
    return image
  }

  /** The images of all runtimes that are here, ready for the first job. */
  async warmUp(names: readonly RuntimeName[]): Promise<void> {
    await Promise.allSettled(names.map(async (name) => (await this.#runtime(name)).root()))
  }

  async #openRuntime(name: RuntimeName): Promise<Image> {
    const found = await this.#options.findRuntime(name)
    if (found === undefined)
      throw new Unavailable(
        `the runtime image ${name} is not here: \`npm run setup -- gvisor\` (or docker) builds it`,
      )
    const signal = new AbortController().signal
    return await this.#options.images.get({ kind: 'reference', reference: `oci:${found.layout}` }, signal)
  }

  /** The path of the program built from Go source. */
  buildGo(program: Program, entry: string | null, signal: AbortSignal, phases?: Phases): Promise<string> {
    return this.#go.get(program, entry, signal, phases)
  }

  async user(image: Image, text: string, phases = unmeasured): Promise<FoundUser> {
    if (!needsFiles(text)) return findUser(text, '', '')
    const key = `${image.digest} ${text}`
    const known = this.#users.get(key)
    if (known !== undefined) return known
    const root = await image.root(phases)
    const [passwd = '', group = ''] = await Promise.all([
      readInRoot(root, '/etc/passwd', maxAccountBytes),
      readInRoot(root, '/etc/group', maxAccountBytes),
    ])
    const found = findUser(text, passwd, group)
    if (this.#users.size >= maxUsers) this.#users.clear()
    this.#users.set(key, found)
    return found
  }

  /** The directory with a source’s files; undefined where it is an image. */
  async source(
    program: Program,
    held: AsyncDisposableStack,
    phases = unmeasured,
  ): Promise<string | undefined> {
    const { source } = program
    switch (source.kind) {
      case 'code': {
        const dir = held.use(await this.files.makeDirectory())
        await writeCode(dir.path, codeFile(program), source.text)
        return dir.path
      }
      case 'archive':
        return held.use(await this.#archives.get(source, phases)).path
      case 'image':
      case 'image-archive':
        return undefined
      default:
        throw new Error(`unhandled ${source satisfies never}`)
    }
  }

  async network(
    job: Job,
    signal: AbortSignal,
    held: AsyncDisposableStack,
    phases: Phases,
  ): Promise<Network | undefined> {
    const { egress } = job
    if (egress === 'none') return undefined
    const { networks, whyNoNetworks } = this.#options
    if (networks === undefined)
      throw new Unavailable(`network.egress is not to be had on this host: ${whyNoNetworks}`)
    return held.use(await phases.measure('open network', () => networks.open(egress, signal)))
  }

  /** A box that runs a command; not started. `result` is the file for its result. */
  command(
    route: CommandRoute,
    job: Job,
    signal: AbortSignal,
    phases = unmeasured,
  ): Promise<{ sandbox: Sandbox; result: string }> {
    return this.#tracked((either) => this.#command(route, job, either, phases), signal)
  }

  async #command(
    route: CommandRoute,
    job: Job,
    signal: AbortSignal,
    phases: Phases,
  ): Promise<{ sandbox: Sandbox; result: string }> {
    await using held = new AsyncDisposableStack()
    const isGo = route.kind === 'go'
    const program = isGo ? await this.buildGo(job, route.entry, signal, phases) : undefined
    const image = held.use(await this.image(isGo ? 'base' : route.base, signal, phases))
    const user = await this.user(image, job.user ?? image.config.user, phases)
    const files = await this.source(job, held, phases)
    const dir = held.use(await this.files.makeDirectory())
    const result = join(dir.path, 'result')
    await using file = await open(result, 'wx')
    // Whoever the user is, nobody else sees the directory above it.
    await file.chmod(0o666)
    const mounts: Mount[] = [{ source: result, target: inBox.result, readonly: false }]
    if (files !== undefined) mounts.push({ source: files, target: inBox.workspace, readonly: true })
    if (program !== undefined) mounts.push({ source: program, target: inBox.program, readonly: true })
    const sandbox = await this.#make(held, {
      image,
      argv: commandArgv(isGo ? [inBox.program] : route.argv, image.config),
      env: commandEnv(image.config, user.home, job),
      cwd: workingDirectory(job, image.config),
      user,
      mounts,
      limits: boxLimits(job.limits, 'command'),
      network: await this.network(job, signal, held, phases),
      phases,
    })
    return { sandbox, result }
  }

  /** A box with a shim for this job; started where nothing of the user’s runs by that. */
  handler(
    route: HandlerRoute,
    job: Job,
    image: Image,
    signal: AbortSignal,
    making: Making = {},
  ): Promise<Sandbox> {
    return this.#tracked((either) => this.#handler(route, job, image, either, making), signal)
  }

  async #handler(
    route: HandlerRoute,
    job: Job,
    image: Image,
    signal: AbortSignal,
    { phases = unmeasured, ahead = false }: Making,
  ): Promise<Sandbox> {
    await using held = new AsyncDisposableStack()
    held.use(image)
    const { language } = route
    const isReady = this.engine.resumes === true && typeof route.base === 'string' && fitsReady(job)
    const user = await this.user(image, job.user ?? image.config.user, phases)
    const files = await this.source(job, held, phases)
    if (isReady) {
      const network = await this.network(job, signal, held, phases)
      const sandbox = await this.#ready(held, language, job.limits, image, { network, phases, ahead })
      if (ahead) await this.#limber(sandbox, language)
      const provide = () => sandbox.box.provide!(files!, inBox.workspace)
      await orClosed(sandbox, () => phases.measure('mount files', provide))
      return sandbox
    }
    const mounts = [this.#shimMount(language)]
    if (files !== undefined) mounts.push({ source: files, target: inBox.workspace, readonly: true })
    const sandbox = await this.#make(held, {
      image,
      argv: shimArgv(language, job.limits.memory_mb),
      env: handlerEnv(image.config, user.home),
      cwd: workingDirectory(job, image.config),
      user,
      mounts,
      limits: boxLimits(job.limits, 'handler'),
      network: await this.network(job, signal, held, phases),
      phases,
    })
    if (typeof route.base === 'string') await this.#start(sandbox, phases)
    return sandbox
  }

  /** A box with a shim that is ready, and nothing of anybody’s in it. */
  blank(language: 'node' | 'python', limits: Program['limits']): Promise<Sandbox> {
    return this.#tracked((signal) => this.#blank(language, limits, signal))
  }

  async #blank(language: 'node' | 'python', limits: Program['limits'], signal: AbortSignal) {
    await using held = new AsyncDisposableStack()
    const image = held.use(await this.image(language, signal))
    const sandbox = await this.#ready(held, language, limits, image, { ahead: true })
    await this.#limber(sandbox, language)
    return sandbox
  }

  /** What a snapshot does not bring with it. */
  async #limber(sandbox: Sandbox, language: 'node' | 'python'): Promise<void> {
    const { box, shim } = sandbox
    if (box.resumed !== true) return
    await orClosed(sandbox, () => rehearseAgain(box, shim!, language, this.#shims[language].rehearsal))
  }

  /** A box with a shim on a runtime image of ours, whose files come later. */
  async #ready(
    held: AsyncDisposableStack,
    language: 'node' | 'python',
    limits: Program['limits'],
    image: Image,
    { network, phases = unmeasured, ahead = false }: Making & { network?: Network | undefined },
  ): Promise<Sandbox> {
    const user = await this.user(image, image.config.user, phases)
    const spec: BoxSpec = {
      image,
      argv: shimArgv(language, limits.memory_mb, this.engine.resumes === true),
      env: handlerEnv(image.config, user.home),
      cwd: inBox.workspace,
      user,
      mounts: [this.#shimMount(language)],
      limits: boxLimits(limits, 'handler'),
      network,
      phases,
      ahead,
    }
    let workspace: string | undefined
    if (this.engine.resumes === true) {
      for (const target of [inBox.workspace, ...rehearsalPlaces])
        spec.mounts.push({ source: this.#nothing, target, readonly: true })
      const key = `${language} ${this.#shims[language].sha256} ${rehearsalKey(language)}`
      spec.template = { key, exercise: (box) => rehearse(box, language) }
    } else {
      workspace = held.use(await this.files.makeDirectory()).path
      spec.mounts.push({ source: workspace, target: inBox.workspace, readonly: true })
    }
    const sandbox = await this.#make(held, spec, workspace)
    await this.#start(sandbox, phases)
    return sandbox
  }

  /** Starts a box whose process is a shim of ours on an image of ours. Throws where that does not come up. */
  async #start(sandbox: Sandbox, phases: Phases): Promise<void> {
    const shim = sandbox.attach()
    if (sandbox.box.resumed === true) return
    try {
      await phases.measure('start handler', () => startShim(sandbox, shim))
    } catch (error) {
      this.metrics?.sandboxFailed(error instanceof TooSmall ? 'oom' : 'start')
      await sandbox.close()
      throw error
    }
  }

  /** Puts a program’s files into a blank box; false where they are too many for that. */
  fill(sandbox: Sandbox, program: Program, phases = unmeasured): Promise<boolean> {
    return this.#tracked(() => this.#fill(sandbox, program, phases))
  }

  async #fill(sandbox: Sandbox, program: Program, phases: Phases): Promise<boolean> {
    const { source } = program
    const { box } = sandbox
    const mount = (work: () => Promise<void>) => phases.measure('mount files', work)
    if (box.provide !== undefined) {
      await using held = new AsyncDisposableStack()
      const files = await this.source(program, held, phases)
      if (files !== undefined) await mount(() => box.provide!(files, inBox.workspace))
      return files !== undefined
    }
    const dir = sandbox.workspace
    if (dir === undefined) throw new Error('a box that is not blank')
    if (source.kind === 'code') {
      await mount(() => writeCode(dir, codeFile(program), source.text))
      return true
    }
    if (source.kind !== 'archive') return false
    using archive = await this.#archives.get(source, phases)
    if (archive.entries > maxLinked) return false
    await mount(() => linkInto(archive.path, dir))
    return true
  }

  #shimMount(language: 'node' | 'python'): Mount {
    const target = language === 'node' ? inBox.nodeShim : inBox.pythonShim
    return { source: this.#shims[language].file, target, readonly: true }
  }

  async #make(held: AsyncDisposableStack, spec: BoxSpec, workspace?: string): Promise<Sandbox> {
    this.#stop.signal.throwIfAborted()
    const asked = preciseNow()
    const waiting = spec.phases?.begin('wait for sandbox')
    const box = await this.#turns.take(() => {
      // Else each box would tell of a wait that was none.
      if (preciseNow() - asked >= waitedMs) waiting?.done()
      else waiting?.drop()
      return this.#create(spec)
    })
    const { network, image } = spec
    // From here on the box owns what it stands on.
    const sandbox: Sandbox = new Sandbox({
      box,
      network,
      imageDigest: image.digest,
      workspace,
      held: held.move(),
      onClosed: (ms) => {
        this.metrics?.cleanedUp(ms / 1_000)
        this.#sandboxes.delete(sandbox)
      },
    })
    this.#sandboxes.add(sandbox)
    return sandbox
  }

  async #create(spec: BoxSpec): Promise<Box> {
    try {
      return await this.engine.create(spec)
    } catch (error) {
      if (error instanceof BoxError && error.fault === 'engine') this.metrics?.sandboxFailed('create')
      throw error
    }
  }

  /** What is being made when the runner ends is waited for, and taken away with the rest. */
  async #tracked<T>(make: (signal: AbortSignal) => Promise<T>, signal?: AbortSignal): Promise<T> {
    const stop = this.#stop.signal
    stop.throwIfAborted()
    const making = make(signal === undefined ? stop : AbortSignal.any([signal, stop]))
    this.#making.add(making)
    try {
      return await making
    } finally {
      this.#making.delete(making)
    }
  }

  /** Processes of this host that are boxes. */
  pids(): number[] {
    return [...this.#sandboxes].flatMap(({ box }) => box.pids())
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stop.abort(new Unavailable('the runner is shutting down'))
    await this.#go[Symbol.asyncDispose]()
    // Those that come up meanwhile are not waited for: nobody else knows of them.
    for (const sandbox of this.#sandboxes) void sandbox.close()
    await Promise.allSettled(this.#making)
    await Promise.all([...this.#sandboxes].map((sandbox) => sandbox.close()))
    await this.#archives[Symbol.asyncDispose]()
    for (const image of this.#runtimes.values())
      await image.then(
        (one) => one[Symbol.dispose](),
        () => {},
      )
  }
}

const imageParts = ({ digest, config, layout }: Image) => ({ digest, config, layout })

/** Whether a job can run in a box that was made before anybody knew of it, its network apart. */
const fitsReady = (job: Job) => fitsBlank({ ...job, egress: 'none' })

async function orClosed(sandbox: Sandbox, work: () => Promise<void>): Promise<void> {
  try {
    await work()
  } catch (error) {
    await sandbox.close()
    throw error
  }
}

/** Throws where it does not come up. */
async function startShim(sandbox: Sandbox, shim: Shim): Promise<void> {
  await sandbox.box.start()
  const timer = setTimeout(() => void sandbox.kill(), readyMs)
  const ready = await shim.ready.finally(() => clearTimeout(timer))
  if (ready) return
  const { exit, stderr } = shim.gone!
  if (exit.oom || memorySpent(stderr)) throw new TooSmall()
  throw new Unavailable(
    `the runtime did not start (exit code ${exit.code})${stderr === '' ? '' : `: ${stderr.slice(-500)}`}`,
  )
}

/** The runtime alone is more than the memory limit. */
export class TooSmall extends Error {
  override name = 'TooSmall'
  constructor() {
    super('the runtime itself needs more than the memory of limits.memory_mb')
  }
}
