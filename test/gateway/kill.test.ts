// timeout: 170
import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { kill } from '../../gateway/kill.ts'
import { type AcceptedEvent, isEnd } from '../../shared/events.ts'
import { newWorkloadId } from '../../shared/ids.ts'
import { begin, finish, fold, toWorkload, type WorkloadRecord } from '../../shared/lifecycle.ts'
import { lateSubject } from '../../shared/subjects.ts'
import { EVENTS } from '../../shared/topology.ts'
import { codeOf, completed, failed, startWorker, untilStopped } from '../runners/support.ts'
import { ground, history, kindsOf, origin, seeded, submit, until, untilEnd } from '../shared/support.ts'

const alive = () => false
const gone = () => true

test('killing a pending workload stores the end at once; it never starts', async () => {
  await using on = await ground()
  const { id } = await submit(on.bus)
  const end = await kill(on.bus, id, alive, origin)
  assert.is(end!.type, 'vulcan.workload.killed')
  assert.is(end!.data.attempt, 0)
  await using worker = await startWorker(on, () => completed())
  const other = await submit(on.bus)
  await untilEnd(on.bus, other.id)
  assert.equal(
    worker.runner.ran.map((job) => job.id),
    [other.id],
  )
})

test('killing what has ended gives the end that stands', async () => {
  await using on = await ground()
  await using _ = await startWorker(on, () => completed(1))
  const { id } = await submit(on.bus)
  await untilEnd(on.bus, id)
  assert.is((await kill(on.bus, id, alive, origin))!.type, 'vulcan.workload.completed')
})

test('killing what was never accepted gives nothing', async () => {
  await using on = await ground()
  assert.is(await kill(on.bus, newWorkloadId(), alive, origin), undefined)
})

test('killing what waits for its next attempt ends it; the attempt never comes', async () => {
  await using on = await ground()
  await using worker = await startWorker(on, () => {
    throw new Error('a bug in the runner')
  })
  const { id } = await submit(on.bus, { retry: { max_attempts: 20 } })
  await until('the retry', async () => kindsOf(await history(on.bus, id)).includes('retrying') || undefined)
  const end = await kill(on.bus, id, alive, origin)
  assert.is(end!.type, 'vulcan.workload.killed')
  const ran = worker.runner.ran.length
  await delay(1_500)
  assert.is(worker.runner.ran.length, ran)
})

test('a kill between two attempts tells of the one before: when it started, how long it ran, where', async () => {
  await using on = await ground()
  await using worker = await startWorker(on, async () => {
    await delay(50)
    return failed('backend_unavailable')
  })
  const { id } = await submit(on.bus, { retry: { max_attempts: 20 } })
  const events = await until('the second retry', async () => {
    const events = await history(on.bus, id)
    return events.length === 5 ? events : undefined
  })
  const end = (await kill(on.bus, id, alive, origin))!
  const all = await history(on.bus, id)
  const started = all.findLast(({ event }) => event.type === 'vulcan.workload.started')!.event
  assert.is(end.data.started_at, started.time)
  assert.is(end.data.runner, worker.id)
  assert.ok(end.data.attempt >= 2)
  assert.ok(end.data.duration_ms! >= 40)

  // The fold says of the workload what the one who killed it was answered.
  let record: WorkloadRecord | undefined
  for (const { event, seq } of all) {
    const folded = fold(record, event, seq)
    assert.ok('record' in folded)
    record = folded.record
  }
  const accepted = events[0]!.event as AcceptedEvent
  const answered = finish(begin(accepted, events[0]!.seq), end, all.at(-1)!.seq)
  assert.equal(toWorkload(record!), toWorkload(answered))
  assert.ok(record!.queue_ms! > 0)
})

test('a running workload whose runner is gone is ended by the kill itself', async () => {
  await using on = await ground({ ackWaitMs: 60_000 })
  await using worker = await startWorker(on, (_, signal) => untilStopped(signal))
  const { id } = await submit(on.bus)
  await until('the start', () => worker.runner.ran.length === 1 || undefined)
  await worker.die()
  const end = await kill(on.bus, id, gone, origin)
  assert.is(end!.type, 'vulcan.workload.killed')
  assert.is(end!.data.runner, worker.id)
})

