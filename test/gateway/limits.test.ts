// timeout: 120
import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { retryAfter, roomFor } from '../../gateway/lanes.ts'
import { type FunctionSpec, lanesOf } from '../../shared/functions.ts'
import { ensureLane, laneConsumer, WORK } from '../../shared/topology.ts'
import { type Code, completed } from '../runners/support.ts'
import { until } from '../shared/support.ts'
import { deploy } from './functions.ts'
import { call, type Site, site } from './support.ts'

/** Deploys with its lane, in the order of a real deploy. */
async function limited(here: Site, name: string, spec: Partial<FunctionSpec>) {
  const { gateway, on } = here
  const version = await deploy(gateway, name, { spec })
  const record = gateway.registry.get(name)!.record
  const [lane] = lanesOf(record, () => version)
  if (lane === undefined) return undefined
  await ensureLane(on.bus.jsm, on.topology, lane)
  await gateway.registry.putLane(lane)
  return lane
}

const invoke = (here: Site, name: string) =>
  call(here.gateway, 'POST', `/v1/functions/${name}/invocations`, { body: {} })
const invokeAsync = (here: Site, name: string) =>
  call(here.gateway, 'POST', `/v1/functions/${name}/invocations/async`, { body: {} })

const statuses = (answers: { status: number }[]) => {
  const counts: Record<number, number> = {}
  for (const { status } of answers) counts[status] = (counts[status] ?? 0) + 1
  return counts
}

/** Code that goes on until it is let. */
function held() {
  const seen = { now: 0, most: 0, ended: 0 }
  const gate = Promise.withResolvers<void>()
  const code: Code = async () => {
    seen.most = Math.max(seen.most, ++seen.now)
    await gate.promise
    seen.now--
    seen.ended++
    return completed(1)
  }
  return { seen, code, open: () => gate.resolve() }
}

test('room is what may wait and what can start, without what waits', () => {
  const count = { pending: 0, out: 0, delivered: 0, due: Number.POSITIVE_INFINITY }
  assert.is(roomFor(0, 5, count), 5)
  assert.is(roomFor(0, 5, { ...count, out: 5 }), 0)
  assert.is(roomFor(10, 5, { ...count, out: 5, pending: 4 }), 6)
  assert.is(roomFor(10, 5, { ...count, out: 7, pending: 12 }), -2)
  assert.is(roomFor(3, null, { ...count, due: 2 }), 5)
  assert.is(roomFor(3, null, { ...count, due: 0, pending: 1 }), 2)
  assert.is(roomFor(0, 5, { ...count, due: 1 }), 1)
  assert.is(roomFor(0, null, count), 16)
  assert.is(roomFor(2, null, { ...count, pending: 2 }), 0)
})

test('the time to wait is that in which those refused could be taken', () => {
  assert.is(retryAfter(1, 1_000), 1)
  assert.is(retryAfter(50, 10), 5)
  assert.is(retryAfter(0, 0.5), 2)
  assert.is(retryAfter(10_000, 1), 60)
  assert.is(retryAfter(1, 0), 15)
})

test('of 200 calls at once as many run and wait as may; the others are told when to come again', async () => {
  const { seen, code, open } = held()
  await using here = await site({ code, slots: 64 })
  await limited(here, 'busy', { concurrency: 4, queue_limit: 20 })
  const calls = Array.from({ length: 200 }, () => invoke(here, 'busy'))
  const refused: Awaited<(typeof calls)[number]>[] = []
  for (const one of calls) void one.then((answer) => answer.status === 429 && refused.push(answer))
  await until('the refusals', () => refused.length === 176 || undefined)
  await delay(200)
  assert.is(refused.length, 176)
  assert.is(seen.now, 4)
  for (const { headers, body } of refused) {
    assert.is((body as { code: string }).code, 'queue_full')
    const wait = Number(headers.get('retry-after'))
    assert.ok(Number.isInteger(wait) && wait >= 1 && wait <= 60, String(wait))
  }
  open()
  assert.equal(statuses(await Promise.all(calls)), { 200: 24, 429: 176 })
  assert.is(seen.most, 4)
  assert.is((await invoke(here, 'busy')).status, 200)
})

test('a queue limit of 0 lets through what can run at once and refuses the rest', async () => {
  const { seen, code, open } = held()
  await using here = await site({ code })
  await limited(here, 'none', { concurrency: 2, queue_limit: 0 })
  const first = invoke(here, 'none')
  await until('the first', () => seen.now === 1 || undefined)
  const second = invoke(here, 'none')
  await until('the second', () => seen.now === 2 || undefined)
  assert.is((await invoke(here, 'none')).status, 429)
  assert.is((await invokeAsync(here, 'none')).status, 429)
  open()
  assert.equal(statuses(await Promise.all([first, second])), { 200: 2 })
  const again = await invoke(here, 'none')
  assert.is(again.status, 200)
})

test('one after the other passes a queue limit of 0', async () => {
  await using here = await site({ code: () => completed(1) })
  await limited(here, 'alone', { concurrency: 1, queue_limit: 0 })
  for (let i = 0; i < 20; i++) {
    const { status } = await invoke(here, 'alone')
    assert.is(status, 200, `call ${i}`)
  }
})

test('with only a rate, what is not due waits and counts', async () => {
  await using here = await site({ code: () => completed(1) })
  await limited(here, 'rated', { rate: { limit: 1, per_s: 600, burst: 3 }, queue_limit: 5 })
  const answers = await Promise.all(Array.from({ length: 30 }, () => invokeAsync(here, 'rated')))
  const counts = statuses(answers)
  // Three start. While they take their turns, as many more may seem to be able to.
  assert.ok(counts[202]! >= 8 && counts[202]! <= 11, JSON.stringify(counts))
  assert.is(counts[429], 30 - counts[202]!)
})

test('with only a queue limit the queue counts as soon as the runners are full', async () => {
  const { seen, code, open } = held()
  await using here = await site({ code, slots: 4 })
  const lane = await limited(here, 'plain', { queue_limit: 6 })
  assert.is(lane?.concurrency, null)
  const calls = Array.from({ length: 4 }, () => invoke(here, 'plain'))
  for (const one of calls) one.catch(() => {})
  await until('full', () => seen.now === 4 || undefined)
  let status = 202
  for (let i = 0; i < 30 && status === 202; i++) {
    ;({ status } = await invokeAsync(here, 'plain'))
    await until('it is counted', async () => {
      const info = await here.on.bus.jsm.consumers.info(WORK, laneConsumer(lane!))
      return info.num_pending + info.num_ack_pending >= Math.min(4 + i + 1, 10) || undefined
    })
    await delay(20)
  }
  assert.is(status, 429)
  const { num_pending } = await here.on.bus.jsm.consumers.info(WORK, laneConsumer(lane!))
  assert.ok(num_pending >= 5 && num_pending <= 7, String(num_pending))
  open()
  for (const answer of await Promise.all(calls)) assert.is(answer.status, 200)
})

test('a function without a queue limit is never refused', async () => {
  await using here = await site({ code: () => completed(1) })
  await limited(here, 'open', { concurrency: 1 })
  const answers = await Promise.all(Array.from({ length: 100 }, () => invoke(here, 'open')))
  assert.equal(statuses(answers), { 200: 100 })
})

test.run()
