import { rm } from 'node:fs/promises'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { eventSchemas, type LifecycleEvent, makeEvent } from '../../shared/events.ts'
import { newWorkloadId } from '../../shared/ids.ts'
import { fold, toWorkload, type WorkloadRecord } from '../../shared/lifecycle.ts'
import { eventSubject, lateSubject, lifecycleSubjects } from '../../shared/subjects.ts'
import { EVENTS } from '../../shared/topology.ts'
import { dump, endOf, folded, getJson, makeWorld, origin, until, type World } from './support.ts'

/** The record as the lifecycle’s own fold has it, straight from the stream. */
async function expected({ bus }: World, id: string): Promise<WorkloadRecord> {
  let record: WorkloadRecord | undefined
  for (let seq = 1; ; ) {
    const stored = await bus.jsm.streams
      .getMessage(EVENTS, { seq, next_by_subj: lifecycleSubjects(id) } as unknown as { seq: number })
      .catch(() => null)
    if (stored === null) return record!
    const kind = stored.subject.split('.')[3] as keyof typeof eventSchemas
    const parsed = eventSchemas[kind].safeParse(stored.json())
    if (parsed.success) {
      const folded = fold(record, parsed.data as LifecycleEvent, stored.seq)
      if ('record' in folded) record = folded.record
    }
    seq = stored.seq + 1
  }
}

test('events become the record that the lifecycle folds, whole and exact', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const dispatcher = await world.dispatcher()
  const a = await publish.run({ labels: { team: 'a', 'x/y': 'ü"\'' }, input: { x: [1, null, 'é'] } })
  const b = await publish.accepted()
  await publish.started(b)
  await publish.retrying(b)
  await publish.started(b, 2, 'isolate-2')
  const c = await publish.accepted()
  await publish.ended(c, 'killed', {
    attempt: 0,
    runner: null,
    started_at: null,
    cause: 'killed',
    output: null,
  })
  await folded(dispatcher, bus)
  for (const id of [a, b, c]) {
    const record = await expected(world, id)
    const internal = await getJson(`${dispatcher.url}/internal/workloads/${id}`)
    assert.equal(internal.body, JSON.parse(JSON.stringify(record)))
    const shown = await getJson(`${dispatcher.url}/v1/workloads/${id}`)
    assert.is(shown.status, 200)
    assert.equal(shown.body, JSON.parse(JSON.stringify(toWorkload(record))))
  }
})

test('what is delivered twice, refused or garbage changes no row, and is counted once', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const dispatcher = await world.dispatcher()
  const id = await publish.run()
  const before = await expected(world, id)
  const raw = (subject: string, body: string | object) =>
    bus.js.publish(subject, typeof body === 'string' ? body : JSON.stringify(body))
  const again = makeEvent('failed', id, 1, endOf({ cause: 'internal', output: null }), origin)
  await raw(eventSubject(id, 'failed'), again)
  await raw(eventSubject(id, 'started'), makeEvent('started', id, 2, { attempt: 2, runner: 'r' }, origin))
  const stranger = newWorkloadId()
  await raw(
    eventSubject(stranger, 'started'),
    makeEvent('started', stranger, 1, { attempt: 1, runner: 'r' }, origin),
  )
  await raw(`vulcan.events.${id}.completed`, 'not json')
  await raw(`vulcan.events.${id}.nonsense`, '{}')
  await raw('vulcan.events.x', new TextDecoder().decode(new Uint8Array([0xff, 0])))
  await raw(`vulcan.events.${stranger}.failed`, again)
  await raw(`vulcan.events.${id}.failed`, { ...again, time: 'yesterday' })
  const late = makeEvent('late', id, 1, { attempt: 1, runner: 'r', status: 'completed', cause: null }, origin)
  await raw(lateSubject(id), late)
  await raw(lateSubject(id), { ...late, data: 3 })
  await raw(`vulcan.logs.${id}`, '[[[')
  await raw(`vulcan.logs.${id}`, { ...late, type: 'vulcan.workload.log' })
  const after = await publish.run()
  await folded(dispatcher, bus)

  assert.equal(
    (await getJson(`${dispatcher.url}/internal/workloads/${id}`)).body,
    JSON.parse(JSON.stringify(before)),
  )
  assert.is((await getJson(`${dispatcher.url}/v1/workloads/${after}`)).body.status, 'completed')
  assert.is((await getJson(`${dispatcher.url}/v1/workloads/${stranger}`)).status, 404)
  const stats = (await getJson(`${dispatcher.url}/v1/stats`)).body
  assert.equal(stats.illegal, {
    total: 3,
    by_move: { 'failed after completed': 1, 'started after completed': 1, 'started without accepted': 1 },
  })
  assert.equal(stats.late, { total: 1, by_status: { completed: 1 } })
  assert.is(stats.invalid, 8)
})

