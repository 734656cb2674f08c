/**
 * One runner process: `node runners/main.ts isolate | gvisor | docker | microvm`. Stateless; start as many as the host
 * carries. With `probe` behind it, it only says what the host can do.
 */
import { availableParallelism, totalmem } from 'node:os'
import { resolve } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { z } from 'zod'
import { Blobs } from '../shared/blobs.ts'
import { Bus } from '../shared/bus.ts'
import { CommonConfig, logOptionsOf, readConfig, secretKeyOf } from '../shared/config.ts'
import { newProcessId } from '../shared/ids.ts'
import { Meters } from '../shared/meters.ts'
import { answerMetrics } from '../shared/metrics-answer.ts'
import { makeLogger, stopSignal } from '../shared/process.ts'
import { countProcess } from '../shared/process-metrics.ts'
import { Registry } from '../shared/registry.ts'
import { SecretBox, Secrets } from '../shared/secrets.ts'
import { startTracing } from '../shared/telemetry.ts'
import { Isolation } from '../shared/workload.ts'
import type { ContainerOptions } from './container/index.ts'
import { descendantsUse } from './descendants.ts'
import type { EgressOptions } from './egress.ts'
import { RunnerMetrics } from './metrics.ts'
import { serveMetrics } from './metrics-server.ts'
import type { MicrovmOptions } from './microvm/index.ts'
import type { Probe, Runner } from './runner.ts'
import { announceUnavailable, runWorker } from './worker.ts'

const list = z
  .string()
  .default('')
  .transform((text) =>
    text
      .split(',')
      .map((entry) => entry.trim())
      .filter(Boolean),
  )
const absolute = z.string().transform((path) => resolve(path))
const slots = z.coerce.number().int().min(1).max(10_000)

const RunnerConfig = CommonConfig.extend({
  dataDir: CommonConfig.shape.dataDir.pipe(absolute),
  cacheDir: CommonConfig.shape.cacheDir.pipe(absolute),
  /** Workloads that an isolate runner holds at once. */
  slots: slots.default(64),
  /** The same of a container runner, whose sandboxes cost more. */
  containerSlots: slots.default(() => Math.max(4, 2 * availableParallelism())),
  /** The same of a microVM runner: more than there are cores only wait for each other, where they compute. */
  microvmSlots: slots.default(() => Math.max(4, availableParallelism())),
  /** Virtual machines that stand ready, restored and exercised: how many at most. */
  microvmPool: z.coerce.number().int().min(0).max(10_000).default(16),
  /** What they may hold together, MiB. */
  microvmPoolMb: z.coerce
    .number()
    .int()
    .min(0)
    .default(() => Math.max(256, Math.min(4_096, Math.floor(totalmem() / 2 ** 23)))),
  /** One is replaced after so many seconds. */
  microvmPoolAgeS: z.coerce.number().min(1).default(1_800),
  /** Off: every machine is booted from its kernel. */
  microvmSnapshots: z.enum(['on', 'off']).default('on'),
  /** The Firecracker binary, where it is not on PATH. */
  firecracker: absolute.optional(),
  /** `host:port`s with private addresses that code may reach where its policy names them; separated by commas. */
  egressAllowPrivate: list.pipe(
    z.array(z.string().regex(/^\S+:\d{1,5}$/, 'must be host:port, separated by commas')),
  ),
  /** Docker Engine API: a `unix:` or `tcp:` URL. */
  dockerHost: z.string().optional(),
  /** `host` or `host:port` of registries that may be asked without TLS, besides those of loopback. */
  insecureRegistries: list,
  /** Absolute folders below which `oci:` references may point. */
  imageDirectories: list.pipe(
    z.array(z.string().startsWith('/', 'must be absolute paths, separated by commas')),
  ),
  /** Credentials of registries, as Docker’s config.json has them. */
  registryAuthFile: absolute.optional(),
  /** What fetched and unpacked images may take on disk, MiB. */
  imageCacheMb: z.coerce.number().int().min(64).default(20_480),
  /** Of its own metrics, on loopback; 0, or one that is taken: any free one. */
  metricsPort: z.coerce.number().int().min(0).max(65_535).default(0),
  /** A workload’s attempt publishes at most this many log lines and bytes. */
  logLines: z.coerce.number().int().positive().default(10_000),
  logBytes: z.coerce
    .number()
    .int()
    .positive()
    .default(5 * 1_048_576),
})

