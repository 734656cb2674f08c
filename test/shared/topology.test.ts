// timeout: 120
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Bus } from '../../shared/bus.ts'
import { newWorkloadId } from '../../shared/ids.ts'
import { pullWork, type WorkMessage } from '../../shared/queue.ts'
import { acceptedSubject, eventSubject } from '../../shared/subjects.ts'
import { EVENTS, ensureTopology, LOGS, TopologyOptions, WORK, workConsumer } from '../../shared/topology.ts'
import { Isolation } from '../../shared/workload.ts'
import { startNats } from '../nats.ts'
import { acceptedEvent, bareEnd, ground, submit, until } from './support.ts'

const queued = async (bus: Bus) => (await bus.jsm.streams.info(WORK)).state.messages

test('five connections at once bring an empty server to its shape', async () => {
  await using scope = new AsyncDisposableStack()
  const nats = scope.use(await startNats())
  const buses = await Promise.all(
    [1, 2, 3, 4, 5].map((n) => Bus.connect({ url: nats.url, name: `test-${n}` })),
  )
  for (const bus of buses) scope.use(bus)
  const options = TopologyOptions.parse({})
  await Promise.all(buses.map((bus) => ensureTopology(bus.jsm, options)))
  const { jsm } = buses[0]!
  assert.equal((await jsm.streams.names().next()).sort(), [EVENTS, LOGS, WORK].sort())
  for (const isolation of Isolation.options) {
    const { config } = await jsm.consumers.info(WORK, workConsumer(isolation))
    assert.is(config.filter_subject, `vulcan.work.${isolation}.any.*`)
    assert.is(config.max_deliver, -1)
    assert.is(config.ack_wait, 15_000 * 1_000_000)
  }
})

test('starting again changes neither messages nor the place of a consumer', async () => {
  await using on = await ground()
  const { bus, topology } = on
  const ids = [await submit(bus), await submit(bus), await submit(bus)].map(({ id }) => id)
  const got: WorkMessage[] = []
  const puller = pullWork(bus, 'isolate', 1, (message) => got.push(message))
  await until('the first delivery', () => got.length === 1 || undefined)
  got[0]!.ack()
  await bus.flush()
  await until('the acknowledgement', async () => (await queued(bus)) === 2 || undefined)
  await puller.stop()
  const before = await bus.jsm.consumers.info(WORK, 'isolate')

  for (let i = 0; i < 3; i++) await ensureTopology(bus.jsm, topology)

  const after = await bus.jsm.consumers.info(WORK, 'isolate')
  assert.is(after.created, before.created)
  assert.equal(after.delivered, before.delivered)
  assert.is(await queued(bus), 2)
  const rest: string[] = []
  const again = pullWork(bus, 'isolate', 5, (message) => {
    rest.push(message.workload)
    message.ack()
  })
  await until('the rest', () => rest.length === 2 || undefined)
  assert.equal(rest, ids.slice(1))
  await again.stop()
})

test('changed settings are brought to what stands, and nothing is lost by it', async () => {
  await using on = await ground()
  await submit(on.bus)
  await ensureTopology(
    on.bus.jsm,
    TopologyOptions.parse({ ackWaitMs: 4_000, eventsMaxAgeH: 1, logsMaxMb: 64 }),
  )
  const { jsm } = on.bus
  assert.is((await jsm.consumers.info(WORK, 'isolate')).config.ack_wait, 4_000 * 1_000_000)
  assert.is((await jsm.streams.info(EVENTS)).config.max_age, 3_600 * 1e9)
  assert.is((await jsm.streams.info(LOGS)).config.max_bytes, 64 * 1_048_576)
  await until('the queued message', async () => (await queued(on.bus)) === 1 || undefined)
})

