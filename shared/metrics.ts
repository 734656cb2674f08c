/**
 * What the metrics of all processes have in common (prom-client). Each process declares its own, all in one file
 * (`gateway/metrics.ts`, `dispatcher/metrics.ts`, `runners/metrics.ts`), on a registry made here.
 */
import {
  Counter,
  Gauge,
  Histogram,
  type Metric,
  type OpenMetricsContentType,
  Registry as PromRegistry,
  type RegistryContentType,
} from 'prom-client'
import { z } from 'zod'

/** What a process counts. Only of registries of this kind the library keeps exemplars, whatever is answered. */
export type Registry = PromRegistry<OpenMetricsContentType>

export type Service = 'vulcan-gateway' | 'vulcan-dispatcher' | 'vulcan-runner'

/** Seconds, from a warm isolate to a long build. */
export const durationBuckets = [
  0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300,
]
/** Bytes, from 1 KiB to 16 GiB. */
export const byteBuckets = Array.from({ length: 13 }, (_, n) => 1_024 * 4 ** n)

/**
 * A registry whose series all carry `service` and `process` (the process’s id, as in events and heartbeats), and
 * `labels`, where a process has more to say of all it counts.
 */
export function createRegistry(
  service: Service,
  process: string,
  labels: Record<string, string> = {},
): Registry {
  const registry: Registry = new PromRegistry()
  registry.setContentType(PromRegistry.OPENMETRICS_CONTENT_TYPE)
  registry.setDefaultLabels({ service, process, ...labels })
  return registry
}

/** The label of workloads that are no invocation of a function, and of functions beyond the bound. */
export const noFunction = ''
export const otherFunctions = '_other'

/** Bounds a label: the first `most` names keep theirs, all others share `_other`. */
export class BoundedLabel {
  readonly #known = new Set<string>()
  readonly #most: number

  constructor(most = 100) {
    this.#most = most
  }

  of(name: string | null | undefined): string {
    if (name == null) return noFunction
    if (this.#known.has(name)) return name
    if (this.#known.size >= this.#most) return otherFunctions
    this.#known.add(name)
    return name
  }
}

/** What a metric is called, and what it counts, in a sentence with its unit. */
interface Named<L extends readonly string[]> {
  name: `vulcan_${string}`
  help: string
  /** Names. */
  labels: L
  registry: Registry
}

/** The labels’ values, in the order in which they were declared. */
type Values<L extends readonly string[]> = { [N in keyof L]: string }

/** What was made for a set of labels, by its values one after the other: found again without building a string. */
class Kept<T> {
  readonly #root = new Map<string, unknown>()
  readonly #make: (values: readonly string[]) => T
  #single: T | undefined

  constructor(make: (values: readonly string[]) => T) {
    this.#make = make
  }

  of(values: readonly string[]): T {
    const last = values.length - 1
    if (last < 0) {
      this.#single ??= this.#make(values)
      return this.#single
    }
    let level = this.#root
    for (let n = 0; n < last; n++) {
      let next = level.get(values[n]!) as Map<string, unknown> | undefined
      if (next === undefined) {
        next = new Map()
        level.set(values[n]!, next)
      }
      level = next
    }
    let found = level.get(values[last]!) as T | undefined
    if (found === undefined) {
      found = this.#make(values.slice())
      level.set(values[last]!, found)
    }
    return found
  }
}

/** The lowest bit of a traceparent’s flags (W3C Trace Context). */
const isSampled = (traceparent: string): boolean => (Number.parseInt(traceparent.slice(53, 55), 16) & 1) === 1

const namedValues = (names: readonly string[], values: readonly string[]): Record<string, string> =>
  Object.fromEntries(names.map((name, n) => [name, values[n] ?? '']))

/** Counts up. Its name ends in `_total`. */
export class Count<const L extends readonly string[]> {
  readonly #kept: Kept<{ inc(by?: number): void }>

  constructor({ name, help, labels, registry }: Named<L> & { name: `vulcan_${string}_total` }) {
    const counter = new Counter({
      name,
      help,
      labelNames: labels,
      registers: [registry],
    })
    this.#kept = new Kept((values) => counter.labels(namedValues(labels, values)))
  }

  /** @param values the labels’, in the order of their declaration */
  add(by: number, ...values: Values<L>): void {
    if (by > 0) this.#kept.of(values).inc(by)
  }
}

/** A distribution; of those with exemplars the last measurement of each bucket leads to its trace. */
export class Distribution<const L extends readonly string[]> {
  readonly #histogram: Histogram
  readonly #kept: Kept<Record<string, string>>

  constructor({
    name,
    help,
    labels,
    registry,
    buckets = durationBuckets,
  }: Named<L> & { buckets?: number[] }) {
    this.#histogram = new Histogram({
      name,
      help,
      labelNames: labels,
      registers: [registry],
      buckets,
      enableExemplars: true,
    })
    this.#kept = new Kept((values) => namedValues(labels, values))
  }

