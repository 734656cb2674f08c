/**
 * What the metrics of all processes have in common (prom-client). Each process declares its own, all in one file
 * (`gateway/metrics.ts`, `dispatcher/metrics.ts`, `runners/metrics.ts`), on a registry made here.
 */
import { Registry } from 'prom-client'

export type Service = 'vulcan-gateway' | 'vulcan-dispatcher' | 'vulcan-runner'

/** Seconds, from a warm isolate to a long build. */
export const durationBuckets = [
  0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300,
]

/** A registry whose series all carry `service` and `process` (the process’s id, as in events and heartbeats). */
export function createRegistry(service: Service, process: string): Registry {
  const registry = new Registry()
  registry.setDefaultLabels({ service, process })
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
