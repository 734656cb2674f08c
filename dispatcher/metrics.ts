/**
 * What the dispatcher counts and measures. Series of workloads count what was recorded in the streams, each event
 * once, however often it is delivered or the database is made anew. Durations are seconds, sizes bytes.
 */
import {
  BoundedLabel,
  Count,
  createRegistry,
  Distribution,
  Reading,
  type Registry,
} from '../shared/metrics.ts'
import type { Cause, Isolation, Status } from '../shared/workload.ts'
import { SuccessWindow } from './success.ts'

/** A look at how full a queue is. */
export interface QueueFigures {
  isolation: Isolation
  /** Of a lane. */
  function: string | undefined
  /** Accepted and not delivered to a runner yet. */
  waiting: number
  /** Delivered and not acknowledged: running, or held back for a retry. */
  delivered: number
  redelivered: number
  /** Seconds since the oldest of those that wait was queued; undefined: not known. */
  oldestS: number | undefined
}

export interface StreamFigures {
  stream: string
  messages: number
  bytes: number
  /** Undefined: it has no bound. */
  maxBytes: number | undefined
}

export interface RunnerFigures {
  runner: string
  isolation: Isolation
  host: string
  up: boolean
  /** It offers its isolation. */
  available: boolean
  slots: number
  active: number
  /** Seconds since its last heartbeat. */
  silentS: number
}

export interface FoldFigures {
  stream: string
  /** Stored and not folded; undefined: not known. */
  messages: number | undefined
  /** Seconds that the oldest of them has been stored; undefined: not known. */
  seconds: number | undefined
}

/** Where the figures come from that are read when somebody asks. */
export interface Sources {
  /** Awaited before what the server and the disk know is read. */
  look(): Promise<unknown>
  queues(): Iterable<QueueFigures>
  streams(): Iterable<StreamFigures>
  folds(): Iterable<FoldFigures>
  runners(): Iterable<RunnerFigures>
  /** Each part that the dispatcher needs, and whether it is ready. */
  parts(): Iterable<readonly [part: string, ready: boolean]>
  /** Bytes of the database’s files; undefined where it is elsewhere. */
  databaseBytes(): number | undefined
}

/** What is done to the database. */
export type DatabaseWork = 'fold events' | 'fold logs' | 'read'

const batchSizes = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000]

export class DispatcherMetrics {
  readonly registry: Registry
  readonly #functions = new BoundedLabel()
  readonly #success = new SuccessWindow()
  readonly #ends: Count<['isolation', 'function', 'status', 'cause']>
  readonly #runs: Distribution<['isolation', 'function']>
  readonly #waits: Distribution<['isolation', 'function']>
  readonly #retries: Count<['isolation', 'function', 'cause']>
  readonly #late: Count<['status']>
  readonly #refused: Count<['stream', 'reason']>
  readonly #lines: Count<[]>
  readonly #droppedLines: Count<['by']>
  readonly #missingBatches: Count<[]>
  readonly #batches: Distribution<['stream']>
  readonly #plans: Distribution<['stream']>
  readonly #delays: Distribution<['stream']>
  readonly #database: Distribution<['operation']>
  readonly #databaseFailures: Count<['operation']>
  readonly #swept: Count<['isolation', 'status']>
  readonly #stalled: Count<['isolation']>
  readonly #removed: Count<['kind']>