  /**
   * @param traceparent of the span that was measured: an exemplar where it is sampled
   * @param values the labels’, in the order of their declaration
   */
  add(value: number, traceparent: string | undefined, ...values: Values<L>): void {
    if (!Number.isFinite(value)) return
    const labels = this.#kept.of(values)
    if (traceparent !== undefined && isSampled(traceparent))
      this.#histogram.observe({ labels, value, exemplarLabels: { trace_id: traceparent.slice(3, 35) } })
    else this.#histogram.observe({ labels, value })
  }
}

/** A figure that is read when somebody asks; one whose name ends in `_total` only grows. */
export class Reading<const L extends readonly string[]> {
  readonly #reads = new Map<string, { values: Values<L>; read: () => number | undefined }>()
  readonly #lists: (() => Iterable<readonly [value: number, ...labels: Values<L>]>)[] = []

  /** @param before awaited each time before the figures are read, as where they are asked of somebody else */
  constructor({ name, help, labels, registry, before }: Named<L> & { before?: () => Promise<unknown> }) {
    const reads = this.#reads
    const lists = this.#lists
    const told = (tell: (labels: Record<string, string>, value: number) => void) => {
      for (const { values, read } of reads.values()) {
        const value = read()
        if (value !== undefined && Number.isFinite(value)) tell(namedValues(labels, values), value)
      }
      for (const list of lists)
        for (const [value, ...values] of list())
          if (Number.isFinite(value)) tell(namedValues(labels, values), value)
    }
    const options = { name, help, labelNames: labels, registers: [registry] }
    // Emptied and filled in one turn: two may ask at once.
    if (name.endsWith('_total'))
      new Counter({
        ...options,
        async collect() {
          await before?.()
          this.reset()
          told((labels, value) => this.inc(labels, Math.max(0, value)))
        },
      })
    else
      new Gauge({
        ...options,
        async collect() {
          await before?.()
          this.reset()
          told((labels, value) => this.set(labels, value))
        },
      })
  }

  /** Undefined is left out. The last reader of the same labels holds. */
  from(read: () => number | undefined, ...values: Values<L>): void {
    this.#reads.set(JSON.stringify(values), { values, read })
  }

  /** Figures whose labels come and go: each with the labels’ values behind it, no two with the same. */
  each(list: () => Iterable<readonly [value: number, ...labels: Values<L>]>): void {
    this.#lists.push(list)
  }
}

/** One metric with all its series, as they travel between processes. */
export const Family = z.object({
  name: z.string(),
  help: z.string(),
  type: z.enum(['counter', 'gauge', 'histogram']),
  values: z.array(
    z.object({
      value: z.number(),
      labels: z.record(z.string(), z.union([z.string(), z.number()])),
      metricName: z.string().optional(),
      exemplar: z
        .object({ labelSet: z.record(z.string(), z.string()), value: z.number(), timestamp: z.number() })
        .nullish(),
    }),
  ),
})
export type Family = z.infer<typeof Family>

/** All that is counted there, now. */
export const familiesOf = async (registry: Registry): Promise<Family[]> =>
  (await registry.getMetricsAsJSON()) as unknown as Family[]

/**
 * The page that Prometheus reads: families of the same name become one, those without series are left out. In the
 * text format (version 0.0.4), or, where `accept` asks for it, as OpenMetrics 1.0, which has exemplars.
 */
export async function metricsPage(
  families: readonly Family[],
  accept: string | undefined,
): Promise<{ body: string; contentType: string }> {
  const contentType = accept?.includes('application/openmetrics-text')
    ? PromRegistry.OPENMETRICS_CONTENT_TYPE
    : PromRegistry.PROMETHEUS_CONTENT_TYPE
  const merged = new Map<string, Family>()
  for (const family of families) {
    const known = merged.get(family.name)
    if (known === undefined) merged.set(family.name, { ...family, values: [...family.values] })
    else if (known.type === family.type) known.values.push(...family.values)
  }
  const page: PromRegistry<RegistryContentType> = new PromRegistry()
  page.setContentType(contentType)
  for (const family of merged.values()) {
    if (family.values.length === 0) continue
    page.registerMetric({
      ...family,
      get() {
        return this
      },
    } as unknown as Metric)
  }
  return { body: await page.metrics(), contentType }
}
