// timeout: 120
import { randomBytes } from 'node:crypto'
import { readdir } from 'node:fs/promises'
import { request } from 'node:http'
import { tmpdir } from 'node:os'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { digestOf } from '../../shared/ids.ts'
import { BLOBS } from '../../shared/topology.ts'
import { ground, until } from '../shared/support.ts'
import { call, type Gateway, startGateway } from './support.ts'

const binary = { 'content-type': 'application/octet-stream' }
const upload = (gateway: Gateway, bytes: Buffer, query = '', headers: Record<string, string> = {}) =>
  call(gateway, 'POST', `/v1/blobs${query}`, {
    raw: new Uint8Array(bytes),
    headers: { ...binary, ...headers },
  })
const spooled = async () => (await readdir(tmpdir())).filter((name) => name.startsWith('vulcan-body-'))

for (const size of [0, 1, 131_073, 5_000_000])
  test(`${size} bytes go in and come out again`, async () => {
    await using on = await ground()
    await using gateway = await startGateway(on)
    const bytes = randomBytes(size)
    const digest = digestOf(bytes)
    const first = await upload(gateway, bytes)
    assert.equal([first.status, first.body], [201, { blob: digest, size }])
    assert.is(first.headers.get('location'), `/v1/blobs/${digest}`)
    assert.equal((await upload(gateway, bytes)).status, 200)

    const answer = await fetch(`${gateway.url}/v1/blobs/${digest}`)
    assert.equal([answer.status, answer.headers.get('content-length')], [200, String(size)])
    assert.is(Buffer.compare(Buffer.from(await answer.arrayBuffer()), bytes), 0)
    const head = await fetch(`${gateway.url}/v1/blobs/${digest}`, { method: 'HEAD' })
    assert.equal([head.status, head.headers.get('content-length')], [200, String(size)])
    assert.is(await head.text(), '')
    assert.equal(await spooled(), [])
  })

test('bytes that come without a length are taken up to the limit', async () => {
  await using on = await ground()
  await using gateway = await startGateway(on, { maxBodyBytes: 1_000_000 })
  const send = (parts: number) =>
    call(gateway, 'POST', '/v1/blobs', {
      raw: ReadableStream.from(Array.from({ length: parts }, () => new Uint8Array(100_000))),
      headers: binary,
    })
  assert.equal((await send(10)).body.size, 1_000_000)
  const refused = await send(11)
  assert.equal([refused.status, refused.body.code], [413, 'payload_too_large'])
  const declared = await upload(gateway, Buffer.alloc(1_000_001))
  assert.equal([declared.status, declared.body.code], [413, 'payload_too_large'])
  assert.equal(await spooled(), [])
})

test('bytes that are not what the client says they are are not stored', async () => {
  await using on = await ground()
  await using gateway = await startGateway(on)
  const bytes = Buffer.from('hello')
  const digest = digestOf(bytes)
  assert.is((await upload(gateway, bytes, `?digest=${digest}`)).status, 201)
  assert.is((await upload(gateway, bytes, '', { 'x-vulcan-digest': digest })).status, 200)
  const other = Buffer.from('other')
  for (const answer of [
    await upload(gateway, other, `?digest=${digest}`),
    await upload(gateway, other, '', { 'x-vulcan-digest': digest }),
  ]) {
    assert.equal([answer.status, answer.body.code], [422, 'digest_mismatch'])
    assert.match(answer.body.detail, digestOf(other))
  }
  assert.is((await call(gateway, 'GET', `/v1/blobs/${digestOf(other)}`)).status, 404)
  const query = await upload(gateway, bytes, '?digest=abc')
  assert.equal([query.status, query.body.code], [400, 'invalid_query'])
  const header = await upload(gateway, bytes, '', { 'x-vulcan-digest': 'abc' })
  assert.equal([header.status, header.body.code], [400, 'invalid_header'])
})

test('what there is not is answered as that, also to HEAD', async () => {
  await using on = await ground()
  await using gateway = await startGateway(on)
  for (const digest of [digestOf('never'), 'abc', 'sha256:', '..%2f..']) {
    const answer = await call(gateway, 'GET', `/v1/blobs/${digest}`)
    assert.equal([answer.status, answer.body.code], [404, 'blob_not_found'])
    assert.is((await call(gateway, 'HEAD', `/v1/blobs/${digest}`)).status, 404)
  }
})

test('a blob that lost its bytes is not answered with a 200', async () => {
  await using on = await ground()
  await using gateway = await startGateway(on)
  const { body } = await upload(gateway, randomBytes(300_000))
  await on.bus.jsm.streams.purge(`OBJ_${BLOBS}`, { filter: `$O.${BLOBS}.C.>` })
  const answer = await call(gateway, 'GET', `/v1/blobs/${body.blob}`)
  assert.equal([answer.status, answer.body.code], [500, 'internal'])
})

test('a client that goes away in the middle leaves nothing', async () => {
  await using on = await ground()
  await using gateway = await startGateway(on)
  await new Promise<void>((resolve) => {
    const sending = request(`${gateway.url}/v1/blobs`, {
      method: 'POST',
      headers: { ...binary, 'content-length': '1000000' },
    })
    sending.on('error', () => resolve())
    sending.write(Buffer.alloc(500_000), () => sending.destroy(new Error('gone')))
  })
  await until('the spooled file to have no name', async () => (await spooled()).length === 0 || undefined)
  assert.equal(await on.blobs.list(), [])
  assert.is((await upload(gateway, Buffer.from('after'))).status, 201)
})

test.run()
