/**
 * A request from its head to the last byte of its answer: its span, its part in the metrics, its line in the log.
 *
 *     {METHOD} {route}              server
 *       publish vulcan.events       producer; the accepted event carries its traceparent, and so all that follows does
 */
import type { IncomingMessage, ServerResponse } from 'node:http'
import type { HttpBindings } from '@hono/node-server'
import type { AcceptedEvent, EndEvent, EventKind } from '../shared/events.ts'
import type { Logger } from '../shared/process.ts'
import { isSampled, type TraceLink, traceFields } from '../shared/trace.ts'
import { type Attributes, preciseNow, type Span, type Tracing, tracingOff } from '../shared/tracing.ts'
import type { WorkloadId } from '../shared/workload.ts'
import type { GatewayMetrics } from './metrics.ts'

/** What is known of requests; all of it may be missing. */
export interface Watched {
  metrics?: GatewayMetrics | undefined
  tracing?: Tracing | undefined
  /** Where people look at traces. */
  traceUrl?: TraceLink | undefined
}

/** What handlers get besides Node’s own objects. */
export type Bindings = HttpBindings & { watch: RequestWatch }

/** Asked every few seconds by machines: no traces. */
const untraced = new Set(['/healthz', '/readyz', '/metrics'])
const knownMethods = new Set(['GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS', 'TRACE', 'CONNECT'])
/** Requests answered with 202 that wait for their workload’s end, at most; and how long (ms). */
const mostHeld = 1_000
const heldMs = 60_000

/** Begins with every request; what it is given stands for the whole process. */
export class RequestWatcher {
  readonly tracing: Tracing
  readonly metrics: GatewayMetrics | undefined
  readonly log: Logger
  held = 0

  constructor({ tracing, metrics, log }: Watched & { log: Logger }) {
    this.tracing = tracing ?? tracingOff
    this.metrics = metrics
    this.log = log
  }

  /** @param route as it is declared, such as `/v1/workloads/:id`; empty: there is none */
  begin(incoming: IncomingMessage, outgoing: ServerResponse, route: string): RequestWatch {
    return new RequestWatch(this, incoming, outgoing, route)
  }
}

export class RequestWatch {
  readonly span: Span
  readonly #watcher: RequestWatcher
  readonly #incoming: IncomingMessage
  readonly #outgoing: ServerResponse
  readonly #route: string
  readonly #at = performance.now()
  #workload: WorkloadId | undefined
  #failed = false
  #closed = false
  /** Settles with the end of a workload that the answer did not wait for. */
  #end: Promise<EndEvent | undefined> | undefined

