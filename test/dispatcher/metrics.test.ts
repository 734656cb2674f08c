// timeout: 120
import { rm } from 'node:fs/promises'
import { join } from 'node:path'
import { createClient } from '@libsql/client'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { Dispatcher } from '../../dispatcher/dispatcher.ts'
import { SuccessWindow } from '../../dispatcher/success.ts'
import type { Heartbeat } from '../../shared/backends.ts'
import { makeEvent } from '../../shared/events.ts'
import type { Lane } from '../../shared/functions.ts'
import { MetricsGatherer } from '../../shared/metrics-answer.ts'
import { Registry } from '../../shared/registry.ts'
import { acceptedSubject, eventSubject, lateSubject, runnerSubject } from '../../shared/subjects.ts'
import { ensureLane, TopologyOptions, WORK } from '../../shared/topology.ts'
import { scrape, sumOf } from '../metrics-page.ts'
import { checkMetrics, findPrometheus } from '../prometheus.ts'
import { folded, makeWorld, origin, until, type World } from './support.ts'

const traceId = '4bf92f3577b34da6a3ce929d0e0e4736'
const ref = { name: 'double', version: 'v0123456789abcdef', ref: 'live' }

/** On the world’s database, and following both streams: what is published from now on is new to it. */
async function following(world: World, options: Parameters<World['dispatcher']>[0] = {}) {
  const dispatcher = await world.dispatcher(options)
  const { events, logs } = dispatcher.live
  await until('streams followed', () => events.lag !== undefined && logs.lag !== undefined)
  return dispatcher
}

const total = async (dispatcher: Dispatcher, name: string, labels: Record<string, string> = {}) =>
  sumOf(await scrape(dispatcher.url), name, labels) ?? 0

test('what is recorded of workloads is counted by isolation and function', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const dispatcher = await following(world, { id: 'dispatcher-1' })
  publish.origin = { ...origin, traceparent: `00-${traceId}-00f067aa0ba902b7-01` }
  await publish.run()
  const called = await publish.accepted({ function: ref })
  await publish.started(called)
  await publish.retrying(called)
  await publish.started(called, 2)
  await publish.logs(called, 2, ['one', 'two'], { attempt: 2, dropped: 3 })
  await publish.ended(called, 'failed', { attempt: 2, cause: 'timeout', duration_ms: 2_500 })
  const killed = await publish.accepted()
  const never = { attempt: 0, runner: null, started_at: null, duration_ms: null, cause: 'killed' as const }
  await publish.ended(killed, 'killed', never)
  const late = { attempt: 1, runner: 'r', status: 'completed' as const, cause: null }
  await bus.js.publish(lateSubject(called), JSON.stringify(makeEvent('late', called, 1, late, origin)))
  const illegal = makeEvent('started', called, 3, { attempt: 3, runner: 'r' }, origin)
  await bus.js.publish(eventSubject(called, 'started'), JSON.stringify(illegal))
  await bus.js.publish(`vulcan.events.${called}.failed`, 'no event')
  await folded(dispatcher, bus)

  const page = await scrape(dispatcher.url)
  const sum = (name: string, labels: Record<string, string> = {}) => sumOf(page, name, labels) ?? 0
  const plain = { isolation: 'isolate', function: '' }
  const double = { isolation: 'isolate', function: 'double' }
  const ends = 'vulcan_ends_total'
  assert.is(sum(ends), 3)
  assert.is(sum(ends, { ...plain, status: 'completed', cause: '' }), 1)
  assert.is(sum(ends, { ...plain, status: 'killed', cause: 'killed' }), 1)
  assert.is(sum(ends, { ...double, status: 'failed', cause: 'timeout' }), 1)
  assert.is(sum('vulcan_retries_total', { ...double, cause: 'runner_lost' }), 1)
  assert.is(sum('vulcan_queue_wait_seconds_count'), 2, 'first attempts')
  assert.ok(Math.abs(sum('vulcan_queue_wait_seconds_sum', double) - 0.01) < 1e-9)
  assert.is(sum('vulcan_run_duration_seconds_count'), 2, 'what never ran has no duration')
  assert.is(sum('vulcan_run_duration_seconds_sum', double), 2.5)
  assert.is(sum('vulcan_run_duration_seconds_bucket', { ...double, le: '1' }), 0)
  assert.is(sum('vulcan_run_duration_seconds_bucket', { ...double, le: '2.5' }), 1)
  assert.is(sum('vulcan_success_ratio', plain), 1, 'a kill is neither')
  assert.is(sum('vulcan_success_ratio', double), 0)
  assert.is(sum('vulcan_late_events_total', { status: 'completed' }), 1)
  const events = { stream: 'VULCAN_EVENTS' }
  assert.is(sum('vulcan_refused_messages_total', { ...events, reason: 'invalid' }), 1)
  assert.is(sum('vulcan_refused_messages_total', { ...events, reason: 'started after failed' }), 1)
  assert.is(sum('vulcan_stored_log_lines_total'), 2)
  assert.is(sum('vulcan_stored_log_lines_dropped_total', { by: 'runner' }), 3)
  assert.is(sum('vulcan_log_batches_missing_total'), 1)
  assert.is(sum('vulcan_fold_batch_messages_sum', events), 13)
  assert.ok(sum('vulcan_fold_delay_seconds_count', events) > 0)
  assert.ok(sum('vulcan_fold_plan_seconds_count', events) > 0)
  assert.ok(sum('vulcan_database_seconds_count', { operation: 'fold events' }) > 0)
  assert.ok(sum('vulcan_database_seconds_sum', { operation: 'fold logs' }) > 0)
  assert.ok(sum('vulcan_database_bytes') > 4_096)
  assert.is(sum('vulcan_stream_messages', events), 13)
  assert.ok(sum('vulcan_stream_bytes', events) > 1_000)
  assert.is(sum('vulcan_stream_max_bytes', events), 8_192 * 1_048_576)
  for (const part of ['bus', 'database', 'fold']) assert.is(sum('vulcan_dispatcher_ready', { part }), 1, part)
  assert.is(sum('vulcan_process_restarts_total'), 0)
  for (const series of page) {
    assert.is(series.labels.service, 'vulcan-dispatcher')
    assert.is(series.labels.process, 'dispatcher-1')
  }

  const before = await total(dispatcher, 'vulcan_database_seconds_count', { operation: 'read' })
  await fetch(`${dispatcher.url}/v1/workloads`)
  assert.ok((await total(dispatcher, 'vulcan_database_seconds_count', { operation: 'read' })) > before)

  const open = await fetch(`${dispatcher.url}/metrics`, {
    headers: { accept: 'application/openmetrics-text' },
  })
  assert.match(open.headers.get('content-type') ?? '', /^application\/openmetrics-text/)
  const text = await open.text()
  assert.match(text, new RegExp(`vulcan_run_duration_seconds_bucket.*# \\{trace_id="${traceId}"\\} 2\\.5`))
  assert.match(text, new RegExp(`vulcan_queue_wait_seconds_bucket.*# \\{trace_id="${traceId}"\\} 0\\.01`))

  const gathered = await new MetricsGatherer(bus, 'test', () => ['dispatcher-1']).gather()
  assert.equal(gathered.answered, ['dispatcher-1'])
  assert.ok(gathered.families.some(({ name }) => name === ends))
})

