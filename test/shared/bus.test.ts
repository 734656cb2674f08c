// timeout: 120
import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Bus } from '../../shared/bus.ts'
import { BusUnavailable, MessageTooLarge, StreamFull } from '../../shared/errors.ts'
import { type LifecycleEvent, makeEvent } from '../../shared/events.ts'
import { newWorkloadId } from '../../shared/ids.ts'
import { acceptedSubject, eventSubject, logSubject } from '../../shared/subjects.ts'
import { EVENTS, ensureTopology, LOGS, TopologyOptions } from '../../shared/topology.ts'
import { startNats } from '../nats.ts'
import { acceptedEvent, fill, ground, history, kindsOf, origin, submit, until } from './support.ts'

const started = (id: string, attempt = 1, source = origin.source): LifecycleEvent =>
  makeEvent('started', id, attempt, { attempt, runner: 'r1' }, { source })

const killed = (id: string, source = origin.source): LifecycleEvent =>
  makeEvent(
    'killed',
    id,
    '0.kill',
    {
      attempt: 0,
      runner: null,
      started_at: null,
      duration_ms: null,
      cause: 'killed',
      error: null,
      output: null,
      output_blob: null,
      exit_code: null,
      logs: null,
      receipt: null,
    },
    { source },
  )

async function rejection(promise: Promise<unknown>): Promise<Error> {
  try {
    await promise
  } catch (error) {
    return error as Error
  }
  throw new Error('it did not reject')
}

test('the first accepted event is stored, a second is refused and the first one stands', async () => {
  await using on = await ground()
  const first = acceptedEvent()
  const second = acceptedEvent({ code: 'export default () => 2' }, first.subject)
  const subject = acceptedSubject(first.subject, 'isolate')
  const stored = await on.bus.publishEvent(subject, first, 0)
  assert.ok(stored.stored)
  assert.equal(await on.bus.publishEvent(subject, second, 0), { stored: false })
  const last = await on.bus.lastEvent(first.subject)
  assert.equal(last, { event: first, seq: stored.seq })
  assert.equal(await on.bus.acceptedEvent(first.subject), last)
})

test('accepted under another isolation is refused as well', async () => {
  await using on = await ground()
  const event = acceptedEvent()
  assert.ok((await on.bus.publishEvent(acceptedSubject(event.subject, 'isolate'), event, 0)).stored)
  assert.not((await on.bus.publishEvent(acceptedSubject(event.subject, 'gvisor'), event, 0)).stored)
})

test('of fifty that publish from the same sequence exactly one is stored', async () => {
  await using on = await ground()
  const { id, seq } = await submit(on.bus)
  const results = await Promise.all(
    Array.from({ length: 50 }, (_, i) =>
      i % 2 === 0
        ? on.bus.publishEvent(eventSubject(id, 'started'), started(id, 1, `/r/${i}`), seq)
        : on.bus.publishEvent(eventSubject(id, 'killed'), killed(id, `/g/${i}`), seq),
    ),
  )
  assert.is(results.filter(({ stored }) => stored).length, 1)
  assert.is((await history(on.bus, id)).length, 2)
})

test('lastEvent follows every step while acceptedEvent stays; an unknown workload has neither', async () => {
  await using on = await ground()
  const { id, seq } = await submit(on.bus)
  const stored = await on.bus.settleEvent(eventSubject(id, 'started'), started(id), seq)
  assert.is((await on.bus.lastEvent(id))!.event.type, 'vulcan.workload.started')
  assert.is((await on.bus.lastEvent(id))!.seq, stored.stored && stored.seq)
  assert.is((await on.bus.acceptedEvent(id))!.seq, seq)
  assert.is(await on.bus.lastEvent(newWorkloadId()), undefined)
  assert.is(await on.bus.acceptedEvent(newWorkloadId()), undefined)
  assert.is(await on.bus.lastSequence(EVENTS, 'vulcan.events.>'), stored.stored && stored.seq)
  assert.is(await on.bus.lastSequence(EVENTS, 'vulcan.late.none'), 0)
})

test('settling what another has overtaken tells what stands', async () => {
  await using on = await ground()
  const { id, seq } = await submit(on.bus)
  await on.bus.settleEvent(eventSubject(id, 'killed'), killed(id), seq)
  const settled = await on.bus.settleEvent(eventSubject(id, 'started'), started(id), seq)
  assert.not(settled.stored)
  assert.is(settled.stored === false && settled.last?.event.type, 'vulcan.workload.killed')
})