test('a runner that is told and then dies does not keep the kill waiting', async () => {
  await using on = await ground({ ackWaitMs: 60_000 })
  let told = false
  await using worker = await startWorker(on, async (_, signal) => {
    await untilStopped(signal)
    told = true
    await new Promise(() => {})
    return completed()
  })
  const { id } = await submit(on.bus)
  await until('the start', () => worker.runner.ran.length === 1 || undefined)
  const killing = kill(on.bus, id, () => told && !worker.bus.connected, origin)
  await until('the message', () => told || undefined)
  await worker.die()
  assert.is((await killing)!.type, 'vulcan.workload.killed')
})

/** Seeded, and printed where it fails. */
const seed = Number(process.env.VULCAN_SEED ?? Date.now() % 1_000_000)

test('kill against start, 150 times: one end each, and no code after a stored kill', async () => {
  await using on = await ground()
  const random = seeded(seed)
  const ranAt = new Map<string, number>()
  await using _ = await startWorker(on, async (job, signal) => {
    ranAt.set(job.id, (await on.bus.lastEvent(job.id))!.seq)
    return await untilStopped(signal)
  })
  const ends: Record<string, number> = {}
  for (let i = 0; i < 150; i++) {
    const { id } = await submit(on.bus)
    await delay(random() * 3)
    const end = await kill(on.bus, id, alive, origin)
    assert.is(end!.type, 'vulcan.workload.killed', `seed ${seed}, round ${i}`)
    const events = await history(on.bus, id)
    assert.is(events.filter(({ event }) => isEnd(event)).length, 1, `seed ${seed}, round ${i}`)
    const kinds = kindsOf(events).join()
    ends[kinds] = (ends[kinds] ?? 0) + 1
    // What the code saw when it began: it was started, and not yet killed.
    const at = ranAt.get(id)
    if (at !== undefined) assert.is(at, events[1]!.seq, `seed ${seed}, round ${i}: ${kinds}`)
    if (kinds === 'accepted,killed') assert.is(at, undefined, `seed ${seed}, round ${i}`)
  }
  assert.is(
    (ends['accepted,killed'] ?? 0) + (ends['accepted,started,killed'] ?? 0),
    150,
    `seed ${seed}: ${JSON.stringify(ends)}`,
  )
})

test('kill against completion, 150 times: one end each, the same for everybody, nothing after it', async () => {
  await using on = await ground()
  const random = seeded(seed + 1)
  await using _ = await startWorker(on, async (job, signal) => {
    const ms = Number(codeOf(job))
    await Promise.race([delay(ms), untilStopped(signal)])
    return signal.aborted ? await untilStopped(signal) : completed(ms)
  })
  const ends = new Set<string>()
  for (let i = 0; i < 150; i++) {
    const { id } = await submit(on.bus, { code: String(random() * 4) })
    await delay(random() * 8)
    const killers = await Promise.all([kill(on.bus, id, alive, origin), kill(on.bus, id, alive, origin)])
    const recorded = await untilEnd(on.bus, id)
    for (const end of killers) assert.equal(end, recorded, `seed ${seed}, round ${i}`)
    const events = await history(on.bus, id)
    assert.is(events.filter(({ event }) => isEnd(event)).length, 1, `seed ${seed}, round ${i}`)
    assert.ok(isEnd(events.at(-1)!.event), `seed ${seed}, round ${i}`)
    assert.is(await on.bus.lastSequence(EVENTS, lateSubject(id)), 0, `seed ${seed}, round ${i}`)
    ends.add(recorded.type)
  }
  assert.ok(ends.has('vulcan.workload.completed') && ends.has('vulcan.workload.killed'), [...ends].join())
})

test('a kill waits through a restart of the server', async () => {
  await using on = await ground()
  const { id } = await submit(on.bus)
  const killing = until('the kill', () => kill(on.bus, id, alive, origin).catch(() => undefined))
  await on.nats.restart()
  assert.is((await killing).type, 'vulcan.workload.killed')
  assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'killed'])
})

test.run()
