// timeout: 120
import { randomBytes } from 'node:crypto'
import { headers } from '@nats-io/transport-node'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { BlobCorrupt, Blobs } from '../../shared/blobs.ts'
import { Bus } from '../../shared/bus.ts'
import { BusUnavailable, StreamFull } from '../../shared/errors.ts'
import { digestOf } from '../../shared/ids.ts'
import { BLOBS } from '../../shared/topology.ts'
import { fill, ground, until } from './support.ts'

const stream = `OBJ_${BLOBS}`
const bytesStored = async (bus: Bus) => (await bus.jsm.streams.info(stream)).state.bytes

async function rejection(promise: Promise<unknown>): Promise<Error> {
  try {
    await promise
  } catch (error) {
    return error as Error
  }
  throw new Error('it did not reject')
}

for (const size of [0, 1, 131_072, 131_073, 3_000_000])
  test(`${size} bytes come back as they were put`, async () => {
    await using on = await ground()
    const bytes = randomBytes(size)
    const ref = await on.blobs.put(bytes)
    assert.equal(ref, { blob: digestOf(bytes), size })
    assert.is(await on.blobs.size(ref.blob), size)
    assert.is(Buffer.compare((await on.blobs.get(ref.blob))!, bytes), 0)
    assert.equal(
      (await on.blobs.list()).map(({ digest, size }) => ({ digest, size })),
      [{ digest: ref.blob, size }],
    )
  })

test('20 MB come back as they were put', async () => {
  await using on = await ground()
  const bytes = randomBytes(20_000_000)
  const ref = await on.blobs.put(bytes)
  const back = await on.blobs.get(ref.blob)
  assert.is(Buffer.compare(back!, bytes), 0)
})

test('any number of reads leaves nothing behind in the server', async () => {
  await using on = await ground()
  const { blob } = await on.blobs.put(Buffer.from('read often'))
  // The server takes 1,000 consumers a stream.
  for (let i = 0; i < 1_100; i++) assert.is((await on.blobs.get(blob))!.byteLength, 10)
  assert.is((await on.bus.jsm.streams.info(stream)).state.consumer_count, 0)
})

test('the same bytes are stored once', async () => {
  await using on = await ground()
  const bytes = randomBytes(500_000)
  const first = await on.blobs.put(bytes)
  const stored = await bytesStored(on.bus)
  assert.equal(await on.blobs.put(Buffer.from(bytes)), first)
  assert.is(await bytesStored(on.bus), stored)
})

test('the same bytes put at once from two connections are stored once, and all puts succeed', async () => {
  await using on = await ground()
  await using bus = await Bus.connect({ url: on.nats.url, name: 'other' })
  const other = await Blobs.open(bus, 1)
  const bytes = randomBytes(400_000)
  const refs = await Promise.all(Array.from({ length: 10 }, (_, i) => (i % 2 ? other : on.blobs).put(bytes)))
  for (const ref of refs) assert.equal(ref, refs[0])
  assert.is(Buffer.compare((await on.blobs.get(refs[0]!.blob))!, bytes), 0)
  await until('the others to be purged', async () => (await bytesStored(on.bus)) < 450_000 || undefined)
  assert.ok(await on.blobs.removeStale(refs[0]!.blob, Date.now() + 1_000))
  assert.is((await bytesStored(on.bus)) < 10_000, true)
})

test('a blob that was removed is missing, and can be put again', async () => {
  await using on = await ground()
  const bytes = randomBytes(200_000)
  const { blob } = await on.blobs.put(bytes)
  assert.ok(await on.blobs.removeStale(blob, Date.now() + 1_000))
  assert.is(await on.blobs.get(blob), undefined)
  assert.is(await on.blobs.size(blob), undefined)
  assert.equal(await on.blobs.list(), [])
  await on.blobs.put(bytes)
  assert.is(Buffer.compare((await on.blobs.get(blob))!, bytes), 0)
})

test('a blob put since then is not stale, and stays', async () => {
  await using on = await ground()
  const before = Date.now() - 1_000
  const bytes = randomBytes(1_000)
  const { blob } = await on.blobs.put(bytes)
  assert.not(await on.blobs.removeStale(blob, before))
  assert.is(Buffer.compare((await on.blobs.get(blob))!, bytes), 0)
})

