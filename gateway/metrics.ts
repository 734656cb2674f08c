/** What a gateway counts and measures. All methods are cheap and never throw; durations are seconds. */
import {
  BoundedLabel,
  Count,
  createRegistry,
  Distribution,
  Reading,
  type Registry,
} from '../shared/metrics.ts'
import type { Isolation } from '../shared/workload.ts'

/** Others share one label: a client may send any word. */
const methods = new Set(['GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS'])
/** Of a connection that its client closed before the answer was there. */
const clientGone = 'gone'

export class GatewayMetrics {
  readonly registry: Registry
  readonly #functions = new BoundedLabel()
  readonly #statuses = new Map<number, string>()
  readonly #requests: Count<['method', 'route', 'status']>
  readonly #durations: Distribution<['method', 'route']>
  readonly #accepts: Count<['isolation', 'function']>
  readonly #refusals: Count<['code']>
  readonly #waiting: Reading<[]>
  readonly #processes: Reading<['state']>

  /** @param process the gateway’s id, as in events */
  constructor(process: string) {
    const registry = createRegistry('vulcan-gateway', process)
    this.registry = registry
    this.#requests = new Count({
      name: 'vulcan_http_requests_total',
      help: 'Requests that were answered, by route and status; `gone`: the client did not wait for the answer.',
      labels: ['method', 'route', 'status'],
      registry,
    })
    this.#durations = new Distribution({
      name: 'vulcan_http_request_duration_seconds',
      help: 'Seconds from a request’s headers to the last byte of its answer.',
      labels: ['method', 'route'],
      registry,
    })
    this.#accepts = new Count({
      name: 'vulcan_accepts_total',
      help: 'Workloads whose accepted event was stored.',
      labels: ['isolation', 'function'],
      registry,
    })
    this.#refusals = new Count({
      name: 'vulcan_refusals_total',
      help: 'Requests that were answered with a problem document, by its code.',
      labels: ['code'],
      registry,
    })
    this.#waiting = new Reading({
      name: 'vulcan_waiting_callers',
      help: 'Callers that wait for the end of a workload now.',
      labels: [],
      registry,
    })
    this.#processes = new Reading({
      name: 'vulcan_metrics_processes',
      help: 'Processes that answered when this gateway last gathered their metrics, and those that should have.',
      labels: ['state'],
      registry,
    })
  }

  /**
   * A request is over.
   * @param route as it is declared, such as `/v1/workloads/:id` or `/fn/:name`; empty: there is none
   * @param status undefined: the client went away before
   */
  request(
    method: string,
    route: string,
    status: number | undefined,
    seconds: number,
    traceparent?: string,
  ): void {
    const word = methods.has(method) ? method : '_other'
    this.#requests.add(1, word, route, status === undefined ? clientGone : this.#wordOf(status))
    this.#durations.add(seconds, traceparent, word, route)
  }

  /** An accepted event was stored. @param fn name of the function, where it is one */
  accepted(isolation: Isolation, fn: string | undefined): void {
    this.#accepts.add(1, isolation, this.#functions.of(fn))
  }

  /** A request was answered with a problem. @param code of the problem document, such as `queue_full` */
  refused(code: string): void {
    this.#refusals.add(1, code)
  }

  /** `read` is called whenever somebody looks. */
  waiting(read: () => number): void {
    this.#waiting.from(read)
  }

  /** Of the last gathering. */
  gathered({ answered, missing }: { answered: readonly string[]; missing: readonly string[] }): void {
    this.#processes.from(() => answered.length + 1, 'answered')
    this.#processes.from(() => missing.length, 'missing')
  }

  #wordOf(status: number): string {
    let word = this.#statuses.get(status)
    if (word === undefined) {
      word = String(status)
      this.#statuses.set(status, word)
    }
    return word
  }
}