  constructor(watcher: RequestWatcher, incoming: IncomingMessage, outgoing: ServerResponse, route: string) {
    this.#watcher = watcher
    this.#incoming = incoming
    this.#outgoing = outgoing
    this.#route = route
    const { tracing } = watcher
    const header = incoming.headers.traceparent
    const parent = typeof header === 'string' ? header : undefined
    this.span =
      tracing.on && !untraced.has(route)
        ? tracing.begin(nameOf(incoming, route), {
            kind: 'server',
            parent,
            attributes: attributesOf(incoming, route),
          })
        : tracingOff.begin('', { kind: 'server', parent })
    outgoing.once('close', this.#over)
  }

  /** The span of publishing an event of a workload that this request makes. To be ended by whoever publishes. */
  beginPublish(
    id: WorkloadId,
    { isolation, function: fn }: Pick<AcceptedEvent['data'], 'isolation' | 'function'>,
  ): Span {
    this.#workload = id
    const { span } = this
    if (!span.recording)
      return this.#watcher.tracing.begin(accepting, { kind: 'producer', parent: span.traceparent })
    span.set({
      'vulcan.workload.id': id,
      'vulcan.isolation': isolation,
      ...(fn == null
        ? {}
        : {
            'faas.trigger': 'http',
            'faas.invoked_name': fn.name,
            'vulcan.function': fn.name,
            'vulcan.version': fn.version,
          }),
    })
    return this.#watcher.tracing.begin(accepting, {
      kind: 'producer',
      parent: span.traceparent,
      attributes: {
        ...acceptedAttributes,
        'messaging.message.id': `${id}.accepted.0`,
        'vulcan.workload.id': id,
      },
    })
  }

  /** Which workload it is about, where that is another than it makes. */
  about(id: WorkloadId): void {
    this.#workload = id
    this.span.set({ 'vulcan.workload.id': id })
  }

  /** The workload’s end, where it comes before the answer is over. */
  ended({ type, data: { cause, attempt } }: EndEvent): void {
    const { span } = this
    if (!span.recording || this.#closed) return
    span.set({ 'vulcan.status': type.slice('vulcan.workload.'.length), 'vulcan.attempt': attempt })
    if (cause === null) return
    span.set({ 'vulcan.cause': cause })
    this.#failed = true
    span.fail(cause)
  }

  /**
   * The answer does not wait for the workload’s end. Where the trace is not sampled, its spans are kept until then,
   * for at most a minute, as nobody knows yet whether it fails. `wait` begins to wait; it is given up by the signal.
   */
  goesOn(wait: (over: AbortSignal) => Promise<EndEvent | undefined>): void {
    if (!this.span.recording || isSampled(this.span.traceparent) || this.#watcher.held >= mostHeld) return
    const over = new AbortController()
    const patience = setTimeout(() => over.abort(), heldMs).unref()
    this.#watcher.held++
    this.#end = wait(over.signal).finally(() => {
      clearTimeout(patience)
      this.#watcher.held--
    })
  }

  /** For log lines. */
  get fields(): Record<string, string> {
    return {
      ...(this.#workload === undefined ? {} : { workload: this.#workload }),
      ...traceFields(this.span.traceparent),
    }
  }

  #over = (): void => {
    const { metrics, log } = this.#watcher
    const { span } = this
    const outgoing = this.#outgoing
    const method = this.#incoming.method ?? 'GET'
    const status = outgoing.writableFinished ? outgoing.statusCode : undefined
    const ms = performance.now() - this.#at
    metrics?.request(method, this.#route, status, ms / 1_000, span.traceparent)
    if (log.isLevelEnabled('debug'))
      log.debug({ method, route: this.#route, status: status ?? 'gone', ms, ...this.fields }, 'request')
    if (!span.recording) return
    if (outgoing.headersSent) span.set({ 'http.response.status_code': outgoing.statusCode })
    if (status === undefined) span.event('client gone')
    else if (status >= 500 && !this.#failed) span.fail(String(status))
    const at = preciseNow()
    const close = (end?: EndEvent) => {
      if (end !== undefined) this.ended(end)
      this.#closed = true
      span.end(at)
    }
    if (this.#end === undefined) close()
    else void this.#end.then(close)
  }
}

const nameOf = ({ method = 'GET' }: IncomingMessage, route: string): string => {
  const word = knownMethods.has(method) ? method : 'HTTP'
  return route === '' ? word : `${word} ${route}`
}

function attributesOf(incoming: IncomingMessage, route: string): Attributes {
  const { method = 'GET', headers, httpVersion, socket, url = '/' } = incoming
  const known = knownMethods.has(method)
  const { host } = headers
  const colon = host?.lastIndexOf(':') ?? -1
  const port = colon > 0 ? Number(host!.slice(colon + 1)) : Number.NaN
  return {
    'http.request.method': known ? method : '_OTHER',
    'http.request.method_original': known ? undefined : method,
    'http.route': route === '' ? undefined : route,
    'url.scheme': 'http',
    'url.path': pathOf(url),
    'server.address': Number.isNaN(port) ? host : host!.slice(0, colon),
    'server.port': Number.isNaN(port) ? undefined : port,
    'client.address': socket.remoteAddress,
    'network.protocol.version': httpVersion,
    'user_agent.original': headers['user-agent'],
  }
}

/** Without the query, which may hold anything; of an absolute URL too. */
export function pathOf(url: string): string {
  const query = url.search(/[?#]/)
  const path = query < 0 ? url : url.slice(0, query)
  if (path.startsWith('/')) return path
  const from = path.indexOf('/', path.indexOf('//') + 2)
  return from < 0 ? '/' : path.slice(from)
}

const accepting = 'publish vulcan.events'
const publishing = (kind: EventKind, subject: string): Attributes => ({
  'messaging.system': 'nats',
  'messaging.operation.name': 'publish',
  'messaging.operation.type': 'send',
  'messaging.destination.name': 'vulcan.events',
  'messaging.destination.template': `vulcan.events.{workload}.${kind}${subject}`,
})
const acceptedAttributes = publishing('accepted', '.{isolation}.{target}')
const killedAttributes = publishing('killed', '')

/** The span of publishing `killed`, in the trace of the workload, linked to that of the request for it. */
export function beginKill(
  tracing: Tracing,
  id: WorkloadId,
  parent: string | undefined,
  request: string | undefined,
): Span {
  const span = tracing.begin('publish killed', {
    kind: 'producer',
    parent,
    links: [request],
    attributes: {
      ...killedAttributes,
      'vulcan.workload.id': id,
      'vulcan.status': 'killed',
      'vulcan.cause': 'killed',
    },
  })
  span.event('kill')
  return span
}
