// timeout: 170
import { type ChildProcess, fork } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { Bus } from '../../shared/bus.ts'
import { Lane } from '../../shared/functions.ts'
import { Registry } from '../../shared/registry.ts'
import { acceptedSubject } from '../../shared/subjects.ts'
import {
  ensureLane,
  laneConsumer,
  recreateConsumer,
  removeLane,
  type TopologyOptions,
  WORK,
} from '../../shared/topology.ts'
import type { WorkloadId } from '../../shared/workload.ts'
import {
  acceptedEvent,
  type Ground,
  ground,
  history,
  kindsOf,
  submit,
  until,
  untilEnd,
} from '../shared/support.ts'
import { type Code, codeOf, completed, failed, startWorker } from './support.ts'

const many = (n: number) => Array.from({ length: n })

/** With a registry, closed with it. */
async function laneGround(topology: Partial<TopologyOptions> = {}): Promise<Ground & { registry: Registry }> {
  const on = await ground(topology)
  const registry = await Registry.open(on.bus, 1)
  return {
    ...on,
    registry,
    async [Symbol.asyncDispose]() {
      registry.close()
      await on[Symbol.asyncDispose]()
    },
  }
}

/** A lane as a deploy makes it. */
async function putLane(
  on: Ground & { registry: Registry },
  name: string,
  limits: Partial<Lane>,
): Promise<Lane> {
  const lane = Lane.parse({
    lane: `fn-${name}`,
    isolation: 'isolate',
    function: name,
    concurrency: null,
    rate: null,
    ...limits,
  })
  await ensureLane(on.bus.jsm, on.topology, lane)
  await on.registry.putLane(lane)
  return lane
}

async function call(bus: Bus, lane: Lane | undefined, code = '0'): Promise<WorkloadId> {
  const target = lane?.lane ?? 'any'
  const event = acceptedEvent({ code }, undefined, { target })
  const stored = await bus.publishEvent(acceptedSubject(event.subject, 'isolate', target), event, 0)
  assert.ok(stored.stored)
  return event.subject
}

const left = async (bus: Bus, lane: Lane) => {
  const info = await bus.jsm.consumers.info(WORK, laneConsumer(lane))
  return info.num_pending + info.num_ack_pending
}
const untilEmpty = (bus: Bus, lane: Lane) =>
  until(`an empty ${lane.lane}`, async () => (await left(bus, lane)) === 0 || undefined, 60_000)
const untilEnded = async (bus: Bus, ids: WorkloadId[]) => {
  for (const id of ids) await untilEnd(bus, id, 60_000)
}

/** Counts what runs at once, and when each began. */
function counter(ms: number) {
  const seen = { now: 0, most: 0, starts: [] as number[], ids: [] as string[] }
  const code: Code = async (job) => {
    seen.most = Math.max(seen.most, ++seen.now)
    seen.starts.push(Date.now())
    seen.ids.push(job.id)
    await delay(ms)
    seen.now--
    return completed()
  }
  return { seen, code }
}

interface Told {
  type: 'start' | 'end' | 'ready'
  id: string
  at: number
  attempt?: number
}

/** A runner process, and what it told. */
async function startProcess(on: Ground, told: (message: Told, child: ChildProcess) => void, slots = 64) {
  const file = join(import.meta.dirname, 'lane-runner.ts')
  const child = fork(file, [on.nats.url, String(on.topology.ackWaitMs), String(slots)])
  const ready = new Promise<void>((resolve) =>
    child.on('message', (message: Told) => {
      if (message.type === 'ready') resolve()
      else told(message, child)
    }),
  )
  await ready
  return {
    child,
    async kill() {
      const exit = once(child, 'exit')
      child.kill('SIGKILL')
      await exit
    },
    async [Symbol.asyncDispose]() {
      if (child.exitCode !== null || child.signalCode !== null) return
      const exit = once(child, 'exit')
      child.send('stop')
      const timer = setTimeout(() => child.kill('SIGKILL'), 10_000)
      await exit
      clearTimeout(timer)
    },
  }
}

/** The most that any window of `ms` holds. */
const densest = (times: number[], ms: number) => {
  const sorted = [...times].sort((a, b) => a - b)
  return Math.max(...sorted.map((from) => sorted.filter((at) => at >= from && at < from + ms).length))
}

/** By when it happened: what two processes tell does not arrive in that order. */
function mostAtOnce(told: Told[]): number {
  let now = 0
  let most = 0
  for (const { type } of told.toSorted((a, b) => a.at - b.at)) {
    now += type === 'start' ? 1 : -1
    most = Math.max(most, now)
  }
  return most
}

