/** The isolation `microvm` behind the Runner interface. */
import { randomBytes } from 'node:crypto'
import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { fetchedFirecracker, findMachineParts } from '../../rootfs/index.ts'
import { Limits } from '../../shared/workload.ts'
import {
  assembleRunner,
  capabilitiesOf,
  filesDirectory,
  maxShareMb,
  type Parts,
  shareOfBudget,
} from '../container/assemble.ts'
import type { EngineOptions, Image, ImageStore } from '../container/engine.ts'
import { findProgram } from '../container/images/processes.ts'
import { openImageStore, requireImageTools } from '../container/images/store.ts'
import { type ContainerOptions, openNetworksOf } from '../container/index.ts'
import { boxLimits } from '../container/plan.ts'
import { findRuntime } from '../container/runtimes/index.ts'
import type { Probe, Runner } from '../runner.ts'
import type { Driver, DriverOptions } from './driver.ts'
import { MicrovmEngine } from './engine.ts'
import { createFirecracker } from './firecracker/index.ts'
import { createQemu } from './qemu/index.ts'

/** Paths are absolute. */
export interface MicrovmOptions extends Omit<ContainerOptions, 'dockerHost'> {
  /** Machines that stand ready: how many at most, MiB of them together, and ms after which one is replaced. */
  pool: { count: number; memoryMb: number; ageMs: number }
  /** The Firecracker binary; undefined: looked for on PATH. */
  firecracker?: string
  /** False: every machine is started from its kernel. */
  snapshots: boolean
}

const whatBringsIt =
  '`npm run setup -- microvm` installs QEMU, builds the runtime images and brings kernel and agent'

/** The isolation cannot be had, and what brings it. */
class Missing extends Error {
  readonly fix: string
  constructor(message: string, fix: string = whatBringsIt) {
    super(message)
    this.fix = fix
  }
}

/** Runs a machine, and leaves nothing but its template. */
export async function probeMicrovm(options: MicrovmOptions): Promise<Probe> {
  try {
    await using scope = new AsyncDisposableStack()
    const { engineOptions } = await begin(options)
    const { networks, noNetworks } = await openNetworksOf(engineOptions, options)
    if (networks !== undefined) scope.use(networks)
    const images = scope.use(await openImages(options))
    const engine = scope.use(await openEngine(engineOptions, options, images))
    const find: Parts['findRuntime'] = (name) => findRuntime(name, options.cacheDir)
    const capabilities = await capabilitiesOf({ engine, networks, noNetworks, findRuntime: find })
    return { available: true, capabilities }
  } catch (error) {
    const { message, fix } = error as { message: string; fix?: unknown }
    return { available: false, reason: message, fix: typeof fix === 'string' ? fix : whatBringsIt }
  }
}

/** Throws where `probeMicrovm` finds nothing. */
export async function createMicrovmRunner(options: MicrovmOptions): Promise<Runner> {
  const { cacheDir, dataDir, diskBudgetMb, pool } = options
  await using scope = new AsyncDisposableStack()
  const { engineOptions } = await begin(options)
  const { networks, noNetworks } = await openNetworksOf(engineOptions, options)
  if (networks !== undefined) scope.use(networks)
  const images = scope.use(await openImages(options))
  const engine = scope.use(await openEngine(engineOptions, options, images))
  scope.move()
  return await assembleRunner({
    isolation: 'microvm',
    owner: engineOptions.owner,
    engine,
    images,
    networks,
    noNetworks,
    findRuntime: (name) => findRuntime(name, cacheDir),
    filesDir: filesDirectory(dataDir, 'microvm'),
    cacheDir,
    budgetMb: diskBudgetMb,
    slots: options.slots,
    pool,
    metrics: options.metrics,
  })
}

async function begin({ dataDir, cacheDir }: MicrovmOptions) {
  const stateDir = join(dataDir, 'microvm')
  await mkdir(stateDir, { recursive: true, mode: 0o700 })
  await mkdir(cacheDir, { recursive: true })
  const engineOptions: EngineOptions = { owner: `microvm-${randomBytes(8).toString('hex')}`, stateDir }
  return { engineOptions }
}

