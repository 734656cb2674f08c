/** The Runner interface over whatever engine there is. */
import { totalmem } from 'node:os'
import { join } from 'node:path'
import type { Capabilities } from '../../shared/backends.ts'
import { type Digest, type Isolation, Limits, type Runtime } from '../../shared/workload.ts'
import type { RunnerMetrics } from '../metrics.ts'
import type { Job, Program, Runner } from '../runner.ts'
import type { Engine, ImageStore, Networks } from './engine.ts'
import { OwnFiles } from './files.ts'
import { blankKey, mebibyte, programKey, type RuntimeName, routeOf } from './plan.ts'
import { Pool, type PoolOptions, poolDefaults } from './pool.ts'
import { Attempt } from './session.ts'
import { Workshop } from './workshop.ts'

export interface Parts {
  isolation: Isolation
  /** Of this process, as the engine knows it. */
  owner: string
  engine: Engine
  images: ImageStore
  networks: Networks | undefined
  /** Why there are no networks, and what brings them. */
  noNetworks: { reason: string; fix: string } | undefined
  findRuntime(name: RuntimeName): Promise<{ layout: string; digest: Digest } | undefined>
  /** Absolute; below the data directory, the same for every process of this kind there. */
  filesDir: string
  cacheDir: string
  budgetMb: number
  slots: number
  pool?: Partial<PoolOptions>
  metrics?: RunnerMetrics | undefined
}

const runtimesOf: Record<RuntimeName, readonly Runtime[]> = {
  node: ['javascript', 'typescript', 'node'],
  python: ['python'],
  go: ['go'],
  base: [],
}
const names: readonly RuntimeName[] = ['base', 'node', 'python', 'go']
const languages = ['node', 'python'] as const
/** Runtime images that were not there are looked for again every so many ms: the set-up may have built them. */
const runtimesMs = 10_000
/** Unpacked archives, and built programs, each get so much of the budget, and at most so many MiB. */
export const shareOfBudget = 0.2
export const maxShareMb = 4_096

/** What this host offers with these parts. */
export async function capabilitiesOf({
  engine,
  networks,
  noNetworks,
  findRuntime,
}: Pick<Parts, 'engine' | 'networks' | 'noNetworks' | 'findRuntime'>): Promise<Capabilities> {
  const found = await Promise.all(names.map(async (name) => ({ name, image: await findRuntime(name) })))
  const runtimes = (there: boolean) =>
    found.filter(({ image }) => (image !== undefined) === there).flatMap(({ name }) => runtimesOf[name])
  return {
    runtimes: [...runtimes(true), 'oci'],
    egress: networks === undefined ? ['none'] : engine.egress,
    walls: engine.walls,
    missing: [
      ...engine.missing,
      ...runtimes(false).map((runtime) => ({
        wall: `runtime ${runtime}`,
        fix: `npm run setup -- ${runtime === 'go' ? 'go' : 'gvisor'} builds it`,
      })),
      ...(noNetworks === undefined
        ? []
        : [{ wall: 'network', fix: `${noNetworks.fix} (${noNetworks.reason})` }]),
    ],
    version: engine.version,
    limits: engine.limits,
  }
}

/** The parts are the runner’s from here on, also where this throws. */
export async function assembleRunner(parts: Parts): Promise<Runner> {
  await using scope = new AsyncDisposableStack()
  scope.use(parts.images)
  if (parts.networks !== undefined) scope.use(parts.networks)
  scope.use(parts.engine)
  const files = scope.use(await OwnFiles.open(parts.filesDir, parts.owner))
  const workshop = scope.use(
    await Workshop.open({
      engine: parts.engine,
      images: parts.images,
      networks: parts.networks,
      whyNoNetworks: parts.noNetworks?.reason ?? '',
      files,
      findRuntime: parts.findRuntime,
      cacheDir: parts.cacheDir,
      budgetMb: Math.min(maxShareMb, Math.ceil(parts.budgetMb * shareOfBudget)),
      metrics: parts.metrics,
    }),
  )
  const pool = new Pool({
    count: Math.max(8, Math.min(poolDefaults.count, parts.slots)),
    memoryMb: Math.max(256, Math.min(2_048, Math.floor(totalmem() / mebibyte / 8))),
    ...parts.pool,
  })
  scope.defer(() => pool.close())
  for (const state of ['running', 'idle', 'warm', 'paused'] as const)
    parts.metrics?.pool(state, () => pool.count(state))
  let capabilities = await capabilitiesOf(parts)
  const looking = setInterval(async () => {
    if (capabilities.missing.some(({ wall }) => wall.startsWith('runtime ')))
      capabilities = await capabilitiesOf(parts).catch(() => capabilities)
  }, runtimesMs).unref()
  scope.defer(() => clearInterval(looking))
  const limits = Limits.parse({})
  for (const language of languages)
    if (capabilities.runtimes.includes(language))
      pool.stock(blankKey(language, limits), 1, () => workshop.blank(language, limits), true)
  void workshop.warmUp(names)
  const held = scope.move()
  return {
    isolation: parts.isolation,
    get capabilities() {
      return capabilities
    },
    prepare: (job) => new Attempt(workshop, pool, job),
    prewarm: (program, count) => prewarm(workshop, pool, program, count),
    metrics: () => ({ ...parts.engine.metrics?.(), ...pool.metrics() }),
    pids: () => workshop.pids(),
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  }
}

/** A program as a job that nobody has sent. */
const jobOf = (program: Program): Job => ({
  ...program,
  id: '',
  attempt: 0,
  input: undefined,
  http: undefined,
  env: {},
  function: undefined,
  traceparent: undefined,
})

/** Runs nothing of the user’s: handlers get boxes with their files in them, Go is built, images are fetched. */
function prewarm(workshop: Workshop, pool: Pool, program: Program, count: number) {
  const key = programKey(program)
  if (count === 0) return pool.keep(key, 0, () => Promise.reject(new Error('not wanted')))
  const never = new AbortController().signal
  let route: ReturnType<typeof routeOf>
  try {
    route = routeOf(program)
  } catch {
    // Said by the first job.
    return
  }
  if (route.kind === 'go') void workshop.buildGo(program, route.entry, never).catch(() => {})
  else if (typeof route.base !== 'string')
    void workshop.image(route.base, never).then(
      (image) => image[Symbol.dispose](),
      () => {},
    )
  else if (route.kind === 'handler') {
    const handler = route
    const { base } = route
    pool.keep(key, count, async () => {
      const image = await workshop.image(base, never)
      const sandbox = await workshop.handler(handler, jobOf(program), image, never, { ahead: true })
      sandbox.programKey = key
      return sandbox
    })
  }
}

/** Where the files of a kind of runner stand. */
export const filesDirectory = (dataDir: string, kind: string): string =>
  join(dataDir, 'containers', `${kind}-files`)
