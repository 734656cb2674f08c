/**
 * The spans of one attempt in the runner’s process:
 *
 *     queue                      from the accepted (or the `retrying`) event’s time to the receipt of the message
 *     process vulcan.work        from the receipt until its end is stored; all below stand under it
 *       parts of a cold start    as the runner of the isolation tells them
 *       publish started
 *       run                      the user’s code; what code sends on, and its own spans, stand under it
 *       publish <end>
 *
 * There are none where nothing is recorded: then every event carries the accepted event’s traceparent.
 */
import type { AcceptedEvent, EventKind, LifecycleEvent } from '../shared/events.ts'
import { isSampled, newSpanId, spanIdOf, withSpanId } from '../shared/trace.ts'
import { type Attributes, preciseNow, type Span, type Tracing } from '../shared/tracing.ts'
import { Cause, type Isolation } from '../shared/workload.ts'
import type { Redact } from './redact.ts'
import type { ByteSink, HttpResponse, Outcome, Phase, RunEvents } from './runner.ts'

/** Phases of one attempt that become spans: the platform’s own, and those of user code. Those beyond are counted. */
const maxPhases = { ours: 64, theirs: 512 }
/** Characters of a span’s name, and of an error’s message on it. */
const maxName = 128
const maxMessage = 500

export interface AttemptOptions {
  accepted: AcceptedEvent
  attempt: number
  /** The event that the attempt follows: `accepted`, or `retrying`. */
  after: LifecycleEvent
  runnerId: string
  isolation: Isolation
  /** Deliveries of its message so far. */
  deliveries: number
  /** When it came, and when it was taken up: milliseconds since the epoch. */
  receivedAt: number
  takenAt: number
}

const queueSystem = { 'messaging.system': 'nats' } as const
const processing = {
  ...queueSystem,
  'messaging.operation.name': 'process',
  'messaging.operation.type': 'process',
  'messaging.destination.name': 'vulcan.work',
  'messaging.destination.template': 'vulcan.work.{isolation}.{target}.{workload}',
} as const

type Published = Exclude<EventKind, 'accepted' | 'late'>

const publishing = (kind: Published): Attributes => ({
  ...queueSystem,
  'messaging.operation.name': 'publish',
  'messaging.operation.type': 'send',
  'messaging.destination.name': 'vulcan.events',
  'messaging.destination.template': `vulcan.events.{workload}.${kind}`,
})
const publishNames: Record<Published, { name: string; attributes: Attributes }> = {
  started: { name: 'publish started', attributes: publishing('started') },
  retrying: { name: 'publish retrying', attributes: publishing('retrying') },
  completed: { name: 'publish completed', attributes: publishing('completed') },
  failed: { name: 'publish failed', attributes: publishing('failed') },
  killed: { name: 'publish killed', attributes: publishing('killed') },
}

/** The span of publishing one lifecycle event. Its traceparent is the event’s. */
export function beginPublish(
  tracing: Tracing,
  kind: Published,
  parent: string | undefined,
  links: (string | undefined)[] = [],
): Span {
  const { name, attributes } = publishNames[kind]
  return tracing.begin(name, { kind: 'producer', parent, links, attributes })
}

/** What stops a run, and as what it ends then. */
const stops = {
  timeout: 'timeout',
  kill: 'killed',
  shutdown: 'runner_lost',
  lease_lost: 'runner_lost',
} as const satisfies Record<string, Cause>
type Stop = keyof typeof stops

export class AttemptSpans {
  readonly #tracing: Tracing
  readonly #span: Span
  readonly #sampled: boolean
  readonly #runTraceparent: string
  /** What is drawn only if the attempt fails: nobody sees it otherwise. */
  readonly #kept: Phase[] = []
  #run: Span | undefined
  #redact: Redact | undefined
  readonly #phases = { ours: 0, theirs: 0 }
  #failed = false
  /** Why it was stopped, where it was. */
  #stopped: Cause | undefined
  /** When it was over, by its end or because it was stopped. */
  #ranAt: number | undefined

  /** Undefined where nothing of this trace is recorded. */
  static begin(tracing: Tracing, options: AttemptOptions): AttemptSpans | undefined {
    if (!tracing.on) return undefined
    const spans = new AttemptSpans(tracing, options)
    return spans.#span.recording ? spans : undefined
  }