test('500 calls at once of a function with concurrency 5 all end, and at most 5 run at once over two processes', async () => {
  await using on = await laneGround()
  const lane = await putLane(on, 'five', { concurrency: 5 })
  const all: Told[] = []
  const ended = new Set<string>()
  const by = new Map<ChildProcess, number>()
  const told = (one: Told, child: ChildProcess) => {
    all.push(one)
    if (one.type === 'end') ended.add(one.id)
    by.set(child, (by.get(child) ?? 0) + 1)
  }
  await using _one = await startProcess(on, told)
  await using _two = await startProcess(on, told)
  const ids = await Promise.all(many(500).map(() => call(on.bus, lane, '5')))
  await untilEnded(on.bus, ids)
  assert.equal(ended, new Set(ids))
  assert.is(mostAtOnce(all), 5)
  assert.is(by.size, 2, 'both took part')
  for (const id of ids.slice(0, 20))
    assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'started', 'completed'])
})

test('a runner that is killed in the middle takes nothing with it, and the limit holds', async () => {
  await using on = await laneGround({ ackWaitMs: 2_000 })
  const lane = await putLane(on, 'killed', { concurrency: 3 })
  const running = new Map<string, ChildProcess>()
  const all: Told[] = []
  const ended = new Set<string>()
  const told = (one: Told, child: ChildProcess) => {
    all.push(one)
    if (one.type === 'start') running.set(one.id, child)
    else {
      running.delete(one.id)
      ended.add(one.id)
    }
  }
  await using _stays = await startProcess(on, told)
  await using dies = await startProcess(on, told)
  const ids = await Promise.all(many(60).map(() => call(on.bus, lane, '30')))
  await until('work on the one to be killed', () =>
    ended.size > 5 && [...running.values()].includes(dies.child) ? true : undefined,
  )
  await dies.kill()
  const lost = [...running].filter(([, child]) => child === dies.child).map(([id]) => id)
  const killedAt = Number(process.hrtime.bigint()) / 1e6
  for (const id of lost) {
    running.delete(id)
    all.push({ type: 'end', id, at: killedAt })
  }
  await untilEnded(on.bus, ids)
  assert.equal(ended, new Set(ids))
  const most = mostAtOnce(all)
  assert.ok(most <= 3, `${most} at once`)
  for (const id of lost) assert.is((await untilEnd(on.bus, id)).type, 'vulcan.workload.completed')
})

test('100 calls at 50 per second take about two seconds, evenly, over two runners', async () => {
  await using on = await laneGround()
  const lane = await putLane(on, 'fifty', { rate: { limit: 50, per_s: 1, burst: 5 } })
  const { seen, code } = counter(1)
  await using _one = await startWorker(on, code)
  await using _two = await startWorker(on, code)
  const ids = await Promise.all(many(100).map(() => call(on.bus, lane)))
  await untilEnded(on.bus, ids)
  assert.equal(new Set(seen.ids), new Set(ids))
  assert.is(seen.ids.length, 100)
  const took = Math.max(...seen.starts) - Math.min(...seen.starts)
  assert.ok(took >= 1_850, `${took} ms`)
  assert.ok(took < 6_000, `${took} ms`)
  // A start may come late and be followed by one on time: three more in a window than the rate says.
  for (const ms of [100, 200, 500, 1_000]) {
    const most = densest(seen.starts, ms)
    assert.ok(most <= (50 * ms) / 1_000 + 5 + 3, `${most} within ${ms} ms`)
  }
})

test('a burst starts at once, what is beyond it at the rate', async () => {
  await using on = await laneGround()
  const lane = await putLane(on, 'burst', { rate: { limit: 2, per_s: 1, burst: 8 } })
  const { seen, code } = counter(1)
  await using _ = await startWorker(on, code)
  await untilEnded(on.bus, await Promise.all(many(10).map(() => call(on.bus, lane))))
  const [first] = seen.starts
  const after = seen.starts.map((at) => at - first!)
  assert.ok(after[7]! < 450, `the burst took ${after[7]} ms`)
  assert.ok(after[8]! >= 450 && after[9]! >= 950, `${after.slice(8)}`)
})

test('1,000 per second are reached', async () => {
  await using on = await laneGround()
  const lane = await putLane(on, 'thousand', { rate: { limit: 1_000, per_s: 1, burst: 50 } })
  const { seen, code } = counter(1)
  await using _one = await startWorker(on, code, { slots: 64 })
  await using _two = await startWorker(on, code, { slots: 64 })
  await untilEnded(on.bus, await Promise.all(many(2_000).map(() => call(on.bus, lane))))
  const took = Math.max(...seen.starts) - Math.min(...seen.starts)
  assert.is(seen.ids.length, 2_000)
  assert.ok(took >= 1_850, `${took} ms`)
  assert.ok(took < 8_000, `${took} ms`)
})

