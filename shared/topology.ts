/**
 * The streams and consumers, as definitions. The gateway and the dispatcher bring a server to this shape at their
 * start (`ensureTopology`); a runner only looks its consumer up, so that starting one never resets a queue.
 */
import type { ConsumerConfig, JetStreamManager, StreamConfig } from '@nats-io/jetstream'
import { z } from 'zod'
import type { Lane } from './functions.ts'
import { Isolation } from './workload.ts'

export const EVENTS = 'VULCAN_EVENTS'
export const WORK = 'VULCAN_WORK'
export const LOGS = 'VULCAN_LOGS'
export const BLOBS = 'vulcan_blobs'
export const BACKENDS = 'vulcan_backends'
export const FUNCTIONS = 'vulcan_functions'
export const SECRETS = 'vulcan_secrets'
export const RATES = 'vulcan_rates'

/** What an operator can set of the streams; read from the environment by `shared/config.ts`. */
export const TopologyOptions = z.object({
  /** JetStream replicas: 1 on one server, 3 in a cluster. */
  replicas: z.coerce.number().int().min(1).max(5).default(1),
  /** A runner that has not said for this long (ms) that it still works on a message loses it to another. */
  ackWaitMs: z.coerce.number().int().min(1_000).default(15_000),
  /** Events and logs are kept this long (hours). */
  eventsMaxAgeH: z.coerce
    .number()
    .positive()
    .default(24 * 30),
  logsMaxAgeH: z.coerce
    .number()
    .positive()
    .default(24 * 7),
  /** … and at most this much of them (MiB). The oldest go first. */
  eventsMaxMb: z.coerce.number().int().positive().default(8_192),
  logsMaxMb: z.coerce.number().int().positive().default(4_096),
})
export type TopologyOptions = z.infer<typeof TopologyOptions>

const hours = (n: number) => Math.round(n * 3_600_000_000_000)
const mebibytes = (n: number) => n * 1_048_576

export function streams(options: TopologyOptions): (Partial<StreamConfig> & { name: string })[] {
  const common = { storage: 'file', num_replicas: options.replicas, discard: 'old' } as const
  return [
    {
      ...common,
      name: EVENTS,
      description: 'The truth: every accepted request and every change after it',
      subjects: ['vulcan.events.>', 'vulcan.late.*'],
      retention: 'limits',
      max_age: hours(options.eventsMaxAgeH),
      max_bytes: mebibytes(options.eventsMaxMb),
      allow_direct: true,
      // Whoever waits for an end hears of it from the server itself, the moment it is stored.
      republish: { src: 'vulcan.events.*.*', dest: 'vulcan.stored.{{wildcard(1)}}.{{wildcard(2)}}' },
    },
    {
      ...common,
      name: WORK,
      description: 'The queue, derived by the server from the accepted events',
      retention: 'workqueue',
      sources: [
        {
          name: EVENTS,
          subject_transforms: [
            {
              src: 'vulcan.events.*.accepted.*.*',
              dest: 'vulcan.work.{{wildcard(2)}}.{{wildcard(3)}}.{{wildcard(1)}}',
            },
          ],
        },
      ],
    },
    {
      ...common,
      name: LOGS,
      description: 'Log lines of workloads, in batches',
      subjects: ['vulcan.logs.*'],
      retention: 'limits',
      max_age: hours(options.logsMaxAgeH),
      max_bytes: mebibytes(options.logsMaxMb),
      allow_direct: true,
    },
  ] as (Partial<StreamConfig> & { name: string })[]
}

/** Durable name of the queue that any runner of an isolation pulls from. */
export const workConsumer = (isolation: Isolation): string => isolation

/** Durable name of a lane’s queue. */
export const laneConsumer = ({ isolation, lane }: Pick<Lane, 'isolation' | 'lane'>): string =>
  `${isolation}_${lane}`

type WorkConsumer = Partial<ConsumerConfig> & { durable_name: string }

/** What a consumer without a bound of its own may have delivered and not acknowledged. */
const unbounded = 100_000

const consumerOf = (
  options: TopologyOptions,
  durable_name: string,
  target: string,
  description: string,
  bound: number,
): WorkConsumer =>
  ({
    durable_name,
    description,
    filter_subject: `vulcan.work.${target}.*`,
    ack_policy: 'explicit',
    deliver_policy: 'all',
    ack_wait: options.ackWaitMs * 1_000_000,
    max_deliver: -1,
    max_ack_pending: bound,
    max_waiting: 4_096,
  }) as WorkConsumer

export const consumers = (options: TopologyOptions): WorkConsumer[] =>
  Isolation.options.map((isolation) =>
    consumerOf(
      options,
      workConsumer(isolation),
      `${isolation}.any`,
      `Work for any ${isolation} runner`,
      unbounded,
    ),
  )

/** The server itself bounds what of a lane is out at once, over all runners and whatever becomes of them. */
export const laneConfig = (options: TopologyOptions, lane: Lane): WorkConsumer =>
  consumerOf(
    options,
    laneConsumer(lane),
    `${lane.isolation}.${lane.lane}`,
    `Invocations of ${lane.function}`,
    lane.concurrency ?? unbounded,
  )

