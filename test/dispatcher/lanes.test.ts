// timeout: 60
import pino from 'pino'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { type LanesSeen, laneActions, startLaneKeeper } from '../../dispatcher/lanes.ts'
import { FunctionRecord, FunctionSpec, FunctionVersion, type Lane, lanesOf } from '../../shared/functions.ts'
import { Registry } from '../../shared/registry.ts'
import { acceptedSubject } from '../../shared/subjects.ts'
import {
  ensureLane,
  laneConsumer,
  TopologyOptions,
  WORK,
  type WorkQueueInfo,
  workQueues,
} from '../../shared/topology.ts'
import { acceptedEvent, ground, until } from '../shared/support.ts'

const topology = TopologyOptions.parse({})
const laneFor = (name: string, concurrency: number | null = 5): Lane => ({
  lane: `fn-${name}`,
  isolation: 'isolate',
  function: name,
  concurrency,
  rate: null,
})
const info = (lane: Lane, over: Partial<WorkQueueInfo> = {}): [string, WorkQueueInfo] => [
  laneConsumer(lane),
  {
    name: laneConsumer(lane),
    subjects: `vulcan.work.isolate.fn-${lane.function}.*`,
    at: 0,
    pending: 0,
    out: 0,
    waiting: 0,
    delivered: 0,
    deliveredTo: 0,
    redelivered: 0,
    maxOut: lane.concurrency ?? 100_000,
    ackWaitMs: topology.ackWaitMs,
    ...over,
  },
]
const acts = (over: Partial<LanesSeen>, now = 100_000) =>
  laneActions(
    topology,
    { wanted: [], registered: [], consumers: new Map(), unwantedSince: new Map(), ...over },
    now,
  ).map(({ act, lane }) => `${act} ${lane.function} ${lane.concurrency}`)

test('a lane as it is wanted is left alone', () => {
  const a = laneFor('a')
  assert.equal(acts({ wanted: [a], registered: [{ ...a }], consumers: new Map([info(a)]) }), [])
})

test('what is missing or differs is brought about, the consumer first', () => {
  const a = laneFor('a')
  assert.equal(acts({ wanted: [a] }), ['ensure a 5', 'register a 5'])
  assert.equal(acts({ wanted: [a], registered: [a] }), ['ensure a 5'])
  const consumers = new Map([info(a)])
  assert.equal(acts({ wanted: [laneFor('a', 2)], registered: [a], consumers }), [
    'ensure a 2',
    'register a 2',
  ])
  const late = new Map([info(a, { ackWaitMs: 1 })])
  assert.equal(acts({ wanted: [a], registered: [a], consumers: late }), ['ensure a 5'])
})

test('what nobody wants is removed after a while, and kept going until then', () => {
  const a = laneFor('a')
  const name = laneConsumer(a)
  const seen = { registered: [a], consumers: new Map([info(a)]) }
  assert.equal(acts({ ...seen }), [])
  assert.equal(acts({ ...seen, unwantedSince: new Map([[name, 90_000]]) }), [])
  assert.equal(acts({ ...seen, unwantedSince: new Map([[name, 30_000]]) }), ['remove a 5'])
  assert.equal(acts({ registered: [a], unwantedSince: new Map([[name, 90_000]]) }), ['ensure a 5'])
})

const versionId = (n: number) => `v${String(n).padStart(16, '0')}`
function functionOf(
  name: string,
  specs: Partial<FunctionSpec>[],
  over: Partial<FunctionRecord> = {},
): { record: FunctionRecord; versions: FunctionVersion[] } {
  const now = new Date().toISOString()
  const versions = specs.map((spec, i) => {
    const { code: _, ...rest } = FunctionSpec.parse({ code: 'x', ...spec })
    return FunctionVersion.parse({
      name,
      version: versionId(i + 1),
      created_at: now,
      isolation: 'isolate',
      routing_reason: 'test',
      runtime: 'javascript',
      bundle: null,
      source: null,
      spec: rest,
      warnings: [],
    })
  })
  const record = FunctionRecord.parse({
    name,
    created_at: now,
    updated_at: now,
    deleted_at: null,
    latest: versionId(specs.length),
    versions: versions.map(({ version }) => ({ version, deployed_at: now })).reverse(),
    aliases: {},
    ...over,
  })
  return { record, versions }
}