type RunnerConfig = z.infer<typeof RunnerConfig>

/** An isolation that is not available is tried again every so many ms. */
const probeAgainMs = 15_000

interface Offer {
  probe(config: RunnerConfig): Promise<Probe>
  create(config: RunnerConfig): Promise<Runner>
  slots(config: RunnerConfig): number
}

// Loaded for the isolation that is run: neither drags the other’s libraries in.
const isolates = () => import('./isolate/index.ts')
const containers = () => import('./container/index.ts')
const microvms = () => import('./microvm/index.ts')

const container = (kind: 'gvisor' | 'docker'): Offer => ({
  probe: async (config) => (await containers()).probeContainer(kind, containerOptions(config)),
  create: async (config) =>
    (await containers()).createContainerRunner(kind, { ...containerOptions(config), metrics }),
  slots: (config) => config.containerSlots,
})

/** The isolations this version can run. */
const offers: Record<Isolation, Offer> = {
  isolate: {
    probe: async () => (await isolates()).probeIsolate(),
    create: async (config) =>
      (await isolates()).createIsolateRunner({ max: config.slots, egress: egressOptions(config), metrics }),
    slots: (config) => config.slots,
  },
  gvisor: container('gvisor'),
  docker: container('docker'),
  microvm: {
    probe: async (config) => (await microvms()).probeMicrovm(microvmOptions(config)),
    create: async (config) => (await microvms()).createMicrovmRunner({ ...microvmOptions(config), metrics }),
    slots: (config) => config.microvmSlots,
  },
}

const isolation = Isolation.safeParse(process.argv[2])
const offer = isolation.success ? offers[isolation.data] : undefined
if (!isolation.success || offer === undefined) {
  console.error(`usage: node runners/main.ts ${Object.keys(offers).join(' | ')}`)
  process.exit(64)
}

const config = readConfig(
  RunnerConfig,
  {
    slots: 'VULCAN_SLOTS',
    containerSlots: 'VULCAN_CONTAINER_SLOTS',
    logLines: 'VULCAN_LOG_LINES',
    logBytes: 'VULCAN_LOG_BYTES',
    egressAllowPrivate: 'VULCAN_EGRESS_ALLOW_PRIVATE',
    dockerHost: 'DOCKER_HOST',
    insecureRegistries: 'VULCAN_INSECURE_REGISTRIES',
    imageDirectories: 'VULCAN_IMAGE_DIRECTORIES',
    registryAuthFile: 'VULCAN_REGISTRY_AUTH_FILE',
    imageCacheMb: 'VULCAN_IMAGE_CACHE_MB',
    microvmSlots: 'VULCAN_MICROVM_SLOTS',
    microvmPool: 'VULCAN_MICROVM_POOL',
    microvmPoolMb: 'VULCAN_MICROVM_POOL_MB',
    microvmPoolAgeS: 'VULCAN_MICROVM_POOL_AGE_S',
    microvmSnapshots: 'VULCAN_MICROVM_SNAPSHOTS',
    firecracker: 'VULCAN_FIRECRACKER',
    metricsPort: 'VULCAN_METRICS_PORT',
  },
  process.env,
)
const runnerId = newProcessId(isolation.data)
const log = await makeLogger('vulcan-runner', logOptionsOf(config, runnerId))
// For `npm run doctor`: what was found is the last line of standard output, as JSON.
if (process.argv[3] === 'probe') {
  process.stdout.write(`${JSON.stringify(await tryOut(offer))}\n`)
  process.exit()
}
const stop = stopSignal()
const { replicas, ackWaitMs } = config.topology
const slotCount = offer.slots(config)

const metrics = new RunnerMetrics(runnerId, isolation.data, descendantsUse)
countProcess(metrics.registry, config.restarts)
await using metricsServer = await serveMetrics(metrics.registry, config.metricsPort)
const metricsUrl = metricsServer.url

// Disposed last: what is still on its way has spans to end.
await using tracing = await startTracing(config.telemetry, { service: 'vulcan-runner', id: runnerId, log })

