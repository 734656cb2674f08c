/**
 * Load under faults: workloads are accepted while every kind of process is killed with SIGKILL, over and over, and
 * afterwards the streams and the API are held against what was promised. Everything is chosen by a printed seed.
 */
import { readdir, readFile } from 'node:fs/promises'
import { setTimeout as delay } from 'node:timers/promises'
import { http, startTestPlatform } from '../platform.ts'
import { type Audit, audit } from './audit.ts'

export type Target = 'gateway' | 'dispatcher' | 'runner' | 'child' | 'nats-server'
export const targets: readonly Target[] = ['gateway', 'dispatcher', 'runner', 'child', 'nats-server']

export interface FaultPlan {
  seed: number
  workloads: number
  /** SIGKILLs of each target. */
  killsEach: number
  /** A kill waits until so many are accepted and unfinished. */
  unfinishedAtKill: number
  ackWaitMs: number
  log: (line: string) => void
}

export interface FaultReport {
  audit: Audit
  accepted: number
  kills: Record<Target, number>
  /** Unfinished at the time of each kill, lowest. */
  fewestUnfinished: number
  statuses: Record<string, number>
  causes: Record<string, number>
  /** Workloads whose API answer differs from the stream’s fold. */
  disagreements: string[]
  /** Sandbox processes whose runner is gone. */
  orphans: number
  seconds: number
}

/** Mulberry32: small, seeded, good enough to choose by. */
export function seeded(seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let t = state
    t = Math.imul(t ^ (t >>> 15), t | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296
  }
}

/** Says a line every 50 ms for as long as it runs: what user code does is seen by its lines. */
const code = `export default async ({ ms }, ctx) => {
  const end = Date.now() + ms
  while (Date.now() < end) {
    await new Promise((resolve) => setTimeout(resolve, Math.min(50, ms)))
    console.log('alive', ctx.attempt)
  }
  return { ms }
}`

export async function runFaults(plan: FaultPlan): Promise<FaultReport> {
  const random = seeded(plan.seed)
  await using platform = await startTestPlatform({ VULCAN_ACK_WAIT_MS: String(plan.ackWaitMs) })
  const { url, supervisor } = platform
  const began = Date.now()
  const totalKills = plan.killsEach * targets.length
  const kills: Record<Target, number> = { gateway: 0, dispatcher: 0, runner: 0, child: 0, 'nats-server': 0 }
  const accepted: string[] = []
  let killsDone = 0
  let fewestUnfinished = Number.POSITIVE_INFINITY
  let finished = 0

  // The load is let in as the kills go on, so that there is always enough unfinished to hurt.
  const allowed = () =>
    Math.min(plan.workloads, 2 * plan.unfinishedAtKill + (plan.workloads * killsDone) / totalKills)
  let next = 0
  const post = async () => {
    while (next < plan.workloads) {
      if (next >= allowed() && accepted.length - finished > 1.5 * plan.unfinishedAtKill) {
        await delay(20)
        continue
      }
      const i = next++
      const long = i % 10 === 0
      const ms = long ? Math.round(plan.ackWaitMs * 1.2) : Math.round(50 + 1_000 * random())
      const max_attempts = i % 3 === 0 ? 3 : 20
      const body = { code, input: { ms }, limits: { timeout_s: 60 }, retry: { max_attempts } }
      const headers = { 'idempotency-key': `fault-${plan.seed}-${i}` }
      for (;;) {
        const answer = await http<{ id: string }>(`${url}/v1/workloads/async`, { body, headers }).catch(
          () => undefined,
        )
        if (answer?.status === 202 || answer?.status === 200) {
          accepted.push(answer.body.id)
          break
        }
        if (answer !== undefined && answer.status < 500) throw new Error(`post: ${JSON.stringify(answer)}`)
        await delay(50)
      }
    }
  }
  const posting = Promise.all(Array.from({ length: 16 }, post))

  let watching = true
  const watch = (async () => {
    while (watching) {
      const stats = await http<{ counts: Record<string, number> }>(`${url}/v1/stats`).catch(() => undefined)
      if (stats?.status === 200) {
        const { completed = 0, failed = 0, killed = 0 } = stats.body.counts
        finished = completed + failed + killed
      }
      await delay(100)
    }
  })()

  const order = targets.flatMap((target) => Array.from({ length: plan.killsEach }, () => target))
  for (let i = order.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1))
    ;[order[i], order[j]] = [order[j]!, order[i]!]
  }
  for (const target of order) {
    await delay(200 + 600 * random())
    while (accepted.length - finished < plan.unfinishedAtKill) {
      if (next >= plan.workloads)
        throw new Error(`only ${accepted.length - finished} left before all kills were done`)
      await delay(20)
    }
    for (;;) {
      const pid =
        target === 'child' ? await someChild(supervisor.pid('runner'), random) : supervisor.pid(target)
      if (pid !== undefined && tryKill(pid)) break
      await delay(50)
    }
    fewestUnfinished = Math.min(fewestUnfinished, accepted.length - finished)
    kills[target]++
    killsDone++
    plan.log(`kill ${killsDone}/${totalKills}: ${target}, ${accepted.length - finished} unfinished`)
  }
  await posting
  plan.log(`all ${accepted.length} accepted, all kills done; waiting for the ends`)
  const deadline = Date.now() + 180_000
  while (finished < plan.workloads && Date.now() < deadline) await delay(100)
  watching = false
  await watch

  const audited = await audit(platform.natsUrl)
  const statuses: Record<string, number> = {}
  const causes: Record<string, number> = {}
  const disagreements: string[] = []
  let cursor: string | null = null
  const listed = new Map<string, { status: string; cause: string | null; attempts: number }>()
  do {
    const page: string = cursor === null ? '' : `&cursor=${encodeURIComponent(cursor)}`
    const answer = await http<{
      workloads: { id: string; status: string; cause: string | null; attempts: number }[]
      next_cursor: string | null
    }>(`${url}/v1/workloads?limit=200${page}`)
    for (const workload of answer.body.workloads) listed.set(workload.id, workload)
    cursor = answer.body.next_cursor
  } while (cursor !== null)
  for (const id of accepted) {
    const record = audited.records.get(id)
    const row = listed.get(id)
    if (record === undefined || row === undefined) {
      disagreements.push(`${id}: stream ${record?.status ?? 'nothing'}, API ${row?.status ?? 'nothing'}`)
      continue
    }
    statuses[row.status] = (statuses[row.status] ?? 0) + 1
    if (row.cause !== null) causes[row.cause] = (causes[row.cause] ?? 0) + 1
    if (record.status !== row.status || record.cause !== row.cause || record.attempts !== row.attempts)
      disagreements.push(`${id}: stream ${record.status}/${record.cause}, API ${row.status}/${row.cause}`)
  }
  const orphans = await countOrphans()
  return {
    audit: audited,
    accepted: new Set(accepted).size,
    kills,
    fewestUnfinished,
    statuses,
    causes,
    disagreements,
    orphans,
    seconds: Math.round((Date.now() - began) / 1_000),
  }
}

