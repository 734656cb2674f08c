// timeout: 120
import { request } from 'node:http'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { EVENTS } from '../../shared/topology.ts'
import { type Answer, call, type Gateway, post, site } from './support.ts'

const code = 'export default () => 1'
const problem = (answer: Answer) => [answer.status, answer.body.code, answer.body.field]

/** The stream has only the events of `n` accepted workloads. */
const nothingStored = async (on: { bus: Gateway['bus'] }) =>
  assert.is((await on.bus.jsm.streams.info(EVENTS)).state.messages, 0)

test('a spec that is not acceptable is refused with the path of what is wrong, and nothing is stored', async () => {
  await using here = await site()
  const expected: [unknown, string][] = [
    [{}, 'code'],
    [{ code, image: 'a/b:1' }, 'image'],
    [{ code, archive: { blob: `sha256:${'0'.repeat(64)}` } }, 'archive'],
    [{ code: '' }, 'code'],
    [{ code: 5 }, 'code'],
    [{ code, isolation: 'jail' }, 'isolation'],
    [{ code, isolation: [] }, 'isolation'],
    [{ code, isolation: ['isolate', 'jail'] }, 'isolation'],
    [{ code, runtime: 'cobol' }, 'runtime'],
    [{ code, limits: { timeout_s: 0 } }, 'limits.timeout_s'],
    [{ code, limits: { timeout_s: '5' } }, 'limits.timeout_s'],
    [{ code, limits: { memory_mb: 1.5 } }, 'limits.memory_mb'],
    [{ code, limits: { memory: 5 } }, 'limits.memory'],
    [{ code, limits: null }, 'limits'],
    [{ code, network: { egress: 'some' } }, 'network.egress'],
    [{ code, network: { egress: 'none', dns: true } }, 'network.dns'],
    [{ code, retry: { on: ['boredom'] } }, 'retry.on[0]'],
    [{ code, env: { MODE: 1 } }, 'env.MODE'],
    [{ code, env: { '1A': 'x' } }, 'env.1A'],
    [{ code, env: { MODE: 'a\0b' } }, 'env.MODE'],
    [{ code, entrypoint: 'a\0b' }, 'entrypoint'],
    [{ code, entrypoint: ['sh', 'a\0b'] }, 'entrypoint[1]'],
    [{ code, labels: { team: null } }, 'labels.team'],
    [{ code, archive: { blob: 'md5:1' }, extra: 1 }, 'archive.blob'],
    [{ code, extra: 1 }, 'extra'],
    [{ archive: { blob: `sha256:${'0'.repeat(64)}`, path: '/' } }, 'archive.path'],
    [{ image: { blob: 'sha256:short' } }, 'image.blob'],
    [{ image: 5 }, 'image'],
    [{ code, entrypoint: [] }, 'entrypoint'],
    [{ code, secrets: ['STRIPE_KEY'] }, 'secrets[0]'],
    [[], ''],
    [null, ''],
    ['text', ''],
    [17, ''],
  ]
  for (const [body, field] of expected) {
    const answer = await post(here.gateway, body)
    assert.is(answer.status, 422, JSON.stringify(body))
    assert.is(answer.headers.get('content-type'), 'application/problem+json')
    assert.is(answer.body.field, field, JSON.stringify([body, answer.body]))
    assert.ok(['invalid_field', 'secret_not_found'].includes(answer.body.code))
    assert.ok(answer.body.detail.length > 0)
  }
  await nothingStored(here.on)
})

test('everything wrong is listed, but not without end', async () => {
  await using here = await site()
  const answer = await post(here.gateway, { code, a: 1, limits: { b: 2, pids: 0 } })
  assert.equal(answer.body.errors.map(({ field }: { field: string }) => field).sort(), [
    'a',
    'limits.b',
    'limits.pids',
  ])
  const many = Object.fromEntries(Array.from({ length: 5_000 }, (_, i) => [`unknown_${i}`, i]))
  const long = await post(here.gateway, { code, ...many })
  assert.is(long.status, 422)
  assert.ok(JSON.stringify(long.body).length < 20_000)
})

test('names that mean something to JavaScript are names like others', async () => {
  await using here = await site()
  for (const raw of ['{"code":"x","__proto__":{"isolation":"jail"}}', '{"code":"x","constructor":1}'])
    assert.is((await call(here.gateway, 'POST', '/v1/workloads', { raw })).status, 422, raw)
  const raw = '{"code":"x","input":{"__proto__":{"a":1},"constructor":2}}'
  const answer = await call(here.gateway, 'POST', '/v1/workloads', { raw })
  assert.is(answer.status, 200)
  assert.ok(Object.hasOwn(answer.body.output, '__proto__'))
})

test('an isolation that is not there is refused with what would bring it', async () => {
  await using here = await site()
  for (const isolation of ['gvisor', 'docker', 'microvm', ['microvm', 'gvisor']]) {
    const answer = await post(here.gateway, { code, isolation })
    assert.equal(problem(answer), [422, 'isolation_unavailable', 'isolation'])
    for (const name of [isolation].flat()) assert.match(answer.body.detail, `npm run setup -- ${name}`)
  }
  await nothingStored(here.on)
})