test('a renewed blob is not stale, and is whole', async () => {
  await using on = await ground()
  const bytes = randomBytes(300_000)
  const { blob, size } = await on.blobs.put(bytes)
  assert.is(await on.blobs.renew(digestOf('never put')), undefined)
  const meta = await on.bus.jsm.streams.getMessage(stream, { last_by_subj: `$O.${BLOBS}.M.>` })
  const old = { ...meta!.json<object>(), mtime: new Date(0).toISOString() }
  const rollup = headers()
  rollup.set('Nats-Rollup', 'sub')
  await on.bus.js.publish(meta!.subject, JSON.stringify(old), { headers: rollup })
  assert.is((await on.blobs.list())[0]!.at, 0)
  assert.equal(await on.blobs.renew(blob), { blob, size })
  assert.not(await on.blobs.removeStale(blob, Date.now() - 60_000))
  assert.is(Buffer.compare((await on.blobs.get(blob))!, bytes), 0)
  // Removed for good, and put again.
  assert.ok(await on.blobs.removeStale(blob, Date.now() + 60_000))
  assert.is(await on.blobs.renew(blob), undefined)
  await on.blobs.put(bytes)
  assert.is(Buffer.compare((await on.blobs.get(blob))!, bytes), 0)
})

test('an unknown blob is missing; an empty store lists nothing; removing nothing is harmless', async () => {
  await using on = await ground()
  const digest = digestOf('never put')
  assert.is(await on.blobs.get(digest), undefined)
  assert.is(await on.blobs.size(digest), undefined)
  assert.equal(await on.blobs.list(), [])
  assert.not(await on.blobs.removeStale(digest, Date.now() + 1_000))
})

test('a blob whose bytes are gone is corrupt, and reading it does not wait for them', async () => {
  await using on = await ground()
  const { blob } = await on.blobs.put(randomBytes(300_000))
  await on.bus.jsm.streams.purge(stream, { filter: `$O.${BLOBS}.C.>` })
  assert.instance(await rejection(on.blobs.get(blob)), BlobCorrupt)
})

test('a blob that lost a part, or holds other bytes, is corrupt', async () => {
  await using on = await ground()
  const lost = await on.blobs.put(randomBytes(300_000))
  await on.bus.jsm.streams.deleteMessage(stream, 1)
  assert.instance(await rejection(on.blobs.get(lost.blob)), BlobCorrupt)

  const { blob } = await on.blobs.put(randomBytes(50_000))
  const meta = (await on.bus.jsm.streams.getMessage(stream, { last_by_subj: `$O.${BLOBS}.M.>` }))!
  const { nuid } = meta.json<{ nuid: string }>()
  await on.bus.jsm.streams.purge(stream, { filter: `$O.${BLOBS}.C.${nuid}` })
  await on.bus.js.publish(`$O.${BLOBS}.C.${nuid}`, randomBytes(50_000))
  assert.instance(await rejection(on.blobs.get(blob)), BlobCorrupt)
})

test('while the server is down every use is BusUnavailable; afterwards all is there', async () => {
  await using on = await ground()
  const bytes = randomBytes(300_000)
  const { blob } = await on.blobs.put(bytes)
  await on.nats.kill()
  await until('the loss', () => !on.bus.connected || undefined)
  for (const use of [on.blobs.get(blob), on.blobs.size(blob), on.blobs.put(randomBytes(10))])
    assert.instance(await rejection(use), BusUnavailable)
  await on.nats.restart()
  await on.bus.whenConnected()
  const back = await until('the bytes', () => on.blobs.get(blob).catch(() => undefined))
  assert.is(Buffer.compare(back, bytes), 0)
})

test('where there is no room a put says so, and goes through once there is', async () => {
  await using on = await ground()
  const bytes = Buffer.alloc(300_000, 'x')
  const undo = await fill(on.bus, stream, 50_000)
  assert.instance(await rejection(on.blobs.put(bytes)), StreamFull)
  await undo()
  const { blob } = await on.blobs.put(bytes)
  assert.is((await on.blobs.get(blob))?.byteLength, 300_000)
})

test.run()