test('what comes behind an end in the same batch is refused and counted, and leaves its record alone', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const id = await publish.run({ labels: { team: 'a' } }, { output: { deep: [1, { é: null }] } })
  const record = await expected(world, id)
  const again = makeEvent('failed', id, 1, endOf({ cause: 'internal', output: null }), origin)
  await bus.js.publish(eventSubject(id, 'failed'), JSON.stringify(again))
  const accepted = (await bus.acceptedEvent(id))!
  await bus.js.publish(`vulcan.events.${id}.accepted.isolate.w1`, JSON.stringify(accepted.event))
  const dispatcher = await world.dispatcher()
  await folded(dispatcher, bus)
  const { body } = await getJson(`${dispatcher.url}/internal/workloads/${id}`)
  assert.equal(body, JSON.parse(JSON.stringify(record)))
  assert.equal((await getJson(`${dispatcher.url}/v1/stats`)).body.illegal.by_move, {
    'accepted after completed': 1,
    'failed after completed': 1,
  })
  const labelled = await getJson(`${dispatcher.url}/v1/workloads?label=team=a`)
  assert.is(labelled.body.workloads.length, 1)
})

test('a second accepted event on another subject of the workload is refused, also after a restart', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const first = await world.dispatcher()
  const id = await publish.run()
  await folded(first, bus)
  await first[Symbol.asyncDispose]()
  const second = await world.dispatcher()
  const accepted = (await bus.acceptedEvent(id))!
  await bus.js.publish(`vulcan.events.${id}.accepted.isolate.w1`, JSON.stringify(accepted.event))
  await folded(second, bus)
  assert.is((await getJson(`${second.url}/v1/workloads/${id}`)).body.status, 'completed')
  assert.equal((await getJson(`${second.url}/v1/stats`)).body.illegal.by_move, {
    'accepted after completed': 1,
  })
})

/** Some of everything: ends, retries, labels, logs with gaps, refused and invalid messages. */
async function mixture({ publish, bus }: World, n: number): Promise<void> {
  await Promise.all(
    Array.from({ length: n }, async (_, i) => {
      const id = await publish.accepted({}, { spec: { labels: { n: String(i % 7) } } })
      if (i % 5 === 0) return
      await publish.started(id)
      await publish.logs(id, 1, ['one', 'two'])
      if (i % 3 === 0) await publish.logs(id, 3, ['four'], { dropped: 2 })
      if (i % 4 === 0) {
        await publish.retrying(id)
        await publish.started(id, 2)
        await publish.logs(id, 1, ['again'], { attempt: 2 })
      }
      if (i % 2 === 0) await publish.ended(id)
      if (i % 6 === 0) await bus.js.publish(`vulcan.events.${id}.started`, '{}')
    }),
  )
}

test('a deleted database is rebuilt completely: while running, and before a start', async () => {
  await using world = await makeWorld()
  const { bus, dir, databaseUrl } = world
  const first = await world.dispatcher()
  await mixture(world, 120)
  await folded(first, bus)
  const before = await dump(databaseUrl)
  assert.is(before.workloads!.length, 120)
  assert.ok(before.log_batches!.length > 100)
  assert.is(before.counters!.length > 0, true)

  await rm(join(dir, 'vulcan.db'))
  await until('the loss noticed', () => first.live.database === undefined || first.live.events.seq === 0)
  await folded(first, bus)
  assert.equal(await dump(databaseUrl), before)
  await until('ready again', async () => (await fetch(`${first.url}/readyz`)).status === 200)

  await first[Symbol.asyncDispose]()
  for (const end of ['', '-wal', '-shm']) await rm(join(dir, `vulcan.db${end}`), { force: true })
  const second = await world.dispatcher()
  await folded(second, bus)
  assert.equal(await dump(databaseUrl), before)
})

test('a damaged database file is moved aside and rebuilt', async () => {
  await using world = await makeWorld()
  const { publish, bus, dir } = world
  const { writeFile } = await import('node:fs/promises')
  const id = await publish.run()
  await writeFile(
    join(dir, 'vulcan.db'),
    'this is no database, but long enough to be taken for one'.repeat(100),
  )
  const dispatcher = await world.dispatcher()
  await folded(dispatcher, bus)
  assert.is((await getJson(`${dispatcher.url}/v1/workloads/${id}`)).status, 200)
})

test('two dispatchers on one database do no harm', async () => {
  await using world = await makeWorld()
  const { bus, databaseUrl } = world
  const one = await world.dispatcher()
  const two = await world.dispatcher()
  await mixture(world, 150)
  await folded(one, bus)
  await folded(two, bus)
  const both = await dump(databaseUrl)
  await using alone = await makeAlone(world)
  assert.equal(await dump(alone.databaseUrl), both)
})

/** The same streams, folded by one dispatcher into a database of its own. */
async function makeAlone(world: World) {
  const databaseUrl = `${world.databaseUrl}.alone`
  const dispatcher = await world.dispatcher({ databaseUrl })
  await folded(dispatcher, world.bus)
  return { databaseUrl, [Symbol.asyncDispose]: () => dispatcher[Symbol.asyncDispose]() }
}

test('a stream that was made anew is folded from its first message, and nothing of the old one stays', async () => {
  await using world = await makeWorld()
  const { publish, bus, databaseUrl } = world
  const dispatcher = await world.dispatcher()
  for (let i = 0; i < 20; i++) await publish.run()
  await folded(dispatcher, bus)
  await bus.jsm.streams.delete(EVENTS)
  await until('the stream is back', async () => bus.jsm.streams.info(EVENTS).catch(() => undefined), 30_000)
  publish.last.clear()
  const id = await publish.run()
  await until('the new workload folded', async () => (await dump(databaseUrl)).workloads!.length === 1)
  assert.is((await getJson(`${dispatcher.url}/v1/workloads/${id}`)).body.status, 'completed')
})

test.run()
