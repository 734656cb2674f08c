/**
 * The consume loop, the same for every isolation: pull no more than there are free slots, say every third of the
 * ack wait that work goes on, answer kills, send heartbeats, and let go of everything when the lease is lost.
 */
import { hostname } from 'node:os'
import { setTimeout as delay } from 'node:timers/promises'
import { backendKey, type Heartbeat, heartbeatMs } from '../shared/backends.ts'
import type { Blobs } from '../shared/blobs.ts'
import type { Bus } from '../shared/bus.ts'
import type { Meters } from '../shared/meters.ts'
import { type Logger, untilAborted } from '../shared/process.ts'
import type { Registry } from '../shared/registry.ts'
import type { SecretBox, Secrets } from '../shared/secrets.ts'
import { allControls, rollCallSubject, runnerSubject, workloadOf } from '../shared/subjects.ts'
import { type Tracing, tracingOff } from '../shared/tracing.ts'
import { TransientMap } from '../shared/transient-map.ts'
import type { Isolation } from '../shared/workload.ts'
import { ControlRequest, type Held, halt, parseJson, takeWork } from './attempt.ts'
import { Bundles } from './bundles.ts'
import { openIntake } from './lanes.ts'
import type { LogLimits } from './logbook.ts'
import type { RunnerMetrics } from './metrics.ts'
import { startPrewarm } from './prewarm.ts'
import type { Probe, Runner } from './runner.ts'
import { Stacks } from './stacks.ts'
import { Vigil } from './vigil.ts'

/** Milliseconds between two writes of the isolation’s last known capabilities; they are kept 15 minutes. */
const announceMs = 5 * 60_000
/** Milliseconds that running work is given to end by itself when the process is told to stop. */
const drainMs = 5_000
/** Milliseconds for which the stream or the object store may have no room before a completion is given up. */
const fullMs = 30_000

export interface WorkerOptions {
  bus: Bus
  blobs: Blobs
  secrets: Pick<Secrets, 'values'>
  box: SecretBox
  /** Names the lanes that work is taken from beside the common queue, and what is kept warm. */
  registry: Pick<Registry, 'lanes' | 'list' | 'version' | 'onChange'>
  meters: Meters
  runner: Runner
  runnerId: string
  slots: number
  ackWaitMs: number
  replicas: number
  logLimits: LogLimits
  /** Off unless given. */
  tracing?: Tracing | undefined
  metrics?: RunnerMetrics | undefined
  /** Where they are served. */
  metricsUrl?: string | undefined
  /** Milliseconds without room after which a completion ends as `disk_full`; 30 s unless given. */
  fullMs?: number
  log: Logger
}