test('the page is as Prometheus wants it', async () => {
  const prometheus = await findPrometheus().catch((error: Error) => {
    console.log(`# SKIP promtool: ${error.message}`)
  })
  if (prometheus === undefined) return
  await using world = await makeWorld()
  const { publish, bus } = world
  const dispatcher = await following(world)
  await publish.run()
  bus.send(runnerSubject('r'), JSON.stringify(heartbeat('r')))
  await folded(dispatcher, bus)
  await until('the runner', () => total(dispatcher, 'vulcan_runner_up'))
  assert.is(await checkMetrics(prometheus, await (await fetch(`${dispatcher.url}/metrics`)).text()), '')
})

test('nothing is counted twice: not by a restart, a redelivery, a new database or a second dispatcher', async () => {
  await using world = await makeWorld()
  const { publish, bus, dir, databaseUrl } = world
  const counted = async (...dispatchers: Dispatcher[]) => {
    const sums = { ends: 0, lines: 0, invalid: 0 }
    for (const dispatcher of dispatchers) {
      sums.ends += await total(dispatcher, 'vulcan_ends_total')
      sums.lines += await total(dispatcher, 'vulcan_stored_log_lines_total')
      sums.invalid += await total(dispatcher, 'vulcan_refused_messages_total')
    }
    return sums
  }
  const some = async (n: number) => {
    for (let i = 0; i < n; i++) {
      const id = await publish.run()
      await publish.logs(id, 1, ['line'])
      await bus.js.publish(`vulcan.events.${id}.nonsense`, '{}')
    }
  }
  const of = (n: number) => ({ ends: n, lines: n, invalid: n })

  const first = await following(world)
  await some(5)
  await folded(first, bus)
  assert.equal(await counted(first), of(5))
  // The same end and the same lines once more, as after an acknowledgement that was lost.
  const id = [...publish.last.keys()][0]!
  const end = await bus.lastEvent(id)
  assert.is((await bus.publishEvent(acceptedSubject(id, 'isolate'), end!.event, 0)).stored, false)
  await publish.logs(id, 1, ['line'])
  await folded(first, bus)
  assert.equal(await counted(first), of(5))

  // Made anew while it runs: the old is folded again, and what is new meanwhile counts.
  await rm(join(dir, 'vulcan.db'))
  await some(3)
  await until('the loss noticed', () => first.live.database === undefined || first.live.events.seq === 0)
  await folded(first, bus)
  assert.equal(await counted(first), of(8))

  // Stopped, while others go on publishing, and started again.
  await first[Symbol.asyncDispose]()
  await some(2)
  const second = await following(world)
  await folded(second, bus)
  assert.equal(await counted(second), of(2))
  await second[Symbol.asyncDispose]()

  // Made anew before a start, and killed in the middle of folding it all again.
  for (const ending of ['', '-wal', '-shm']) await rm(join(dir, `vulcan.db${ending}`), { force: true })
  const third = await following(world)
  await folded(third, bus)
  assert.equal(await counted(third), of(0))
  await third[Symbol.asyncDispose]()
  const client = createClient({ url: databaseUrl })
  const { rows } = await client.execute(`SELECT seq FROM checkpoints WHERE stream = 'VULCAN_EVENTS'`)
  const { timestamp } = (await bus.jsm.streams.getMessage('VULCAN_EVENTS', { seq: 7 }))!
  await client.execute({
    sql: `UPDATE checkpoints SET seq = 7, at = ? WHERE stream = 'VULCAN_EVENTS'`,
    args: [Date.parse(timestamp)],
  })
  client.close()
  const fourth = await following(world)
  await folded(fourth, bus)
  assert.is(fourth.live.events.seq, Number(rows[0]!.seq))
  assert.equal(await counted(fourth), of(0))

  // Each event by one of them, whoever is first.
  const fifth = await following(world)
  await Promise.all([some(20), some(20)])
  await folded(fourth, bus)
  await folded(fifth, bus)
  assert.equal(await counted(fourth, fifth), of(40))
})

