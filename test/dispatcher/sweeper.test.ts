import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { lostRunners, runnerLostEvent } from '../../dispatcher/sweeper.ts'
import { type Look, stuckSince } from '../../dispatcher/watchdog.ts'
import type { Heartbeat } from '../../shared/backends.ts'
import { runnerSubject } from '../../shared/subjects.ts'
import { recreateConsumer, TopologyOptions, WORK } from '../../shared/topology.ts'
import { folded, getJson, makeWorld, origin, until } from './support.ts'

test('a runner is lost only when it would have been heard all that time', () => {
  const lost = (heard: number | undefined, listeningSince: number, now: number) =>
    lostRunners(
      ['r'],
      { heardAt: new Map(heard === undefined ? [] : [['r', heard]]), listeningSince },
      now,
      15,
    ).length === 1
  assert.is(lost(100, 0, 115), false)
  assert.is(lost(100, 0, 116), true)
  assert.is(lost(100, 110, 120), false, 'listening for less than that')
  assert.is(lost(100, 110, 126), true)
  assert.is(lost(undefined, 0, 1_000), false, 'never looked for before')
})

test('a lost runner’s workload is retried while attempts are left, else it has failed', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const dispatcher = await world.dispatcher()
  const id = await publish.accepted({}, { spec: { retry: { max_attempts: 2 } } })
  await publish.started(id)
  await folded(dispatcher, bus)
  const { body: record } = await getJson(`${dispatcher.url}/internal/workloads/${id}`)
  const retry = runnerLostEvent(record, origin, 0, () => 1)
  assert.is(retry.type, 'vulcan.workload.retrying')
  assert.equal((retry.data as { not_before: string }).not_before, '1970-01-01T00:00:00.250Z')
  const end = runnerLostEvent({ ...record, attempts: 2 }, origin, 0)
  assert.is(end.type, 'vulcan.workload.failed')
  assert.is(end.data.cause, 'runner_lost')
  assert.is(end.data.attempt, 2)
})

const heartbeat = (runner: string): Heartbeat => ({
  runner,
  isolation: 'isolate',
  available: true,
  reason: null,
  fix: null,
  capabilities: null,
  slots: 4,
  active: 1,
  metrics: {},
  metrics_url: null,
  host: 'h',
  pid: 1,
  started_at: new Date().toISOString(),
  leaving: false,
})

test('what a silent runner had is ended or put back; what a living one has goes on', async () => {
  await using world = await makeWorld()
  const { publish, bus, nats } = world
  const dispatcher = await world.dispatcher({ lostAfterMs: 1_500, sweepMs: 200 })
  const timer = setInterval(() => bus.send(runnerSubject('alive'), JSON.stringify(heartbeat('alive'))), 200)
  try {
    const spent = await publish.accepted({}, { spec: { retry: { max_attempts: 1 } } })
    const left = await publish.accepted()
    const going = await publish.accepted()
    await publish.started(spent, 1, 'gone')
    await publish.started(left, 1, 'gone')
    await publish.started(going, 1, 'alive')
    const get = async (id: string) => (await getJson(`${dispatcher.url}/v1/workloads/${id}`)).body
    // A break of the connection counts as not having listened.
    await delay(1_000)
    await nats.restart()
    await until('the end', async () => (await get(spent))?.status === 'failed')
    const ended = await get(spent)
    assert.is(ended.cause, 'runner_lost')
    assert.match(ended.error.message, /gone/)
    const back = await until('the retry', async () => {
      const workload = await get(left)
      return workload.status === 'pending' && workload
    })
    assert.is(back.cause, 'runner_lost')
    assert.is((await get(going)).status, 'running')
    await delay(2_000)
    assert.is((await get(going)).status, 'running')
  } finally {
    clearInterval(timer)
  }
})

test('what is no event behind the start of a lost runner’s workload does not keep it from its end', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const dispatcher = await world.dispatcher({ lostAfterMs: 800, sweepMs: 200 })
  const id = await publish.accepted({}, { spec: { retry: { max_attempts: 1 } } })
  await publish.started(id, 1, 'gone')
  await bus.js.publish(`vulcan.events.${id}.completed`, 'nonsense')
  await until('the end', async () => {
    const { status, body } = await getJson(`${dispatcher.url}/v1/workloads/${id}`)
    return status === 200 && body.status === 'failed' && body.cause === 'runner_lost'
  })
})

test('a consumer counts as stuck while it delivers nothing that is asked for', () => {
  const look: Look = { pending: 5, waiting: 2, delivered: 7, wanted: true }
  assert.is(stuckSince(undefined, look, 10), undefined)
  assert.is(stuckSince({ look, since: undefined }, look, 10), 10)
  assert.is(stuckSince({ look, since: 10 }, look, 50), 10)
  assert.is(stuckSince({ look, since: 10 }, { ...look, delivered: 8 }, 50), undefined)
  assert.is(stuckSince({ look, since: 10 }, { ...look, pending: 0 }, 50), undefined)
  assert.is(stuckSince({ look, since: 10 }, { ...look, waiting: 0 }, 50), undefined)
  assert.is(stuckSince({ look, since: 10 }, { ...look, wanted: false }, 50), undefined)
})

test('a consumer made anew delivers everything that was not acknowledged', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const ids = [await publish.accepted(), await publish.accepted()]
  await until('queued', async () => (await bus.jsm.consumers.info(WORK, 'isolate')).num_pending === 2)
  const consumer = await bus.js.consumers.get(WORK, 'isolate')
  const taken = await consumer.next({ expires: 2_000 })
  assert.ok(taken?.subject.endsWith(ids[0]!))
  await recreateConsumer(bus.jsm, TopologyOptions.parse({}), 'isolate')
  assert.is((await bus.jsm.consumers.info(WORK, 'isolate')).num_pending, 2)
})

test.run()