for (const garbage of ['nonsense', '{}', '{"type":"vulcan.workload.completed"}'])
  test(`what is no event (${garbage}) moves no workload: settling goes through behind it`, async () => {
    await using on = await ground()
    const { id, seq } = await submit(on.bus)
    const { seq: place } = await on.bus.js.publish(eventSubject(id, 'completed'), garbage)
    assert.is((await on.bus.lastEvent(id))!.event.type, 'vulcan.workload.accepted')
    assert.is((await on.bus.lastEvent(id))!.seq, place, 'what the next publish must expect')
    assert.is((await on.bus.acceptedEvent(id))!.seq, seq)
    const stored = await on.bus.settleEvent(eventSubject(id, 'started'), started(id), seq)
    assert.ok(stored.stored)
    assert.is((await on.bus.startedEvent(id))!.seq, stored.seq)

    await on.bus.js.publish(`vulcan.events.${id}.nonsense`, garbage)
    const end = killed(id)
    const first = await on.bus.settleEvent(eventSubject(id, 'killed'), end, stored.seq)
    assert.ok(first.stored)
    await on.bus.js.publish(eventSubject(id, 'killed'), garbage)
    assert.ok(
      (await on.bus.settleEvent(eventSubject(id, 'killed'), end, stored.seq)).stored,
      'the same again',
    )
    const late = await on.bus.settleEvent(eventSubject(id, 'started'), started(id, 2), stored.seq)
    assert.is(late.stored === false && late.last?.event.type, 'vulcan.workload.killed')
  })

test('an event on another workload’s or kind’s subject is none', async () => {
  await using on = await ground()
  const one = await submit(on.bus)
  const other = await submit(on.bus)
  await on.bus.js.publish(eventSubject(one.id, 'killed'), JSON.stringify(killed(other.id)))
  await on.bus.js.publish(eventSubject(one.id, 'failed'), JSON.stringify(killed(one.id)))
  assert.is((await on.bus.lastEvent(one.id))!.event.type, 'vulcan.workload.accepted')
})

test('where nothing but what is no event is left, there is no last event, and settling from 0 goes through', async () => {
  await using on = await ground()
  const { id, seq } = await submit(on.bus)
  await on.bus.jsm.streams.purge(EVENTS)
  await on.bus.js.publish(eventSubject(id, 'started'), 'nonsense')
  assert.is(await on.bus.lastEvent(id), undefined)
  assert.is(await on.bus.acceptedEvent(id), undefined)
  assert.ok((await on.bus.settleEvent(eventSubject(id, 'killed'), killed(id), 0)).stored)
  await on.bus.jsm.streams.purge(EVENTS)
  assert.equal(await on.bus.settleEvent(eventSubject(id, 'started'), started(id), seq), {
    stored: false,
    last: undefined,
  })
})

test('settling the same event again says that it is stored, where it is', async () => {
  await using on = await ground()
  const { id, seq } = await submit(on.bus)
  const event = started(id)
  const first = await on.bus.settleEvent(eventSubject(id, 'started'), event, seq)
  assert.equal(await on.bus.settleEvent(eventSubject(id, 'started'), event, seq), first)
  assert.is((await history(on.bus, id)).length, 2)
})

test('the same step of another process is not taken for ours', async () => {
  await using on = await ground()
  const { id, seq } = await submit(on.bus)
  await on.bus.settleEvent(eventSubject(id, 'started'), started(id, 1, '/r/a'), seq)
  const settled = await on.bus.settleEvent(eventSubject(id, 'started'), started(id, 1, '/r/b'), seq)
  assert.not(settled.stored)
})

test('events are settled through SIGKILLs of the server, each exactly once', async () => {
  await using on = await ground()
  const work = await Promise.all(Array.from({ length: 40 }, () => submit(on.bus)))
  for (let round = 0; round < 3; round++) {
    const attempt = round + 1
    const settled = Promise.all(
      work.map(async (one) => {
        const event = started(one.id, attempt)
        const stored = await on.bus.settleEvent(eventSubject(one.id, 'started'), event, one.seq)
        assert.ok(stored.stored)
        one.seq = stored.seq
      }),
    )
    await on.nats.restart()
    await settled
  }
  for (const { id } of work)
    assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'started', 'started', 'started'])
})

test('settling while the server is down waits for it and goes through at its return', async () => {
  await using on = await ground()
  const { id, seq } = await submit(on.bus)
  await on.nats.kill()
  await until('the loss', () => !on.bus.connected || undefined)
  const settling = on.bus.settleEvent(eventSubject(id, 'started'), started(id), seq)
  await on.nats.restart()
  assert.ok((await settling).stored)
  assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'started'])
})

