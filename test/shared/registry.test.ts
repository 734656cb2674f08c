// timeout: 180
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Bus } from '../../shared/bus.ts'
import { BusUnavailable, Problem } from '../../shared/errors.ts'
import { FunctionRecord, FunctionVersion, Lane, resolve } from '../../shared/functions.ts'
import { Registry } from '../../shared/registry.ts'
import { FUNCTIONS } from '../../shared/topology.ts'
import { ground, seeded, until } from './support.ts'

const stream = `KV_${FUNCTIONS}`
const v1 = 'v0000000000000001'
const v2 = 'v0000000000000002'
const at = '2026-01-01T00:00:00.000Z'

const recordOf = (name: string, over: Partial<FunctionRecord> = {}): FunctionRecord =>
  FunctionRecord.parse({
    name,
    created_at: at,
    updated_at: at,
    deleted_at: null,
    latest: v1,
    versions: [{ version: v1, deployed_at: at }],
    aliases: {},
    ...over,
  })

const versionOf = (name: string, version: string): FunctionVersion =>
  FunctionVersion.parse({
    name,
    version,
    created_at: at,
    isolation: 'isolate',
    routing_reason: 'test',
    runtime: 'javascript',
    bundle: null,
    source: null,
    spec: {},
    warnings: [],
  })

const codeOf = (promise: Promise<unknown>) =>
  promise.then(
    () => 'nothing was thrown',
    (error) => (error instanceof Problem ? error.code : error.constructor.name),
  )

test('what was put is there at once, and a moment later in every other registry', async () => {
  await using on = await ground()
  await using bus = await Bus.connect({ url: on.nats.url, name: 'other' })
  const one = await Registry.open(on.bus, 1)
  const other = await Registry.open(bus, 1)
  const heard: string[] = []
  const stop = other.onChange((key) => heard.push(key))

  assert.is(one.get('a'), undefined)
  await one.putVersion(versionOf('a', v1))
  const revision = await one.put(recordOf('a'), 0)
  assert.equal(one.get('a'), { record: recordOf('a'), revision })
  assert.equal(one.version('a', v1), versionOf('a', v1))
  assert.is(one.version('a', v2), undefined)

  await until('the record', () => other.get('a'))
  assert.equal(other.get('a'), one.get('a'))
  assert.equal(other.version('a', v1), versionOf('a', v1))
  assert.equal(heard, [`version.a.${v1}`, 'function.a'])

  stop()
  const next = await other.put(recordOf('a', { deleted_at: at }), revision)
  assert.ok(next > revision)
  await until('the change', () => one.get('a')?.record.deleted_at ?? undefined)
  assert.is(heard.length, 2)
  one.close()
  other.close()
})

test('a registry opened later has read everything, in order of names', async () => {
  await using on = await ground()
  const first = await Registry.open(on.bus, 1)
  const names = Array.from({ length: 2_000 }, (_, i) => `f-${String(i).padStart(4, '0')}`)
  for (let i = 0; i < names.length; i += 100)
    await Promise.all(
      names.slice(i, i + 100).map(async (name) => {
        await first.putVersion(versionOf(name, v1))
        await first.put(recordOf(name), 0)
      }),
    )
  const second = await Registry.open(on.bus, 1)
  assert.equal(
    second.list().map(({ name }) => name),
    names,
  )
  assert.is(second.versions().length, 2_000)
  assert.equal(second.get('f-1999'), first.get('f-1999'))
  first.close()
  second.close()
})

test('of two that change a function at once one is refused, and then sees what the other wrote', async () => {
  await using on = await ground()
  await using bus = await Bus.connect({ url: on.nats.url, name: 'other' })
  const one = await Registry.open(on.bus, 1)
  const other = await Registry.open(bus, 1)
  const revision = await one.put(recordOf('a'), 0)
  assert.is(await codeOf(other.put(recordOf('a'), 0)), 'function_conflict')
  assert.is(other.get('a')?.revision, revision)

  const newer = await one.put(recordOf('a', { latest: v2 }), revision)
  assert.is(await codeOf(other.put(recordOf('a'), revision)), 'function_conflict')
  assert.equal(other.get('a'), { record: recordOf('a', { latest: v2 }), revision: newer })
  const last = await other.put(recordOf('a', { deleted_at: at }), newer)
  assert.is(await codeOf(one.put(recordOf('a'), newer)), 'function_conflict')
  assert.is(one.get('a')?.revision, last)
  one.close()
  other.close()
})

test('a version stays as it was first put', async () => {
  await using on = await ground()
  const registry = await Registry.open(on.bus, 1)
  await registry.putVersion(versionOf('a', v1))
  await registry.putVersion({ ...versionOf('a', v1), created_at: '2027-01-01T00:00:00.000Z' })
  assert.is(registry.version('a', v1)?.created_at, at)
  registry.close()
})

