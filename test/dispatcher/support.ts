/** A dispatcher in this process on a server of its own, and events to feed it. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { pathToFileURL } from 'node:url'
import { createClient } from '@libsql/client'
import pino from 'pino'
import { type Dispatcher, DispatcherConfig, startDispatcher } from '../../dispatcher/dispatcher.ts'
import { Bus } from '../../shared/bus.ts'
import {
  type Accepted,
  type End,
  type EndKind,
  type LogBatch,
  makeEvent,
  type Origin,
} from '../../shared/events.ts'
import { newWorkloadId } from '../../shared/ids.ts'
import { acceptedSubject, eventSubject, logSubject } from '../../shared/subjects.ts'
import { ensureTopology, TopologyOptions } from '../../shared/topology.ts'
import { type LogLine, WorkloadSpec } from '../../shared/workload.ts'
import { startNats, type TestNats } from '../nats.ts'

export const origin: Origin = { source: '/vulcan/test' }
export const silent = pino({ level: process.env.TEST_LOG ?? 'silent' })

export async function until<T>(
  what: string,
  probe: () => Promise<T | undefined | false> | T | undefined | false,
  ms = 15_000,
): Promise<T> {
  const deadline = Date.now() + ms
  for (;;) {
    const answer = await probe()
    if (answer) return answer
    if (Date.now() > deadline) throw new Error(`waited ${ms} ms for ${what}`)
    await delay(20)
  }
}

export type World = AsyncDisposable & {
  nats: TestNats
  bus: Bus
  dir: string
  databaseUrl: string
  /** Starts a dispatcher on the world’s database; the world ends it. */
  dispatcher(options?: Partial<Parameters<typeof startDispatcher>[0]>): Promise<Dispatcher>
  publish: Publisher
}

/** A server with the streams, a bus, and a directory for the database. */
export async function makeWorld(): Promise<World> {
  await using scope = new AsyncDisposableStack()
  const dir = await mkdtemp(join(tmpdir(), 'vulcan-test-dispatcher-'))
  scope.defer(() => rm(dir, { recursive: true, force: true }))
  const nats = scope.use(await startNats())
  const bus = scope.use(await Bus.connect({ url: nats.url, name: 'test' }))
  await ensureTopology(bus.jsm, TopologyOptions.parse({}))
  const databaseUrl = pathToFileURL(join(dir, 'vulcan.db')).href
  const resources = scope.move()
  return {
    nats,
    bus,
    dir,
    databaseUrl,
    async dispatcher(options = {}) {
      const config = DispatcherConfig.parse({ natsUrl: nats.url, dispatcherPort: 0, dataDir: dir })
      const dispatcher = await startDispatcher({ ...config, databaseUrl, ...options }, silent)
      resources.use(dispatcher)
      return dispatcher
    },
    publish: new Publisher(bus),
    [Symbol.asyncDispose]: () => resources.disposeAsync(),
  }
}

const at = (ms: number) => new Date(Date.UTC(2026, 10, 20) + ms).toISOString()

/** Publishes the events of workloads, keeping the last sequence of each for the referee. */
export class Publisher {
  readonly #bus: Bus
  /** Of the events from now on. */
  origin: Origin = origin
  readonly last = new Map<string, number>()
  constructor(bus: Bus) {
    this.#bus = bus
  }

