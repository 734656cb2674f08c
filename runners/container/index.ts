/** The isolations `gvisor` and `docker` behind the Runner interface. */
import { randomBytes } from 'node:crypto'
import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import type { EgressOptions } from '../egress.ts'
import type { RunnerMetrics } from '../metrics.ts'
import type { Probe, Runner } from '../runner.ts'
import { assembleRunner, capabilitiesOf, filesDirectory, type Parts } from './assemble.ts'
import { createDocker } from './docker/index.ts'
import type { Engine, EngineOptions } from './engine.ts'
import { createGvisor } from './gvisor/index.ts'
import { openImageStore, requireImageTools } from './images/store.ts'
import { NetworksUnavailable, openNetworks } from './network/index.ts'
import { findRuntime } from './runtimes/index.ts'

/** Paths are absolute. */
export interface ContainerOptions {
  /** What it counts and measures. */
  metrics?: RunnerMetrics | undefined
  /** Workloads held at once. */
  slots: number
  dataDir: string
  cacheDir: string
  egress: EgressOptions
  /** Docker Engine API: a `unix:` or `tcp:` URL. */
  dockerHost?: string
  insecureRegistries: string[]
  imageDirectories: string[]
  registryAuthFile?: string
  /** What fetched and unpacked images may take on disk, MiB. */
  diskBudgetMb: number
}

type Kind = 'gvisor' | 'docker'

const whatBringsIt: Record<Kind, string> = {
  gvisor:
    'run the runner as root on Linux; `npm run setup -- gvisor` installs runsc and builds the runtime images',
  docker: 'start a Docker Engine and name it in DOCKER_HOST; `npm run setup -- docker` installs one',
}

/** Tries everything, limits included, and leaves nothing. */
export async function probeContainer(kind: Kind, options: ContainerOptions): Promise<Probe> {
  try {
    await using scope = new AsyncDisposableStack()
    requireImageTools()
    const { engineOptions } = await begin(kind, options)
    const { networks, noNetworks } = await openNetworksOf(engineOptions, options)
    if (networks !== undefined) scope.use(networks)
    const engine = scope.use(await openEngine(kind, engineOptions, options))
    const find: Parts['findRuntime'] = (name) => findRuntime(name, options.cacheDir)
    const capabilities = await capabilitiesOf({ engine, networks, noNetworks, findRuntime: find })
    return { available: true, capabilities }
  } catch (error) {
    const { message, fix } = error as { message: string; fix?: unknown }
    return { available: false, reason: message, fix: typeof fix === 'string' ? fix : whatBringsIt[kind] }
  }
}

/** Throws where `probeContainer` finds nothing. */
export async function createContainerRunner(kind: Kind, options: ContainerOptions): Promise<Runner> {
  const { cacheDir, dataDir, insecureRegistries, imageDirectories, registryAuthFile, diskBudgetMb } = options
  await using scope = new AsyncDisposableStack()
  const { engineOptions } = await begin(kind, options)
  const find: Parts['findRuntime'] = (name) => findRuntime(name, cacheDir)
  const { networks, noNetworks } = await openNetworksOf(engineOptions, options)
  if (networks !== undefined) scope.use(networks)
  // Removes what dead processes left: before anything that their boxes may still use is looked at.
  const engine = scope.use(await openEngine(kind, engineOptions, options))
  const images = scope.use(
    await openImageStore({
      dir: join(cacheDir, 'images'),
      insecureRegistries,
      imageDirectories: [...imageDirectories, join(cacheDir, 'runtimes')],
      ...(registryAuthFile === undefined ? {} : { authFile: registryAuthFile }),
      budgetMb: diskBudgetMb,
      metrics: options.metrics,
    }),
  )
  scope.move()
  return await assembleRunner({
    isolation: kind,
    owner: engineOptions.owner,
    engine,
    images,
    networks,
    noNetworks,
    findRuntime: find,
    filesDir: filesDirectory(dataDir, kind),
    cacheDir,
    budgetMb: diskBudgetMb,
    slots: options.slots,
    metrics: options.metrics,
  })
}

async function begin(kind: Kind, { dataDir, cacheDir }: ContainerOptions) {
  const stateDir = join(dataDir, 'containers', kind)
  await mkdir(stateDir, { recursive: true, mode: 0o700 })
  await mkdir(cacheDir, { recursive: true })
  const engineOptions: EngineOptions = { owner: `${kind}-${randomBytes(8).toString('hex')}`, stateDir }
  return { engineOptions }
}

const openEngine = (kind: Kind, options: EngineOptions, { dockerHost }: ContainerOptions): Promise<Engine> =>
  kind === 'gvisor'
    ? createGvisor(options)
    : createDocker({ ...options, ...(dockerHost === undefined ? {} : { host: dockerHost }) })

/** Boxes can do without. */
export async function openNetworksOf(
  options: EngineOptions,
  { egress }: Pick<ContainerOptions, 'egress'>,
): Promise<Pick<Parts, 'networks' | 'noNetworks'>> {
  try {
    return { networks: await openNetworks({ ...options, egress }), noNetworks: undefined }
  } catch (error) {
    if (!(error instanceof NetworksUnavailable)) throw error
    return { networks: undefined, noNetworks: { reason: error.message, fix: error.fix } }
  }
}
