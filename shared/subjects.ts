/** Every subject vulcan uses, one function each, its pattern written above it. Ids hold no dots. */
import type { EventKind } from './events.ts'
import type { Isolation, WorkloadId } from './workload.ts'

/** vulcan.events.{workload}.accepted.{isolation}.{target}; target is `any` or a worker id. Public. */
export const acceptedSubject = (id: WorkloadId, isolation: Isolation, target = 'any') =>
  `vulcan.events.${id}.accepted.${isolation}.${target}`

/** vulcan.events.{workload}.{kind}. Public. */
export const eventSubject = (id: WorkloadId, kind: Exclude<EventKind, 'accepted' | 'late'>) =>
  `vulcan.events.${id}.${kind}`

/** vulcan.events.{workload}.>: what the referee compares sequences on. */
export const lifecycleSubjects = (id: WorkloadId) => `vulcan.events.${id}.>`

/** vulcan.late.{workload}: results that came after another end. Public, outside the referee’s subjects. */
export const lateSubject = (id: WorkloadId) => `vulcan.late.${id}`

/** vulcan.logs.{workload}: batches of log lines. Public. */
export const logSubject = (id: WorkloadId) => `vulcan.logs.${id}`

/** vulcan.stored.*.{kind}: ends, as the server republishes them once they are stored. Core NATS, may be lost. */
export const storedEnds = ['completed', 'failed', 'killed'].map((kind) => `vulcan.stored.*.${kind}`)

/** vulcan.control.{workload}: request to the runner that has it. Core NATS, answered by that runner only. */
export const controlSubject = (id: WorkloadId) => `vulcan.control.${id}`

/** vulcan.runners.{runner}: heartbeats with capabilities. Core NATS. */
export const runnerSubject = (runner: string) => `vulcan.runners.${runner}`

/** vulcan.roll-call: asks every runner for a heartbeat now. Core NATS. */
export const rollCallSubject = 'vulcan.roll-call'

/** vulcan.metrics: asks every process for what it counts; answers are gzipped JSON. Core NATS. */
export const metricsSubject = 'vulcan.metrics'

/**
 * vulcan.reply.{gateway}.{workload}: the response of an HTTP invocation as it comes, from its runner to the gateway
 * whose caller waits; see `exchange.ts`. Core NATS.
 */
export const replySubject = (gateway: string, id: WorkloadId) => `vulcan.reply.${gateway}.${id}`
export const allReplies = (gateway: string) => `vulcan.reply.${gateway}.*`

/** vulcan.request.{workload}: the request body as it comes, and credits for the response; see `exchange.ts`. Core NATS. */
export const requestSubject = (id: WorkloadId) => `vulcan.request.${id}`

export const allRunners = 'vulcan.runners.*'
export const allControls = 'vulcan.control.*'

/** The workload id in a subject of the events, stored, late, logs or control family. */
export const workloadOf = (subject: string): WorkloadId => subject.split('.', 3)[2] ?? ''

/** The last token: the workload in `vulcan.work.{isolation}.{target}.{workload}`. */
export const lastToken = (subject: string): string => subject.slice(subject.lastIndexOf('.') + 1)