const probing = tryOut(offer)
await using bus = await Bus.connect({ url: config.natsUrl, name: runnerId }, stop)
using _answers = answerMetrics(bus, runnerId, metrics.registry)
if (await untilAvailable(offer, isolation.data, await probing)) {
  const box = await SecretBox.open(secretKeyOf(config))
  const [blobs, secrets, registry, meters] = await openStores(box)
  using _stores = {
    [Symbol.dispose]() {
      for (const store of [secrets, registry, meters]) store.close()
    },
  }
  await using runner = await offer.create(config)
  await runWorker(
    {
      bus,
      blobs,
      secrets,
      box,
      registry,
      meters,
      runner,
      runnerId,
      slots: slotCount,
      ackWaitMs,
      replicas,
      logLimits: { lines: config.logLines, bytes: config.logBytes },
      metrics,
      metricsUrl,
      tracing,
      log,
    },
    stop,
  )
}

async function tryOut(offer: Offer): Promise<Probe> {
  try {
    return await offer.probe(config)
  } catch (error) {
    log.error({ err: error }, 'the host could not be tried out')
    return { available: false, reason: (error as Error).message, fix: 'see the log of the runner' }
  }
}

/** Tells why it is not there, and tries again: a busy host, or an Engine that restarts, is so for a while only. */
async function untilAvailable(offer: Offer, isolation: Isolation, probe: Probe): Promise<boolean> {
  while (!probe.available) {
    const { reason, fix } = probe
    log.error({ reason, fix }, 'isolation unavailable')
    const changed = new AbortController()
    const until = AbortSignal.any([stop, changed.signal])
    const announced = announceUnavailable(bus, { runnerId, isolation, replicas, metricsUrl }, probe, until)
    while (!stop.aborted && !probe.available && probe.reason === reason) {
      await delay(probeAgainMs, undefined, { signal: stop }).catch(() => {})
      if (!stop.aborted) probe = await tryOut(offer)
    }
    changed.abort()
    await announced
    if (stop.aborted) return false
  }
  return true
}

async function openStores(box: SecretBox) {
  for (;;) {
    try {
      return await Promise.all([
        Blobs.open(bus, replicas),
        Secrets.open(bus, replicas, box),
        Registry.open(bus, replicas),
        Meters.open(bus, replicas),
      ])
    } catch (error) {
      stop.throwIfAborted()
      log.warn({ err: error }, 'waiting for the object store')
      await delay(500)
    }
  }
}

/** The broker is never to be reached by user code, wherever it is; all addresses of this host are out of reach anyway. */
function egressOptions(config: RunnerConfig): EgressOptions {
  const servers = config.natsUrl.split(',').map((server) => {
    const { hostname, port } = new URL(server.includes('://') ? server.trim() : `nats://${server.trim()}`)
    return `${hostname}:${port === '' ? 4222 : port}`
  })
  return { allowPrivate: config.egressAllowPrivate, platform: servers }
}

function containerOptions(config: RunnerConfig): ContainerOptions {
  const { containerSlots, dataDir, cacheDir, insecureRegistries, imageDirectories, imageCacheMb } = config
  return {
    slots: containerSlots,
    dataDir,
    cacheDir,
    egress: egressOptions(config),
    insecureRegistries,
    imageDirectories,
    diskBudgetMb: imageCacheMb,
    ...(config.dockerHost === undefined ? {} : { dockerHost: config.dockerHost }),
    ...(config.registryAuthFile === undefined ? {} : { registryAuthFile: config.registryAuthFile }),
  }
}

function microvmOptions(config: RunnerConfig): MicrovmOptions {
  const { dockerHost: _, ...common } = containerOptions(config)
  const { microvmSlots, microvmPool, microvmPoolMb, microvmPoolAgeS, microvmSnapshots, firecracker } = config
  return {
    ...common,
    slots: microvmSlots,
    pool: { count: microvmPool, memoryMb: microvmPoolMb, ageMs: microvmPoolAgeS * 1_000 },
    snapshots: microvmSnapshots === 'on',
    ...(firecracker === undefined ? {} : { firecracker }),
  }
}