const laneOf = (name: string): Lane => ({
  lane: `fn-${name}`,
  isolation: 'isolate',
  function: name,
  concurrency: 1,
  rate: null,
})

test('how full the queues are, and how old, is what the server says', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const lane = laneOf('narrow')
  const registry = await Registry.open(bus, 1)
  await ensureLane(bus.jsm, TopologyOptions.parse({}), lane)
  await registry.putLane(lane)
  const dispatcher = await following(world)
  const read = async (name: string, labels: Record<string, string>) =>
    sumOf(await scrape(dispatcher.url), name, labels)
  const common = { isolation: 'isolate', function: '' }
  const narrow = { isolation: 'isolate', function: 'narrow' }
  await until('the lane', async () => (await read('vulcan_queue_depth', narrow)) === 0)
  assert.is(await read('vulcan_queue_oldest_age_seconds', common), 0)
  assert.is(await read('vulcan_queue_depth', { isolation: 'microvm', function: '' }), 0)

  for (let i = 0; i < 3; i++) await publish.accepted()
  const inLane = makeEvent(
    'accepted',
    await publish.accepted(),
    0,
    (await bus.acceptedEvent([...publish.last.keys()][0]!))!.event.data as never,
    origin,
  )
  await bus.js.publish(
    `vulcan.events.${inLane.subject}x.accepted.isolate.${lane.lane}`,
    JSON.stringify(inLane),
  )
  await until('4 of them', async () => (await read('vulcan_queue_depth', common)) === 4)
  await until('1 in the lane', async () => (await read('vulcan_queue_depth', narrow)) === 1)
  await until('time', async () => (await read('vulcan_queue_oldest_age_seconds', common))! > 0.5)
  assert.ok((await read('vulcan_queue_oldest_age_seconds', narrow))! > 0)

  const consumer = await bus.js.consumers.get(WORK, 'isolate')
  const first = (await consumer.next({ expires: 5_000 }))!
  await until('delivered', async () => (await read('vulcan_queue_delivered', common)) === 1)
  assert.is(await read('vulcan_queue_depth', common), 3)
  first.nak()
  const all = []
  while (all.length < 4) all.push((await consumer.next({ expires: 5_000 }))!)
  assert.is(all.filter(({ info }) => info.deliveryCount === 2).length, 1)
  await until('redelivered', async () => (await read('vulcan_queue_redelivered', common)) === 1)
  assert.is(await read('vulcan_queue_delivered', common), 4)
  for (const message of all) message.ack()
  await until('empty', async () => (await read('vulcan_queue_delivered', common)) === 0)
  assert.is(await read('vulcan_queue_depth', common), 0)
  assert.is(await read('vulcan_queue_oldest_age_seconds', common), 0)
  registry.close()
})