test('what was on its way when the connection broke is told so without waiting for an acknowledgement', async () => {
  await using on = await ground()
  const event = acceptedEvent()
  process.kill(on.nats.pid, 'SIGSTOP')
  const publishing = rejection(on.bus.publishEvent(acceptedSubject(event.subject, 'isolate'), event, 0))
  await delay(50)
  await on.nats.kill()
  const outcome = await Promise.race([publishing, delay(3_000, 'still waiting')])
  assert.instance(outcome, BusUnavailable)
})

test('settling is given up by its signal while the server is down', async () => {
  await using on = await ground()
  const { id, seq } = await submit(on.bus)
  await on.nats.kill()
  await until('the loss', () => !on.bus.connected || undefined)
  const stop = new AbortController()
  const settling = on.bus.settleEvent(eventSubject(id, 'started'), started(id), seq, stop.signal)
  stop.abort(new Error('enough'))
  assert.match((await rejection(settling)).message, 'enough')
})

test('a full stream that may not drop the old says StreamFull, and settling goes through once there is room', async () => {
  await using on = await ground()
  const { id, seq } = await submit(on.bus)
  const { config } = await on.bus.jsm.streams.info(EVENTS)
  await on.bus.jsm.streams.update(EVENTS, { ...config, max_bytes: 4_096, discard: 'new' } as typeof config)
  const big = acceptedEvent({ input: 'x'.repeat(8_000) })
  const error = await rejection(on.bus.publishEvent(acceptedSubject(big.subject, 'isolate'), big, 0))
  assert.instance(error, StreamFull)
  assert.is(await on.bus.lastEvent(big.subject), undefined)

  const { state } = await on.bus.jsm.streams.info(EVENTS)
  await on.bus.jsm.streams.update(EVENTS, {
    ...config,
    max_bytes: state.bytes,
    discard: 'new',
  } as typeof config)
  const settling = on.bus.settleEvent(eventSubject(id, 'started'), started(id), seq)
  await delay(300)
  assert.is((await history(on.bus, id)).length, 1)
  await on.bus.jsm.streams.update(EVENTS, config)
  assert.ok((await settling).stored)
})

test('settling gives up after the time for which there may be no room, not before', async () => {
  await using on = await ground()
  const { id, seq } = await submit(on.bus)
  const undo = await fill(on.bus, EVENTS)
  const begun = performance.now()
  const error = await rejection(
    on.bus.settleEvent(eventSubject(id, 'started'), started(id), seq, undefined, 500),
  )
  assert.instance(error, StreamFull)
  assert.ok(performance.now() - begun >= 490)
  await undo()
  assert.ok((await on.bus.settleEvent(eventSubject(id, 'started'), started(id), seq, undefined, 0)).stored)
})

test('what is published soon leaves by itself in order, together, or with the next flush', async () => {
  await using on = await ground()
  const got: string[] = []
  on.bus.listen('test.*', (message) => got.push(message.string()))
  await on.bus.flush()
  for (let i = 0; i < 10; i++) on.bus.publishSoon('test.x', String(i))
  on.bus.publish('test.x', 'now')
  await until('all', () => got.length === 11 || undefined)
  assert.equal(got, ['now', ...Array.from({ length: 10 }, (_, i) => String(i))])
  on.bus.publishSoon('test.x', 'flushed')
  await on.bus.flush()
  assert.is(got.at(-1), 'flushed')
})

test('what is larger than a message is refused by itself; what was published beside it arrives', async () => {
  await using on = await ground()
  const huge = acceptedEvent({ input: 'ü'.repeat(600_000) })
  const [error, small] = await Promise.all([
    rejection(on.bus.publishEvent(acceptedSubject(huge.subject, 'isolate'), huge, 0)),
    submit(on.bus),
  ])
  assert.instance(error, MessageTooLarge)
  assert.instance(
    await rejection(on.bus.settleEvent(acceptedSubject(huge.subject, 'isolate'), huge, 0)),
    MessageTooLarge,
  )
  assert.ok(await on.bus.lastEvent(small.id))
  await submit(on.bus)
})

test('without the stream a publish is BusUnavailable', async () => {
  await using nats = await startNats()
  await using bus = await Bus.connect({ url: nats.url, name: 'test' })
  const event = acceptedEvent()
  const error = await rejection(bus.publishEvent(acceptedSubject(event.subject, 'isolate'), event, 0))
  assert.instance(error, BusUnavailable)
})

test('reading while the server is down is BusUnavailable, and works again at its return', async () => {
  await using on = await ground()
  const { id } = await submit(on.bus)
  await on.nats.kill()
  await until('the loss', () => !on.bus.connected || undefined)
  assert.type(on.bus.disconnectedAt, 'number')
  assert.instance(await rejection(on.bus.lastEvent(id)), BusUnavailable)
  assert.instance(await rejection(on.bus.lastSequence(EVENTS, 'vulcan.events.>')), BusUnavailable)
  await on.nats.restart()
  await on.bus.whenConnected()
  assert.is(on.bus.disconnectedAt, undefined)
  await until('a read', () => on.bus.lastEvent(id).catch(() => undefined))
})

