// timeout: 170
import { execFile } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm, truncate, writeFile } from 'node:fs/promises'
import { request } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { AcceptedEvent } from '../../shared/events.ts'
import { sha256Hex } from '../../shared/ids.ts'
import { EVENTS } from '../../shared/topology.ts'
import { skip } from '../harness.ts'
import { codeOf, completed } from '../runners/support.ts'
import { until, untilEnd } from '../shared/support.ts'
import { call, type Gateway, post, type Site, site } from './support.ts'

const MiB = 1_048_576
const spec = { code: 'export default (input) => input' }
const execute = promisify(execFile)
const hasCurl = await execute('curl', ['--version']).then(
  () => true,
  () => false,
)

const storedEvents = async ({ on }: Site) => (await on.bus.jsm.streams.info(EVENTS)).state.messages
const storedBlobs = async ({ on }: Site) => (await on.blobs.list()).length

/** Sends `total` bytes as node’s own client does, by chunks, and gives the answer it gets meanwhile. */
async function send(
  gateway: Gateway,
  total: number,
  headers: Record<string, string | number>,
): Promise<{ status: number | undefined; body: string }> {
  const outgoing = request(`${gateway.url}/v1/workloads`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...headers },
  })
  let answered = false
  // The server may close while the body is still being sent: that is no matter once the answer is there.
  outgoing.on('error', () => {})
  const answer = once(outgoing, 'response').then(async ([response]) => {
    answered = true
    let body = ''
    for await (const part of response) body += part
    return { status: response.statusCode as number, body }
  })
  const chunk = Buffer.alloc(64 * 1_024, ' ')
  for (let sent = 0; sent < total && !answered && !outgoing.destroyed; sent += chunk.length)
    if (!outgoing.write(chunk)) await Promise.race([once(outgoing, 'drain').catch(() => {}), answer])
  if (!answered) outgoing.end()
  return await answer
}

test('a declared 200 MB is 413 before it is sent, and nothing is stored', async () => {
  await using here = await site()
  const { status, body } = await send(here.gateway, 200 * MiB, { 'content-length': 200 * MiB })
  assert.is(status, 413)
  assert.is(JSON.parse(body).code, 'payload_too_large')
  assert.match(JSON.parse(body).detail, '64 MiB')
  assert.is(await storedEvents(here), 0)
  assert.is(await storedBlobs(here), 0)
  assert.is((await post(here.gateway, spec)).status, 200)
})

test('a body in chunks is 413 once it is over 64 MiB, and nothing is stored', async () => {
  await using here = await site()
  const { status, body } = await send(here.gateway, 80 * MiB, { 'transfer-encoding': 'chunked' })
  assert.is(status, 413)
  assert.is(JSON.parse(body).code, 'payload_too_large')
  assert.is(await storedEvents(here), 0)
  assert.is(await storedBlobs(here), 0)
  assert.is((await post(here.gateway, spec)).status, 200)
})

test('the limit is inclusive: as many bytes are read, one more is not', async () => {
  await using here = await site({ maxBodyBytes: 2_000_000 })
  const raw = JSON.stringify({ ...spec, input: 'x'.repeat(1_000_000) }).padEnd(2_000_000)
  const inChunks = (text: string) => new Blob([text]).stream()
  const statuses = [raw, `${raw} `, inChunks(raw), inChunks(`${raw} `)].map(
    async (raw) => (await call(here.gateway, 'POST', '/v1/workloads', { raw })).status,
  )
  assert.equal(await Promise.all(statuses), [200, 413, 200, 413])
})

const curlForms: [string, string[]][] = [
  ['as it comes', []],
  ['without waiting for 100 Continue', ['-H', 'Expect:']],
  ['in chunks', ['-H', 'Transfer-Encoding: chunked', '-H', 'Expect:']],
]
for (const [form, options] of curlForms) {
  const name = `curl shows the 413 of a 200 MB body sent ${form}`
  if (!hasCurl) skip(test, name, 'curl is not installed')
  else
    test(name, async () => {
      await using here = await site()
      const folder = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
      try {
        const file = join(folder, 'body')
        await writeFile(file, '')
        await truncate(file, 200 * MiB)
        const { stdout } = await execute('curl', [
          ...['-sS', '-m', '30', '-X', 'POST', '-H', 'Content-Type: application/json', ...options],
          ...['-T', file, '-w', '\n%{http_code}', `${here.gateway.url}/v1/workloads`],
        ])
        assert.match(stdout, /"code":"payload_too_large"[^\n]*\n413$/)
        assert.is(await storedEvents(here), 0)
      } finally {
        await rm(folder, { recursive: true })
      }
    })
}

test('twenty small bodies in chunks at once are all read', async () => {
  await using here = await site()
  const body = JSON.stringify({ ...spec, input: 1 })
  const open: ReadableStreamDefaultController[] = []
  const answers = Array.from({ length: 20 }, () =>
    call(here.gateway, 'POST', '/v1/workloads', {
      raw: new ReadableStream({
        start(controller) {
          controller.enqueue(Buffer.from(body.slice(0, 10)))
          open.push(controller)
        },
      }),
    }),
  )
  await new Promise((resolve) => setTimeout(resolve, 300))
  for (const controller of open) {
    controller.enqueue(Buffer.from(body.slice(10)))
    controller.close()
  }
  for (const { status } of await Promise.all(answers)) assert.is(status, 200)
})

