/**
 * Containers, or microVMs, of every kind under SIGKILLs of their runner, at any moment of its life, its start included. Afterwards
 * everything that was accepted has its one end, and the host holds nothing that the runners made. Everything is chosen
 * by a printed seed.
 */
import { readFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { processesStartedWith } from '../../../scripts/process-identity.ts'
import type { Isolation, Workload } from '../../../shared/workload.ts'
import { type Audit, audit } from '../../faults/audit.ts'
import { skip } from '../../harness.ts'
import { seeded } from '../../shared/support.ts'
import { type Fields, Ground } from '../conformance/ground.ts'
import { type Language, node, python, shell } from '../conformance/languages.ts'

export interface OrphanPlan {
  seed: number
  runs: number
  /** SIGKILLs of the runner. */
  kills: number
  /** Runs at once; 8 unless given. */
  width?: number
  log: (line: string) => void
}

interface OrphanReport {
  audit: Audit
  accepted: number
  kills: number
  /** Kills of a runner that was not offering itself yet. */
  killsAtStart: number
  statuses: Record<string, number>
  causes: Record<string, number>
  /** Ends that are not what the program deserves. */
  wrongEnds: string[]
  /** Left of killed runners while their successor lives on. */
  orphans: string[]
  /** Left when all has stopped. */
  left: string[]
  seconds: number
}

interface Kind {
  language: Language
  program: (n: number) => string
  fields: (random: number) => Fields
  ends: string[]
  /** Told to stop after so many ms. */
  killedAfterMs?: number
}

const memory_mb = 96
const kinds: Kind[] = [
  // The same code over and over: in warm boxes.
  { language: node, program: () => node.programs.echo, fields: (input) => ({ input }), ends: ['completed'] },
  // Code of its own each: in boxes that stand ready.
  {
    language: python,
    program: (n) => `${python.programs.echo}# ${n}\n`,
    fields: (input) => ({ input }),
    ends: ['completed'],
  },
  // Boxes made for one run.
  {
    language: shell,
    program: () => 'sleep "$(cat)"\n',
    fields: (random) => ({ input: 2 * random }),
    ends: ['completed'],
  },
  {
    language: shell,
    program: () => shell.programs.text,
    fields: () => ({ input: 500_000 }),
    ends: ['completed'],
  },
  {
    language: shell,
    program: () => shell.programs.spins,
    fields: () => ({ limits: { timeout_s: 1, memory_mb } }),
    ends: ['timeout'],
  },
  {
    language: python,
    program: () => python.programs.grows,
    fields: () => ({ limits: { timeout_s: 60, memory_mb } }),
    ends: ['oom'],
  },
  {
    language: node,
    program: () => node.programs.sleeps,
    fields: () => ({ input: 60 }),
    ends: ['killed'],
    killedAfterMs: 1_500,
  },
  {
    language: node,
    program: (n) => `${node.programs.echo} // ${n}`,
    fields: (input) => ({ input, network: { egress: 'all' } }),
    ends: ['completed'],
  },
]

/** So many of the kills come within so many ms after the one before: while the runner starts. */
const startShare = 1 / 3
const startMs = 1_500
/** The others come within so many ms after it has work. */
const liveMs = 1_000

/** Registers the test for this isolation, on a platform of its own. */
export async function orphans(isolation: Isolation, plan: Omit<OrphanPlan, 'log'>): Promise<void> {
  console.log(`seed ${plan.seed} (VULCAN_SEED=${plan.seed} repeats it)`)
  const ground = await Ground.open(isolation)
  const obstacle = await ground.obstacle()
  const name = `${isolation}: ${plan.runs} runs under ${plan.kills} SIGKILLs of their runner end once each and leave nothing`
  if (obstacle !== undefined) {
    skip(test, name, obstacle)
    await ground[Symbol.asyncDispose]()
    return
  }
  test(name, async () => {
    await using _ = ground
    const report = await runOrphans(ground, { ...plan, log: console.log }).catch((error) => {
      console.log(ground.lastWords().join('\n'))
      throw error
    })
    console.log({ ...report, audit: { ...report.audit, records: report.audit.records.size } })
    assert.is(report.accepted, plan.runs)
    assert.is(report.kills, plan.kills)
    assert.is(report.audit.ends, plan.runs)
    assert.equal(report.audit.wrong, [])
    assert.ok(report.audit.retries > 0, 'some were at work when they were hit')
    assert.equal(report.wrongEnds, [])
    assert.equal(report.orphans, [])
    assert.equal(report.left, [])
  })
}

async function runOrphans(ground: Ground, plan: OrphanPlan): Promise<OrphanReport> {
  const { log, width = 8 } = plan
  const random = seeded(plan.seed)
  const began = Date.now()
  const backend = await ground.backend()
  const usable = kinds.filter(
    ({ fields }) => fields(0).network === undefined || backend.capabilities?.egress.includes('all'),
  )
  const report: OrphanReport = {
    audit: undefined as never,
    accepted: 0,
    kills: 0,
    killsAtStart: 0,
    statuses: {},
    causes: {},
    wrongEnds: [],
    orphans: [],
    left: [],
    seconds: 0,
  }
  const note = ({ id, status, cause, error }: Workload, { ends }: Kind) => {
    report.statuses[status] = (report.statuses[status] ?? 0) + 1
    if (cause !== null) report.causes[cause] = (report.causes[cause] ?? 0) + 1
    const end = status === 'failed' ? cause! : status
    if (!ends.includes(end)) report.wrongEnds.push(`${id}: ${end}, not ${ends}: ${error?.message}`)
  }

  let next = 0
  let over = 0
  const worker = async () => {
    while (next < plan.runs) {
      const n = next++
      const kind = usable[Math.floor(random() * usable.length)]!
      const retry = { max_attempts: 20, backoff: 'none' }
      const fields = { limits: { timeout_s: 60, memory_mb }, ...kind.fields(random()), retry }
      const id = await ground.begin(kind.language, kind.program(n), fields)
      report.accepted++
      if (kind.killedAfterMs !== undefined) {
        await delay(kind.killedAfterMs * random())
        // Whoever is told to ask again does.
        while ((await ground.kill(id)).ended_at == null) await delay(200)
      }
      note(await ground.ended(id, 300_000), kind)
      over++
    }
  }
  const working = Promise.all(Array.from({ length: width }, worker))

  /** The runner’s process, also before it offers itself. */
  const runnerNow = () =>
    processesStartedWith('VULCAN_DATA_DIR', ground.platform.dataDir).find((pid) =>
      isRunner(pid, ground.isolation),
    )
  const killing = (async () => {
    while (report.kills < plan.kills) {
      if (random() < startShare) await delay(startMs * random())
      else {
        // Spread over the runs, while there is something to hurt.
        const due = ((plan.runs - width) * (report.kills + random())) / plan.kills
        while (over < due) await delay(20)
        await ground.runnerPid()
        await delay(liveMs * random())
      }
      let pid = runnerNow()
      while (pid === undefined) {
        await delay(20)
        pid = runnerNow()
      }
      const isOffering = (await ground.backend()).runners.some((one) => one.pid === pid)
      ground.census.look(pid)
      try {
        process.kill(pid, 'SIGKILL')
      } catch {
        continue
      }
      report.kills++
      if (!isOffering) report.killsAtStart++
      log(`kill ${report.kills}/${plan.kills} of ${pid}, ${over} of ${plan.runs} have ended`)
    }
  })()
  await Promise.all([killing, working])
  log(`all ${report.accepted} have ended`)
  report.orphans = await ground.census.orphans(await ground.runnerPid())
  report.audit = await audit(ground.platform.natsUrl)
  report.left = await ground.leftovers()
  report.seconds = Math.round((Date.now() - began) / 1_000)
  return report
}

/** Node itself, whatever stands in front of it. */
function isRunner(pid: number, isolation: Isolation): boolean {
  try {
    const words = readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0')
    return (
      /(?:^|\/)node$/.test(words[0]!) &&
      words.some((word) => word.endsWith('runners/main.ts')) &&
      words.includes(isolation)
    )
  } catch {
    return false
  }
}
