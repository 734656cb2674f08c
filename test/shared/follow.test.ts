import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { Bus } from '../../shared/bus.ts'
import { Follower, type FollowOptions, type StoredMessage, StreamReplaced } from '../../shared/follow.ts'
import { EVENTS, ensureTopology } from '../../shared/topology.ts'
import { ground, submit, until } from './support.ts'

const start = { seq: 0, at: 0, created: null }
const follow = (bus: Bus, over: Partial<FollowOptions> = {}) =>
  new Follower(bus, {
    stream: EVENTS,
    place: start,
    batch: 500,
    lingerMs: 50,
    ensure: async () => {},
    ...over,
  })
const never = new AbortController().signal

test('what is stored comes once each, in order, in batches no larger than asked for, from the place on', async () => {
  await using on = await ground()
  for (let i = 0; i < 57; i++) await submit(on.bus)
  const got: StoredMessage[] = []
  {
    await using follower = follow(on.bus, { batch: 10 })
    while (got.length < 57) {
      const some = await follower.next(never)
      assert.ok(some.length >= 1 && some.length <= 10, String(some.length))
      got.push(...some)
    }
    assert.is(follower.behind, 0)
  }
  assert.equal(
    got.map(({ seq }) => seq),
    Array.from({ length: 57 }, (_, i) => i + 1),
  )
  const { seq, at } = got[29]!
  await using rest = follow(on.bus, { place: { seq, at, created: null } })
  assert.is((await rest.next(never))[0]!.seq, 31)
})

test('the first message waits for those stored in the linger after it, and they come as one batch', async () => {
  await using on = await ground()
  await using follower = follow(on.bus, { lingerMs: 400 })
  const batch = follower.next(never)
  await until('the stream', () => follower.created ?? undefined)
  const begun = performance.now()
  for (let i = 0; i < 5; i++) {
    await submit(on.bus)
    await delay(20)
  }
  assert.is((await batch).length, 5)
  const took = performance.now() - begun
  assert.ok(took >= 390 && took < 2_000, String(took))
})

test('a hurried follower hands out what has arrived at once', async () => {
  await using on = await ground()
  await using follower = follow(on.bus, { lingerMs: 20_000 })
  const batch = follower.next(never)
  await submit(on.bus)
  await until('the message', () => (follower.behind ?? 0) > 0 || undefined)
  const begun = performance.now()
  follower.hurry()
  assert.is((await batch).length, 1)
  assert.ok(performance.now() - begun < 1_000)
})

test('following goes on behind the last message when the consumer is deleted or the server crashes', async () => {
  await using on = await ground()
  await using follower = follow(on.bus)
  const seqs: number[] = []
  const take = async () => seqs.push(...(await follower.next(never)).map(({ seq }) => seq))
  await submit(on.bus)
  await take()
  for await (const { name } of on.bus.jsm.consumers.list(EVENTS))
    await on.bus.jsm.consumers.delete(EVENTS, name)
  await submit(on.bus)
  await take()
  await on.nats.restart()
  await on.bus.whenConnected()
  await until('a third', () => submit(on.bus).catch(() => undefined))
  await take()
  assert.equal(seqs, [1, 2, 3])
})

test('another stream under the same name is told, and waiting is given up by its signal', async () => {
  await using on = await ground()
  await submit(on.bus)
  const { created } = await on.bus.jsm.streams.info(EVENTS)
  await on.bus.jsm.streams.delete(EVENTS)
  await ensureTopology(on.bus.jsm, on.topology)
  await using replaced = follow(on.bus, { place: { seq: 1, at: 1, created } })
  const error = await replaced.next(never).catch((error) => error)
  assert.instance(error, StreamReplaced)
  await using waiting = follow(on.bus)
  const stop = new AbortController()
  const next = waiting.next(stop.signal).catch((error) => error)
  stop.abort(new Error('enough'))
  assert.is((await next).message, 'enough')
})

test.run()
