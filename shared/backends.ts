/** What runners say of themselves: heartbeats while they live, and the last known capabilities of each isolation. */
import { z } from 'zod'
import { Isolation, Runtime } from './workload.ts'

/** Milliseconds between two heartbeats of a runner. */
export const heartbeatMs = 3_000
/** A runner not heard of for this long (ms) is taken for lost. */
export const lostAfterMs = 15_000
/** What an isolation’s runners can do is known for this long (ms) after they last said it. */
export const knownForMs = 15 * 60_000

/** Whether a limit holds on this host, as found by exceeding it. */
export const LimitReport = z
  .partialRecord(z.enum(['memory', 'cpu', 'pids', 'file_size', 'disk']), z.enum(['enforced', 'not enforced']))
  .meta({ id: 'LimitReport' })
export type LimitReport = z.infer<typeof LimitReport>

export const Capabilities = z
  .object({
    runtimes: z.array(Runtime),
    egress: z.array(z.enum(['none', 'all', 'allowlist'])),
    /** Outer walls in force, such as `bubblewrap`, `node-permissions`. */
    walls: z.array(z.string()),
    /** Walls that are wanted but not in force, and `runtime python` and the like, each with what would bring it. */
    missing: z.array(z.object({ wall: z.string(), fix: z.string() })),
    /** Version of the engine, such as V8’s. */
    version: z.string(),
    /** Absent where limits are kept by the engine itself. */
    limits: LimitReport.optional(),
  })
  .meta({ id: 'Capabilities' })
export type Capabilities = z.infer<typeof Capabilities>

export const Heartbeat = z.object({
  runner: z.string(),
  isolation: Isolation,
  available: z.boolean(),
  /** Why it is unavailable and what would make it available; null where it is. */
  reason: z.string().nullable(),
  fix: z.string().nullable(),
  capabilities: Capabilities.nullable(),
  slots: z.int().nonnegative(),
  active: z.int().nonnegative(),
  host: z.string(),
  pid: z.int(),
  started_at: z.iso.datetime(),
  /** What the runner counts and measures by itself, such as `restore_ms_p50`. */
  metrics: z.record(z.string(), z.number()).default({}),
  /** Where its own metrics are served, on its host’s loopback; null: nowhere. */
  metrics_url: z.string().nullable().default(null),
  /** False in its last heartbeat: it is going away and takes no more work. */
  leaving: z.boolean(),
})
export type Heartbeat = z.infer<typeof Heartbeat>

/**
 * `{isolation}.{host}`: where a host’s last word on an isolation is kept, so that one that cannot offer it leaves
 * the word of another alone. Keys take letters, digits and `-/_=.` only.
 */
export const backendKey = ({ isolation, host }: Pick<Heartbeat, 'isolation' | 'host'>): string =>
  `${isolation}.${host.replace(/[^A-Za-z0-9_-]/g, '_') || '_'}`

/** A runner as `/v1/backends` lists it. */
export const RunnerStatus = Heartbeat.pick({
  runner: true,
  slots: true,
  active: true,
  metrics: true,
  metrics_url: true,
  host: true,
  pid: true,
  started_at: true,
}).extend({ last_seen: z.iso.datetime() })

export const Backend = z
  .object({
    isolation: Isolation,
    available: z.boolean(),
    reason: z.string().nullable(),
    fix: z.string().nullable(),
    capabilities: Capabilities.nullable(),
    runners: z.array(RunnerStatus),
  })
  .meta({ id: 'Backend' })
export type Backend = z.infer<typeof Backend>

/** A backend without who runs it: what routing looks at. */
export type Ability = Omit<Backend, 'runners'>
