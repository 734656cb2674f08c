/** What folded events say to whoever counts them and follows their traces. Each of them is told once. */
import { hasEnded } from '../shared/lifecycle.ts'
import { isSampled } from '../shared/trace.ts'
import type { Tracing } from '../shared/tracing.ts'
import type { Step } from './fold.ts'
import type { DispatcherMetrics } from './metrics.ts'
import type { Batch } from './project.ts'

export const teller =
  (metrics: DispatcherMetrics, tracing: Tracing) =>
  (steps: Step[], batch: Batch): void => {
    for (const step of steps) count(metrics, step)
    if (tracing.on) traceEnds(tracing, steps, batch)
  }

function count(metrics: DispatcherMetrics, step: Step): void {
  const { event, isolation, function: of, cause } = step
  const fn = of?.name
  if (event.type === 'vulcan.workload.started') {
    if (step.attempt === 1) metrics.began(isolation, fn, step.queueMs ?? 0, event.traceparent)
  } else if (event.type === 'vulcan.workload.retrying') {
    if (cause !== null) metrics.retried(isolation, fn, cause)
  } else if (hasEnded(step.status)) metrics.ended(isolation, fn, step, event.traceparent)
}

const folding = {
  'messaging.system': 'nats',
  'messaging.operation.name': 'fold',
  'messaging.operation.type': 'process',
  'messaging.destination.name': 'vulcan.events',
} as const

/**
 * One span for each end, from the moment its batch was read until it was committed, which is now. What the end was of
 * stands on the spans above it.
 */
function traceEnds(tracing: Tracing, steps: Step[], { messages, readAt }: Batch): void {
  for (const step of steps) {
    if (!hasEnded(step.status) || !isWanted(step)) continue
    const { event, status, cause } = step
    const span = tracing.begin('fold vulcan.events', {
      kind: 'consumer',
      parent: event.traceparent,
      at: readAt,
      attributes: {
        ...folding,
        'messaging.message.id': event.id,
        'messaging.batch.message_count': messages,
        'vulcan.workload.id': step.workload,
        'vulcan.status': status,
        'vulcan.cause': cause ?? undefined,
      },
    })
    if (cause !== null) span.fail(cause, step.message)
    span.end()
  }
}

/** Of a trace that is not sampled nobody sees anything but failures. */
const isWanted = ({ event: { traceparent }, cause }: Step): boolean =>
  traceparent !== undefined && (cause !== null || isSampled(traceparent))