test('lanes are put, put again and removed', async () => {
  await using on = await ground()
  const registry = await Registry.open(on.bus, 1)
  const lane = Lane.parse({ lane: 'fn-a', isolation: 'isolate', function: 'a', concurrency: 5, rate: null })
  await registry.putLane(lane)
  await registry.putLane({ ...lane, concurrency: 7 })
  assert.equal(registry.lanes(), [{ ...lane, concurrency: 7 }])
  await registry.removeLane(lane)
  assert.equal(registry.lanes(), [])
  const later = await Registry.open(on.bus, 1)
  assert.equal(later.lanes(), [])
  registry.close()
  later.close()
})

test('a registry goes on after the server was killed, with what was changed while it was away', async () => {
  await using on = await ground()
  const registry = await Registry.open(on.bus, 1)
  const revision = await registry.put(recordOf('a'), 0)
  await on.nats.kill()
  await until('the loss', () => !on.bus.connected || undefined)
  assert.equal(registry.get('a')?.record, recordOf('a'))
  assert.is(await codeOf(registry.put(recordOf('b'), 0)), BusUnavailable.name)
  await on.nats.restart()

  await using bus = await Bus.connect({ url: on.nats.url, name: 'other' })
  const other = await Registry.open(bus, 1)
  assert.is(other.get('a')?.revision, revision)
  await other.put(recordOf('a', { latest: v2 }), revision)
  await other.put(recordOf('c'), 0)
  await until('the change', () => registry.get('a')?.record.latest === v2 || undefined, 30_000)
  await until('the new one', () => registry.get('c'))
  await registry.put(recordOf('b'), 0)
  assert.ok(await until('b', () => other.get('b')))
  registry.close()
  other.close()
})

test('where the bucket was made anew, what was in the old one is gone', async () => {
  await using on = await ground()
  const registry = await Registry.open(on.bus, 1)
  await registry.put(recordOf('a'), 0)
  await registry.put(recordOf('b'), 0)
  await on.bus.jsm.streams.delete(stream)
  await on.nats.restart()
  await until('a new bucket', () => registry.get('a') === undefined || undefined, 40_000)
  await until('room for it', () => registry.put(recordOf('c'), 0).catch(() => undefined))
  assert.equal(
    registry.list().map(({ name }) => name),
    ['c'],
  )
  registry.close()
})

test('an entry that is not ours is passed over', async () => {
  await using on = await ground()
  const registry = await Registry.open(on.bus, 1)
  for (const key of ['function.x', 'version.x.y', 'lane.x.y', 'other', 'function.y'])
    await on.bus.js.publish(`$KV.${FUNCTIONS}.${key}`, key === 'function.y' ? 'not json' : '{"name":1}')
  await registry.put(recordOf('a'), 0)
  const later = await Registry.open(on.bus, 1)
  assert.equal([later.list().length, later.versions(), later.lanes()], [1, [], []])
  assert.is(later.get('x'), undefined)
  registry.close()
  later.close()
})

const thrown = (run: () => unknown) => {
  try {
    run()
  } catch (error) {
    return (error as Problem).code
  }
  return 'nothing was thrown'
}

test('a call without a ref means live where it is set, else the latest', () => {
  const versions = [v2, v1].map((version) => ({ version, deployed_at: at }))
  const record = recordOf('a', { latest: v2, versions })
  assert.equal(resolve(record, undefined), { version: v2, ref: 'latest' })
  const live = recordOf('a', { latest: v2, versions, aliases: { live: { version: v1 } } })
  assert.equal(resolve(live, undefined), { version: v1, ref: 'live' })
  assert.equal(resolve(live, 'latest'), { version: v2, ref: 'latest' })
  assert.equal(resolve(live, v2), { version: v2, ref: v2 })
})

test('what is not there is named by kind', () => {
  const record = recordOf('a')
  assert.is(
    thrown(() => resolve(record, v2)),
    'version_not_found',
  )
  for (const ref of ['staging', 'constructor', '__proto__', '', 'Ä'])
    assert.is(
      thrown(() => resolve(record, ref)),
      'alias_not_found',
    )
  const deleted = recordOf('a', { deleted_at: at })
  for (const ref of [undefined, v1, 'latest'])
    assert.is(
      thrown(() => resolve(deleted, ref)),
      'function_not_found',
    )
})

test('a split of 90 to 10 is one over many calls', () => {
  const record = recordOf('a', { aliases: { live: { weights: { [v1]: 90, [v2]: 10 } } } })
  const random = seeded(7)
  let second = 0
  for (let i = 0; i < 10_000; i++) if (resolve(record, undefined, random).version === v2) second++
  assert.ok(second > 900 && second < 1_100, `${second} of 10,000`)
  assert.is(resolve(record, 'live', () => 0).version, v1)
  assert.is(resolve(record, 'live', () => 0.899_999).version, v1)
  assert.is(resolve(record, 'live', () => 0.9).version, v2)
  assert.is(resolve(record, 'live', () => 0.999_999).version, v2)
})

test.run()
