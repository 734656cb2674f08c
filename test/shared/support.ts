/** A server with the streams on it, and what tests do with them: submit work, read back what was stored. */
import { setTimeout as delay } from 'node:timers/promises'
import { Blobs } from '../../shared/blobs.ts'
import { Bus, type StoredEvent } from '../../shared/bus.ts'
import {
  type AcceptedEvent,
  type End,
  type EndKind,
  isEnd,
  LifecycleEvent,
  makeEvent,
} from '../../shared/events.ts'
import { newWorkloadId } from '../../shared/ids.ts'
import { acceptedSubject, lifecycleSubjects } from '../../shared/subjects.ts'
import { EVENTS, ensureTopology, TopologyOptions } from '../../shared/topology.ts'
import { type WorkloadId, WorkloadSpec } from '../../shared/workload.ts'
import { startNats, type TestNats } from '../nats.ts'

export const origin = { source: '/vulcan/test' }

export interface Ground extends AsyncDisposable {
  nats: TestNats
  bus: Bus
  blobs: Blobs
  topology: TopologyOptions
}

/** A real server brought to the project's shape, and a connection to it. */
export async function ground(topology: Partial<TopologyOptions> = {}): Promise<Ground> {
  await using scope = new AsyncDisposableStack()
  const nats = scope.use(await startNats())
  const bus = scope.use(await Bus.connect({ url: nats.url, name: 'test' }))
  const options = TopologyOptions.parse(topology)
  await ensureTopology(bus.jsm, options)
  const blobs = await Blobs.open(bus, 1)
  const resources = scope.move()
  return { nats, bus, blobs, topology: options, [Symbol.asyncDispose]: () => resources.disposeAsync() }
}

/** An accepted event for a spec; every default filled in. */
export function acceptedEvent(
  spec: Partial<WorkloadSpec> | Record<string, unknown> = {},
  id: WorkloadId = newWorkloadId(),
  over: Partial<AcceptedEvent['data']> = {},
): AcceptedEvent {
  const data = {
    spec: WorkloadSpec.parse({ code: 'export default () => 1', ...spec }),
    payload: null,
    isolation: 'isolate' as const,
    target: 'any',
    routing_reason: 'test',
    request_sha256: '',
    trace_id: '0'.repeat(32),
    rerun_of: null,
    ...over,
  }
  return makeEvent('accepted', id, 0, data, origin) as AcceptedEvent
}

/** Stores an accepted event, which queues it. Returns its id and sequence. */
export async function submit(
  bus: Bus,
  spec: Record<string, unknown> = {},
  over: Partial<AcceptedEvent['data']> = {},
): Promise<{ id: WorkloadId; seq: number }> {
  const event = acceptedEvent(spec, newWorkloadId(), over)
  const stored = await bus.publishEvent(acceptedSubject(event.subject, 'isolate'), event, 0)
  if (!stored.stored) throw new Error('refused')
  return { id: event.subject, seq: stored.seq }
}

/** Everything stored of a workload, oldest first. */
export async function history(bus: Bus, id: WorkloadId): Promise<StoredEvent[]> {
  const events: StoredEvent[] = []
  for (let seq = 1; ; ) {
    const query = { seq, next_by_subj: lifecycleSubjects(id) }
    const stored = await bus.jsm.streams.getMessage(EVENTS, query).catch((error) => {
      if (error.code === 10037) return null
      throw error
    })
    if (stored === null) return events
    events.push({ event: LifecycleEvent.parse(stored.json()), seq: stored.seq })
    seq = stored.seq + 1
  }
}

export const kindsOf = (events: StoredEvent[]): string[] =>
  events.map(({ event }) => event.type.slice('vulcan.workload.'.length))

/** Polls until `check` gives something; throws after `timeoutMs` naming `what`. */
export async function until<T>(
  what: string,
  check: () => T | undefined | Promise<T | undefined>,
  timeoutMs = 15_000,
): Promise<T> {
  const deadline = Date.now() + timeoutMs
  for (;;) {
    const found = await check()
    if (found !== undefined && found !== false) return found
    if (Date.now() > deadline) throw new Error(`${what} did not happen within ${timeoutMs} ms`)
    await delay(10)
  }
}

/** An end of an attempt of which nothing else is known. */
export const bareEnd = (
  kind: EndKind,
  id: WorkloadId,
  data: Pick<End, 'attempt' | 'runner'> & Partial<End>,
  source = origin.source,
): LifecycleEvent =>
  makeEvent(
    kind,
    id,
    data.attempt,
    {
      started_at: null,
      duration_ms: null,
      cause: null,
      error: null,
      output: null,
      output_blob: null,
      exit_code: null,
      logs: null,
      receipt: null,
      ...data,
    },
    { source },
  ) as LifecycleEvent

/** Brings a stream’s room to what it holds and `spare` bytes; returns how to undo that. */
export async function fill(bus: Bus, stream: string, spare = 0): Promise<() => Promise<unknown>> {
  const { config, state } = await bus.jsm.streams.info(stream)
  const full = { ...config, max_bytes: Math.max(1, state.bytes + spare), discard: 'new' } as typeof config
  await bus.jsm.streams.update(stream, full)
  return () => bus.jsm.streams.update(stream, config)
}

/** The recorded end of a workload. */
export const untilEnd = (bus: Bus, id: WorkloadId, timeoutMs?: number) =>
  until(
    `the end of ${id}`,
    async () => {
      const last = await bus.lastEvent(id).catch(() => undefined)
      return last !== undefined && isEnd(last.event) ? last.event : undefined
    },
    timeoutMs,
  )

/** Numbers from a seed (mulberry32), so that a failing sequence can be repeated. */
export function seeded(seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let t = state
    t = Math.imul(t ^ (t >>> 15), t | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296
  }
}