test('a function’s lane has the limits of its current version, else of its newest that has any', () => {
  const limitsOf = (specs: Partial<FunctionSpec>[], over: Partial<FunctionRecord> = {}) => {
    const { record, versions } = functionOf('f', specs, over)
    return lanesOf(record, (id) => versions.find(({ version }) => version === id)).map(
      ({ concurrency }) => concurrency,
    )
  }
  assert.equal(limitsOf([{}]), [])
  assert.equal(limitsOf([{ concurrency: 5 }, { concurrency: 9 }]), [9])
  assert.equal(limitsOf([{ concurrency: 5 }, {}]), [5])
  assert.equal(
    limitsOf([{ concurrency: 5 }, { concurrency: 9 }], { aliases: { live: { version: versionId(1) } } }),
    [5],
  )
  assert.equal(
    limitsOf([{ concurrency: 5 }, { concurrency: 9 }], {
      aliases: { live: { weights: { [versionId(1)]: 90, [versionId(2)]: 10 } } },
    }),
    [5],
  )
  assert.equal(limitsOf([{ queue_limit: 3 }]), [null])
  assert.equal(limitsOf([{ concurrency: 5 }], { deleted_at: new Date().toISOString() }), [])
})

test('a keeper brings back a lost consumer, follows the live version, and removes a deleted function’s lane once it is empty', async () => {
  await using on = await ground()
  const { bus } = on
  const registry = await Registry.open(bus, 1)
  const { record, versions } = functionOf('kept', [{ concurrency: 5 }, { concurrency: 9 }])
  for (const version of versions) await registry.putVersion(version)
  let revision = await registry.put(record, 0)
  using _ = startLaneKeeper({
    bus,
    topology: on.topology,
    registry,
    log: pino({ level: 'silent' }),
    graceMs: 300,
    lookMs: 200,
  })
  const name = laneConsumer(laneFor('kept'))
  const bound = async () => (await workQueues(bus.jsm)).get(name)?.maxOut
  await until('the lane', async () => (await bound()) === 9 || undefined)
  await until('its entry', () => registry.lanes()[0]?.concurrency === 9 || undefined)

  revision = await registry.put({ ...record, aliases: { live: { version: versionId(1) } } }, revision)
  await until('the live version’s limit', async () => (await bound()) === 5 || undefined)

  const event = acceptedEvent({}, undefined, { target: 'fn-kept' })
  await bus.publishEvent(acceptedSubject(event.subject, 'isolate', 'fn-kept'), event, 0)
  await bus.jsm.consumers.delete(WORK, name)
  await until('it is back', async () => (await workQueues(bus.jsm)).get(name)?.pending === 1 || undefined)

  await registry.put({ ...record, deleted_at: new Date().toISOString() }, revision)
  await new Promise((resolve) => setTimeout(resolve, 1_000))
  assert.is((await workQueues(bus.jsm)).get(name)?.pending, 1, 'not while there is work')
  const consumer = await bus.js.consumers.get(WORK, name)
  ;(await consumer.next({ expires: 2_000 }))!.ack()
  await until('it is gone', async () => (await bound()) === undefined || undefined)
  await until('its entry', () => registry.lanes().length === 0 || undefined)
  registry.close()
})

test('what slipped into a lane that was removed is delivered when it is made again', async () => {
  await using on = await ground()
  const { bus } = on
  const lane = laneFor('slipped')
  const event = acceptedEvent({}, undefined, { target: lane.lane })
  await bus.publishEvent(acceptedSubject(event.subject, 'isolate', lane.lane), event, 0)
  await until('it', async () => (await bus.jsm.streams.info(WORK)).state.messages === 1 || undefined)
  await ensureLane(bus.jsm, on.topology, lane)
  const queues = await workQueues(bus.jsm)
  assert.is(queues.get(laneConsumer(lane))?.pending, 1)
})

test.run()
