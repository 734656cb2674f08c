/** One runner process: `node runners/main.ts isolate`. Stateless; start as many as the host carries. */
import { setTimeout as delay } from 'node:timers/promises'
import { z } from 'zod'
import { Blobs } from '../shared/blobs.ts'
import { Bus } from '../shared/bus.ts'
import { CommonConfig, readConfig } from '../shared/config.ts'
import { newProcessId } from '../shared/ids.ts'
import { makeLogger, stopSignal } from '../shared/process.ts'
import { Isolation } from '../shared/workload.ts'
import { createIsolateRunner, probeIsolate } from './isolate/index.ts'
import type { Probe, Runner } from './runner.ts'
import { announceUnavailable, runWorker } from './worker.ts'

const RunnerConfig = CommonConfig.extend({
  /** Workloads held at once. */
  slots: z.coerce.number().int().min(1).max(10_000).default(64),
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
  create(slots: number): Promise<Runner>
}

/** The isolations this version can run. */
const offers: Partial<Record<Isolation, Offer>> = {
  isolate: { probe: () => probeIsolate(), create: (slots) => createIsolateRunner({ max: slots }) },
}

const isolation = Isolation.safeParse(process.argv[2])
const offer = isolation.success ? offers[isolation.data] : undefined
if (!isolation.success || offer === undefined) {
  console.error(`usage: node runners/main.ts ${Object.keys(offers).join(' | ')}`)
  process.exit(64)
}

const config = readConfig(
  RunnerConfig,
  { slots: 'VULCAN_SLOTS', logLines: 'VULCAN_LOG_LINES', logBytes: 'VULCAN_LOG_BYTES' },
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
  await using runner = await offer.create(config.slots)
  await runWorker(
    {
      bus,
      blobs: await openBlobs(),
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

async function openBlobs(): Promise<Blobs> {
  for (;;) {
    try {
      return await Blobs.open(bus, replicas)
    } catch (error) {
      stop.throwIfAborted()
      log.warn({ err: error }, 'waiting for the object store')
      await delay(500)
    }
  }
}
