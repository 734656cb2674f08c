/**
 * The streams and consumers, as definitions. The gateway and the dispatcher bring a server to this shape at their
 * start (`ensureTopology`); a runner only looks its consumer up, so that starting one never resets a queue.
 */
import type { ConsumerConfig, JetStreamManager, StreamConfig } from '@nats-io/jetstream'
import { z } from 'zod'
import { Isolation } from './workload.ts'

export const EVENTS = 'VULCAN_EVENTS'
export const WORK = 'VULCAN_WORK'
export const LOGS = 'VULCAN_LOGS'
export const BLOBS = 'vulcan_blobs'
export const BACKENDS = 'vulcan_backends'

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
    },
  ] as (Partial<StreamConfig> & { name: string })[]
}

/** Durable name of the queue that any runner of an isolation pulls from. */
export const workConsumer = (isolation: Isolation): string => isolation

export const consumers = (options: TopologyOptions): (Partial<ConsumerConfig> & { durable_name: string })[] =>
  Isolation.options.map(
    (isolation) =>
      ({
        durable_name: workConsumer(isolation),
        description: `Work for any ${isolation} runner`,
        filter_subject: `vulcan.work.${isolation}.any.*`,
        ack_policy: 'explicit',
        deliver_policy: 'all',
        ack_wait: options.ackWaitMs * 1_000_000,
        max_deliver: -1,
        max_ack_pending: 100_000,
        max_waiting: 4_096,
      }) as Partial<ConsumerConfig> & { durable_name: string },
  )

/** `10058` stream name in use with another configuration; `10148` consumer exists; both mean: update. */
const exists = (error: unknown): boolean =>
  error instanceof Error && 'code' in error && [10058, 10148, 10013, 10105].includes(Number(error.code))

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
  for (const config of consumers(options)) {
    try {
      await jsm.consumers.add(WORK, config)
    } catch (error) {
      if (!exists(error)) throw error
      await jsm.consumers.update(WORK, config.durable_name, config)
    }
  }
}

/** Deletes a work consumer and makes it anew. What was delivered and not acknowledged is then delivered again. */
export async function recreateConsumer(
  jsm: JetStreamManager,
  options: TopologyOptions,
  isolation: Isolation,
): Promise<void> {
  const name = workConsumer(isolation)
  const config = consumers(options).find(({ durable_name }) => durable_name === name)!
  await jsm.consumers.delete(WORK, name)
  await jsm.consumers.add(WORK, config)
}
