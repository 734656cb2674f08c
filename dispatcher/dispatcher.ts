/** The dispatcher’s parts, put together. */
import { setTimeout as delay } from 'node:timers/promises'
import { serve } from '@hono/node-server'
import { z } from 'zod'
import { lostAfterMs } from '../shared/backends.ts'
import { Blobs } from '../shared/blobs.ts'
import { Bus } from '../shared/bus.ts'
import { CommonConfig } from '../shared/config.ts'
import { newProcessId } from '../shared/ids.ts'
import { answerMetrics } from '../shared/metrics-answer.ts'
import type { Logger } from '../shared/process.ts'
import { countProcess } from '../shared/process-metrics.ts'
import { Registry } from '../shared/registry.ts'
import { ensureTopology } from '../shared/topology.ts'
import { traceLinks } from '../shared/trace.ts'
import { type Tracing, tracingOff } from '../shared/tracing.ts'
import { openDatabase } from './database.ts'
import { Figures } from './figures.ts'
import { eventProjection } from './fold.ts'
import { startLaneKeeper } from './lanes.ts'
import { Live } from './live.ts'
import { logProjection } from './logs.ts'
import { DispatcherMetrics } from './metrics.ts'
import { project, type Told } from './project.ts'
import { readsApp } from './reads.ts'
import { startRetention } from './retention.ts'
import { startSweeper } from './sweeper.ts'
import { teller } from './tell.ts'
import { startWatchdog } from './watchdog.ts'

const hours = z.coerce.number().positive()

export const DispatcherConfig = CommonConfig.extend({
  /** Address of the internal HTTP server. It asks nobody who they are: not the gateway’s `VULCAN_HOST`. */
  dispatcherHost: z.string().default('127.0.0.1'),
  /** Its port; 0: any free one. */
  dispatcherPort: z.coerce.number().int().min(0).max(65_535).default(8081),
  /** `file:/path`, `libsql://host`, `http(s)://host`; a file in the data directory unless given. */
  databaseUrl: z.string().min(1).optional(),
  /** For a remote libSQL server. */
  databaseToken: z.string().min(1).optional(),
  /** A workload keeps at most this many log lines and bytes, over all its attempts. */
  logLines: z.coerce.number().int().positive().default(10_000),
  logBytes: z.coerce
    .number()
    .int()
    .positive()
    .default(5 * 1_048_576),
  /** Ended workloads, and log lines, are kept this long (hours). */
  keepWorkloadsH: hours.default(24 * 30),
  keepLogsH: hours.default(24 * 7),
  /** A blob nothing refers to is kept this long (hours) after it was last put. */
  blobGraceH: hours.default(24),
  /** Seconds between two rounds of removing what is too old. */
  retentionEveryS: z.coerce.number().positive().default(600),
})
export type DispatcherConfig = z.infer<typeof DispatcherConfig>

export const dispatcherVariables: Partial<Record<keyof DispatcherConfig, string>> & Record<string, string> = {
  dispatcherHost: 'VULCAN_DISPATCHER_HOST',
  dispatcherPort: 'VULCAN_DISPATCHER_PORT',
  databaseUrl: 'VULCAN_DATABASE_URL',
  databaseToken: 'VULCAN_DATABASE_TOKEN',
  logLines: 'VULCAN_LOG_LINES',
  logBytes: 'VULCAN_LOG_BYTES',
  keepWorkloadsH: 'VULCAN_KEEP_WORKLOADS_H',
  keepLogsH: 'VULCAN_KEEP_LOGS_H',
  blobGraceH: 'VULCAN_BLOB_GRACE_H',
  retentionEveryS: 'VULCAN_RETENTION_EVERY_S',
}

export interface DispatcherOptions extends DispatcherConfig {
  databaseUrl: string
  /** Of this process, as in events; made up unless given. */
  id?: string
  tracing?: Tracing
  /** Milliseconds of silence after which a runner is lost, and between two sweeps; for tests. */
  lostAfterMs?: number
  sweepMs?: number
}

export interface Dispatcher extends AsyncDisposable {
  /** Base URL of its HTTP server. */
  url: string
  live: Live
}

