// timeout: 120
import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Bus } from '../../shared/bus.ts'
import { pullWork, type WorkMessage, type WorkPuller } from '../../shared/queue.ts'
import { ensureTopology, recreateConsumer, WORK } from '../../shared/topology.ts'
import { type Ground, ground, seeded, submit, until } from './support.ts'

const submitMany = async (bus: Bus, n: number) =>
  new Set((await Promise.all(Array.from({ length: n }, () => submit(bus)))).map(({ id }) => id))

/** A puller that holds what it gets, and counts. */
function holder(bus: Bus, slots: number) {
  const hand: WorkMessage[] = []
  const seen: WorkMessage[] = []
  let most = 0
  const puller = pullWork(bus, 'isolate', slots, (message) => {
    seen.push(message)
    hand.push(message)
    most = Math.max(most, hand.length)
  })
  return {
    hand,
    seen,
    puller,
    get most() {
      return most
    },
    /** Acknowledges the oldest in hand and frees its slot. */
    finish() {
      const message = hand.shift()
      message?.ack()
      if (message !== undefined) puller.release()
    },
  }
}

const empty = (bus: Bus) =>
  until('an empty queue', async () => {
    const info = await bus.jsm.streams.info(WORK).catch(() => undefined)
    return info?.state.messages === 0 || undefined
  })

test('no more come than there are slots; each release brings one more', async () => {
  await using on = await ground()
  const ids = await submitMany(on.bus, 12)
  const one = holder(on.bus, 4)
  await until('four', () => one.hand.length === 4 || undefined)
  await delay(300)
  assert.is(one.seen.length, 4)
  one.finish()
  await until('the fifth', () => one.seen.length === 5 || undefined)
  await delay(200)
  assert.is(one.seen.length, 5)
  while (one.seen.length < 12 || one.hand.length > 0) {
    one.finish()
    await delay(2)
  }
  assert.is(one.most, 4)
  assert.equal(new Set(one.seen.map(({ workload }) => workload)), ids)
  await empty(on.bus)
  await one.puller.stop()
})

test('work that comes while a pull is open is handed out at once', async () => {
  await using on = await ground()
  const one = holder(on.bus, 2)
  for (let i = 0; i < 5; i++) {
    const { id, seq } = await submit(on.bus)
    const message = await until('the message', () => one.hand[0])
    assert.is(message.workload, id)
    assert.is(message.acceptedSeq, seq)
    assert.is(message.deliveries, 1)
    assert.is(JSON.parse(message.body).subject, id)
    one.finish()
  }
  await one.puller.stop()
})

test('three pullers that compete share everything, none over its slots', async () => {
  await using on = await ground()
  const random = seeded(3)
  await using a = await Bus.connect({ url: on.nats.url, name: 'a' })
  await using b = await Bus.connect({ url: on.nats.url, name: 'b' })
  const holders = [holder(on.bus, 2), holder(a, 5), holder(b, 9)]
  const ids = await submitMany(on.bus, 300)
  await until('all', async () => {
    for (const one of holders) if (random() < 0.5) one.finish()
    return holders.reduce((sum, one) => sum + one.seen.length - one.hand.length, 0) === 300 || undefined
  })
  assert.ok(
    holders.every((one, i) => one.most <= [2, 5, 9][i]!),
    holders.map((one) => one.most).join(),
  )
  assert.ok(holders.every((one) => one.seen.length > 0))
  const seen = holders.flatMap((one) => one.seen.map(({ workload }) => workload))
  assert.is(seen.length, 300)
  assert.equal(new Set(seen), ids)
  for (const one of holders) await one.puller.stop()
})

test('a new connection does not bring more than there are slots', async () => {
  await using on = await ground()
  const one = holder(on.bus, 3)
  await delay(100)
  for (let i = 0; i < 3; i++) {
    const returned = new Promise<void>((resolve) => {
      const stop = on.bus.onConnection((connected) => {
        if (!connected) return
        stop()
        resolve()
      })
    })
    await on.bus.nc.reconnect()
    await returned
  }
  const ids = await submitMany(on.bus, 30)
  await until('three', () => one.hand.length === 3 || undefined)
  await delay(500)
  assert.is(one.most, 3)
  await until('the rest', async () => {
    one.finish()
    return one.seen.length - one.hand.length >= 30 || undefined
  })
  assert.is(one.most, 3)
  assert.equal(new Set(one.seen.map(({ workload }) => workload)), ids)
  await one.puller.stop()
})

test('acknowledgements go out by themselves within moments, in one write', async () => {
  await using on = await ground()
  await submitMany(on.bus, 20)
  const one = holder(on.bus, 20)
  await until('all', () => one.hand.length === 20 || undefined)
  const { outMsgs } = on.bus.nc.stats()
  for (const message of one.hand) message.ack()
  assert.is(on.bus.nc.stats().outMsgs, outMsgs, 'not at once')
  await delay(60)
  assert.ok(on.bus.nc.stats().outMsgs >= outMsgs + 20)
  await empty(on.bus)
  await one.puller.stop()
})

for (const last of ['a flush', 'disposing the bus'] as const)
  test(`an acknowledgement is sent by ${last} at the latest`, async () => {
    await using on = await ground({ ackWaitMs: 60_000 })
    await using other = await Bus.connect({ url: on.nats.url, name: 'other' })
    await submit(on.bus)
    const one = holder(other, 1)
    const message = await until('the message', () => one.hand[0])
    await one.puller.stop()
    message.ack()
    if (last === 'a flush') await other.flush()
    else await other[Symbol.asyncDispose]()
    const { num_ack_pending } = await on.bus.jsm.consumers.info(WORK, 'isolate')
    assert.is(num_ack_pending, 0)
  })

