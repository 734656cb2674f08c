/** The gateway process: `node gateway/main.ts`. Stateless; start as many as you like on one bus. */
import type { IncomingMessage, ServerResponse } from 'node:http'
import { tmpdir } from 'node:os'
import { setTimeout as delay } from 'node:timers/promises'
import { serve } from '@hono/node-server'
import { z } from 'zod'
import { Blobs } from '../shared/blobs.ts'
import { Bus } from '../shared/bus.ts'
import { CommonConfig, logOptionsOf, readConfig, secretKeyOf } from '../shared/config.ts'
import { GatewayExchanges } from '../shared/exchange.ts'
import { newProcessId } from '../shared/ids.ts'
import { Meters } from '../shared/meters.ts'
import { answerMetrics } from '../shared/metrics-answer.ts'
import { makeLogger, stopSignal, untilAborted } from '../shared/process.ts'
import { countProcess } from '../shared/process-metrics.ts'
import { Registry } from '../shared/registry.ts'
import { SecretBox, Secrets } from '../shared/secrets.ts'
import { startTracing } from '../shared/telemetry.ts'
import { ensureTopology } from '../shared/topology.ts'
import { traceLinks } from '../shared/trace.ts'
import { gatewayFetch } from './app.ts'
import { Builder } from './build/build.ts'
import { isInvocation } from './invoke.ts'
import { LaneGate } from './lanes.ts'
import { GatewayMetrics } from './metrics.ts'
import { readsFrom } from './reads.ts'
import { openRoster } from './roster.ts'
import { Waits } from './waits.ts'

const GatewayConfig = CommonConfig.extend({
  port: z.coerce.number().int().min(0).max(65_535).default(8080),
  dispatcherUrl: z.url().default('http://127.0.0.1:8081'),
  /** Largest request body, MiB. */
  maxBodyMb: z.coerce.number().positive().max(1_024).default(64),
  /** Largest upload of a blob, MiB: image archives are large, and are not held in memory. */
  maxBlobMb: z.coerce.number().positive().max(4_096).default(1_024),
  /** Longest wait of one request, seconds; then it is answered 202. */
  maxWaitS: z.coerce.number().positive().max(86_400).default(3_600),
})

const config = readConfig(
  GatewayConfig,
  {
    port: 'VULCAN_PORT',
    dispatcherUrl: 'VULCAN_DISPATCHER_URL',
    maxBodyMb: 'VULCAN_MAX_BODY_MB',
    maxBlobMb: 'VULCAN_MAX_BLOB_MB',
    maxWaitS: 'VULCAN_MAX_WAIT_S',
  },
  process.env,
)
const gatewayId = newProcessId('gateway')
const metrics = new GatewayMetrics(gatewayId)
countProcess(metrics.registry, config.restarts)
const log = await makeLogger('vulcan-gateway', logOptionsOf(config, gatewayId))
const stop = stopSignal()
const { replicas } = config.topology
const maxBodyBytes = Math.floor(config.maxBodyMb * 1_048_576)
const maxBlobBytes = Math.floor(config.maxBlobMb * 1_048_576)

// Disposed last: what is still on its way has spans to end.
await using tracing = await startTracing(config.telemetry, { service: 'vulcan-gateway', id: gatewayId, log })
await using bus = await Bus.connect({ url: config.natsUrl, name: gatewayId }, stop)
using _answers = answerMetrics(bus, gatewayId, metrics.registry)
const box = await SecretBox.open(secretKeyOf(config))
const [blobs, roster, registry, secrets, meters] = await whenStreamsStand()
const gate = new LaneGate({ bus, registry, meters })
const waits = new Waits(bus)
metrics.waiting(() => waits.size)
const exchanges = new GatewayExchanges(bus, gatewayId)
const fetch = gatewayFetch({
  bus,
  blobs,
  roster,
  registry,
  secrets,
  box,
  gate,
  builder: new Builder({ cacheDir: config.cacheDir, tempDir: tmpdir(), env: process.env }),
  topology: config.topology,
  gatewayId,
  metrics,
  tracing,
  traceUrl: traceLinks(config.traceUrl),
  waits,
  exchanges,
  reads: readsFrom(config.dispatcherUrl),
  maxBodyBytes,
  maxBlobBytes,
  maxWaitS: config.maxWaitS,
  log,
})

// Bodies that are streamed to functions may take as long as the longest wait.
const serverOptions = { requestTimeout: config.maxWaitS * 1_000 }
const server = serve({ fetch, hostname: config.host, port: config.port, serverOptions }, (address) =>
  log.info({ address: address.address, port: address.port }, 'listening'),
)
// A body that is refused by its declared size is not asked for; one that is streamed to a function has no limit. What comes all the same is read and thrown away for
// half a second (by node-server), so that the answer is not lost in a reset connection.
server.on('checkContinue', (request: IncomingMessage, response: ServerResponse) => {
  const limit = request.url?.startsWith('/v1/blobs') ? maxBlobBytes : maxBodyBytes
  if (isInvocation(request) || !(Number(request.headers['content-length']) > limit)) response.writeContinue()
  server.emit('request', request, response)
})
server.on('error', (error) => {
  log.fatal({ err: error }, 'cannot listen')
  process.exit(1)
})

await untilAborted(stop)
log.info({ waiting: waits.size }, 'stopping')
await new Promise<void>((resolve) => {
  server.close(() => resolve())
  // Those who wait get a 202 with the way to their workload; streams are resumed elsewhere by Last-Event-ID.
  waits.close()
  setTimeout(() => 'closeAllConnections' in server && server.closeAllConnections(), 1_000).unref()
})
roster.close()
exchanges.close()
gate.close()
meters.close()
registry.close()
secrets.close()

/** Brings the streams to their shape, for as long as it takes a server to come up. */
async function whenStreamsStand() {
  for (;;) {
    try {
      await ensureTopology(bus.jsm, config.topology)
      return [
        await Blobs.open(bus, replicas),
        await openRoster(bus, replicas),
        await Registry.open(bus, replicas),
        await Secrets.open(bus, replicas, box),
        await Meters.open(bus, replicas),
      ] as const
    } catch (error) {
      stop.throwIfAborted()
      log.warn({ err: error }, 'waiting for the streams')
      await delay(500)
    }
  }
}
