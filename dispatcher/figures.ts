/** What is read when somebody asks for the metrics: the server’s own word on queues and streams, and who is heard. */
import { stat } from 'node:fs/promises'
import type { Bus } from '../shared/bus.ts'
import type { Lane } from '../shared/functions.ts'
import { EVENTS, LOGS, laneConsumer, WORK, workConsumer, workQueues } from '../shared/topology.ts'
import { Isolation } from '../shared/workload.ts'
import { filePath } from './database.ts'
import type { Live } from './live.ts'
import type { FoldFigures, QueueFigures, RunnerFigures, Sources, StreamFigures } from './metrics.ts'
import { partsOf } from './readiness.ts'
import type { Sweeper } from './sweeper.ts'

/** Milliseconds that a look is as good as a new one. */
const freshMs = 1_000
/** Milliseconds that who asks waits for a look; and that figures are told when the server does not answer. */
const patienceMs = 700
const keptMs = 30_000
/** Queues of which the oldest message is asked for in one look. */
const mostAges = 100
const ours = /^(VULCAN_|OBJ_vulcan_|KV_vulcan_)/

interface Look {
  /** Milliseconds since the epoch. */
  at: number
  queues: QueueFigures[]
  streams: StreamFigures[]
  folds: FoldFigures[]
  databaseBytes: number | undefined
}

const nothing: Look = { at: 0, queues: [], streams: [], folds: [], databaseBytes: undefined }

export class Figures implements Sources {
  readonly #live: Live
  readonly #path: string | undefined
  readonly #lostAfterMs: number
  /** As soon as they are known. */
  lanes: () => Lane[] = () => []
  heard: Sweeper['runners'] = new Map()
  #last = nothing
  #looking: Promise<void> | undefined

  /** @param lostAfterMs milliseconds of silence after which a runner is taken for lost */
  constructor(live: Live, databaseUrl: string, lostAfterMs: number) {
    this.#live = live
    this.#lostAfterMs = lostAfterMs
    this.#path = filePath(databaseUrl)
  }

  /** Never rejects, and never takes longer than is waited for a dispatcher’s answer. */
  async look(): Promise<void> {
    if (Date.now() - this.#last.at < freshMs) return
    this.#looking ??= this.#lookAtAll()
      .catch(() => {})
      .finally(() => {
        this.#looking = undefined
      })
    let timer: NodeJS.Timeout | undefined
    const late = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, patienceMs)
    })
    await Promise.race([this.#looking, late])
    clearTimeout(timer)
  }

  async #lookAtAll(): Promise<void> {
    const databaseBytes = await this.#sizeOfDatabase()
    const bus = this.#live.connectedBus
    if (bus === undefined) {
      this.#last = { ...this.#current, databaseBytes }
      return
    }
    const [queues, { streams, folds }] = await Promise.all([
      this.#lookAtQueues(bus),
      this.#lookAtStreams(bus),
    ])
    this.#last = { at: Date.now(), queues, streams, folds, databaseBytes }
  }

  async #lookAtQueues({ jsm }: Bus): Promise<QueueFigures[]> {
    const infos = await workQueues(jsm)
    const queues = new Map<string, { isolation: Isolation; function: string | undefined }>()
    for (const isolation of Isolation.options)
      queues.set(workConsumer(isolation), { isolation, function: undefined })
    for (const lane of this.lanes())
      queues.set(laneConsumer(lane), { isolation: lane.isolation, function: lane.function })
    let ages = 0
    const looks = [...queues].map(async ([name, queue]): Promise<QueueFigures[]> => {
      const info = infos.get(name)
      if (info === undefined) return []
      const { pending, out, redelivered, subjects, deliveredTo, at } = info
      const asked = pending > 0 && ages++ < mostAges
      const oldest = asked ? await storedAt(jsm, WORK, deliveredTo + 1, subjects) : undefined
      const oldestS = pending === 0 ? 0 : oldest === undefined ? undefined : secondsBetween(oldest, at)
      return [{ ...queue, waiting: pending, delivered: out, redelivered, oldestS }]
    })
    return (await Promise.all(looks)).flat()
  }

  async #lookAtStreams({ jsm }: Bus): Promise<{ streams: StreamFigures[]; folds: FoldFigures[] }> {
    const streams: StreamFigures[] = []
    const folds: FoldFigures[] = []
    const { events, logs } = this.#live
    for await (const { config, state, ts } of jsm.streams.list()) {
      if (!ours.test(config.name)) continue
      const { messages, bytes } = state
      const maxBytes = config.max_bytes > 0 ? config.max_bytes : undefined
      streams.push({ stream: config.name, messages, bytes, maxBytes })
      const progress = config.name === EVENTS ? events : config.name === LOGS ? logs : undefined
      if (progress === undefined) continue
      const { seq } = progress
      const isFolded = state.last_seq <= seq
      const oldest = isFolded ? undefined : await storedAt(jsm, config.name, seq + 1, '>')
      const seconds =
        oldest === undefined ? 0 : secondsBetween(oldest, ts === undefined ? Date.now() : Date.parse(ts))
      // Until a database was opened nobody knows how far it is.
      folds.push({
        stream: config.name,
        messages: isFolded ? 0 : progress.lag,
        seconds: progress.isKnown ? seconds : undefined,
      })
    }
    return { streams, folds }
  }

  async #sizeOfDatabase(): Promise<number | undefined> {
    if (this.#path === undefined) return undefined
    const sizes = await Promise.all(
      ['', '-wal'].map(async (end) =>
        stat(this.#path + end).then(
          ({ size }) => size,
          () => 0,
        ),
      ),
    )
    return sizes.reduce((sum, size) => sum + size, 0)
  }

  get #current(): Look {
    return Date.now() - this.#last.at < keptMs ? this.#last : nothing
  }

  queues(): Iterable<QueueFigures> {
    return this.#current.queues
  }

  streams(): Iterable<StreamFigures> {
    return this.#current.streams
  }

  folds(): Iterable<FoldFigures> {
    return this.#current.folds
  }

  databaseBytes(): number | undefined {
    return this.#last.databaseBytes
  }

  *runners(): Iterable<RunnerFigures> {
    const now = Date.now()
    for (const { heartbeat, at } of this.heard.values()) {
      const { runner, isolation, host, available, slots, active, leaving } = heartbeat
      if (leaving) continue
      const up = now - at <= this.#lostAfterMs
      yield { runner, isolation, host, up, available, slots, active, silentS: (now - at) / 1_000 }
    }
  }

  *parts(): Iterable<readonly [part: string, ready: boolean]> {
    for (const [part, { ready }] of Object.entries(partsOf(this.#live))) yield [part, ready]
  }
}

/** When the next message on `subject` from `seq` on was stored, ms since the epoch; undefined: there is none. */
async function storedAt(
  jsm: Bus['jsm'],
  stream: string,
  seq: number,
  subject: string,
): Promise<number | undefined> {
  const query: { seq: number; next_by_subj: string } = { seq, next_by_subj: subject }
  const message = await jsm.streams.getMessage(stream, query).catch(() => null)
  return message === null ? undefined : Date.parse(message.timestamp)
}

const secondsBetween = (from: number, to: number): number => Math.max(0, (to - from) / 1_000)