test('what is not JSON is refused as such', async () => {
  await using here = await site()
  for (const raw of ['', '{', '{"code":}', 'code=x', '\ufeff', '{"a":1}{"b":2}']) {
    const answer = await call(here.gateway, 'POST', '/v1/workloads', {
      raw,
      headers: { 'content-type': 'application/json' },
    })
    assert.equal(problem(answer), [400, 'malformed_json', undefined], raw)
  }
})

test('a body that is not declared as JSON is refused', async () => {
  await using here = await site()
  const raw = JSON.stringify({ code })
  for (const type of [
    'text/plain',
    'application/x-www-form-urlencoded',
    'application/jsonp',
    'multipart/form-data',
  ])
    assert.equal(
      problem(await call(here.gateway, 'POST', '/v1/workloads', { raw, headers: { 'content-type': type } })),
      [415, 'unsupported_media_type', undefined],
      type,
    )
  assert.is(await statusWithoutType(here.gateway, raw), 415)
  for (const type of ['application/json', 'APPLICATION/JSON; charset=utf-8', 'application/vnd.vulcan+json'])
    assert.is(
      (await call(here.gateway, 'POST', '/v1/workloads', { raw, headers: { 'content-type': type } })).status,
      200,
      type,
    )
})

function statusWithoutType(gateway: Gateway, body: string): Promise<number | undefined> {
  return new Promise((resolve, reject) => {
    const outgoing = request(`${gateway.url}/v1/workloads`, { method: 'POST' }, (answer) => {
      answer.resume()
      resolve(answer.statusCode)
    })
    outgoing.on('error', reject)
    outgoing.end(body)
  })
}

test('a bad header is refused by its name, before anything is stored', async () => {
  await using here = await site()
  const bad: [Record<string, string>, string][] = [
    [{ prefer: 'wait=soon' }, 'Prefer'],
    [{ 'idempotency-key': 'k'.repeat(256) }, 'Idempotency-Key'],
    [{ 'idempotency-key': '' }, 'Idempotency-Key'],
  ]
  for (const [headers, field] of bad)
    assert.equal(problem(await post(here.gateway, { code }, headers)), [400, 'invalid_header', field])
  await nothingStored(here.on)
  assert.is((await post(here.gateway, { code }, { 'idempotency-key': 'k'.repeat(255) })).status, 200)
})

test('an id that is none is unknown, and never reaches the bus', async () => {
  await using here = await site()
  const heard: string[] = []
  here.on.bus.listen('$JS.API.STREAM.MSG.GET.VULCAN_EVENTS', (message) => heard.push(message.string()))
  here.on.bus.listen('$JS.API.DIRECT.GET.>', (message) => heard.push(message.subject))
  here.on.bus.listen('vulcan.control.>', (message) => heard.push(message.subject))
  await here.on.bus.flush()
  for (const id of ['*', '>', '%3E', '%2A', 'a.b', 'async', '..%2f..', '%00', '%zz', 'x'.repeat(5_000), '0'])
    for (const [method, path] of [
      ['GET', `/v1/workloads/${id}`],
      ['GET', `/v1/workloads/${id}/logs`],
      ['DELETE', `/v1/workloads/${id}`],
      ['POST', `/v1/workloads/${id}/kill`],
      ['POST', `/v1/workloads/${id}/rerun`],
    ] as const) {
      const answer = await call(here.gateway, method, path)
      assert.is(answer.status, 404, `${method} ${path}`)
      assert.is(answer.headers.get('content-type'), 'application/problem+json')
    }
  await here.gateway.bus.flush()
  assert.equal(heard, [])
})

test('an unknown route is 404, a known one under another method 405 with what it takes', async () => {
  await using here = await site()
  for (const path of ['/', '/v1', '/v1/nothing', '/v1/schemas/events/none', '/v2/workloads']) {
    const answer = await call(here.gateway, 'GET', path)
    assert.equal(problem(answer), [404, 'not_found', undefined], path)
  }
  const id = '01890000-0000-7000-8000-000000000000'
  const wrong: [string, string, string][] = [
    ['PUT', '/v1/workloads', 'GET, POST'],
    ['DELETE', '/v1/backends', 'GET'],
    ['POST', '/openapi.json', 'GET'],
    ['PATCH', `/v1/workloads/${id}`, 'GET, DELETE'],
    ['GET', `/v1/workloads/${id}/kill`, 'POST'],
    ['POST', '/healthz', 'GET'],
  ]
  for (const [method, path, allow] of wrong) {
    const answer = await call(here.gateway, method, path)
    assert.equal(problem(answer), [405, 'method_not_allowed', undefined], `${method} ${path}`)
    assert.is(answer.headers.get('allow'), allow)
  }
})

test('input may be nested deeply: it comes back whole or is refused by its path', async () => {
  await using here = await site()
  for (const depth of [100, 1_000, 5_000, 50_000, 200_000]) {
    const raw = `{"code":"x","input":${'['.repeat(depth)}${']'.repeat(depth)}}`
    const answer = await call(here.gateway, 'POST', '/v1/workloads', { raw })
    if (answer.status === 200) assert.is(answer.body.status, 'completed', String(depth))
    else assert.equal(problem(answer), [422, 'invalid_field', 'input'], String(depth))
    if (depth <= 1_000) assert.is(answer.status, 200)
  }
  assert.is((await post(here.gateway, { code })).status, 200)
})

test.run()
