import { createClient } from '@libsql/client'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { removeLogs, removeWorkloads, sweepBlobs } from '../../dispatcher/retention.ts'
import { Blobs } from '../../shared/blobs.ts'
import { FunctionVersion } from '../../shared/functions.ts'
import { Registry } from '../../shared/registry.ts'
import type { Digest } from '../../shared/workload.ts'
import { dump, folded, getJson, makeWorld, until } from './support.ts'

test('ended workloads, their labels and logs, and old log lines are removed; what runs stays', async () => {
  await using world = await makeWorld()
  const { publish, bus, databaseUrl } = world
  const dispatcher = await world.dispatcher()
  const day = 24 * 3_600_000
  const daysAgo = (n: number) => new Date(Date.now() - n * day).toISOString()
  const make = async (ended: string | undefined) => {
    const id = await publish.accepted({}, { spec: { labels: { a: 'b' } }, time: daysAgo(100) })
    await publish.started(id)
    await publish.logs(id, 1, ['x'])
    if (ended !== undefined) await publish.ended(id, 'completed', {}, ended)
    return id
  }
  const old = await make(daysAgo(31))
  const young = await make(daysAgo(29))
  const running = await make(undefined)
  await folded(dispatcher, bus)
  const database = dispatcher.live.database!
  assert.is(await removeWorkloads(database, new Date(Date.now() - 30 * day)), 1)
  assert.is((await getJson(`${dispatcher.url}/v1/workloads/${young}`)).status, 200)
  assert.is((await getJson(`${dispatcher.url}/v1/workloads/${running}`)).status, 200)
  assert.is((await getJson(`${dispatcher.url}/v1/workloads/${old}`)).status, 404)
  let tables = await dump(databaseUrl)
  assert.is(tables.workloads!.length, 2)
  assert.is(tables.workload_labels!.length, 2)
  assert.is(tables.log_batches!.length, 2)
  assert.is(await removeLogs(database, Date.now() - 60_000), 0)
  assert.is(await removeLogs(database, Date.now() + 60_000), 2)
  tables = await dump(databaseUrl)
  assert.is(tables.log_batches!.length, 0)
  assert.is(tables.workloads!.length, 2)
})

test('a blob is removed when nothing refers to it twice in a row, and not before', async () => {
  await using world = await makeWorld()
  const { publish, bus, databaseUrl } = world
  const dispatcher = await world.dispatcher()
  const blobs = await Blobs.open(bus, 1)
  const put = (text: string) => blobs.put(Buffer.from(text))
  const payload = await put('{"code":"1"}')
  const output = await put('"output"')
  const free = await put('free')
  const coming = await put('coming')
  const archive = await put('archive')
  const image = await put('image')
  await publish.accepted({}, { spec: { code: undefined, archive: { blob: archive.blob } } })
  await publish.accepted({}, { spec: { code: undefined, image: { blob: image.blob } } })
  const holder = await publish.accepted({ payload })
  await publish.started(holder)
  await publish.ended(holder, 'completed', { output: null, output_blob: output })
  await folded(dispatcher, bus)
  const { live } = dispatcher
  const registry = await Registry.open(bus, 1)
  const there = async () => (await blobs.list()).map(({ digest }) => digest).sort()
  const suspects = new Set<Digest>()
  const sweep = (blobGraceMs: number) => sweepBlobs({ bus, live, registry, blobGraceMs }, suspects)

  assert.is(await sweep(3_600_000), 0)
  assert.is(suspects.size, 0, 'all are in their grace')
  assert.is(await sweep(-1), 0)
  assert.equal([...suspects].sort(), [free.blob, coming.blob].sort())
  // Referred to by an event that is published between the sweeps, and folded by the next.
  await publish.accepted({ payload: coming })
  assert.is(await sweep(-1), 1)
  const kept = [payload, output, coming, archive, image]
  assert.equal(await there(), kept.map(({ blob }) => blob).sort())
  assert.is(await blobs.get(free.blob), undefined)
  assert.is(await blobs.removeStale(payload.blob, Date.now() - 60_000), false, 'put since then')

  // Put again, it is there again.
  await put('free')
  assert.equal(Buffer.from((await blobs.get(free.blob))!).toString(), 'free')

  const client = createClient({ url: databaseUrl })
  await client.execute('DELETE FROM workloads')
  client.close()
  await sweep(-1)
  assert.is(await sweep(-1), 6)
  assert.equal(await there(), [])
  registry.close()
})

test('blobs of a deployed version are never removed', async () => {
  await using world = await makeWorld()
  const { bus } = world
  const dispatcher = await world.dispatcher()
  const blobs = await Blobs.open(bus, 1)
  const registry = await Registry.open(bus, 1)
  const put = async (text: string) => (await blobs.put(Buffer.from(text))).blob
  const [bundle, map, source, archive, image, free] = [
    await put('bundle'),
    await put('map'),
    await put('source'),
    await put('archive'),
    await put('image'),
    await put('free'),
  ]
  const version = (id: string, over: object) =>
    FunctionVersion.parse({
      name: 'a',
      version: id,
      created_at: new Date().toISOString(),
      isolation: 'isolate',
      routing_reason: 'test',
      runtime: 'javascript',
      bundle: null,
      source: null,
      spec: {},
      warnings: [],
      ...over,
    })
  await registry.putVersion(
    version('v0000000000000001', {
      bundle: { blob: bundle, size: 6, map },
      source: { blob: source, size: 6 },
    }),
  )
  await registry.putVersion(version('v0000000000000002', { spec: { archive: { blob: archive } } }))
  await registry.putVersion(version('v0000000000000003', { spec: { image: { blob: image } } }))
  await until('a database', () => dispatcher.live.database)
  const suspects = new Set<Digest>()
  const sweep = () => sweepBlobs({ bus, live: dispatcher.live, registry, blobGraceMs: -1 }, suspects)
  await until('the blob store', () => dispatcher.live.blobs)
  await sweep()
  assert.is(await sweep(), 1)
  const left = (await blobs.list()).map(({ digest }) => digest).sort()
  assert.equal(left, [bundle, map, source, archive, image].sort())
  assert.is(await blobs.size(free), undefined)
  registry.close()
})

test('retention runs by itself', async () => {
  await using world = await makeWorld()
  const { publish } = world
  const dispatcher = await world.dispatcher({ retentionEveryS: 0.2, keepWorkloadsH: 1 })
  await until('a database', () => dispatcher.live.database)
  const id = await publish.accepted()
  await publish.ended(id, 'killed', { cause: 'killed' }, '2020-01-01T00:00:00.000Z')
  await until('it gone', async () => (await getJson(`${dispatcher.url}/v1/workloads/${id}`)).status === 404)
})

test.run()
