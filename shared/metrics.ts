/**
 * What the metrics of all processes have in common (prom-client). Each process declares its own, all in one file
 * (`gateway/metrics.ts`, `dispatcher/metrics.ts`, `runners/metrics.ts`), on a registry made here.
 */
import {
  Counter,
  Gauge,
  type Metric,
  type OpenMetricsContentType,
  Registry as PromRegistry,
  type RegistryContentType,
} from 'prom-client'
import { z } from 'zod'
import { isSampled } from './trace.ts'

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

const namedValues = (names: readonly string[], values: readonly string[]): Record<string, string> =>
  Object.fromEntries(names.map((name, n) => [name, values[n] ?? '']))

/** What is counted under one set of labels. */
interface Tally {
  labels: Record<string, string>
  value: number
}

/** Counts up. Its name ends in `_total`. The library only gets the sums, and when somebody asks: it is slow to count. */
export class Count<const L extends readonly string[]> {
  readonly #kept: Kept<Tally>

  constructor({ name, help, labels, registry }: Named<L> & { name: `vulcan_${string}_total` }) {
    const tallies: Tally[] = []
    this.#kept = new Kept((values) => {
      const tally = { labels: namedValues(labels, values), value: 0 }
      tallies.push(tally)
      return tally
    })
    new Counter({
      name,
      help,
      labelNames: labels,
      registers: [registry],
      collect() {
        this.reset()
        for (const tally of tallies) this.inc(tally.labels, tally.value)
      },
    })
  }

  /** @param values the labels’, in the order of their declaration */
  add(by: number, ...values: Values<L>): void {
    if (by > 0) this.#kept.of(values).value += by
  }
}

type Exemplar = NonNullable<Family['values'][number]['exemplar']>

/** What was measured under one set of labels. */
interface Series {
  labels: Record<string, string>
  /** By bucket, with one more for what is above them all; not summed up. */
  counts: number[]
  exemplars: Exemplar[]
  sum: number
  count: number
}

/**
 * A distribution; of those with exemplars the last measurement of each bucket leads to its trace. Kept here, as the
 * library’s takes ten times as long to measure; it is told of it in the library’s own shape.
 */
export class Distribution<const L extends readonly string[]> {
  readonly #kept: Kept<Series>
  readonly #buckets: readonly number[]

  constructor({
    name,
    help,
    labels,
    registry,
    buckets = durationBuckets,
  }: Named<L> & { buckets?: number[] }) {
    const all: Series[] = []
    this.#buckets = buckets
    this.#kept = new Kept((values) => {
      const series: Series = {
        labels: namedValues(labels, values),
        counts: new Array<number>(buckets.length + 1).fill(0),
        exemplars: [],
        sum: 0,
        count: 0,
      }
      all.push(series)
      return series
    })
    // One without labels is there before it has measured anything.
    if (labels.length === 0) this.#kept.of([])
    const get = async () => ({
      name,
      help,
      type: 'histogram' as const,
      values: all.flatMap((series) => told(name, buckets, series)),
    })
    registry.registerMetric({ name, get } as unknown as Metric)
  }

  /**
   * @param traceparent of the span that was measured: an exemplar where it is sampled
   * @param values the labels’, in the order of their declaration
   */
  add(value: number, traceparent: string | undefined, ...values: Values<L>): void {
    if (!Number.isFinite(value)) return
    const series = this.#kept.of(values)
    const buckets = this.#buckets
    let n = 0
    while (n < buckets.length && value > buckets[n]!) n++
    series.counts[n]!++
    series.sum += value
    series.count++
    if (traceparent !== undefined && isSampled(traceparent))
      series.exemplars[n] = {
        labelSet: { trace_id: traceparent.slice(3, 35) },
        value,
        timestamp: Date.now() / 1_000,
      }
  }
}

/** The samples of one series: its buckets, each with all that is below it, sum and count. */
function told(
  name: string,
  buckets: readonly number[],
  { labels, counts, exemplars, sum, count }: Series,
): Family['values'] {
  let below = 0
  const samples: Family['values'] = counts.map((here, n) => {
    below += here
    const le = buckets[n] ?? '+Inf'
    return { metricName: `${name}_bucket`, labels: { le, ...labels }, value: below, exemplar: exemplars[n] }
  })
  samples.push({ metricName: `${name}_sum`, labels: { ...labels }, value: sum })
  samples.push({ metricName: `${name}_count`, labels: { ...labels }, value: count })
  return samples
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
