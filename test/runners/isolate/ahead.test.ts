/** Short runs are sent to a busy child before it is free; nothing of that may show when one of them is not short. */
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { createIsolateRunner } from '../../../runners/isolate/index.ts'
import type { Outcome, Runner } from '../../../runners/runner.ts'
import { hearing, job, output, sleep } from './support.ts'

/** Runs for as long as its input says, busily, and counts the calls of its isolate. */
const code = `let calls = 0
export default ({ ms }) => {
  const until = performance.now() + ms
  while (performance.now() < until);
  return ++calls
}`

/** One child, which knows that this code takes next to no time. */
async function oneChild(max: number): Promise<Runner> {
  const runner = await createIsolateRunner({ min: 1, max })
  for (let i = 0; i < 30; i++) await output(runner, code, { input: { ms: 0 } })
  return runner
}

interface Begun {
  outcome: Promise<Outcome>
  stop: AbortController
  /** Milliseconds from the call to the outcome, once it is there. */
  ms: number | undefined
}

function begin(runner: Runner, ms: number, text = code): Begun {
  const stop = new AbortController()
  const start = performance.now()
  const begun: Begun = {
    stop,
    ms: undefined,
    outcome: runner
      .prepare(job(text, { input: { ms } }))
      .run(stop.signal, hearing())
      .finally(() => {
        begun.ms = performance.now() - start
      }),
  }
  return begun
}

const statuses = (outcomes: Outcome[]) => outcomes.map((outcome) => outcome.status)

test('what was sent ahead of a run that turns out to be long goes to another child', async () => {
  await using runner = await oneChild(2)
  const long = begin(runner, 4_000)
  const short = Array.from({ length: 6 }, () => begin(runner, 0))
  assert.equal(statuses(await Promise.all(short.map((one) => one.outcome))), Array(6).fill('completed'))
  assert.is(long.ms, undefined, 'the long one was over before them')
  assert.is((await long.outcome).status, 'completed')
})

test('with no other child to go to they run behind it, each once and in order', async () => {
  await using runner = await oneChild(1)
  const all = [begin(runner, 200), ...Array.from({ length: 20 }, () => begin(runner, 0))]
  const outputs = (await Promise.all(all.map((one) => one.outcome))).map((outcome) =>
    outcome.status === 'completed' ? JSON.parse(outcome.output) : outcome,
  )
  assert.equal(
    outputs,
    Array.from({ length: 21 }, (_, i) => 31 + i),
  )
})

test('a child that is killed fails the run it was at, and no other', async () => {
  await using runner = await oneChild(2)
  const hit = begin(runner, 3_000)
  const others = Array.from({ length: 6 }, () => begin(runner, 0))
  await sleep(3)
  for (const pid of runner.pids()) process.kill(pid, 'SIGKILL')
  const outcome = await hit.outcome
  assert.is(outcome.status === 'failed' && outcome.cause, 'runner_lost', JSON.stringify(outcome))
  assert.equal(statuses(await Promise.all(others.map((one) => one.outcome))), Array(6).fill('completed'))
})

test('one that is stopped before its turn never runs, and the others do', async () => {
  await using runner = await oneChild(1)
  const first = begin(runner, 100)
  const [second, third, fourth] = [begin(runner, 0), begin(runner, 0), begin(runner, 0)]
  third.stop.abort('killed')
  assert.is((await third.outcome).status, 'stopped')
  assert.is(first.ms, undefined)
  const outcomes = await Promise.all([first.outcome, second.outcome, fourth.outcome])
  assert.equal(
    outcomes.map((outcome) => outcome.status === 'completed' && outcome.output),
    ['31', '32', '33'],
  )
})

test('a run that spends its memory takes none of those behind it along', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 2 })
  const hungry = `export default ({ ms }) => { const held = []; while (ms > 0) held.push(new Array(1e5).fill(ms)); return held.length }`
  for (let i = 0; i < 30; i++) await output(runner, hungry, { input: { ms: 0 } })
  const spent = begin(runner, 1, hungry)
  const others = Array.from({ length: 6 }, () => begin(runner, 0, hungry))
  const outcome = await spent.outcome
  assert.is(outcome.status === 'failed' && outcome.cause, 'oom', JSON.stringify(outcome))
  assert.equal(statuses(await Promise.all(others.map((one) => one.outcome))), Array(6).fill('completed'))
})

test('a thousand short runs at once are each run once', async () => {
  await using runner = await oneChild(2)
  const counting = 'let n = 0; export default () => ++n'
  const outputs = await Promise.all(Array.from({ length: 1_000 }, () => output(runner, counting)))
  // Two isolates at most count, each from 1 without a gap.
  const counts = new Map<number, number>()
  for (const n of outputs as number[]) counts.set(n, (counts.get(n) ?? 0) + 1)
  const sizes = [...counts.values()]
  assert.ok(Math.max(...sizes) <= 2)
  const longest = Math.max(...counts.keys())
  assert.is(counts.size, longest)
})

test.run()
