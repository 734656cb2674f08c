// timeout: 120
import { randomBytes } from 'node:crypto'
import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Bus } from '../../shared/bus.ts'
import { credentialHeaders, SecretBox, SecretKeyError, Secrets } from '../../shared/secrets.ts'
import { SECRETS } from '../../shared/topology.ts'
import { ground, until } from './support.ts'

const newKey = () => randomBytes(32).toString('base64')
const boxOf = (key = newKey()) => SecretBox.open({ key, file: '/nowhere' })

async function folder(): Promise<AsyncDisposable & { path: string }> {
  const path = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) }
}

const rejection = (promise: Promise<unknown>): Promise<Error> =>
  promise.then(
    () => assert.unreachable('it did not reject') as never,
    (error) => error,
  )

test('what was sealed is opened by the same key and context only', async () => {
  const key = newKey()
  const box = await boxOf(key)
  for (const text of ['', 'x', 'geheim: äöü 🎉', 'y'.repeat(70_000)]) {
    const sealed = box.seal(text, 'here')
    assert.is((await boxOf(key)).unseal(sealed, 'here'), text)
    assert.throws(() => box.unseal(sealed, 'there'))
    assert.not.equal(box.seal(text, 'here'), sealed)
  }
  const other = await boxOf()
  assert.throws(() => other.unseal(box.seal('x', 'here'), 'here'))
})

test('no byte of what was sealed can be changed or left out', async () => {
  const box = await boxOf()
  const sealed = box.seal('some text', 'here')
  const bytes = Buffer.from(sealed.slice(3), 'base64url')
  for (let i = 0; i < bytes.length; i++) {
    const changed = Buffer.from(bytes)
    changed[i]! ^= 1
    assert.throws(() => box.unseal(`v1.${changed.toString('base64url')}`, 'here'))
    assert.throws(() => box.unseal(`v1.${bytes.subarray(0, i).toString('base64url')}`, 'here'))
  }
  for (const text of ['', 'v1.', 'v2.abc', 'some text']) assert.throws(() => box.unseal(text, 'here'))
  assert.is(box.unseal(sealed, 'here'), 'some text')
})

test('the key file is made once by whoever comes first, readable by its owner only', async () => {
  await using dir = await folder()
  const file = join(dir.path, 'deep', 'secrets.key')
  const boxes = await Promise.all(Array.from({ length: 10 }, () => SecretBox.open({ file })))
  const sealed = boxes[0]!.seal('x', 'here')
  for (const box of boxes) assert.is(box.unseal(sealed, 'here'), 'x')
  assert.is((await stat(file)).mode & 0o777, 0o600)
  assert.equal(await readdir(join(dir.path, 'deep')), ['secrets.key'])
  const before = await readFile(file, 'utf8')
  assert.is((await SecretBox.open({ file })).unseal(sealed, 'here'), 'x')
  assert.is(await readFile(file, 'utf8'), before)
  assert.is((await SecretBox.open({ key: before, file: '/nowhere' })).unseal(sealed, 'here'), 'x')
})

test('a key that is none is refused with what is wrong', async () => {
  await using dir = await folder()
  const file = join(dir.path, 'secrets.key')
  for (const text of ['', 'short', randomBytes(31).toString('base64')]) {
    await writeFile(file, text)
    const error = await rejection(SecretBox.open({ file }))
    assert.instance(error, SecretKeyError)
    assert.match(error.message, file)
    assert.match((await rejection(boxOf(text || '='))).message, 'VULCAN_SECRETS_KEY')
  }
  assert.match((await rejection(SecretBox.open({ file: join(file, 'below') }))).message, 'below')
})

test('secrets are put, named, opened and removed, seen by others, and stored only sealed', async () => {
  await using on = await ground()
  await using bus = await Bus.connect({ url: on.nats.url, name: 'other' })
  const key = newKey()
  const one = await Secrets.open(on.bus, 1, await boxOf(key))
  const other = await Secrets.open(bus, 1, await boxOf(key))
  await one.put('B', 'second value')
  await one.put('A', 'first value')
  assert.equal(one.names(), ['A', 'B'])
  assert.equal(one.values(['A', 'B']), { A: 'first value', B: 'second value' })
  await until('the others', () => other.has('A') || undefined)
  assert.equal(other.values(['B', 'A']), { A: 'first value', B: 'second value' })
  assert.throws(() => one.values(['A', 'C', 'D']), /no secret C, D/)

  const { state } = await on.bus.jsm.streams.info(`KV_${SECRETS}`)
  for (let seq = 1; seq <= state.last_seq; seq++) {
    const text = (await on.bus.jsm.streams.getMessage(`KV_${SECRETS}`, { seq }))!.string()
    assert.not.match(text, /value/)
  }

  await one.put('A', 'changed')
  await until('the change', () => other.values(['A']).A === 'changed' || undefined)
  assert.is(await one.remove('A'), true)
  assert.is(await one.remove('A'), false)
  assert.not(one.has('A'))
  await until('the removal', () => !other.has('A') || undefined)
  await other.put('A', 'again')
  assert.is(other.values(['A']).A, 'again')
  one.close()
  other.close()
})

test('a sealed value moved under another name, or sealed with another key, is not opened', async () => {
  await using on = await ground()
  const secrets = await Secrets.open(on.bus, 1, await boxOf())
  await secrets.put('A', 'value')
  const sealed = (await on.bus.jsm.streams.getMessage(`KV_${SECRETS}`, { seq: 1 }))!.data
  await on.bus.js.publish(`$KV.${SECRETS}.B`, sealed)
  await until('B', () => secrets.has('B') || undefined)
  assert.throws(() => secrets.values(['B']), /secret B was encrypted with another key/)
  const foreign = await Secrets.open(on.bus, 1, await boxOf())
  assert.equal(foreign.names(), ['A', 'B'])
  assert.throws(() => foreign.values(['A']), /secret A was encrypted with another key/)
  secrets.close()
  foreign.close()
})

test('credential headers are named in lower case', () => {
  for (const name of ['authorization', 'proxy-authorization', 'cookie', 'set-cookie', 'x-api-key'])
    assert.ok(credentialHeaders.has(name))
})

test.run()