test('whenConnected resolves at once, on return, or rejects by its signal', async () => {
  await using on = await ground()
  await on.bus.whenConnected()
  await on.bus.whenConnected(AbortSignal.abort(new Error('unused')))
  await on.nats.kill()
  await until('the loss', () => !on.bus.connected || undefined)
  assert.match(
    (await rejection(on.bus.whenConnected(AbortSignal.abort(new Error('before'))))).message,
    'before',
  )
  const stop = new AbortController()
  const waiting = on.bus.whenConnected(stop.signal)
  stop.abort(new Error('meanwhile'))
  assert.match((await rejection(waiting)).message, 'meanwhile')
  const returned = on.bus.whenConnected()
  await on.nats.restart()
  await returned
})

test('listeners hear each loss and return until they stop listening', async () => {
  await using on = await ground()
  const heard: boolean[] = []
  const stop = on.bus.onConnection((connected) => heard.push(connected))
  await on.nats.restart()
  await until('the return', () => heard.includes(true) || undefined)
  assert.equal(heard, [false, true])
  stop()
  await on.nats.restart()
  await on.bus.whenConnected()
  assert.equal(heard, [false, true])
})

test('connecting waits for a server that comes later, and is given up by its signal', async () => {
  await using nats = await startNats()
  await nats.kill()
  const given = rejection(Bus.connect({ url: nats.url, name: 'test' }, AbortSignal.timeout(300)))
  const connecting = Bus.connect({ url: nats.url, name: 'test' })
  assert.is((await given).name, 'TimeoutError')
  await nats.restart()
  await using bus = await connecting
  await ensureTopology(bus.jsm, TopologyOptions.parse({}))
  await submit(bus)
})

test('disposing delivers what was sent before', async () => {
  await using on = await ground()
  const got: string[] = []
  on.bus.listen('test.*', (message) => got.push(message.string()))
  await on.bus.flush()
  const other = await Bus.connect({ url: on.nats.url, name: 'other' })
  for (let i = 0; i < 100; i++) other.send('test.x', String(i))
  await other[Symbol.asyncDispose]()
  await until('all', () => got.length === 100 || undefined)
  assert.equal(
    got,
    Array.from({ length: 100 }, (_, i) => String(i)),
  )
})

for (const state of ['connected', 'down'] as const)
  test(`whatever waits when a bus is disposed is rejected, with the server ${state}`, async () => {
    await using on = await ground()
    const { id, seq } = await submit(on.bus)
    const other = await Bus.connect({ url: on.nats.url, name: 'other' })
    if (state === 'down') {
      await on.nats.kill()
      await until('the loss', () => !other.connected || undefined)
    }
    const event = acceptedEvent()
    const waiting = [
      rejection(other.publishEvent('vulcan.nobody.listens', event, 0)),
      rejection(other.settleEvent('vulcan.nobody.listens', started(id), seq)),
      ...(state === 'down' ? [rejection(other.whenConnected())] : []),
    ]
    await other[Symbol.asyncDispose]()
    for (const error of await Promise.all(waiting)) assert.instance(error, BusUnavailable)
    assert.instance(await rejection(other.publishEvent('vulcan.events.x.started', event, 0)), BusUnavailable)
    assert.instance(
      await rejection(other.settleEvent('vulcan.events.x.started', started(id), 0)),
      BusUnavailable,
    )
    other.send('test.x', 'into the void')
    await delay(20)
  })

test('a record with the same message id is stored once', async () => {
  await using on = await ground()
  const id = newWorkloadId()
  const batch = makeEvent('log', id, '1.1', { attempt: 1, n: 1, lines: [], dropped: 0 }, origin)
  const first = await on.bus.publishRecord(logSubject(id), batch, `${id}.1.log.1`)
  assert.is(await on.bus.publishRecord(logSubject(id), batch, `${id}.1.log.1`), first)
  assert.is((await on.bus.jsm.streams.info(LOGS)).state.messages, 1)
})

test('a question nobody answers is undefined, as is one while the server is down', async () => {
  await using on = await ground()
  assert.is(await on.bus.ask('vulcan.control.none', '{}', 200), undefined)
  on.bus.listen('vulcan.control.one', (message) => message.respond('yes'))
  assert.is(await on.bus.ask('vulcan.control.one', '{}', 2_000), 'yes')
  await on.nats.kill()
  await until('the loss', () => !on.bus.connected || undefined)
  assert.is(await on.bus.ask('vulcan.control.one', '{}', 200), undefined)
})

test.run()