test('a lane waits for its own only: the common queue and other lanes go on beside one that is stuck', async () => {
  await using on = await laneGround()
  const stuck = await putLane(on, 'stuck', { concurrency: 2 })
  const free = await putLane(on, 'free', { concurrency: 2 })
  const slow = await putLane(on, 'slow', { rate: { limit: 1, per_s: 3_600, burst: 1 } })
  await using worker = await startWorker(on, async (job, signal) => {
    if (codeOf(job) === 'stuck') await delay(60_000, undefined, { signal }).catch(() => {})
    return completed()
  })
  await Promise.all(many(20).map(() => call(on.bus, stuck, 'stuck')))
  await Promise.all(many(5).map(() => call(on.bus, slow)))
  await until('two stuck', () => worker.runner.ran.length >= 2 || undefined)
  const ids = await Promise.all([
    ...many(50).map(() => call(on.bus, free)),
    ...many(50).map(async () => (await submit(on.bus)).id),
  ])
  for (const id of ids) await untilEnd(on.bus, id)
  assert.is(await left(on.bus, stuck), 20)
  assert.is(await left(on.bus, slow), 4)
})

test('lanes that want more than there are slots share them with each other and with the common queue', async () => {
  await using on = await laneGround()
  const lanes = await Promise.all(many(10).map((_, i) => putLane(on, `greedy-${i}`, { concurrency: 50 })))
  const order: string[] = []
  let now = 0
  let most = 0
  await Promise.all(lanes.flatMap((lane, i) => many(20).map(() => call(on.bus, lane, `lane ${i}`))))
  await Promise.all(many(100).map(() => call(on.bus, undefined, 'common')))
  await using _ = await startWorker(
    on,
    async (job) => {
      most = Math.max(most, ++now)
      order.push(codeOf(job))
      await delay(3)
      now--
      return completed()
    },
    { slots: 8 },
  )
  await until('all', () => order.length === 300 || undefined, 60_000)
  assert.ok(most <= 8, `${most} at once`)
  const early = order.slice(0, 150)
  const common = early.filter((code) => code === 'common').length
  assert.ok(common >= 40, `${common} of the common queue`)
  for (const [i] of lanes.entries()) {
    const mine = early.filter((code) => code === `lane ${i}`).length
    assert.ok(mine >= 2, `${mine} of lane ${i}`)
  }
})

test('lanes are found, changed and let go while runners run; what is queued survives all of it', async () => {
  await using on = await laneGround()
  const { seen, code } = counter(20)
  await using _ = await startWorker(on, code)

  // Queued before any runner knows the lane.
  const early = Lane.parse({
    lane: 'fn-live',
    isolation: 'isolate',
    function: 'live',
    concurrency: 1,
    rate: null,
  })
  await ensureLane(on.bus.jsm, on.topology, early)
  await Promise.all(many(5).map(() => call(on.bus, early)))
  await delay(300)
  assert.is(seen.ids.length, 0)
  const lane = await putLane(on, 'live', { concurrency: 1 })
  await until('the five', () => seen.ids.length === 5 || undefined)
  assert.is(seen.ids.length, 5)
  assert.is(seen.most, 1)

  // A larger bound holds for what is queued already; a smaller one for what starts from then on.
  await Promise.all(many(60).map(() => call(on.bus, lane)))
  await until('some', () => seen.ids.length >= 8 || undefined)
  await putLane(on, 'live', { concurrency: 4 })
  await until('four at once', () => seen.most === 4 || undefined)
  await putLane(on, 'live', { concurrency: 2 })
  await delay(200)
  seen.most = 0
  await until('more', () => seen.most > 0 || undefined)
  await untilEmpty(on.bus, lane)
  assert.ok(seen.most <= 2, `${seen.most} at once`)
  assert.is(seen.ids.length, 65)

  // Not removed while it has work; removed when it is empty; back when it is put again.
  const last = await call(on.bus, lane)
  await delay(5)
  const removed = await removeLane(on.bus.jsm, on.topology, lane)
  await untilEnd(on.bus, last)
  if (!removed) {
    await untilEmpty(on.bus, lane)
    assert.ok(await removeLane(on.bus.jsm, on.topology, lane))
  }
  await on.registry.removeLane(lane)
  await delay(500)
  const again = await putLane(on, 'live', { concurrency: 2 })
  const id = await call(on.bus, again)
  await untilEnd(on.bus, id)
})

test('a retry in its backoff keeps its place: nothing overtakes it beyond the limit', async () => {
  await using on = await laneGround()
  const lane = await putLane(on, 'retried', { concurrency: 1 })
  const order: string[] = []
  await using _ = await startWorker(on, (job) => {
    order.push(`${codeOf(job)} ${job.attempt}`)
    return codeOf(job) === 'first' && job.attempt < 3 ? failed('internal') : completed()
  })
  const first = await call(on.bus, lane, 'first')
  const second = await call(on.bus, lane, 'second')
  await untilEnded(on.bus, [first, second])
  assert.equal(order, ['first 1', 'first 2', 'first 3', 'second 1'])
  await untilEmpty(on.bus, lane)
})