  async #event(subject: string, event: Parameters<Bus['publishEvent']>[1]): Promise<number> {
    const expected = this.last.get(event.subject) ?? 0
    const published = await this.#bus.publishEvent(subject, event, expected)
    if (!published.stored) throw new Error(`refused: ${event.id}`)
    this.last.set(event.subject, published.seq)
    return published.seq
  }

  async accepted(
    data: Partial<Accepted> = {},
    { id = newWorkloadId(), time = at(0), spec = {} as object } = {},
  ): Promise<string> {
    const full: Accepted = {
      spec: WorkloadSpec.parse({ code: 'export default () => 1', ...spec }),
      payload: null,
      isolation: 'isolate',
      target: 'any',
      routing_reason: 'JavaScript source',
      request_sha256: 'f'.repeat(64),
      trace_id: 'a'.repeat(32),
      rerun_of: null,
      ...data,
    }
    await this.#event(
      acceptedSubject(id, full.isolation),
      makeEvent('accepted', id, 0, full, this.origin, time),
    )
    return id
  }

  started(id: string, attempt = 1, runner = 'isolate-1', time = at(10)): Promise<number> {
    return this.#event(
      eventSubject(id, 'started'),
      makeEvent('started', id, attempt, { attempt, runner }, this.origin, time),
    )
  }

  retrying(id: string, attempt = 1, runner = 'isolate-1'): Promise<number> {
    const data = {
      attempt,
      runner,
      cause: 'runner_lost' as const,
      error: { message: 'gone', stack: null },
      not_before: at(20),
    }
    return this.#event(
      eventSubject(id, 'retrying'),
      makeEvent('retrying', id, attempt, data, this.origin, at(15)),
    )
  }

  ended(id: string, kind: EndKind = 'completed', data: Partial<End> = {}, time = at(30)): Promise<number> {
    return this.#event(eventSubject(id, kind), makeEvent(kind, id, 1, endOf(data), this.origin, time))
  }

  /** A whole life. */
  async run(spec: object = {}, end: Partial<End> = {}, kind: EndKind = 'completed'): Promise<string> {
    const id = await this.accepted({}, { spec })
    await this.started(id)
    await this.ended(id, kind, end)
    return id
  }

  logs(id: string, n: number, texts: string[], { attempt = 1, dropped = 0 } = {}): Promise<number> {
    const data: LogBatch = { attempt, n, lines: texts.map(line), dropped }
    const event = makeEvent('log', id, `${attempt}.${n}`, data, this.origin, at(12))
    return this.#bus.publishRecord(logSubject(id), event, `${id}.${attempt}.log.${n}`)
  }
}

export const line = (text: string): LogLine => ({ time: at(12), level: 'info', stream: 'console', text })

export const endOf = (data: Partial<End> = {}): End => ({
  attempt: 1,
  runner: 'isolate-1',
  started_at: at(10),
  duration_ms: 20,
  cause: null,
  error: null,
  output: { y: 42 },
  output_blob: null,
  exit_code: null,
  logs: { last: 0, lines: 0, dropped: 0 },
  receipt: null,
  ...data,
})

/** Every row of every table, as text, without what drizzle notes of its migrations. */
export async function dump(databaseUrl: string): Promise<Record<string, string[]>> {
  const client = createClient({ url: databaseUrl })
  try {
    const tables: Record<string, string[]> = {}
    for (const table of ['workloads', 'workload_labels', 'log_batches', 'checkpoints', 'counters']) {
      const { rows } = await client.execute(`SELECT * FROM ${table} ORDER BY 1, 2`)
      tables[table] = rows.map((row) => JSON.stringify(row))
    }
    return tables
  } finally {
    client.close()
  }
}

/** Waits until everything stored now is folded. */
export async function folded(dispatcher: Dispatcher, bus: Bus): Promise<void> {
  const { live } = dispatcher
  for (const [stream, progress] of [
    ['VULCAN_EVENTS', live.events],
    ['VULCAN_LOGS', live.logs],
  ] as const) {
    const { state } = await bus.jsm.streams.info(stream)
    await until(
      `${stream} folded to ${state.last_seq}`,
      () => live.database && progress.seq >= state.last_seq,
    )
  }
}

// biome-ignore lint/suspicious/noExplicitAny: what came is what the test looks at
export const getJson = async (url: string): Promise<{ status: number; body: any; headers: Headers }> => {
  const response = await fetch(url)
  const text = await response.text()
  return {
    status: response.status,
    body: text === '' ? undefined : JSON.parse(text),
    headers: response.headers,
  }
}
