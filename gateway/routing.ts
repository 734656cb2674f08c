/** Which isolation runs a workload, and why. Pure; what is available is given. */
import type { Ability } from '../shared/backends.ts'
import { Problem } from '../shared/errors.ts'
import type { Isolation, Runtime, WorkloadSpec } from '../shared/workload.ts'

export interface Route {
  isolation: Isolation
  /** Recorded with the workload as `routing_reason`. */
  reason: string
}

type Abilities = (isolation: Isolation) => Ability

/** The runtime a spec means where it names none. */
export const runtimeOf = (spec: WorkloadSpec): Runtime | undefined =>
  spec.runtime ?? (spec.image !== undefined ? 'oci' : spec.code !== undefined ? 'javascript' : undefined)

/** What `auto` takes: the lightest isolation that is strong enough for the kind of source. */
function automatic(spec: WorkloadSpec): Route {
  const runtime = runtimeOf(spec)
  if (spec.image !== undefined) return { isolation: 'gvisor', reason: 'auto: an image runs under gvisor' }
  if (spec.archive !== undefined)
    return { isolation: 'microvm', reason: 'auto: an archive runs in a microvm' }
  if (runtime === 'javascript')
    return { isolation: 'isolate', reason: 'auto: JavaScript source runs in an isolate' }
  if (runtime === 'typescript')
    return { isolation: 'isolate', reason: 'auto: TypeScript source runs in an isolate' }
  return { isolation: 'microvm', reason: `auto: ${runtime} source runs in a microvm` }
}

/** Why a backend cannot take the spec; undefined when it can. */
function obstacle(spec: WorkloadSpec, backend: Ability): string | undefined {
  if (!backend.available) return `${backend.isolation} is unavailable: ${backend.reason}; ${backend.fix}`
  const can = backend.capabilities
  if (can === null) return undefined
  const runtime = runtimeOf(spec)
  if (runtime !== undefined && !can.runtimes.includes(runtime))
    return `${backend.isolation} runs ${can.runtimes.join(', ')}, not ${runtime}`
  const egress = Array.isArray(spec.network.egress) ? 'allowlist' : spec.network.egress
  if (!can.egress.includes(egress))
    return `${backend.isolation} offers egress ${can.egress.join(', ')}, not ${egress}`
  return undefined
}

/**
 * Chooses. An isolation that is not available is refused with what would make it so; a weaker one is taken only
 * where the client’s own preference list says it may be.
 */
export function route(spec: WorkloadSpec, abilities: Abilities): Route {
  const asked = spec.isolation
  const candidates: Route[] =
    asked === 'auto'
      ? [automatic(spec)]
      : typeof asked === 'string'
        ? [{ isolation: asked, reason: `requested: ${asked}` }]
        : asked.map((isolation, i) => ({
            isolation,
            reason: `preferred: ${isolation} is choice ${i + 1} of ${asked.length}`,
          }))
  const passed: string[] = []
  for (const candidate of candidates) {
    const reason = obstacle(spec, abilities(candidate.isolation))
    if (reason === undefined)
      return passed.length === 0
        ? candidate
        : { ...candidate, reason: `${candidate.reason}; passed over: ${passed.join('; ')}` }
    passed.push(reason)
  }
  throw new Problem('isolation_unavailable', { detail: passed.join('; '), field: 'isolation' })
}