test('without a word it is delivered again after the ack wait, counted; with working() it is not', async () => {
  await using on = await ground({ ackWaitMs: 1_000 })
  await submit(on.bus)
  const silent = holder(on.bus, 4)
  await until('again', () => silent.seen.length === 2 || undefined)
  assert.equal(
    silent.seen.map(({ deliveries }) => deliveries),
    [1, 2],
  )
  const message = silent.seen[1]!
  for (let i = 0; i < 8; i++) {
    message.working()
    await delay(300)
  }
  assert.is(silent.seen.length, 2)
  message.ack()
  await empty(on.bus)
  await silent.puller.stop()
})

test('later brings it back after its delay, not before', async () => {
  await using on = await ground()
  await submit(on.bus)
  const one = holder(on.bus, 2)
  const message = await until('the first', () => one.hand.shift())
  const at = performance.now()
  message.later(700)
  one.puller.release()
  await until('the second', () => one.seen.length === 2 || undefined)
  assert.ok(performance.now() - at >= 690)
  assert.is(one.seen[1]!.deliveries, 2)
  await one.puller.stop()
})

test('a runner that is stopped hands back what is on its way, and takes nothing more', async () => {
  await using on = await ground()
  await using other = await Bus.connect({ url: on.nats.url, name: 'other' })
  const one = holder(on.bus, 50)
  await delay(100)
  const submitting = submitMany(other, 100)
  await until('some', () => one.seen.length > 5 || undefined)
  const stopping = one.puller.stop()
  const had = one.seen.length
  await stopping
  const ids = await submitting
  await delay(200)
  assert.is(one.seen.length, had)
  const next = holder(other, 100)
  await until(
    'the rest',
    () => new Set([...one.seen, ...next.seen].map((m) => m.workload)).size === 100 || undefined,
    8_000,
  )
  assert.equal(new Set([...one.seen, ...next.seen].map((m) => m.workload)), ids)
  assert.is(next.seen.length, 100 - had)
  await next.puller.stop()
})

test('work goes on after a SIGKILL and restart of the server, with what was in hand', async () => {
  await using on = await ground({ ackWaitMs: 1_500 })
  const done = new Set<string>()
  const one = holder(on.bus, 4)
  const ids = await submitMany(on.bus, 40)
  for (let i = 0; i < 3; i++) {
    await until('some', () => one.hand.length > 0 || undefined)
    await on.nats.restart()
    await on.bus.whenConnected()
    for (let n = 0; n < 3; n++) {
      for (const { workload } of one.hand) done.add(workload)
      one.finish()
    }
  }
  await until('all', () => {
    for (const { workload } of one.hand) done.add(workload)
    one.finish()
    return done.size === 40 || undefined
  })
  while (one.hand.length > 0) one.finish()
  assert.is(one.most <= 4, true)
  assert.equal(done, ids)
  await until('the end', async () => {
    one.finish()
    return (await on.bus.jsm.streams.info(WORK)).state.messages === 0 || undefined
  })
  await one.puller.stop()
})

test('a consumer that is deleted and made anew is pulled from again', async () => {
  await using on = await ground()
  const one = holder(on.bus, 4)
  await submit(on.bus)
  await until('the first', () => one.seen.length === 1 || undefined)
  one.finish()
  await empty(on.bus)
  await recreateConsumer(on.bus.jsm, on.topology, 'isolate')
  await submit(on.bus)
  await until('work from the new one', () => one.seen.length === 2 || undefined)
  one.finish()
  await empty(on.bus)

  await on.bus.jsm.consumers.delete(WORK, 'isolate')
  await delay(1_500)
  await ensureTopology(on.bus.jsm, on.topology)
  await submit(on.bus)
  await until('work from the third', () => one.seen.length === 3 || undefined)
  assert.is(one.most, 1)
  one.finish()
  await one.puller.stop()
})

test('what was delivered when its consumer was deleted is delivered again', async () => {
  await using on = await ground()
  const one = holder(on.bus, 4)
  const { id } = await submit(on.bus)
  await until('the first', () => one.seen.length === 1 || undefined)
  await recreateConsumer(on.bus.jsm, on.topology, 'isolate')
  await until('again', () => one.seen.length === 2 || undefined)
  assert.is(one.seen[1]!.workload, id)
  one.finish()
  await one.puller.stop()
})

test('stopping while the server is down settles', async () => {
  await using on = await ground()
  const pullers: WorkPuller[] = [holder(on.bus, 2).puller]
  await on.nats.kill()
  await until('the loss', () => !on.bus.connected || undefined)
  pullers.push(holder(on.bus, 2).puller)
  for (const puller of pullers) await puller.stop()
  await submitWhenBack(on)
})

/** The queue is whole after all that. */
async function submitWhenBack(on: Ground) {
  await on.nats.restart()
  await on.bus.whenConnected()
  const one = holder(on.bus, 1)
  await until('a submission', () => submit(on.bus).catch(() => undefined))
  await until('its message', () => one.hand.length === 1 || undefined)
  one.finish()
  await one.puller.stop()
}

test.run()
