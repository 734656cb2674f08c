/** The isolate runner: JavaScript and TypeScript in V8 isolates, in child processes behind walls. */
import { createHash } from 'node:crypto'
import { availableParallelism } from 'node:os'
import { EgressGate, type EgressOptions } from '../egress.ts'
import { nothingRan } from '../guest/report.ts'
import type { RunnerMetrics } from '../metrics.ts'
import type { Capabilities, Job, Outcome, Prepared, Probe, Runner } from '../runner.ts'
import { type Code, isCode } from './attempt.ts'
import { killOrphans } from './orphans.ts'
import { Pool, type PoolOptions } from './pool.ts'
import { childMarker, type WallOptions, type Walls, wallCandidates } from './walls.ts'
import { webBundle } from './web/bundle.ts'

export interface IsolateOptions extends WallOptions {
  metrics?: RunnerMetrics | undefined
  /** What user code may reach where its policy lets it: see `egress.ts`. */
  egress?: EgressOptions
  /** MiB that the isolates kept warm in all children may hold together; default 512. */
  warmMb?: number
  /** Child processes kept ready; default: one per core, at least 2. */
  min?: number
  /** Workloads that can run at once; default 32. */
  max?: number
  /** A child over `min` is let go after so many ms without work; default 30,000. */
  idleMs?: number
}

const defaultWarmMb = 512
/** A host that cannot run one expression in so many ms does not offer isolates. */
const probeMs = 5_000

const unheard = {
  onLog() {},
  respond(): never {
    throw new Error('the probe answers nothing')
  },
}

type Found = { pool: Pool; capabilities: Capabilities } | { pool?: undefined; reason: string }

const whatBringsIt = 'npm ci with Node 20 or newer brings isolated-vm and the Node it needs'

/** Runs `1 + 1` behind the strongest walls this host can do. */
export async function probeIsolate(options: IsolateOptions = {}): Promise<Probe> {
  await using egress = new EgressGate()
  const found = await findWalls(options, { min: 1, max: 1, idleMs: 60_000, warmMb: defaultWarmMb }, egress)
  if (found.pool === undefined) return { available: false, reason: found.reason, fix: whatBringsIt }
  await found.pool.close()
  return { available: true, capabilities: found.capabilities }
}

/** Throws where `probeIsolate` finds nothing. Its children are ready when it returns. */
export async function createIsolateRunner(options: IsolateOptions = {}): Promise<Runner> {
  const min = options.min ?? Math.max(2, availableParallelism())
  const max = Math.max(options.max ?? 32, min)
  const { idleMs = 30_000, warmMb = defaultWarmMb, metrics } = options
  const egress = new EgressGate({ ...options.egress, metrics })
  const found = await findWalls(options, { min, max, idleMs, warmMb }, egress)
  if (found.pool === undefined) throw new Error(`isolates are not available: ${found.reason}`)
  const { pool, capabilities } = found
  if (metrics !== undefined) pool.measure(metrics)
  await pool.filled()
  return {
    isolation: 'isolate',
    capabilities,
    prepare: (job) => (isCode(job) ? pool.prepare(job) : refuse(job)),
    prewarm(program, count) {
      if (isCode(program)) pool.prewarm(program, count)
    },
    pids: () => pool.pids(),
    async [Symbol.asyncDispose]() {
      await pool.close()
      await egress[Symbol.asyncDispose]()
    },
  }
}

const capabilitiesOf = ({ names, missing }: Walls, version: string) => ({
  runtimes: ['javascript' as const, 'typescript' as const],
  egress: ['none' as const, 'all' as const, 'allowlist' as const],
  walls: names,
  missing,
  version: `V8 ${version}`,
})

/** The first walls behind which a workload really runs, with the pool that ran it. */
async function findWalls(
  options: IsolateOptions,
  poolOptions: PoolOptions,
  egress: EgressGate,
): Promise<Found> {
  killOrphans(childMarker)
  let web: string
  try {
    web = (await webBundle()).path
  } catch (error) {
    return { reason: `the web APIs could not be bundled: ${(error as Error).message}` }
  }
  let candidates: Walls[]
  try {
    candidates = wallCandidates(options, web)
  } catch (error) {
    return { reason: `isolated-vm was not found: ${(error as Error).message}` }
  }
  let reason = 'nothing was tried'
  for (const walls of candidates) {
    const pool = new Pool(walls, poolOptions, egress)
    const outcome = await pool.prepare(probeJob()).run(AbortSignal.timeout(probeMs), unheard)
    if (outcome.status === 'completed' && outcome.output === '2')
      return { pool, capabilities: capabilitiesOf(walls, pool.version) }
    reason = describe(outcome)
    await pool.close()
  }
  return { reason }
}

const describe = (outcome: Outcome) =>
  outcome.status === 'failed' ? outcome.error.message : `a sandbox did not answer within ${probeMs} ms`

/** What is no source text. */
const refuse = ({ source }: Job): Prepared => ({
  run: async () => ({
    status: 'failed',
    cause: 'invalid_workload',
    error: {
      message: `an isolate runs source code, not an ${source.kind === 'archive' ? 'archive' : 'image'}`,
      stack: null,
    },
    exitCode: null,
    ...nothingRan,
  }),
  release() {},
})

function probeJob(): Job & Code {
  const code = 'export default () => 1 + 1'
  return {
    id: '00000000-0000-7000-8000-000000000000',
    attempt: 1,
    runtime: 'javascript',
    source: { kind: 'code', text: code, sha256: createHash('sha256').update(code).digest('hex') },
    entrypoint: undefined,
    workingDir: undefined,
    user: undefined,
    input: undefined,
    http: undefined,
    env: {},
    limits: { timeout_s: probeMs / 1000, memory_mb: 16, cpu: 1, pids: 1, output_mb: 1, disk_mb: 1 },
    egress: 'none',
    function: undefined,
    traceparent: undefined,
  }
}