function tryKill(pid: number): boolean {
  try {
    return process.kill(pid, 'SIGKILL')
  } catch {
    return false
  }
}

interface Process {
  pid: number
  parent: number
  command: string
}

async function processes(): Promise<Process[]> {
  const all: Process[] = []
  for (const name of await readdir('/proc')) {
    if (!/^\d+$/.test(name)) continue
    try {
      const stat = await readFile(`/proc/${name}/stat`, 'utf8')
      const command = (await readFile(`/proc/${name}/cmdline`, 'utf8')).replaceAll('\0', ' ')
      all.push({
        pid: Number(name),
        parent: Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[1]),
        command,
      })
    } catch {
      // Gone meanwhile.
    }
  }
  return all
}

const isSandbox = ({ command }: Process) => command.includes('runners/isolate/child.ts')

function descendants(all: Process[], of: number): Set<number> {
  const found = new Set([of])
  for (let grown = true; grown; ) {
    grown = false
    for (const { pid, parent } of all)
      if (found.has(parent) && !found.has(pid)) {
        found.add(pid)
        grown = true
      }
  }
  return found
}

/** One sandbox process of the runner; undefined when it has none now. */
async function someChild(runner: number | undefined, random: () => number): Promise<number | undefined> {
  if (runner === undefined) return undefined
  const all = await processes()
  const ours = descendants(all, runner)
  const children = all.filter((one) => ours.has(one.pid) && isSandbox(one))
  return children[Math.floor(random() * children.length)]?.pid
}

/** Sandboxes whose chain of parents no longer leads to the process that made them. */
async function countOrphans(): Promise<number> {
  const all = new Map((await processes()).map((one) => [one.pid, one]))
  const orphaned = (one: Process): boolean => {
    const parent = all.get(one.parent)
    return parent === undefined || parent.pid === 1 || (isSandbox(parent) && orphaned(parent))
  }
  return [...all.values()].filter((one) => isSandbox(one) && orphaned(one)).length
}
