/** Which isolation runs a workload, and why. Pure; what is available is given. */
import type { Ability, Capabilities } from '../shared/backends.ts'
import { Problem } from '../shared/errors.ts'
import { Isolation, runtimeOf, type WorkloadSpec } from '../shared/workload.ts'

export interface Route {
  isolation: Isolation
  /** Recorded with the workload as `routing_reason`. */
  reason: string
}

type Abilities = (isolation: Isolation) => Ability

/** What is looked at of a spec, of a workload’s or a function’s. */
export type Routable = Pick<
  WorkloadSpec,
  'isolation' | 'runtime' | 'code' | 'archive' | 'image' | 'entrypoint' | 'working_dir' | 'user' | 'network'
>

/** What `auto` takes: the lightest isolation that is strong enough for the kind of source. */
function automatic(spec: Routable): Route {
  const runtime = runtimeOf(spec)
  if (spec.image !== undefined) return { isolation: 'gvisor', reason: 'auto: an image runs under gvisor' }
  if (spec.archive !== undefined)
    return { isolation: 'microvm', reason: 'auto: an archive runs in a microvm' }
  if (Array.isArray(spec.entrypoint))
    return { isolation: 'microvm', reason: 'auto: a command runs in a microvm' }
  if (runtime === 'javascript')
    return { isolation: 'isolate', reason: 'auto: JavaScript source runs in an isolate' }
  if (runtime === 'typescript')
    return { isolation: 'isolate', reason: 'auto: TypeScript source runs in an isolate' }
  return { isolation: 'microvm', reason: `auto: ${runtime} source runs in a microvm` }
}

/** What isolates have no use for; undefined: nothing. */
function beyondIsolates(spec: Routable): string | undefined {
  if (spec.code === undefined)
    return `isolate runs source code, not an ${spec.image === undefined ? 'archive' : 'image'}`
  if (Array.isArray(spec.entrypoint)) return 'isolate calls what the code exports and runs no command'
  if (spec.working_dir !== undefined) return 'isolate has no files, and so no working_dir'
  if (spec.user !== undefined) return 'isolate has no users'
  return undefined
}

/** What would bring what is missing, where the runner knows. */
const wayTo = (what: string, { missing }: Capabilities): string => {
  const found = missing.find(({ wall }) => wall === what)
  return found === undefined ? '' : `: ${found.fix}`
}

/** Why a backend cannot take the spec; undefined when it can. */
function obstacle(spec: Routable, backend: Ability): string | undefined {
  if (!backend.available) return `${backend.isolation} is unavailable: ${backend.reason}; ${backend.fix}`
  const beyond = backend.isolation === 'isolate' ? beyondIsolates(spec) : undefined
  if (beyond !== undefined) return beyond
  const can = backend.capabilities
  if (can === null) return undefined
  const runtime = runtimeOf(spec)
  if (runtime !== undefined && !can.runtimes.includes(runtime))
    return `${backend.isolation} runs ${can.runtimes.join(', ')} here, not ${runtime}${wayTo(`runtime ${runtime}`, can)}`
  const egress = Array.isArray(spec.network.egress) ? 'allowlist' : spec.network.egress
  if (!can.egress.includes(egress))
    return `${backend.isolation} offers egress ${can.egress.join(', ')}, not ${egress}${wayTo('network', can)}`
  return undefined
}

/** What a client could ask for by name where `auto` finds its choice unavailable. */
function instead(spec: Routable, chosen: Isolation, abilities: Abilities): string {
  const others = Isolation.options.filter(
    (one) => one !== chosen && obstacle(spec, abilities(one)) === undefined,
  )
  return others.length === 0
    ? ''
    : `; ${others.join(' and ')} could run it: name one in "isolation" where it is strong enough for you`
}

/**
 * Chooses. An isolation that is not available is refused with what would make it so; a weaker one is taken only
 * where the client’s own preference list says it may be.
 */
export function route(spec: Routable, abilities: Abilities): Route {
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
  const hint = asked === 'auto' ? instead(spec, candidates[0]!.isolation, abilities) : ''
  throw new Problem('isolation_unavailable', { detail: passed.join('; ') + hint, field: 'isolation' })
}