  /** @param process the dispatcher’s id, as in events */
  constructor(process: string) {
    const registry = createRegistry('vulcan-dispatcher', process)
    this.registry = registry
    this.#ends = new Count({
      name: 'vulcan_ends_total',
      help: 'Workloads that have ended, by their recorded end.',
      labels: ['isolation', 'function', 'status', 'cause'],
      registry,
    })
    this.#runs = new Distribution({
      name: 'vulcan_run_duration_seconds',
      help: 'Seconds that the last attempt of a workload ran.',
      labels: ['isolation', 'function'],
      registry,
    })
    this.#waits = new Distribution({
      name: 'vulcan_queue_wait_seconds',
      help: 'Seconds from the acceptance of a workload until its first attempt began.',
      labels: ['isolation', 'function'],
      registry,
    })
    this.#retries = new Count({
      name: 'vulcan_retries_total',
      help: 'Attempts that are followed by another, by why they failed.',
      labels: ['isolation', 'function', 'cause'],
      registry,
    })
    this.#late = new Count({
      name: 'vulcan_late_events_total',
      help: 'Results that came when the workload had another end already.',
      labels: ['status'],
      registry,
    })
    this.#refused = new Count({
      name: 'vulcan_refused_messages_total',
      help: 'Messages of the streams that changed nothing: no valid event, or a move that the lifecycle does not know.',
      labels: ['stream', 'reason'],
      registry,
    })
    this.#lines = new Count({
      name: 'vulcan_stored_log_lines_total',
      help: 'Log lines that were stored for readers.',
      labels: [],
      registry,
    })
    this.#droppedLines = new Count({
      name: 'vulcan_stored_log_lines_dropped_total',
      help: 'Log lines of which only the number was stored: dropped by the runner, or beyond what a workload may keep.',
      labels: ['by'],
      registry,
    })
    this.#missingBatches = new Count({
      name: 'vulcan_log_batches_missing_total',
      help: 'Batches of log lines that never arrived.',
      labels: [],
      registry,
    })
    this.#batches = new Distribution({
      name: 'vulcan_fold_batch_messages',
      help: 'Messages that were folded in one transaction.',
      labels: ['stream'],
      buckets: batchSizes,
      registry,
    })
    this.#plans = new Distribution({
      name: 'vulcan_fold_plan_seconds',
      help: 'Seconds to read the messages of a batch and decide what is written, with what is looked up for it.',
      labels: ['stream'],
      registry,
    })
    this.#delays = new Distribution({
      name: 'vulcan_fold_delay_seconds',
      help: 'Seconds from the storing of a batch’s first message in the stream until the batch was committed.',
      labels: ['stream'],
      registry,
    })
    this.#database = new Distribution({
      name: 'vulcan_database_seconds',
      help: 'Seconds that the database took.',
      labels: ['operation'],
      registry,
    })
    this.#databaseFailures = new Count({
      name: 'vulcan_database_failures_total',
      help: 'What the database did not do. What was to be written is tried again.',
      labels: ['operation'],
      registry,
    })
    this.#swept = new Count({
      name: 'vulcan_lost_workloads_total',
      help: 'Workloads of lost runners that the dispatcher ended, or put back for another attempt.',
      labels: ['isolation', 'status'],
      registry,
    })
    this.#stalled = new Count({
      name: 'vulcan_stalled_queues_total',
      help: 'Queues that delivered nothing although somebody asked, and were made anew.',
      labels: ['isolation'],
      registry,
    })
    this.#removed = new Count({
      name: 'vulcan_removed_total',
      help: 'What was removed as it was older than it is kept.',
      labels: ['kind'],
      registry,
    })
  }

  /** The end of a workload. @param traceparent of the event that says so */
  ended(
    isolation: Isolation,
    fn: string | undefined,
    { status, cause, durationMs }: { status: Status; cause: Cause | null; durationMs: number | null },
    traceparent: string | undefined,
  ): void {
    const label = this.#functions.of(fn)
    this.#ends.add(1, isolation, label, status, cause ?? '')
    if (durationMs !== null) this.#runs.add(durationMs / 1_000, traceparent, isolation, label)
    if (status !== 'killed') this.#success.add(isolation, label, status === 'completed', Date.now())
  }

  /** The first attempt has begun. */
  began(isolation: Isolation, fn: string | undefined, waitMs: number, traceparent: string | undefined): void {
    this.#waits.add(waitMs / 1_000, traceparent, isolation, this.#functions.of(fn))
  }

  /** An attempt is followed by another. */
  retried(isolation: Isolation, fn: string | undefined, cause: Cause): void {
    this.#retries.add(1, isolation, this.#functions.of(fn), cause)
  }

  /** @param n messages @param name as in the counters of the database, such as `late.completed`, `invalid` */
  refused(stream: string, name: string, n: number): void {
    if (name.startsWith('late.')) this.#late.add(n, name.slice('late.'.length))
    else this.#refused.add(n, stream, name.replace(/^illegal\./, ''))
  }

  /** Of log batches: lines that can be read, lines that were dropped, and batches that never came. */
  logged(lines: number, droppedByRunner: number, droppedHere: number, missing: number): void {
    this.#lines.add(lines)
    this.#droppedLines.add(droppedByRunner, 'runner')
    this.#droppedLines.add(droppedHere, 'dispatcher')
    this.#missingBatches.add(missing)
  }

  planned(stream: string, messages: number, seconds: number): void {
    this.#batches.add(messages, undefined, stream)
    this.#plans.add(seconds, undefined, stream)
  }

  /** @param seconds since the first of the messages that are new was stored */
  committed(stream: string, seconds: number): void {
    this.#delays.add(Math.max(0, seconds), undefined, stream)
  }

  /** Measures what is done to the database. */
  async database<T>(operation: DatabaseWork, act: () => Promise<T>): Promise<T> {
    const before = performance.now()
    try {
      return await act()
    } catch (error) {
      this.#databaseFailures.add(1, operation)
      throw error
    } finally {
      this.#database.add((performance.now() - before) / 1_000, undefined, operation)
    }
  }

  swept(isolation: Isolation, status: 'failed' | 'retrying'): void {
    this.#swept.add(1, isolation, status)
  }

  stalled(isolation: Isolation): void {
    this.#stalled.add(1, isolation)
  }

  removed(kind: 'workloads' | 'log_batches' | 'blobs', n: number): void {
    this.#removed.add(n, kind)
  }

  /** Once, as soon as there is somewhere to read them. */
  read(sources: Sources): void {
    const { registry } = this
    const before = () => sources.look()
    const byQueue = { labels: ['isolation', 'function'], registry, before } as const
    const queues =
      (pick: (queue: QueueFigures) => number | undefined, join: (a: number, b: number) => number) => () =>
        this.#byQueue(sources.queues(), pick, join)
    const sum = (a: number, b: number) => a + b
    new Reading({
      name: 'vulcan_queue_depth',
      help: 'Accepted workloads that no runner has been given yet. Lanes stand by their function.',
      ...byQueue,
    }).each(queues(({ waiting }) => waiting, sum))
    new Reading({
      name: 'vulcan_queue_delivered',
      help: 'Workloads that runners have been given and have not finished: they run, or wait for another attempt.',
      ...byQueue,
    }).each(queues(({ delivered }) => delivered, sum))
    new Reading({
      name: 'vulcan_queue_redelivered',
      help: 'Of the workloads that runners have been given, those given more than once.',
      ...byQueue,
    }).each(queues(({ redelivered }) => redelivered, sum))
    new Reading({
      name: 'vulcan_queue_oldest_age_seconds',
      help: 'Seconds that the workload has waited that has waited longest of those no runner was given yet.',
      ...byQueue,
    }).each(queues(({ oldestS }) => oldestS, Math.max))

    const byStream = { labels: ['stream'], registry, before } as const
    const streams = (pick: (stream: StreamFigures) => number | undefined) =>
      function* () {
        for (const one of sources.streams()) {
          const value = pick(one)
          if (value !== undefined) yield [value, one.stream] as const
        }
      }
    new Reading({ name: 'vulcan_stream_messages', help: 'Messages that a stream holds.', ...byStream }).each(
      streams(({ messages }) => messages),
    )
    new Reading({ name: 'vulcan_stream_bytes', help: 'Bytes that a stream holds.', ...byStream }).each(
      streams(({ bytes }) => bytes),
    )
    new Reading({
      name: 'vulcan_stream_max_bytes',
      help: 'Bytes that a stream may hold; the oldest messages make room.',
      ...byStream,
    }).each(streams(({ maxBytes }) => maxBytes))
    const folds = (pick: (fold: FoldFigures) => number | undefined) =>
      function* () {
        for (const one of sources.folds()) {
          const value = pick(one)
          if (value !== undefined) yield [value, one.stream] as const
        }
      }
    new Reading({
      name: 'vulcan_fold_lag_messages',
      help: 'Messages of a stream that are stored and not yet folded into the database.',
      ...byStream,
    }).each(folds(({ messages }) => messages))
    new Reading({
      name: 'vulcan_fold_lag_seconds',
      help: 'Seconds that the oldest message has been stored that is not yet folded into the database.',
      ...byStream,
    }).each(folds(({ seconds }) => seconds))

    const runners = (pick: (runner: RunnerFigures) => number) =>
      function* () {
        for (const one of sources.runners()) yield [pick(one), one.runner, one.isolation, one.host] as const
      }
    const byRunner = { labels: ['runner', 'isolation', 'host'], registry } as const
    new Reading({
      name: 'vulcan_runner_up',
      help: '1 while a runner is heard; 0 for ten minutes after it fell silent without having said that it leaves.',
      ...byRunner,
    }).each(runners(({ up }) => (up ? 1 : 0)))
    new Reading({
      name: 'vulcan_runner_available',
      help: '1 where a runner offers its isolation; 0 where its host lacks something.',
      ...byRunner,
    }).each(runners(({ available }) => (available ? 1 : 0)))
    new Reading({
      name: 'vulcan_runner_slots',
      help: 'Workloads that a runner takes at once.',
      ...byRunner,
    }).each(runners(({ slots }) => slots))
    new Reading({ name: 'vulcan_runner_active', help: 'Workloads that a runner has now.', ...byRunner }).each(
      runners(({ active }) => active),
    )
    new Reading({
      name: 'vulcan_runner_silent_seconds',
      help: 'Seconds since a runner was last heard.',
      ...byRunner,
    }).each(runners(({ silentS }) => silentS))

    new Reading({
      name: 'vulcan_success_ratio',
      help: 'Share of completed workloads among those that completed or failed in the last five minutes.',
      labels: ['isolation', 'function'],
      registry,
    }).each(() => this.#success.ratios(Date.now()))
    new Reading({
      name: 'vulcan_dispatcher_ready',
      help: '1 where a part that the dispatcher needs is ready: the bus, its database, and the fold being up to date.',
      labels: ['part'],
      registry,
    }).each(function* () {
      for (const [part, ready] of sources.parts()) yield [ready ? 1 : 0, part] as const
    })
    new Reading({
      name: 'vulcan_database_bytes',
      help: 'Bytes of the database’s files, where it is a file.',
      labels: [],
      registry,
      before,
    }).from(() => sources.databaseBytes())
  }

  /** Functions beyond the bound share a label. */
  *#byQueue(
    queues: Iterable<QueueFigures>,
    pick: (queue: QueueFigures) => number | undefined,
    join: (a: number, b: number) => number,
  ): Iterable<readonly [number, string, string]> {
    const joined = new Map<string, [number, string, string]>()
    for (const queue of queues) {
      const value = pick(queue)
      if (value === undefined) continue
      const fn = this.#functions.of(queue.function)
      const key = `${queue.isolation} ${fn}`
      const known = joined.get(key)
      if (known === undefined) joined.set(key, [value, queue.isolation, fn])
      else known[0] = join(known[0], value)
    }
    yield* joined.values()
  }
}