/** Serves at once; connects, opens the database and folds in the background, for as long as it takes. */
export async function startDispatcher(options: DispatcherOptions, log: Logger): Promise<Dispatcher> {
  await using scope = new AsyncDisposableStack()
  const stop = new AbortController()
  const name = options.id ?? newProcessId('dispatcher')
  const metrics = new DispatcherMetrics(name)
  const live = new Live(metrics)
  const figures = new Figures(live, options.databaseUrl, options.lostAfterMs ?? lostAfterMs)
  metrics.read(figures)
  countProcess(metrics.registry, options.restarts)
  const logsKeptMs = options.keepLogsH * 3_600_000

  const traceUrl = traceLinks(options.traceUrl)
  const app = readsApp({ live, logsKeptMs, traceUrl, registry: metrics.registry, log, stop: stop.signal })
  const port = await new Promise<number>((resolve, reject) => {
    const server = serve(
      { fetch: app.fetch, hostname: options.dispatcherHost, port: options.dispatcherPort },
      (address) => resolve(address.port),
    )
    server.on('error', reject)
    scope.defer(async () => {
      const closed = new Promise((resolve) => server.close(resolve))
      if ('closeIdleConnections' in server) server.closeIdleConnections()
      await Promise.race([closed, delay(1_000, undefined, { ref: false })])
      if ('closeAllConnections' in server) server.closeAllConnections()
      await closed
    })
  })

  const running = run({ options, name, live, metrics, figures, log }, stop.signal).catch((error) => {
    if (!stop.signal.aborted) throw error
  })
  scope.defer(() => running)
  scope.defer(() => stop.abort())
  const { dispatcherHost } = options
  const host = dispatcherHost.includes(':') ? `[${dispatcherHost}]` : dispatcherHost
  const resources = scope.move()
  return { url: `http://${host}:${port}`, live, [Symbol.asyncDispose]: () => resources.disposeAsync() }
}

interface Running {
  options: DispatcherOptions
  /** Id of this process. */
  name: string
  live: Live
  metrics: DispatcherMetrics
  figures: Figures
  log: Logger
}

async function run(
  { options, name, live, metrics, figures, log }: Running,
  stop: AbortSignal,
): Promise<void> {
  const { topology, tracing = tracingOff } = options
  const origin = { source: `/vulcan/dispatchers/${name}` }
  await using bus = await Bus.connect({ url: options.natsUrl, name }, stop)
  live.bus = bus
  using _answers = answerMetrics(bus, name, metrics.registry)
  const ensure = async () => {
    await ensureTopology(bus.jsm, topology)
    live.blobs = await Blobs.open(bus, topology.replicas)
  }
  await untilDone(ensure, stop, (error) => log.warn({ err: error }, 'waiting for JetStream'))

  const registry = await untilDone(
    () => Registry.open(bus, topology.replicas),
    stop,
    (error) => log.warn({ err: error }, 'waiting for the functions'),
  )
  using _registry = { [Symbol.dispose]: () => registry.close() }
  figures.lanes = () => registry.lanes()
  const parts = { bus, live, origin, tracing, metrics, log }
  using sweeper = startSweeper({ ...parts, lostAfterMs: options.lostAfterMs, sweepMs: options.sweepMs })
  figures.heard = sweeper.runners
  using _watchdog = startWatchdog({
    bus,
    topology,
    lanes: () => registry.lanes(),
    runners: sweeper.runners,
    metrics,
    log,
  })
  using _lanes = startLaneKeeper({ bus, topology, registry, log })
  await using _retention = startRetention({
    bus,
    live,
    registry,
    metrics,
    log,
    keepWorkloadsMs: options.keepWorkloadsH * 3_600_000,
    keepLogsMs: options.keepLogsH * 3_600_000,
    blobGraceMs: options.blobGraceH * 3_600_000,
    everyMs: options.retentionEveryS * 1_000,
  })

  const events = eventProjection(log, teller(metrics, tracing))
  const logs = logProjection({ lines: options.logLines, bytes: options.logBytes }, log, metrics)
  const eventsTold: Told = { created: null, seq: 0 }
  const logsTold: Told = { created: null, seq: 0 }
  // Each turn is the life of one database: where the file is deleted, the next is folded from the streams’ start.
  while (!stop.aborted) {
    const database = await untilDone(
      () => openDatabase({ url: options.databaseUrl, authToken: options.databaseToken }),
      stop,
      (error) => {
        live.databaseTrouble = messageOf(error)
        log.warn({ err: error }, 'the database cannot be opened')
      },
    )
    live.database = database
    live.databaseTrouble = undefined
    const trouble = (error: unknown) => {
      live.databaseTrouble = error === undefined ? undefined : messageOf(error)
    }
    const life = AbortSignal.any([stop, database.lost])
    const context = { bus, database, changes: live.changes, metrics, ensure, trouble, log }
    const folds = [
      project({ ...context, projection: events, progress: live.events, told: eventsTold }, life),
      project({ ...context, projection: logs, progress: live.logs, told: logsTold }, life),
    ]
    try {
      await Promise.all(folds)
    } catch (error) {
      if (!life.aborted) throw error
      if (!stop.aborted) log.warn({ reason: messageOf(database.lost.reason) }, 'opening the database anew')
    } finally {
      await Promise.allSettled(folds)
      live.database = undefined
      live.databaseTrouble = 'it is being opened'
      database.close()
    }
  }
}

const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error))

/** Tries until it succeeds, saying so now and then; rejects when `stop` is aborted. */
async function untilDone<T>(
  act: () => Promise<T>,
  stop: AbortSignal,
  say: (error: unknown) => void,
): Promise<T> {
  for (let tries = 0; ; tries++) {
    stop.throwIfAborted()
    try {
      return await act()
    } catch (error) {
      stop.throwIfAborted()
      if (tries % 20 === 0) say(error)
      await delay(Math.min(2_000, 50 * 2 ** tries), undefined, { signal: stop })
    }
  }
}