/** Runs until `stop` is aborted and what was held has ended or been handed back. */
export async function runWorker(options: WorkerOptions, stop: AbortSignal): Promise<void> {
  const { bus, blobs, runner, runnerId, slots, ackWaitMs, logLimits, metrics, log } = options
  const tracing = options.tracing ?? tracingOff
  const held = new TransientMap<string, Held>()
  const vigil = new Vigil(() => held.size === 1)
  const bundles = new Bundles(blobs)
  const context = {
    bus,
    blobs,
    bundles,
    stacks: new Stacks(bundles),
    secrets: options.secrets,
    box: options.box,
    runner,
    runnerId,
    ackWaitMs,
    fullMs: options.fullMs ?? fullMs,
    logLimits,
    tracing,
    metrics,
    log,
    held,
    vigil,
  }

  const stopAll = (reason: 'shutdown' | 'lease_lost') => {
    for (const one of held.values()) halt(one, reason)
  }

  const startedAt = new Date().toISOString()
  const heartbeat = (leaving: boolean): Heartbeat => ({
    runner: runnerId,
    isolation: runner.isolation,
    available: true,
    reason: null,
    fix: null,
    capabilities: runner.capabilities,
    slots,
    active: held.size,
    metrics: finite(runner.metrics?.() ?? {}),
    metrics_url: options.metricsUrl ?? null,
    host: hostname(),
    pid: process.pid,
    started_at: startedAt,
    leaving,
  })
  const beat = (leaving = false) => bus.send(runnerSubject(runnerId), JSON.stringify(heartbeat(leaving)))

  const rollCalls = bus.listen(rollCallSubject, () => beat())
  const controls = bus.listen(allControls, (message) => {
    const mine = held.get(workloadOf(message.subject))
    if (mine === undefined) return
    const request = ControlRequest.safeParse(parseJson(message.string()))
    if (!request.success) return
    if (request.data.action === 'kill') {
      mine.killer ??= request.data.traceparent
      halt(mine, 'killed')
    } else if (request.data.action === 'gone') {
      if (mine.leave === undefined) return
      mine.spans?.event('caller gone')
      mine.leave()
    } else if (request.data.attempt !== mine.attempt) return
    message.respond('{"ok":true}')
  })

  await announce(bus, options.replicas, heartbeat(false), stop)
  beat()
  const intake = openIntake({
    bus,
    isolation: runner.isolation,
    slots,
    lanes: options.registry,
    meters: options.meters,
    handle: (message, receivedAt) => takeWork(context, message, receivedAt),
    log,
  })
  using _prewarm = startPrewarm({
    isolation: runner.isolation,
    functions: options.registry,
    stores: { blobs, bundles },
    secrets: options.secrets,
    runner,
    tracing,
    log,
  })

  // Another runner takes over an ack wait after this one was last heard; by then nothing may run here, whether the
  // connection broke, went silent or this process was stopped for a while.
  let heardAt = Date.now()
  const keepLease = () => {
    if (Date.now() - heardAt > ackWaitMs * 0.8) stopAll('lease_lost')
  }
  const renewLease = async () => {
    if (!bus.connected) return
    const at = Date.now()
    for (const one of held.values()) one.message.working()
    await bus.flush()
    heardAt = at
  }
  const unwatch = bus.onConnection((connected) => {
    keepLease()
    if (!connected) return
    heardAt = Date.now()
    void renewLease().catch(() => {})
    beat()
  })
  const timers = [
    setInterval(() => beat(), heartbeatMs),
    setInterval(
      () => void announce(bus, options.replicas, heartbeat(false), stop).catch(() => {}),
      announceMs,
    ),
    setInterval(keepLease, ackWaitMs / 20),
    setInterval(() => void renewLease().catch(() => {}), ackWaitMs / 3),
  ]
  log.info({ runner: runnerId, isolation: runner.isolation, slots }, 'taking work')

  await untilAborted(stop)
  log.info({ active: held.size }, 'stopping')
  await intake.stop()
  const deadline = Date.now() + drainMs
  while (held.size > 0 && Date.now() < deadline) await delay(20)
  stopAll('shutdown')
  while (held.size > 0 && Date.now() < deadline + 2_000) await delay(20)
  beat(true)
  for (const timer of timers) clearInterval(timer)
  unwatch()
  rollCalls.unsubscribe()
  controls.unsubscribe()
}

/** JSON has no other numbers, and a heartbeat that cannot be read is none. */
const finite = (metrics: Record<string, number>): Record<string, number> =>
  Object.fromEntries(Object.entries(metrics).filter(([, value]) => Number.isFinite(value)))

/** Records what this isolation’s runners can do on this host, so that gateways know it also while none is alive. */
export async function announce(
  bus: Bus,
  replicas: number,
  heartbeat: Heartbeat,
  stop: AbortSignal,
): Promise<void> {
  for (;;) {
    try {
      const kv = await bus.backends(replicas)
      await kv.put(backendKey(heartbeat), JSON.stringify(heartbeat))
      return
    } catch (error) {
      if (stop.aborted) throw error
      await delay(500)
    }
  }
}

/** Says, for as long as the process lives, that an isolation cannot be offered here and what would change that. */
export async function announceUnavailable(
  bus: Bus,
  options: { runnerId: string; isolation: Isolation; replicas: number; metricsUrl?: string | undefined },
  probe: Extract<Probe, { available: false }>,
  stop: AbortSignal,
): Promise<void> {
  const heartbeat: Heartbeat = {
    runner: options.runnerId,
    isolation: options.isolation,
    available: false,
    reason: probe.reason,
    fix: probe.fix,
    capabilities: null,
    slots: 0,
    active: 0,
    metrics: {},
    metrics_url: options.metricsUrl ?? null,
    host: hostname(),
    pid: process.pid,
    started_at: new Date().toISOString(),
    leaving: false,
  }
  const beat = () => bus.send(runnerSubject(options.runnerId), JSON.stringify(heartbeat))
  const rollCalls = bus.listen(rollCallSubject, beat)
  await announce(bus, options.replicas, heartbeat, stop)
  const timer = setInterval(beat, heartbeatMs)
  beat()
  await untilAborted(stop)
  clearInterval(timer)
  rollCalls.unsubscribe()
}
