/** One runner process: `node runners/main.ts isolate`. Stateless; start as many as the host carries. */
import { setTimeout as delay } from 'node:timers/promises'
import { z } from 'zod'
import { Blobs } from '../shared/blobs.ts'
import { Bus } from '../shared/bus.ts'
import { CommonConfig, readConfig, secretKeyOf } from '../shared/config.ts'
import { newProcessId } from '../shared/ids.ts'
import { Meters } from '../shared/meters.ts'
import { makeLogger, stopSignal } from '../shared/process.ts'
import { Registry } from '../shared/registry.ts'
import { SecretBox, Secrets } from '../shared/secrets.ts'
import { Isolation } from '../shared/workload.ts'
import type { EgressOptions } from './egress.ts'
import { createIsolateRunner, probeIsolate } from './isolate/index.ts'
import type { Probe, Runner } from './runner.ts'
import { announceUnavailable, runWorker } from './worker.ts'

const RunnerConfig = CommonConfig.extend({
  /** Workloads held at once. */
  slots: z.coerce.number().int().min(1).max(10_000).default(64),
  /** `host:port`s with private addresses that code may reach where its policy names them; separated by commas. */
  egressAllowPrivate: z
    .string()
    .default('')
    .transform((text) =>
      text
        .split(',')
        .map((entry) => entry.trim())
        .filter(Boolean),
    )
    .pipe(z.array(z.string().regex(/^\S+:\d{1,5}$/, 'must be host:port, separated by commas'))),
  /** A workload’s attempt publishes at most this many log lines and bytes. */
  logLines: z.coerce.number().int().positive().default(10_000),
  logBytes: z.coerce
    .number()
    .int()
    .positive()
    .default(5 * 1_048_576),
})

interface Offer {
  probe(): Promise<Probe>
  create(options: { slots: number; egress: EgressOptions }): Promise<Runner>
}

/** The isolations this version can run. */
const offers: Partial<Record<Isolation, Offer>> = {
  isolate: {
    probe: () => probeIsolate(),
    create: ({ slots, egress }) => createIsolateRunner({ max: slots, egress }),
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
    logLines: 'VULCAN_LOG_LINES',
    logBytes: 'VULCAN_LOG_BYTES',
    egressAllowPrivate: 'VULCAN_EGRESS_ALLOW_PRIVATE',
  },
  process.env,
)
const runnerId = newProcessId(isolation.data)
const log = makeLogger('vulcan-runner', config.logLevel).child({ runner: runnerId })
const stop = stopSignal()
const { replicas, ackWaitMs } = config.topology

const probing = offer.probe()
await using bus = await Bus.connect({ url: config.natsUrl, name: runnerId }, stop)
const probe = await probing
if (!probe.available) {
  log.error({ reason: probe.reason, fix: probe.fix }, 'isolation unavailable')
  await announceUnavailable(bus, { runnerId, isolation: isolation.data, replicas }, probe, stop)
} else {
  const box = await SecretBox.open(secretKeyOf(config))
  const [blobs, secrets, registry, meters] = await openStores(box)
  using _stores = {
    [Symbol.dispose]() {
      for (const store of [secrets, registry, meters]) store.close()
    },
  }
  await using runner = await offer.create({ slots: config.slots, egress: egressOptions() })
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
      slots: config.slots,
      ackWaitMs,
      replicas,
      logLimits: { lines: config.logLines, bytes: config.logBytes },
      log,
    },
    stop,
  )
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
function egressOptions(): EgressOptions {
  const servers = config.natsUrl.split(',').map((server) => {
    const { hostname, port } = new URL(server.includes('://') ? server.trim() : `nats://${server.trim()}`)
    return `${hostname}:${port === '' ? 4222 : port}`
  })
  return { allowPrivate: config.egressAllowPrivate, platform: servers }
}