for (const megabytes of [5, 60])
  test(`an input of ${megabytes} MB goes by claim check, unseen by the client`, async () => {
    await using here = await site({
      code: (job) => completed({ length: JSON.parse(job.input!).text.length, sha256: sha256Hex(job.input!) }),
    })
    const input = { text: 'x'.repeat(megabytes * 1_000_000) }
    const answer = await post(here.gateway, { ...spec, input, labels: { size: String(megabytes) } })
    assert.is(answer.status, 200)
    assert.equal(answer.body.output, { length: input.text.length, sha256: sha256Hex(JSON.stringify(input)) })
    const event = (await here.on.bus.acceptedEvent(answer.body.id))!.event as AcceptedEvent
    assert.is(event.data.spec.input, undefined)
    assert.is(event.data.spec.code, undefined)
    assert.equal(event.data.spec.labels, { size: String(megabytes) })
    assert.ok(event.data.payload!.size > megabytes * 1_000_000)
  })

test('large code goes by claim check too; rerun runs the very same', async () => {
  await using here = await site({ code: (job) => completed([sha256Hex(codeOf(job)), job.input ?? null]) })
  const code = `// ${'c'.repeat(2_000_000)}`
  const first = await post(here.gateway, { code, input: { a: 1 } })
  assert.equal(first.body.output, [sha256Hex(code), '{"a":1}'])
  const again = await call(here.gateway, 'POST', `/v1/workloads/${first.body.id}/rerun`, {
    headers: { prefer: 'wait=20' },
  })
  assert.is(again.status, 200)
  assert.equal(again.body.output, first.body.output)
  assert.is(await storedBlobs(here), 1)

  const blob = ((await here.on.bus.acceptedEvent(first.body.id))!.event as AcceptedEvent).data.payload!.blob
  await here.on.blobs.removeStale(blob, Date.now() + 1_000)
  const late = await call(here.gateway, 'POST', `/v1/workloads/${first.body.id}/rerun`)
  assert.is(late.status, 404)
  assert.is(late.body.code, 'blob_not_found')
})

test('without an input a large one stays without', async () => {
  await using here = await site({ code: (job) => completed(job.input === undefined) })
  const answer = await post(here.gateway, { code: `// ${'c'.repeat(700_000)}` })
  assert.is(answer.body.output, true)
})

test('bodies that grow by being written again are measured as they are stored', async () => {
  await using here = await site({ code: (job) => completed(JSON.parse(job.input!).length) })
  const numbers = `{"code":"x","input":[${Array(90_000).fill('1e20').join()}]}`
  const bytes = Buffer.concat([
    Buffer.from('{"code":"x","input":"'),
    Buffer.alloc(500_000, 0xff),
    Buffer.from('"}'),
  ])
  for (const [raw, length] of [
    [numbers, 90_000],
    [bytes, 500_000],
  ] as const) {
    const answer = await call(here.gateway, 'POST', '/v1/workloads', { raw })
    assert.is(answer.status, 200)
    assert.is(answer.body.output, length)
  }
  assert.is(await storedBlobs(here), 2)
})

test('what can only travel in the message is refused by its field when it is too large', async () => {
  await using here = await site()
  const env = Object.fromEntries(Array.from({ length: 40 }, (_, i) => [`NAME_${i}`, 'x'.repeat(30_000)]))
  const labels = Object.fromEntries(Array.from({ length: 20_000 }, (_, i) => [`label-${i}`, 'x'.repeat(60)]))
  for (const [field, body] of [
    ['env', { ...spec, env }],
    ['labels', { ...spec, labels }],
    ['env', { ...spec, env, input: 'x'.repeat(2_000_000) }],
  ] as const) {
    const answer = await post(here.gateway, body)
    assert.is(answer.status, 422, field)
    assert.is(answer.body.code, 'invalid_field')
    assert.is(answer.body.field, field)
  }
  assert.is(await storedBlobs(here), 0)
  assert.is(await storedEvents(here), 0)
  assert.is((await post(here.gateway, spec)).status, 200)
})

test('a large output comes back whole, to the one who waits and to a kill that is too late', async () => {
  const output = Array.from({ length: 300_000 }, (_, i) => i)
  await using here = await site({ code: () => completed(output) })
  const answer = await post(here.gateway, spec)
  assert.is(answer.status, 200)
  assert.equal(answer.body.output, output)
  const killed = await call(here.gateway, 'DELETE', `/v1/workloads/${answer.body.id}`)
  assert.is(killed.body.status, 'completed')
  assert.equal(killed.body.output, output)
})

test('a client that goes away while it sends leaves nothing behind', async () => {
  await using here = await site()
  for (const headers of [{ 'content-length': 10 * MiB }, { 'content-length': 1_000 }, {}]) {
    const outgoing = request(`${here.gateway.url}/v1/workloads`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', ...headers },
    })
    outgoing.on('error', () => {})
    outgoing.write('{"code":')
    await new Promise((resolve) => setTimeout(resolve, 100))
    outgoing.destroy()
  }
  await new Promise((resolve) => setTimeout(resolve, 200))
  assert.is(await storedEvents(here), 0)
  assert.is(here.gateway.waits.size, 0)
  const answer = await post(here.gateway, spec)
  assert.is(answer.status, 200)
  await until('its end', () => untilEnd(here.on.bus, answer.body.id))
})

test.run()