/** `10058` stream name in use with another configuration; `10148` consumer exists; both mean: update. */
const exists = (error: unknown): boolean =>
  error instanceof Error && 'code' in error && [10058, 10148, 10013, 10105].includes(Number(error.code))

/** `10014` no such consumer, `10059` no such stream. */
const isMissing = (error: unknown): boolean =>
  error instanceof Error && 'code' in error && [10014, 10059].includes(Number(error.code))

/**
 * Brings streams and consumers to their definitions; safe to call from several processes at once and at any time.
 * An existing consumer keeps its position. Work consumers are made before anything can be published to them.
 */
export async function ensureTopology(jsm: JetStreamManager, options: TopologyOptions): Promise<void> {
  for (const config of streams(options)) {
    try {
      await jsm.streams.add(config as StreamConfig & { name: string })
    } catch (error) {
      if (!exists(error)) throw error
      await jsm.streams.update(config.name, config)
    }
  }
  for (const config of consumers(options)) await ensureConsumer(jsm, config)
}

async function ensureConsumer(jsm: JetStreamManager, config: WorkConsumer): Promise<void> {
  try {
    await jsm.consumers.add(WORK, config)
  } catch (error) {
    if (!exists(error)) throw error
    await jsm.consumers.update(WORK, config.durable_name, config)
  }
}

/**
 * Brings a lane’s consumer to its definition, as often as one likes; its position and what is out stay as they are.
 * To be called before anything is published to the lane. A bound that shrinks holds for what starts from then on.
 */
export const ensureLane = (jsm: JetStreamManager, options: TopologyOptions, lane: Lane): Promise<void> =>
  ensureConsumer(jsm, laneConfig(options, lane))

/**
 * Removes a lane’s consumer where its queue is empty; false where it is not, and all stays as it is. Only for a
 * lane that nothing is published to any more. What slipped in meanwhile waits in the stream for `ensureLane`.
 */
export async function removeLane(
  jsm: JetStreamManager,
  options: TopologyOptions,
  lane: Lane,
): Promise<boolean> {
  const name = laneConsumer(lane)
  try {
    const { num_pending, num_ack_pending } = await jsm.consumers.info(WORK, name)
    if (num_pending > 0 || num_ack_pending > 0) return false
    await jsm.consumers.delete(WORK, name)
  } catch (error) {
    if (!isMissing(error)) throw error
  }
  const subjects_filter = `vulcan.work.${lane.isolation}.${lane.lane}.*`
  const { state } = await jsm.streams.info(WORK, { subjects_filter })
  if (Object.keys(state.subjects ?? {}).length > 0) {
    await ensureLane(jsm, options, lane)
    return false
  }
  await jsm.streams.purge(`KV_${RATES}`, { filter: `$KV.${RATES}.${name}` }).catch((error) => {
    if (!isMissing(error)) throw error
  })
  return true
}

/** How a work consumer does, and by which settings. */
export interface WorkQueueInfo {
  name: string
  /** What it takes of the stream’s subjects. */
  subjects: string
  /** When the server looked, ms since the epoch. */
  at: number
  pending: number
  /** Delivered and not acknowledged. */
  out: number
  /** Open pulls. */
  waiting: number
  /** Consumer sequence of the last delivery. */
  delivered: number
  /** Stream sequence up to which all of its messages were delivered at least once. */
  deliveredTo: number
  /** Delivered more than once and not acknowledged. */
  redelivered: number
  maxOut: number
  ackWaitMs: number
}

/** All work consumers, by name. */
export async function workQueues(jsm: JetStreamManager): Promise<Map<string, WorkQueueInfo>> {
  const found = new Map<string, WorkQueueInfo>()
  for await (const info of jsm.consumers.list(WORK))
    found.set(info.name, {
      name: info.name,
      subjects: info.config.filter_subject ?? '>',
      at: info.ts === undefined ? Date.now() : Date.parse(info.ts),
      pending: info.num_pending,
      out: info.num_ack_pending,
      waiting: info.num_waiting,
      delivered: info.delivered.consumer_seq,
      deliveredTo: info.delivered.stream_seq,
      redelivered: info.num_redelivered,
      maxOut: info.config.max_ack_pending ?? 0,
      ackWaitMs: (info.config.ack_wait ?? 0) / 1_000_000,
    })
  return found
}

/** True where a lane’s consumer is as `ensureLane` would leave it. */
export function isAsWanted(options: TopologyOptions, lane: Lane, info: WorkQueueInfo | undefined): boolean {
  const { max_ack_pending } = laneConfig(options, lane)
  return info !== undefined && info.maxOut === max_ack_pending && info.ackWaitMs === options.ackWaitMs
}

/**
 * Deletes the consumer of an isolation’s common queue, or of a lane, and makes it anew. What was delivered and not
 * acknowledged is then delivered again.
 */
export async function recreateConsumer(
  jsm: JetStreamManager,
  options: TopologyOptions,
  queue: Isolation | Lane,
): Promise<void> {
  const config =
    typeof queue === 'string'
      ? consumers(options).find(({ durable_name }) => durable_name === workConsumer(queue))!
      : laneConfig(options, queue)
  await jsm.consumers.delete(WORK, config.durable_name)
  await jsm.consumers.add(WORK, config)
}
