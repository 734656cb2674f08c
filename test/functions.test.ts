/** Deployed functions on a whole platform, with real sandboxes. */
import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { fetchRaw, open, type Raw, read } from './gateway/functions.ts'
import { http, startTestPlatform } from './platform.ts'
import { until } from './shared/support.ts'

const deploy = async (url: string, name: string, spec: object) => {
  const answer = await http(`${url}/v1/functions/${name}`, { method: 'PUT', body: spec })
  assert.is(answer.status, 201, JSON.stringify(answer.body))
}
// biome-ignore lint/suspicious/noExplicitAny: answers are looked into field by field.
const workloadOf = async (url: string, answer: Pick<Raw, 'headers'>): Promise<any> =>
  (await http(`${url}/v1/workloads/${answer.headers['x-vulcan-workload-id']}`)).body
const linesOf = async (url: string, id: string): Promise<string[]> => {
  const { body } = await http<{ lines: { text: string }[] }>(`${url}/v1/workloads/${id}/logs`)
  return body.lines.map(({ text }) => text)
}
async function* upload(pieces: number) {
  for (let i = 0; i < pieces; i++) yield Buffer.alloc(100_000, i)
}

test('functions are called by HTTP: bodies, streams, abort, errors and secrets, in real sandboxes', async () => {
  await using platform = await startTestPlatform()
  const { url } = platform

  await deploy(url, 'echo', {
    code: `export default { fetch: (request) => new Response(request.body, {
      status: 201, headers: { 'x-method': request.method, 'x-url': request.url } }) }`,
  })
  for (const method of ['GET', 'HEAD', 'POST', 'DELETE', 'OPTIONS']) {
    const body = method === 'POST' ? Buffer.from([0, 255, 1]) : undefined
    const answer = await fetchRaw(platform, '/fn/echo/a?b=c', {
      method,
      ...(body === undefined ? {} : { body }),
    })
    assert.is(answer.status, 201, method)
    assert.is(answer.headers['x-method'], method)
    assert.is(answer.headers['x-url'], `${url}/a?b=c`)
    assert.ok(answer.body.equals(body ?? Buffer.alloc(0)))
  }
  const large = await fetchRaw(platform, '/fn/echo', { method: 'PUT', body: upload(200) })
  assert.is(large.body.byteLength, 20_000_000)
  for (let i = 0; i < 200; i++)
    assert.ok(
      large.body.subarray(i * 100_000, (i + 1) * 100_000).every((byte) => byte === i % 256),
      `piece ${i}`,
    )

  await deploy(url, 'flow', {
    code: `let made = 0
      export default { fetch: () => new Response(new ReadableStream({ pull(controller) {
        if (++made > 300) return controller.close()
        console.log(made)
        controller.enqueue(new Uint8Array(100_000))
      } })) }`,
  })
  const flow = await open(platform, '/fn/flow')
  await delay(2_000)
  const before = (await linesOf(url, flow.headers['x-vulcan-workload-id'] as string)).length
  assert.ok(before > 5 && before < 200, `${before} pieces of 100 kB were made though nobody read`)
  assert.is((await read(flow)).body.byteLength, 30_000_000)

  await deploy(url, 'events', {
    code: `export default { fetch: () => new Response(new ReadableStream({ async start(controller) {
      for (let i = 0; i < 3; i++) {
        controller.enqueue(new TextEncoder().encode('data: ' + i + '\\n\\n'))
        await new Promise((resolve) => setTimeout(resolve, 200))
      }
      controller.close()
    } }), { headers: { 'content-type': 'text/event-stream' } }) }`,
  })
  const events: string[] = []
  for await (const part of await open(platform, '/fn/events')) events.push(String(part))
  assert.equal(events, ['data: 0\n\n', 'data: 1\n\n', 'data: 2\n\n'])

  await deploy(url, 'wait', {
    code: `export default { fetch: (request) => new Promise((resolve) =>
      request.signal.addEventListener('abort', () => { console.log('aborted'); resolve(new Response()) })) }`,
  })
  const stop = new AbortController()
  const waiting = fetch(`${url}/fn/wait`, { signal: stop.signal }).catch(() => {})
  const started = await until('it runs', async () => {
    const { body } = await http<{ workloads: { id: string; status: string }[] }>(
      `${url}/v1/workloads?function=wait`,
    )
    return body.workloads.find(({ status }) => status === 'running')
  })
  stop.abort()
  await waiting
  await until(
    'the abort to be seen',
    async () => (await linesOf(url, started.id)).includes('aborted') || undefined,
  )

  await deploy(url, 'broken', {
    files: {
      'index.ts': `import { boom } from './lib/boom.ts'\nexport default { fetch: (): Response => boom('private') }\n`,
      'lib/boom.ts': `type What = string\n\nexport function boom(what: What): Response {\n  throw new TypeError(what)\n}\n`,
    },
  })
  const broken = await fetchRaw(platform, '/fn/broken')
  assert.is(broken.status, 502)
  assert.not.match(broken.body.toString(), 'private')
  const { cause, error } = await workloadOf(url, broken)
  assert.is(cause, 'user_error')
  assert.match(error.stack, 'lib/boom.ts:4:9')

  await http(`${url}/v1/secrets/KEY`, { method: 'PUT', body: { value: 'hunter2222' } })
  await deploy(url, 'secret', {
    secrets: ['KEY'],
    code: `export default { fetch(request, env) { console.log(env.KEY); return new Response(String(env.KEY.length)) } }`,
  })
  const secret = await fetchRaw(platform, '/fn/secret')
  assert.is(secret.body.toString(), '10')
  const lines = await until('its line', async () => {
    const found = await linesOf(url, secret.headers['x-vulcan-workload-id'] as string)
    return found.length > 0 ? found : undefined
  })
  assert.equal(lines, ['[redacted: KEY]'])

  const later = await fetchRaw(platform, '/fn/echo', {
    method: 'POST',
    body: 'kept',
    headers: { prefer: 'respond-async', 'content-length': 4 },
  })
  assert.is(later.status, 202)
  const kept = await until('the response', async () => {
    const found = await fetchRaw(platform, `${later.headers.location}/response`)
    return found.status === 404 ? undefined : found
  })
  assert.is(kept.status, 201)
  assert.is(kept.body.toString(), 'kept')
})

test.run()