  private constructor(tracing: Tracing, options: AttemptOptions) {
    const { accepted, attempt, after, runnerId, isolation, deliveries, receivedAt, takenAt } = options
    const { function: fn, http } = accepted.data
    const isRetry = after.type === 'vulcan.workload.retrying'
    const queued = Date.parse(after.time)
    const parent = accepted.traceparent
    this.#tracing = tracing
    this.#span = tracing.begin('process vulcan.work', {
      kind: 'consumer',
      parent,
      links: isRetry ? [after.traceparent] : [],
      at: receivedAt,
      attributes: {
        ...processing,
        'messaging.message.id': accepted.id,
        'vulcan.workload.id': accepted.subject,
        'vulcan.attempt': attempt,
        'vulcan.isolation': isolation,
        'vulcan.runner': runnerId,
        'vulcan.deliveries': deliveries > 1 ? deliveries : undefined,
        'faas.invocation_id': accepted.subject,
        'faas.trigger': http == null ? 'pubsub' : 'http',
        'faas.invoked_name': fn?.name,
        'vulcan.function': fn?.name,
        'vulcan.version': fn?.version,
      },
    })
    const queue = tracing.begin('queue', {
      kind: 'internal',
      parent: parent ?? this.#span.traceparent,
      at: queued,
      attributes: {
        'vulcan.attempt': attempt,
        'vulcan.not_before': isRetry ? after.data.not_before : undefined,
      },
    })
    queue.end(Math.max(queued, receivedAt))
    const { traceparent } = this.#span
    this.#sampled = isSampled(traceparent)
    this.#runTraceparent = withSpanId(traceparent, newSpanId())
    // Only what a lane holds for its rate is taken up later than it comes.
    if (takenAt > receivedAt) this.phase({ name: 'wait for turn', start: receivedAt, end: takenAt })
  }

  /** Of the attempt. */
  get traceparent(): string {
    return this.#span.traceparent
  }

  /** Of the run, known before it begins. */
  get runTraceparent(): string {
    return this.#runTraceparent
  }

  publish(kind: Published, links?: (string | undefined)[]): Span {
    return beginPublish(this.#tracing, kind, this.traceparent, links)
  }

  /** The user’s code may run from now on. `redact` hides the values of secrets in what it says of its spans. */
  run(redact: Redact | undefined): void {
    this.#redact = redact
    const id = spanIdOf(this.#runTraceparent)
    this.#run = this.#tracing.begin('run', { kind: 'internal', parent: this.traceparent, spanId: id })
  }

  phase = (phase: Phase): void => {
    const whose = phase.spanId === undefined ? 'ours' : 'theirs'
    if (++this.#phases[whose] > maxPhases[whose]) return
    if (this.#sampled || this.#failed) this.#draw(phase)
    else this.#kept.push(phase)
  }

  /** The run is being stopped. */
  stopping(stop: Stop, attributes?: Attributes): void {
    this.#stopped ??= stops[stop]
    this.event(stop, attributes)
  }

  /** Something befell the run, or the attempt where that is over. */
  event(name: Stop | 'caller gone' | 'response', attributes?: Attributes): void {
    const span = this.#ranAt === undefined ? this.#run : undefined
    ;(span ?? this.#span).event(name, attributes)
  }

  /** The head of a response goes out while the code still runs. */
  responding(head: HttpResponse, respond: RunEvents['respond']): ByteSink {
    this.event('response', { 'http.response.status_code': head.status })
    return respond(head)
  }

  /** The run is over, by its end or because it was stopped. */
  ran(outcome: Outcome, status: number | undefined): void {
    this.#span.set({
      'vulcan.start': outcome.start,
      'faas.coldstart': outcome.start === 'cold',
      'vulcan.machine.vmm': outcome.machine?.vmm,
      'vulcan.machine.start': outcome.machine?.start,
      'http.response.status_code': status,
    })
    this.#ranAt = preciseNow()
  }

  /** What was made of it. `retry`: another attempt follows, not before that time. */
  judged(
    status: 'completed' | 'failed' | 'killed' | 'retrying',
    cause: Cause | null,
    message?: string,
    notBefore?: string,
  ): void {
    const { ours, theirs } = this.#phases
    const dropped = Math.max(0, ours - maxPhases.ours) + Math.max(0, theirs - maxPhases.theirs)
    this.#span.set({
      'vulcan.status': status,
      'vulcan.cause': cause ?? undefined,
      'vulcan.spans_dropped': dropped > 0 ? dropped : undefined,
    })
    if (notBefore !== undefined) this.#span.event('retry', { 'vulcan.not_before': notBefore })
    if (cause !== null) this.fail(cause, message)
    this.#endRun()
  }

  /** @param type a cause, or what went wrong on our side */
  fail(type: string, message?: string): void {
    const short = message?.slice(0, maxMessage)
    if (!this.#failed) {
      this.#failed = true
      for (const phase of this.#kept.splice(0)) this.#draw(phase)
      this.#run?.fail(type, short)
    }
    this.#span.fail(type, short)
  }

  /** Somebody else had moved the workload on before. */
  refused(): void {
    this.#span.set({ 'vulcan.refused': true })
  }

  end(): void {
    this.#endRun()
    this.#span.end()
  }

  #endRun(): void {
    this.#run?.end(this.#ranAt)
    this.#run = undefined
  }

  #draw(phase: Phase): void {
    const { kind = 'internal', start, end, error, spanId, parentSpanId } = phase
    const redact: Redact = this.#redact ?? ((text) => text)
    const attributes = redacted(phase.attributes, this.#redact)
    const inRun = spanId !== undefined || phase.name === 'guest'
    const above = inRun ? this.#runTraceparent : this.traceparent
    const span = this.#tracing.begin(redact(phase.name).slice(0, maxName), {
      kind,
      parent: parentSpanId === undefined ? above : withSpanId(above, parentSpanId),
      at: start,
      ...(spanId === undefined ? {} : { spanId }),
      ...(attributes === undefined ? {} : { attributes }),
    })
    if (error !== undefined) {
      const stopped = error === 'stopped' ? this.#stopped : undefined
      const type = attributes?.['error.type'] ?? stopped ?? Cause.safeParse(error).data ?? '_OTHER'
      span.fail(String(type), redact(error).slice(0, maxMessage))
    }
    span.end(end)
  }
}

function redacted(attributes: Attributes | undefined, redact: Redact | undefined): Attributes | undefined {
  if (redact === undefined || attributes === undefined) return attributes
  return Object.fromEntries(
    Object.entries(attributes).map(([key, value]) => {
      if (typeof value !== 'string') return [key, value]
      return [key, redact(key === 'url.full' ? readable(value, redact) : value)]
    }),
  )
}

/** A URL in which a secret would stand in an encoded form is given as what it says. */
function readable(url: string, redact: Redact): string {
  try {
    const plain = decodeURIComponent(url)
    return redact(plain) === plain ? url : plain
  } catch {
    return url
  }
}