test('an accepted event is queued once, under its isolation and target, and no other event is', async () => {
  await using on = await ground()
  const { id, seq } = await submit(on.bus)
  await until('the sourced message', async () => (await queued(on.bus)) === 1 || undefined)
  const stored = await on.bus.jsm.streams.getMessage(WORK, { last_by_subj: 'vulcan.work.>' })
  assert.is(stored!.subject, `vulcan.work.isolate.any.${id}`)
  assert.match(stored!.header.get('Nats-Stream-Source'), new RegExp(`^${EVENTS} ${seq} `))
  const other = acceptedEvent()
  await on.bus.publishEvent(acceptedSubject(other.subject, 'gvisor', 'host-1'), other, 0)
  await until('the targeted message', async () => (await queued(on.bus)) === 2 || undefined)
  const targeted = await on.bus.jsm.streams.getMessage(WORK, { last_by_subj: 'vulcan.work.gvisor.>' })
  assert.is(targeted!.subject, `vulcan.work.gvisor.host-1.${other.subject}`)
})

test('what is stored on a workload’s subjects is sent on by the server: not before, and nothing that was refused', async () => {
  await using on = await ground()
  const heard: { subject: string; seq: number; body: unknown }[] = []
  on.bus.listen('vulcan.stored.>', (message) =>
    heard.push({
      subject: message.subject,
      seq: Number(message.headers?.get('Nats-Sequence')),
      body: message.json(),
    }),
  )
  await on.bus.flush()
  const { id, seq } = await submit(on.bus)
  const first = bareEnd('killed', id, { attempt: 0, runner: null }, '/a')
  const second = bareEnd('failed', id, { attempt: 0, runner: null }, '/b')
  const stored = await on.bus.settleEvent(eventSubject(id, 'killed'), first, seq)
  assert.ok(stored.stored)
  assert.not((await on.bus.settleEvent(eventSubject(id, 'failed'), second, seq)).stored)
  await until('the end', () => heard.length > 0 || undefined)
  await on.bus.flush()
  assert.equal(heard, [{ subject: `vulcan.stored.${id}.killed`, seq: stored.seq, body: first }])
})

test('a SIGKILL and restart of the server, queue full or empty, sources nothing twice and loses nothing', async () => {
  await using on = await ground()
  const { bus, nats, topology } = on
  const seen: string[] = []
  const ids = new Set<string>()
  const put = async (n: number) => {
    for (let i = 0; i < n; i++) ids.add((await submit(bus)).id)
  }
  const drain = async () => {
    const puller = pullWork(bus, 'isolate', 8, (message) => {
      seen.push(message.workload)
      message.ack()
      puller.release()
    })
    await until('an empty queue', async () => (await queued(bus).catch(() => 1)) === 0 || undefined)
    await puller.stop()
    // What the server has heard and not written down yet is gone with it: those messages would come once more.
    await new Promise((resolve) => setTimeout(resolve, 500))
  }
  const crash = async () => {
    await nats.restart()
    await bus.whenConnected()
    await until('the streams', () =>
      ensureTopology(bus.jsm, topology).then(
        () => true,
        () => undefined,
      ),
    )
  }
  await put(20)
  await until('the queue', async () => (await queued(bus)) === 20 || undefined)
  await crash()
  assert.is(await queued(bus), 20)
  await drain()
  for (let i = 0; i < 2; i++) {
    await crash()
    await put(5)
    await drain()
  }
  await crash()
  await new Promise((resolve) => setTimeout(resolve, 1_000))
  assert.is(await queued(bus), 0)
  assert.equal([...seen].sort(), [...ids].sort())
})

test('ids of workloads that look like nothing else reach exactly one consumer', async () => {
  await using on = await ground()
  const event = acceptedEvent({}, newWorkloadId(), { isolation: 'microvm' })
  await on.bus.publishEvent(acceptedSubject(event.subject, 'microvm'), event, 0)
  await until('the sourced message', async () => (await queued(on.bus)) === 1 || undefined)
  const pending = await Promise.all(
    Isolation.options.map(async (name) => (await on.bus.jsm.consumers.info(WORK, name)).num_pending),
  )
  assert.equal(
    pending,
    Isolation.options.map((name) => (name === 'microvm' ? 1 : 0)),
  )
})

test.run()
