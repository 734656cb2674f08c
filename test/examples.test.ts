// timeout: 240
import { createHmac } from 'node:crypto'
import { join } from 'node:path'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { deployFolder, putSecretOnce } from '../scripts/deploy.ts'
import { deployExamples, exampleNames, examplesFolder } from '../scripts/examples.ts'
import type { Platform } from '../scripts/platform.ts'
import type { Workload } from '../shared/workload.ts'
import { http, startTestPlatform } from './platform.ts'

const examples = suite<{ platform: Platform; url: string; lines: string[] }>('examples')
const secret = 'the shared secret'

examples.before(async (context) => {
  context.platform = await startTestPlatform()
  context.url = context.platform.url
  context.lines = []
  await putSecretOnce(context.url, 'WEBHOOK_SECRET', secret)
  await deployExamples(context.url, (line) => context.lines.push(line))
})
examples.after(async ({ platform }) => {
  await platform?.[Symbol.asyncDispose]()
})

const invoke = async (url: string, name: string, input: unknown): Promise<Workload> => {
  const answer = await http<Workload>(`${url}/v1/functions/${name}/invocations`, { body: input })
  assert.is(answer.status, 200, JSON.stringify(answer.body))
  return answer.body
}

examples(
  'every example was deployed, and deploying again leaves them as they are',
  async ({ url, lines }) => {
    const names = exampleNames()
    assert.is(names.length, 8)
    assert.equal(
      lines.map((line) => /^example (\S+) is deployed/.exec(line)?.[1]),
      names,
      lines.join('\n'),
    )
    const more: string[] = []
    await deployExamples(url, (line) => more.push(line))
    assert.equal(more, [])
    const again = await deployFolder(url, 'hono-app', join(examplesFolder, 'hono-app'))
    assert.is(again.created, false)
  },
)

examples('hello-js answers over HTTP', async ({ url }) => {
  const answer = await fetch(`${url}/fn/hello-js?name=vulcan`)
  assert.equal([answer.status, await answer.text()], [200, 'hello, vulcan\n'])
  assert.match(answer.headers.get('x-vulcan-workload-id') ?? '', /^[0-9a-f-]{36}$/)
})

examples('hello-ts answers JSON', async ({ url }) => {
  const workload = await invoke(url, 'hello-ts', { name: 'vulcan', language: 'de' })
  assert.equal([workload.status, workload.output], ['completed', { greeting: 'hallo, vulcan' }])
  assert.is(workload.function?.name, 'hello-ts')
})

examples('hono-app routes, with middleware, parameters and JSON bodies', async ({ url }) => {
  const app = `${url}/fn/hono-app`
  const list = await fetch(`${app}/books?q=cities`)
  assert.equal(await list.json(), [{ id: '2', title: 'Invisible Cities' }])
  assert.match(list.headers.get('server-timing') ?? '', /^app;dur=/)
  assert.is(list.headers.get('access-control-allow-origin'), '*')
  assert.ok(list.headers.get('x-request-id'))
  const one = await http(`${app}/books/1`)
  assert.equal([one.status, one.body.title], [200, 'The Left Hand of Darkness'])
  const made = await http(`${app}/books`, { body: { title: 'Kindred' } })
  assert.equal([made.status, made.body.title], [201, 'Kindred'])
  assert.is((await http(`${app}/books`, { body: {} })).status, 422)
  const long = await fetch(`${app}/books`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ title: 'x'.repeat(20_000) }),
  })
  assert.is(long.status, 413)
  const missing = await http(`${app}/nowhere`)
  assert.equal([missing.status, missing.body], [404, { error: 'there is no /nowhere' }])
})

examples('zod-json says what is wrong, or the total', async ({ url }) => {
  const line = { sku: 'x', quantity: 3, price: 1.5 }
  const good = await invoke(url, 'zod-json', { customer: 'a@b.example', lines: [line] })
  assert.equal(good.output, { accepted: true, customer: 'a@b.example', total: 4.5 }, JSON.stringify(good))
  const bad = await invoke(url, 'zod-json', { customer: 'nobody', lines: [{ ...line, quantity: 0 }] })
  const { accepted, errors } = bad.output as { accepted: boolean; errors: { field: string }[] }
  assert.equal([accepted, errors.map(({ field }) => field)], [false, ['customer', 'lines.0.quantity']])
})

examples('sse-clock sends its ticks as they happen', async ({ url }) => {
  const answer = await fetch(`${url}/fn/sse-clock?count=3&ms=400`)
  assert.is(answer.headers.get('content-type'), 'text/event-stream')
  const arrivals: number[] = []
  let text = ''
  for await (const part of answer.body!) {
    arrivals.push(performance.now())
    text += Buffer.from(part).toString()
  }
  assert.equal(text.match(/^id: \d+$/gm), ['id: 1', 'id: 2', 'id: 3'])
  assert.ok(arrivals.at(-1)! - arrivals[0]! > 500, 'the first came before the last was sent')
})

examples('wasm-image draws a PNG', async ({ url }) => {
  const answer = await fetch(`${url}/fn/wasm-image?values=3,1,4&width=120`)
  const bytes = Buffer.from(await answer.arrayBuffer())
  assert.equal([answer.status, answer.headers.get('content-type')], [200, 'image/png'], bytes.toString())
  assert.is(bytes.subarray(0, 8).toString('hex'), '89504e470d0a1a0a')
  assert.is(bytes.readUInt32BE(16), 120)
  assert.is((await fetch(`${url}/fn/wasm-image?values=-1`)).status, 422)
})

examples('scheduled-report gives the same for the same day', async ({ url }) => {
  const one = await invoke(url, 'scheduled-report', { day: '2026-01-31' })
  const two = await invoke(url, 'scheduled-report', { day: '2026-01-31' })
  assert.is(one.status, 'completed', JSON.stringify(one))
  assert.equal(one.output, two.output)
  assert.is((one.output as { day: string }).day, '2026-01-31')
})

examples('webhook-hmac takes what is signed and refuses all else', async ({ url }) => {
  const body = JSON.stringify({ type: 'paid' })
  const send = (headers: Record<string, string>, method = 'POST') =>
    fetch(`${url}/fn/webhook-hmac`, { method, headers, ...(method === 'POST' ? { body } : {}) })
  const signature = (key: string) => `sha256=${createHmac('sha256', key).update(body).digest('hex')}`
  const good = await send({ 'x-signature-256': signature(secret) })
  const text = await good.text()
  assert.equal([good.status, text], [200, '{"received":"paid"}'])
  assert.is((await send({ 'x-signature-256': signature('another') })).status, 401)
  assert.is((await send({})).status, 401)
  assert.is((await send({}, 'GET')).status, 405)
})

examples.run()
