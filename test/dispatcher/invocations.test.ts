import { rm } from 'node:fs/promises'
import { fileURLToPath } from 'node:url'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { referenced } from '../../dispatcher/retention.ts'
import type { Accepted, HttpAnswer, HttpCall } from '../../shared/events.ts'
import { digestOf } from '../../shared/ids.ts'
import { dump, folded, getJson, makeWorld } from './support.ts'

const ref = (text: string) => ({ blob: digestOf(text), size: text.length })
const call: HttpCall = {
  method: 'POST',
  url: 'http://h/fn/hello/a?b',
  headers: [['x', 'y']],
  sealed: null,
  body: { text: 'request words' },
  gateway: null,
}
const answer: HttpAnswer = {
  status: 201,
  headers: [['content-type', 'text/plain']],
  sealed: 'v1.sealed',
  body: { text: 'response words' },
}
const of = (name: string): Pick<Accepted, 'function' | 'bundle'> => ({
  function: { name, version: 'v0123456789abcdef', ref: 'live' },
  bundle: { ...ref('code'), map: null },
})

test('an invocation is listed by its function, and its answer kept beside the row that lists it', async () => {
  await using world = await makeWorld()
  const { publish, bus, databaseUrl } = world
  const dispatcher = await world.dispatcher()
  const plain = await publish.run()
  const id = await publish.accepted({ ...of('hello'), http: call })
  await publish.started(id)
  await publish.ended(id, 'completed', { output: null, response: answer })
  const failed = await publish.accepted({ ...of('other'), http: { ...call, body: 'live', gateway: 'g' } })
  await publish.started(failed)
  await publish.ended(failed, 'failed', { cause: 'user_error', output: null })
  await folded(dispatcher, bus)

  const { body: list } = await getJson(`${dispatcher.url}/v1/workloads?function=hello`)
  assert.equal(
    list.workloads.map(({ id }: { id: string }) => id),
    [id],
  )
  assert.equal(list.workloads[0].function, of('hello').function)
  assert.equal(list.workloads[0].http, { method: 'POST', path: '/fn/hello/a', status: 201 })
  assert.not.match(JSON.stringify(list), 'response words')
  const { body: other } = await getJson(`${dispatcher.url}/v1/workloads/${failed}`)
  assert.equal(other.http, { method: 'POST', path: '/fn/hello/a', status: null })
  const { body: none } = await getJson(`${dispatcher.url}/v1/workloads/${plain}`)
  assert.equal([none.function, none.http], [null, null])

  const { body: record } = await getJson(`${dispatcher.url}/internal/workloads/${id}`)
  assert.equal(record.response, answer)
  assert.equal(record.bundle, of('hello').bundle)

  // A database that was lost is the same again once the stream has been folded anew.
  const before = await dump(databaseUrl)
  await dispatcher[Symbol.asyncDispose]()
  for (const suffix of ['', '-wal', '-shm'])
    await rm(`${fileURLToPath(databaseUrl)}${suffix}`, { force: true })
  const second = await world.dispatcher()
  await folded(second, bus)
  assert.equal((await dump(databaseUrl)).workloads, before.workloads)
})

test('blobs of a request and a response are referred to by their row', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const dispatcher = await world.dispatcher()
  const id = await publish.accepted({ ...of('hello'), http: { ...call, body: ref('request') } })
  await publish.started(id)
  await publish.ended(id, 'completed', { output: null, response: { ...answer, body: ref('response') } })
  await folded(dispatcher, bus)
  const digests = ['request', 'response', 'free'].map(digestOf)
  assert.equal([...(await referenced(dispatcher.live.database!, digests))], digests.slice(0, 2))
})

test.run()
