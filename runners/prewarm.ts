/** Keeps sandboxes ready for the functions that ask for it, with the versions that a call without a ref means. */
import { currentVersions, type FunctionRecord, type FunctionVersion } from '../shared/functions.ts'
import type { Logger } from '../shared/process.ts'
import type { Isolation } from '../shared/workload.ts'
import type { Bundles } from './bundles.ts'
import type { Runner } from './runner.ts'

/** Milliseconds until code that could not be fetched is asked for again. */
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
  bundles: Bundles
  runner: Pick<Runner, 'prewarm'>
  log: Logger
}

type Warm = Parameters<Runner['prewarm']>[0]

/** Follows the registry until it is disposed of. */
export function startPrewarm(options: PrewarmOptions): Disposable {
  const { functions, bundles, runner, isolation, log } = options
  /** By digest of the code. Two functions with the same code share what is warm: the larger count holds. */
  const warm = new Map<string, { job: Warm; count: number }>()
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
        if (version === undefined || version.bundle === null || version.isolation !== isolation) continue
        const digest = version.bundle.blob
        if (count > (found.get(digest)?.count ?? 0)) found.set(digest, { version, count })
      }
    return found
  }

  async function look(): Promise<void> {
    const goal = wanted()
    for (const [digest, { job }] of warm) {
      if (goal.has(digest)) continue
      warm.delete(digest)
      runner.prewarm(job, 0)
    }
    for (const [digest, { version, count }] of goal) {
      const known = warm.get(digest)
      if (known?.count === count && sameLimits(known.job, version)) continue
      try {
        const code = await bundles.get(version.bundle!.blob)
        if (stopped) return
        const job: Warm = {
          // A bundle holds no types any more.
          runtime: version.runtime === 'typescript' ? 'javascript' : version.runtime,
          code,
          codeSha256: version.bundle!.blob.slice('sha256:'.length),
          limits: version.spec.limits,
        }
        warm.set(digest, { job, count })
        runner.prewarm(job, count)
      } catch (error) {
        log.warn({ function: version.name, version: version.version, err: error }, 'cannot be kept warm yet')
        clearTimeout(again)
        again = setTimeout(changed, againMs)
      }
    }
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

const sameLimits = (job: Warm, version: FunctionVersion): boolean =>
  JSON.stringify(job.limits) === JSON.stringify(version.spec.limits)