test('limits that go and come back while work is queued lose nothing, and what was queued under them keeps them', async () => {
  await using on = await laneGround()
  const lane = await putLane(on, 'switched', { concurrency: 2 })
  const seen = { lane: 0, most: 0, common: 0 }
  await using _ = await startWorker(
    on,
    async (job) => {
      if (codeOf(job) === 'lane') seen.most = Math.max(seen.most, ++seen.lane)
      else seen.common++
      await delay(30)
      if (codeOf(job) === 'lane') seen.lane--
      return completed()
    },
    { slots: 16 },
  )
  const before = await Promise.all(many(20).map(() => call(on.bus, lane, 'lane')))
  // The version without limits: its calls go to the common queue and wait for nobody.
  const without = await Promise.all(many(20).map(() => call(on.bus, undefined, 'common')))
  const after = await Promise.all(many(20).map(() => call(on.bus, lane, 'lane')))
  await untilEnded(on.bus, without)
  assert.ok((await left(on.bus, lane)) > 0, 'the lane is still at work')
  await untilEnded(on.bus, [...before, ...after])
  assert.is(seen.most, 2)
  assert.is(seen.common, 20)
  await untilEmpty(on.bus, lane)
})

test('a rate that is raised holds at once for what waits', async () => {
  await using on = await laneGround()
  await putLane(on, 'raised', { rate: { limit: 1, per_s: 3_600, burst: 1 } })
  const { seen, code } = counter(1)
  await using _ = await startWorker(on, code)
  const lane = await putLane(on, 'raised', { rate: { limit: 1, per_s: 3_600, burst: 1 } })
  const ids = await Promise.all(many(20).map(() => call(on.bus, lane)))
  await until('the first', () => seen.ids.length === 1 || undefined)
  await delay(300)
  assert.is(seen.ids.length, 1)
  await putLane(on, 'raised', { rate: { limit: 100, per_s: 1, burst: 1 } })
  await untilEnded(on.bus, ids)
  await untilEmpty(on.bus, lane)
})

test('a lane’s consumer that is made anew delivers what was not acknowledged, and nothing runs twice at once', async () => {
  await using on = await laneGround()
  const lane = await putLane(on, 'anew', { concurrency: 3 })
  const { seen, code } = counter(50)
  await using _ = await startWorker(on, code)
  const ids = await Promise.all(many(20).map(() => call(on.bus, lane)))
  await until('some', () => seen.ids.length >= 3 || undefined)
  await recreateConsumer(on.bus.jsm, on.topology, lane)
  await untilEnded(on.bus, ids)
  assert.is(seen.ids.length, 20)
  assert.equal(new Set(seen.ids), new Set(ids))
})

test('a lane whose queue is not empty is not removed', async () => {
  await using on = await laneGround()
  const lane = await putLane(on, 'full', { concurrency: 1 })
  const id = await call(on.bus, lane)
  await until('the queued message', async () => (await left(on.bus, lane)) === 1 || undefined)
  assert.not(await removeLane(on.bus.jsm, on.topology, lane))
  await using _ = await startWorker(on, () => completed())
  await untilEnd(on.bus, id)
  await untilEmpty(on.bus, lane)
  assert.ok(await removeLane(on.bus.jsm, on.topology, lane))
  assert.ok(await removeLane(on.bus.jsm, on.topology, lane), 'again')
})

test('with a rate, what waits for its turn is handed back when the runner stops, and runs elsewhere', async () => {
  await using on = await laneGround()
  const lane = await putLane(on, 'turns', { rate: { limit: 20, per_s: 1, burst: 1 } })
  const { seen, code } = counter(1)
  const first = await startWorker(on, code)
  const ids = await Promise.all(many(30).map(() => call(on.bus, lane)))
  await until('some', () => seen.ids.length >= 5 || undefined)
  await first.stop()
  await first[Symbol.asyncDispose]()
  assert.ok(seen.ids.length < 30)
  await using _ = await startWorker(on, code)
  await untilEnded(on.bus, ids)
  assert.equal(new Set(seen.ids), new Set(ids))
})

test('the server is killed and restarted under lanes: all ends, the limit holds', async () => {
  await using on = await laneGround({ ackWaitMs: 3_000 })
  const lane = await putLane(on, 'restart', { concurrency: 4 })
  const { seen, code } = counter(20)
  await using _ = await startWorker(on, code)
  const ids = await Promise.all(many(80).map(() => call(on.bus, lane)))
  await until('some', () => seen.ids.length > 10 || undefined)
  await on.nats.restart()
  await on.bus.whenConnected()
  for (const id of ids) await untilEnd(on.bus, id)
  assert.ok(seen.most <= 4, `${seen.most} at once`)
})

test.run()
