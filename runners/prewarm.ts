/** Keeps sandboxes ready for the functions that ask for it, with the versions that a call without a ref means. */
import {
  currentVersions,
  type FunctionRecord,
  type FunctionVersion,
  invocationSpec,
} from '../shared/functions.ts'
import type { Logger } from '../shared/process.ts'
import type { Secrets } from '../shared/secrets.ts'
import { type Tracing, tracingOff } from '../shared/tracing.ts'
import type { Isolation } from '../shared/workload.ts'
import type { Program, Runner } from './runner.ts'
import { programOf, type Stores } from './source.ts'

/** Milliseconds until what could not be fetched is asked for again. */
const againMs = 5_000

/** The part of the registry that is followed. */
export interface FunctionSource {
  list(): FunctionRecord[]
  version(name: string, version: string): FunctionVersion | undefined
  onChange(listener: (key: string) => void): () => void
}

export interface PrewarmOptions {
  isolation: Isolation
  functions: FunctionSource
  stores: Stores
  /** Of images that are in a registry with users. */
  secrets: Pick<Secrets, 'values'>
  runner: Pick<Runner, 'prewarm'>
  /** Off unless given: each version that is made warm is a trace of its own. */
  tracing?: Tracing
  log: Logger
}

/** Two versions of the same key run the same. An isolate takes whatever has the same code; a box is made for more. */
function keyOf({ isolation, runtime, bundle, source, spec }: FunctionVersion): string {
  const code = [runtime, bundle?.blob ?? source?.blob ?? spec.image, spec.entrypoint]
  if (isolation === 'isolate') return JSON.stringify(code)
  const { memory_mb, cpu, pids, disk_mb } = spec.limits
  const { network, user = null, working_dir = null } = spec
  return JSON.stringify([code, memory_mb, cpu, pids, disk_mb, network.egress, user, working_dir])
}

/** Follows the registry until it is disposed of. */
export function startPrewarm(options: PrewarmOptions): Disposable {
  const { functions, stores, secrets, runner, isolation, tracing = tracingOff, log } = options
  /** By what is run. Two functions with the same code share what is warm: the larger count holds. */
  const warm = new Map<string, { program: Program; count: number }>()
  let again: NodeJS.Timeout | undefined
  let due: NodeJS.Immediate | undefined
  let looking = false
  /** Something changed while it was looked at. */
  let missed = false
  let stopped = false

  function wanted(): Map<string, { version: FunctionVersion; count: number }> {
    const found = new Map<string, { version: FunctionVersion; count: number }>()
    for (const record of functions.list())
      for (const id of currentVersions(record)) {
        const version = functions.version(record.name, id)
        const count = version?.spec.prewarm ?? 0
        if (version === undefined || version.isolation !== isolation) continue
        const key = keyOf(version)
        if (count > (found.get(key)?.count ?? 0)) found.set(key, { version, count })
      }
    return found
  }

  async function look(): Promise<void> {
    const goal = wanted()
    for (const [key, { program }] of warm) {
      if (goal.has(key)) continue
      warm.delete(key)
      runner.prewarm(program, 0)
    }
    for (const [key, { version, count }] of goal) {
      const known = warm.get(key)
      if (known?.count === count && sameLimits(known.program, version)) continue
      const span = tracing.on ? beginSpan(version, count) : undefined
      try {
        const program = await programOfVersion(version)
        if (stopped) return
        warm.set(key, { program, count })
        runner.prewarm(program, count)
      } catch (error) {
        span?.fail((error as Error).name, (error as Error).message)
        log.warn({ function: version.name, version: version.version, err: error }, 'cannot be kept warm yet')
        clearTimeout(again)
        again = setTimeout(changed, againMs)
      } finally {
        span?.end()
      }
    }
  }

  const beginSpan = (version: FunctionVersion, count: number) =>
    tracing.begin('prewarm', {
      kind: 'internal',
      attributes: {
        'vulcan.isolation': isolation,
        'vulcan.function': version.name,
        'vulcan.version': version.version,
        'vulcan.sandboxes': count,
      },
    })

  function programOfVersion(version: FunctionVersion): Promise<Program> {
    const spec = invocationSpec(version)
    const { image_auth: auth } = spec
    const registryUser = auth === undefined ? undefined : secrets.values([auth])[auth]
    return programOf(stores, { ...spec, bundle: version.bundle, registryUser })
  }

  /** All that changes in one turn of the event loop is looked at once. */
  function changed(): void {
    due ??= setImmediate(async () => {
      due = undefined
      if (looking) {
        missed = true
        return
      }
      looking = true
      await look()
      looking = false
      if (missed) changed()
      missed = false
    })
  }

  const unfollow = functions.onChange((key) => {
    if (!key.startsWith('lane.')) changed()
  })
  changed()
  return {
    [Symbol.dispose]() {
      stopped = true
      unfollow()
      clearImmediate(due)
      clearTimeout(again)
    },
  }
}

const sameLimits = (program: Program, version: FunctionVersion): boolean =>
  JSON.stringify(program.limits) === JSON.stringify(version.spec.limits)
