// timeout: 1800
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { runFaults, targets } from './driver.ts'
import { runRaces } from './races.ts'

const seed = Number(process.env.VULCAN_SEED ?? Date.now() % 1_000_000)
console.log(`seed ${seed} (VULCAN_SEED=${seed} repeats it)`)

test('2,000 workloads under 50 SIGKILLs: 2,000 ends', async () => {
  const killsEach = 10
  const plan = {
    seed,
    workloads: 2_000,
    killsEach,
    unfinishedAtKill: 100,
    ackWaitMs: 4_000,
    log: console.log,
  }
  const report = await runFaults(plan)
  console.log({ ...report, audit: { ...report.audit, records: report.audit.records.size } })
  for (const target of targets) assert.is(report.kills[target], killsEach)
  assert.ok(report.fewestUnfinished >= plan.unfinishedAtKill)
  assert.is(report.accepted, plan.workloads)
  assert.is(report.audit.records.size, plan.workloads)
  assert.is(report.audit.ends, plan.workloads)
  assert.equal(report.audit.wrong, [])
  assert.equal(report.disagreements, [])
  assert.is(report.orphans, 0)
})

test('500 kills raced against starts and 500 against completions: one end each', async () => {
  const each = 500
  const report = await runRaces(each, 12, seed)
  console.log({ ...report, audit: { ...report.audit, records: report.audit.records.size } })
  assert.equal(report.wrongAnswers, [])
  assert.equal(report.audit.wrong, [])
  assert.is(report.audit.ends, 2 * each)
  assert.is(report.audit.records.size, 2 * each)
  assert.ok(report.neverStarted > 0, 'some kills came before the start')
})

test.run()