test('while the database takes no writes the lag of the fold grows, and is gone afterwards', async () => {
  await using world = await makeWorld()
  const { publish, bus, databaseUrl } = world
  const dispatcher = await following(world)
  await publish.run()
  await folded(dispatcher, bus)
  const events = { stream: 'VULCAN_EVENTS' }
  const lag = async () => sumOf(await scrape(dispatcher.url), 'vulcan_fold_lag_seconds', events)
  await until('no lag', async () => (await lag()) === 0)
  const other = createClient({ url: databaseUrl })
  const lock = await other.transaction('write')
  await publish.run()
  await until('a lag', async () => (await lag())! > 1)
  assert.ok((await total(dispatcher, 'vulcan_fold_lag_messages', events)) >= 3)
  assert.is(await total(dispatcher, 'vulcan_dispatcher_ready', { part: 'database' }), 0)
  assert.ok((await total(dispatcher, 'vulcan_database_failures_total', { operation: 'fold events' })) > 0)
  await lock.rollback()
  other.close()
  await until('no lag', async () => (await lag()) === 0)
  assert.is(await total(dispatcher, 'vulcan_dispatcher_ready', { part: 'database' }), 1)
  assert.is(await total(dispatcher, 'vulcan_ends_total'), 2)
})

test('without the bus the page is answered all the same', async () => {
  await using world = await makeWorld()
  const { publish, bus, nats } = world
  const dispatcher = await following(world)
  await publish.run()
  await folded(dispatcher, bus)
  await nats.kill()
  await until(
    'unready',
    async () => (await total(dispatcher, 'vulcan_dispatcher_ready', { part: 'bus' })) === 0,
  )
  assert.is(await total(dispatcher, 'vulcan_ends_total'), 1)
})

const heartbeat = (runner: string, over: Partial<Heartbeat> = {}): Heartbeat => ({
  runner,
  isolation: 'gvisor',
  available: true,
  reason: null,
  fix: null,
  capabilities: null,
  slots: 4,
  active: 3,
  metrics: {},
  metrics_url: null,
  host: 'here',
  pid: 1,
  started_at: new Date().toISOString(),
  leaving: false,
  ...over,
})

test('runners are up while they are heard, and forgotten when they say that they leave', async () => {
  await using world = await makeWorld()
  const { bus } = world
  const dispatcher = await following(world, { lostAfterMs: 1_000 })
  const read = async (name: string, runner: string) =>
    sumOf(await scrape(dispatcher.url), name, { runner, isolation: 'gvisor', host: 'here' })
  const say = (beat: Heartbeat) => bus.send(runnerSubject(beat.runner), JSON.stringify(beat))
  let alive = true
  const timer = setInterval(() => alive && say(heartbeat('silent')), 100)
  say(heartbeat('bare', { available: false, slots: 0, active: 0 }))
  say(heartbeat('leaving'))
  try {
    await until('up', async () => (await read('vulcan_runner_up', 'silent')) === 1)
    assert.is(await read('vulcan_runner_available', 'silent'), 1)
    assert.is(await read('vulcan_runner_available', 'bare'), 0)
    assert.is(await read('vulcan_runner_slots', 'silent'), 4)
    assert.is(await read('vulcan_runner_active', 'silent'), 3)
    assert.is(typeof (await read('vulcan_runner_up', 'leaving')), 'number')
    say(heartbeat('leaving', { leaving: true }))
    await until('gone', async () => (await read('vulcan_runner_up', 'leaving')) === undefined)
    alive = false
    await until('down', async () => (await read('vulcan_runner_up', 'silent')) === 0)
    assert.ok((await read('vulcan_runner_silent_seconds', 'silent'))! >= 1)
  } finally {
    clearInterval(timer)
  }
})

test('the success of five minutes is forgotten half a minute at a time', () => {
  const window = new SuccessWindow()
  const minute = 60_000
  const ratio = (now: number) => [...window.ratios(now)].map(([value]) => value)
  assert.equal(ratio(0), [])
  window.add('isolate', 'f', true, 0)
  window.add('isolate', 'f', false, 2 * minute)
  window.add('isolate', 'f', false, 2 * minute)
  window.add('isolate', 'f', true, 4 * minute)
  assert.equal(ratio(4.9 * minute), [0.5])
  assert.equal(ratio(5.1 * minute), [1 / 3], 'the first is out')
  assert.equal(ratio(4 * minute), [1 / 3], 'a clock that was set back brings nothing back')
  assert.equal(ratio(7.1 * minute), [1])
  assert.equal(ratio(60 * minute), [])
  window.add('isolate', 'f', true, 60 * minute)
  window.add('gvisor', 'f', false, 60 * minute)
  assert.equal(
    [...window.ratios(60 * minute)],
    [
      [1, 'isolate', 'f'],
      [0, 'gvisor', 'f'],
    ],
  )
})

test.run()
