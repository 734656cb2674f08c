// timeout: 400
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { runFaults, targets } from './driver.ts'
import { runRaces } from './races.ts'

const seed = Number(process.env.VULCAN_SEED ?? Date.now() % 1_000_000)
console.log(`seed ${seed} (VULCAN_SEED=${seed} repeats it)`)

test('SIGKILLs of every process under load lose nothing and end nothing twice', async () => {
  const killsEach = 2
  const plan = { seed, workloads: 300, killsEach, unfinishedAtKill: 40, ackWaitMs: 3_000, log: console.log }
  const report = await runFaults(plan)
  console.log({ ...report, audit: { ...report.audit, records: report.audit.records.size } })
  for (const target of targets) assert.is(report.kills[target], killsEach)
  assert.is(report.accepted, plan.workloads)
  assert.is(report.audit.records.size, plan.workloads)
  assert.is(report.audit.ends, plan.workloads)
  assert.equal(report.audit.wrong, [])
  assert.equal(report.disagreements, [])
  assert.is(report.orphans, 0)
  assert.ok(report.statuses.completed! > plan.workloads * 0.8, 'most complete in spite of all')
})

test('a kill raced against a start or a completion leaves one end', async () => {
  const each = 60
  const report = await runRaces(each, 8, seed)
  console.log({ ...report, audit: { ...report.audit, records: report.audit.records.size } })
  assert.equal(report.wrongAnswers, [])
  assert.equal(report.audit.wrong, [])
  assert.is(report.audit.ends, 2 * each)
  assert.is(report.audit.records.size, 2 * each)
  assert.ok(report.neverStarted > 0, 'some kills came before the start')
  assert.is(report.killVersusStart.completed ?? 0, 0, 'ten seconds of work were cut short each time')
  assert.ok((report.killVersusCompletion.killed ?? 0) + (report.killVersusCompletion.completed ?? 0) === each)
})

test.run()