const openImages = (options: MicrovmOptions): Promise<ImageStore> => {
  requireImageTools()
  const { cacheDir, insecureRegistries, imageDirectories, registryAuthFile, diskBudgetMb } = options
  return openImageStore({
    dir: join(cacheDir, 'images'),
    insecureRegistries,
    imageDirectories: [...imageDirectories, join(cacheDir, 'runtimes')],
    ...(registryAuthFile === undefined ? {} : { authFile: registryAuthFile }),
    budgetMb: diskBudgetMb,
    metrics: options.metrics,
  })
}

/** Over the first driver under which a machine really runs. */
async function openEngine(
  engineOptions: EngineOptions,
  options: MicrovmOptions,
  images: ImageStore,
): Promise<MicrovmEngine> {
  const base = await findRuntime('base', options.cacheDir)
  if (base === undefined) throw new Missing('the runtime image base is not here')
  const reference = `oci:${base.layout}`
  using image = await images.get({ kind: 'reference', reference }, new AbortController().signal)
  const reasons: string[] = []
  for (const [name, open] of driversOf(options)) {
    // Each looks after what dead processes have left of its own.
    const driverOptions = { ...engineOptions, stateDir: join(engineOptions.stateDir, name) }
    try {
      return await openOver(await open(driverOptions), driverOptions, options, image)
    } catch (error) {
      if (error instanceof Missing) throw error
      reasons.push(`${name}: ${(error as Error).message}`)
    }
  }
  throw new Missing(`no virtual machine runs here (${reasons.join('; ')})`)
}

/** The driver is the engine’s from here on, also where this throws. */
async function openOver(
  driver: Driver,
  { owner, stateDir }: DriverOptions,
  { cacheDir, diskBudgetMb, snapshots, metrics }: MicrovmOptions,
  image: Image,
): Promise<MicrovmEngine> {
  await using scope = new AsyncDisposableStack()
  scope.use(driver)
  const parts = await findMachineParts(cacheDir, { kernelFormat: driver.kernelFormat })
  if (parts === undefined) throw new Missing('there is no kernel for machines yet')
  const engine = await MicrovmEngine.open({
    ...{ driver, parts, owner, cacheDir, snapshots, metrics, dir: join(stateDir, owner) },
    budgetMb: Math.min(maxShareMb, Math.ceil(diskBudgetMb * shareOfBudget)),
  })
  await using trial = new AsyncDisposableStack()
  trial.use(engine)
  scope.move()
  await runOnce(engine, image)
  trial.move()
  return engine
}

/** Those that may do, the better first. */
function driversOf({
  firecracker,
  cacheDir,
}: MicrovmOptions): [name: string, open: (options: DriverOptions) => Promise<Driver>][] {
  // What tells a KVM that runs guests from one that does not.
  const withKernel = async (options: DriverOptions, kernelFormat: Driver['kernelFormat']) => {
    const parts = await findMachineParts(cacheDir, { kernelFormat })
    if (parts === undefined) throw new Missing('there is no kernel for machines yet')
    return { ...options, kernel: parts.kernel }
  }
  const binary = firecracker ?? findProgram('firecracker') ?? fetchedFirecracker(cacheDir)
  return [
    ...(binary === undefined
      ? []
      : [
          [
            'firecracker',
            async (options: DriverOptions) =>
              createFirecracker({ ...(await withKernel(options, 'vmlinux')), firecracker: binary }),
          ] satisfies [string, unknown],
        ]),
    ['qemu', async (options) => createQemu(await withKernel(options, 'either'))],
  ]
}

/** Throws where a machine does not run a command to its end. */
async function runOnce(engine: MicrovmEngine, image: Image): Promise<void> {
  const box = await engine.create({
    image,
    argv: ['/bin/true'],
    env: {},
    cwd: '/',
    user: { uid: 65_534, gid: 65_534, groups: [] },
    mounts: [],
    // The template that it leaves is then as most commands want it.
    limits: boxLimits(Limits.parse({}), 'command'),
    network: undefined,
  })
  try {
    box.stdout.resume()
    box.stderr.resume()
    await box.start()
    box.stdin.end()
    const { code, reason } = await box.exited
    if (code !== 0) throw new Error(reason ?? `a trial ended with exit code ${code}`)
  } finally {
    await box.remove()
  }
}
