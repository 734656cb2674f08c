// timeout: 240
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { canonical } from '../../gateway/versions.ts'
import { Blobs } from '../../shared/blobs.ts'
import { FunctionSpec, resolve } from '../../shared/functions.ts'
import { digestOf } from '../../shared/ids.ts'
import { laneConsumer, WORK } from '../../shared/topology.ts'
import { until } from '../shared/support.ts'
import { tarOf, tgzOf, zipOf } from './archives.ts'
import { type Answer, call, type Gateway, site, startGateway, untilKnown } from './support.ts'

const code = 'export default (input) => ({ y: input.x * 2 })'
const put = (gateway: Gateway, name: string, body: unknown) =>
  call(gateway, 'PUT', `/v1/functions/${name}`, { body })
const upload = (
  gateway: Gateway,
  name: string,
  bytes: Buffer,
  type = 'application/gzip',
  query = '',
): Promise<Answer> =>
  call(gateway, 'PUT', `/v1/functions/${name}${query}`, {
    raw: new Uint8Array(bytes),
    headers: { 'content-type': type },
  })
const refused = (answer: Answer, status: number, code: string, field?: string) => {
  assert.equal([answer.status, answer.body.code], [status, code], JSON.stringify(answer.body))
  if (field !== undefined) assert.is(answer.body.field, field)
  assert.is(answer.headers.get('content-type'), 'application/problem+json')
}

/** The code that runs of a version. */
async function bundleOf(gateway: Gateway, answer: Answer): Promise<string> {
  const blobs = await Blobs.open(gateway.bus, 1)
  return Buffer.from((await blobs.get(answer.body.bundle.blob))!).toString()
}

test('a function is put as code, answers where it is, and the same again is the same version', async () => {
  await using at = await site()
  const { gateway } = at
  const first = await put(gateway, 'double', { code })
  assert.is(first.status, 201)
  assert.match(first.body.version, /^v[0-9a-f]{16}$/)
  assert.is(first.headers.get('location'), '/v1/functions/double')
  assert.equal(
    [first.body.name, first.body.url, first.body.created, first.body.warnings, first.body.isolation],
    ['double', `${gateway.url}/fn/double`, true, [], 'isolate'],
  )
  assert.equal(first.body.aliases, { latest: { version: first.body.version } })
  assert.match(await bundleOf(gateway, first), 'x * 2')

  const again = await put(gateway, 'double', { code })
  assert.equal([again.status, again.body.created, again.body.version], [200, false, first.body.version])
  assert.is(again.body.updated_at, first.body.updated_at)
  const other = await put(gateway, 'double', { code, env: { MODE: 'test' } })
  assert.equal([other.status, other.body.created], [201, true])
  assert.is.not(other.body.version, first.body.version)
  assert.is(other.body.bundle.blob, first.body.bundle.blob)

  const { body } = await call(gateway, 'GET', '/v1/functions/double')
  assert.equal([body.version, body.versions, body.spec.env], [other.body.version, 2, { MODE: 'test' }])
  assert.not('code' in body.spec)
})

test('every form of the same project is the same version', async () => {
  await using at = await site()
  const { gateway } = at
  const files = {
    'index.ts': `import { twice } from './lib.ts'\nexport default (n: number) => twice(n)\n`,
    'lib.ts': 'export const twice = (n: number) => n * 2\n',
  }
  const entries = Object.entries(files).map(([path, text]) => ({ path, text }))
  const json = await put(gateway, 'forms', { files })
  assert.is(json.status, 201, JSON.stringify(json.body))
  const blob = await call(gateway, 'POST', '/v1/blobs', {
    raw: new Uint8Array(tgzOf(files)),
    headers: { 'content-type': 'application/octet-stream' },
  })
  const form = new FormData()
  form.set('spec', '{}')
  form.set('archive', new File([new Uint8Array(zipOf(entries))], 'a.zip'))
  const multipart = await fetch(`${gateway.url}/v1/functions/forms`, { method: 'PUT', body: form })
  const versions = [
    await upload(gateway, 'forms', tgzOf(files)),
    await upload(gateway, 'forms', tarOf(entries), 'application/x-tar'),
    await upload(gateway, 'forms', zipOf([...entries].reverse()), 'application/zip'),
    await put(gateway, 'forms', { archive: { blob: blob.body.blob } }),
    { status: multipart.status, body: await multipart.json() },
  ].map(({ status, body }) => [status, body.version])
  for (const version of versions) assert.equal(version, [200, json.body.version])
})

test('the spec of an archive stands in vulcan.json, in the query or in the form; the last two win', async () => {
  await using at = await site()
  const { gateway } = at
  await gateway.secrets.put('A', 'x')
  await gateway.secrets.put('B', 'x')
  const files = {
    'src/here.ts': 'export default 1',
    'there.js': 'export default 2',
    'vulcan.json': JSON.stringify({ entrypoint: 'src/here.ts', env: { A: '1' }, limits: { timeout_s: 5 } }),
  }
  const own = await upload(gateway, 'spec', tgzOf(files))
  assert.is(own.status, 201, JSON.stringify(own.body))
  assert.equal(
    [own.body.spec.entrypoint, own.body.spec.env, own.body.spec.limits.timeout_s],
    ['src/here.ts', { A: '1' }, 5],
  )
  assert.match(await bundleOf(gateway, own), 'src/here.ts')
  const query = '?entrypoint=there.js&env.B=2&env.C=a%20b&secrets=A,B&runtime=javascript'
  const asked = await upload(gateway, 'spec', tgzOf(files), 'application/gzip', query)
  assert.equal(
    [asked.body.spec.env, asked.body.spec.secrets, asked.body.spec.limits.timeout_s],
    [{ B: '2', C: 'a b' }, ['A', 'B'], 5],
  )
  assert.match(await bundleOf(gateway, asked), 'there.js')
  const form = new FormData()
  form.set('spec', JSON.stringify({ env: { D: '4' } }))
  form.set('archive', new Blob([new Uint8Array(tgzOf(files))]))
  const answer = await fetch(`${gateway.url}/v1/functions/spec`, { method: 'PUT', body: form })
  assert.equal(((await answer.json()) as Answer['body']).spec.env, { D: '4' })

  refused(
    await upload(gateway, 'spec', tgzOf(files), 'application/gzip', '?limits=1'),
    400,
    'invalid_query',
    'limits',
  )
  refused(await upload(gateway, 'spec', tgzOf({ ...files, 'vulcan.json': '{' })), 422, 'build_failed')
  refused(
    await upload(gateway, 'spec', tgzOf({ ...files, 'vulcan.json': '{"code":"1"}' })),
    422,
    'invalid_field',
    'code',
  )
  refused(
    await upload(gateway, 'spec', tgzOf({ ...files, 'vulcan.json': '{"limits":{"timeout_s":-1}}' })),
    422,
    'invalid_field',
    'limits.timeout_s',
  )
})

test('what cannot be deployed is refused with what is wrong, and leaves nothing', async () => {
  await using at = await site()
  const { gateway } = at
  const bad = await put(gateway, 'bad', { files: { 'index.ts': 'export default () => {\n  let x = ;\n}' } })
  refused(bad, 422, 'build_failed')
  assert.equal(bad.body.errors, [{ detail: 'Unexpected ";"', file: 'index.ts', line: 2, column: 11 }])
  refused(await put(gateway, 'bad', { code: 'const a = 1' }), 422, 'build_failed')
  refused(await put(gateway, 'bad', {}), 422, 'invalid_field', 'code')
  refused(await put(gateway, 'bad', { code, files: { 'a.js': '' } }), 422, 'invalid_field', 'files')
  refused(await put(gateway, 'bad', { code, input: 1 }), 422, 'invalid_field', 'input')
  refused(await put(gateway, 'bad', { code, concurrency: 0 }), 422, 'invalid_field', 'concurrency')
  refused(await put(gateway, 'bad', { files: { '../a.ts': 'x' } }), 422, 'invalid_field')
  refused(await put(gateway, 'bad', { files: { 'a.txt': 'x' } }), 422, 'invalid_field', 'entrypoint')
  refused(
    await put(gateway, 'bad', { files: { 'a.ts': 'x' }, entrypoint: 'b.ts' }),
    422,
    'invalid_field',
    'entrypoint',
  )
  refused(await put(gateway, 'bad', { code, secrets: ['NO'] }), 422, 'secret_not_found', 'secrets[0]')
  refused(
    await put(gateway, 'bad', { code, isolation: 'microvm' }),
    422,
    'isolation_unavailable',
    'isolation',
  )
  refused(await put(gateway, 'bad', { image: 'host/name:tag' }), 422, 'isolation_unavailable')
  refused(await put(gateway, 'bad', { archive: { blob: digestOf('never') } }), 404, 'blob_not_found')
  refused(await put(gateway, 'Bad_Name', { code }), 422, 'invalid_field', 'name')
  refused(await upload(gateway, 'bad', Buffer.from('hello')), 422, 'invalid_archive')
  refused(await upload(gateway, 'bad', Buffer.from('hello'), 'text/plain'), 415, 'unsupported_media_type')
  refused(
    await upload(gateway, 'bad', tarOf([{ path: '../x.ts', text: 'x' }]), 'application/x-tar'),
    422,
    'invalid_archive',
  )
  refused(await upload(gateway, 'bad', Buffer.from('{'), 'application/json'), 400, 'malformed_json')
  refused(await call(gateway, 'GET', '/v1/functions/bad'), 404, 'function_not_found')
  assert.equal((await call(gateway, 'GET', '/v1/functions')).body, { functions: [] })
  const huge = Object.fromEntries(Array.from({ length: 20 }, (_, i) => [`E${i}`, 'x'.repeat(32_000)]))
  refused(await put(gateway, 'bad', { code, env: huge }), 422, 'invalid_field', 'env')
})

test('without bubblewrap on the gateway’s host nothing is deployed', async () => {
  await using at = await site({ bwrap: '/nowhere/bwrap' })
  const answer = await put(at.gateway, 'a', { code })
  refused(answer, 503, 'build_unavailable')
  assert.match(answer.body.detail, 'install bubblewrap')
})

test('the list is by name, and without what was deleted', async () => {
  await using at = await site()
  const { gateway } = at
  for (const name of ['c', 'a', 'b']) assert.is((await put(gateway, name, { code })).status, 201)
  const names = async (query = '') =>
    (await call(gateway, 'GET', `/v1/functions${query}`)).body.functions.map(
      ({ name }: { name: string }) => name,
    )
  assert.equal(await names(), ['a', 'b', 'c'])
  assert.is((await call(gateway, 'DELETE', '/v1/functions/b')).status, 204)
  assert.equal(await names(), ['a', 'c'])
  assert.equal(await names('?deleted=true'), ['a', 'b', 'c'])
})

test('a deleted function is gone and its history kept; putting it again brings it back', async () => {
  await using at = await site()
  const { gateway } = at
  const first = await put(gateway, 'a', { code })
  await call(gateway, 'PUT', '/v1/functions/a/aliases/live', { body: { version: first.body.version } })
  assert.is((await call(gateway, 'DELETE', '/v1/functions/a')).status, 204)
  for (const [method, path] of [
    ['GET', ''],
    ['DELETE', ''],
    ['GET', '/aliases'],
  ])
    refused(await call(gateway, method!, `/v1/functions/a${path}`), 404, 'function_not_found')
  refused(
    await call(gateway, 'PUT', '/v1/functions/a/aliases/live', { body: { version: first.body.version } }),
    404,
    'function_not_found',
  )
  const kept = await call(gateway, 'GET', '/v1/functions/a/versions')
  assert.is(kept.body.versions[0].version, first.body.version)

  const back = await put(gateway, 'a', { code })
  assert.equal([back.status, back.body.created, back.body.version], [200, false, first.body.version])
  assert.equal(
    [back.body.created_at, back.body.aliases],
    [first.body.created_at, { latest: { version: first.body.version } }],
  )
  refused(await call(gateway, 'DELETE', '/v1/functions/never'), 404, 'function_not_found')
})

test('versions are listed newest first, each with its source', async () => {
  await using at = await site()
  const { gateway } = at
  const one = await put(gateway, 'a', { code: 'export default 1' })
  const two = await put(gateway, 'a', { code: 'export default 2' })
  const list = async () =>
    (await call(gateway, 'GET', '/v1/functions/a/versions')).body.versions.map(
      ({ version, latest }: { version: string; latest: boolean }) => [version, latest],
    )
  assert.equal(await list(), [
    [two.body.version, true],
    [one.body.version, false],
  ])
  await put(gateway, 'a', { code: 'export default 1' })
  assert.equal(await list(), [
    [one.body.version, true],
    [two.body.version, false],
  ])
  const version = await call(gateway, 'GET', `/v1/functions/a/versions/${two.body.version}`)
  assert.equal(
    [version.body.version, version.body.latest, version.body.runtime],
    [two.body.version, false, 'javascript'],
  )
  const source = await fetch(`${gateway.url}/v1/blobs/${version.body.source.blob}`)
  assert.is(await source.text(), 'export default 2')
  const map = await fetch(`${gateway.url}/v1/blobs/${version.body.bundle.map}`)
  assert.equal(((await map.json()) as { sourcesContent: string[] }).sourcesContent, ['export default 2'])
  refused(await call(gateway, 'GET', '/v1/functions/a/versions/v0000000000000000'), 404, 'version_not_found')
  refused(await call(gateway, 'GET', '/v1/functions/never/versions'), 404, 'function_not_found')
})

test('an alias points at a version, is moved back, splits by weight, and is removed', async () => {
  await using at = await site()
  const { gateway } = at
  const v1 = (await put(gateway, 'a', { code: 'export default 1' })).body.version
  const v2 = (await put(gateway, 'a', { code: 'export default 2' })).body.version
  const alias = (method: string, name: string, body?: unknown) =>
    call(gateway, method, `/v1/functions/a/aliases/${name}`, body === undefined ? {} : { body })
  const meant = (ref?: string) => resolve(gateway.registry.get('a')!.record, ref).version

  assert.is(meant(), v2)
  const set = await alias('PUT', 'live', { version: v1 })
  assert.equal([set.status, set.body], [201, { name: 'a', alias: 'live', version: v1, previous: null }])
  assert.is(meant(), v1)
  const moved = await alias('PUT', 'live', { version: v2 })
  assert.equal([moved.status, moved.body.previous], [200, { version: v1 }])
  const back = await alias('PUT', 'live', moved.body.previous)
  assert.equal([back.status, meant()], [200, v1])
  assert.equal((await alias('GET', 'live')).body, { name: 'a', alias: 'live', version: v1 })
  assert.equal((await alias('GET', 'latest')).body.version, v2)

  const weights = { [v1]: 90, [v2]: 10 }
  assert.is((await alias('PUT', 'canary', { weights })).status, 201)
  let second = 0
  for (let i = 0; i < 1_000; i++) if (meant('canary') === v2) second++
  assert.ok(second > 50 && second < 170, `${second} of 1,000`)
  assert.equal((await call(gateway, 'GET', '/v1/functions/a/aliases')).body.aliases, {
    live: { version: v1 },
    canary: { weights },
    latest: { version: v2 },
  })

  const missing = 'v0000000000000000'
  refused(await alias('PUT', 'live', { version: missing }), 404, 'version_not_found', 'version')
  refused(
    await alias('PUT', 'live', { weights: { [v1]: 1, [missing]: 1 } }),
    404,
    'version_not_found',
    `weights.${missing}`,
  )
  for (const [body, field] of [
    [{}, 'version'],
    [{ version: 'latest' }, 'version'],
    [{ weights: {} }, 'weights'],
    [{ weights: { [v1]: 0 } }, `weights.${v1}`],
    [{ weights: { [v1]: 1.5 } }, `weights.${v1}`],
    [{ version: v1, weights }, 'version'],
    [{ version: v1, more: 1 }, 'more'],
    [[], undefined],
  ] as const)
    refused(await alias('PUT', 'live', body), 422, 'invalid_field', field)
  for (const name of ['latest', 'Live', v1, '-a', 'a.b', 'x'.repeat(64)])
    refused(await alias('PUT', name, { version: v1 }), 422, 'invalid_field', 'alias')
  refused(await alias('GET', 'never'), 404, 'alias_not_found')
  refused(await alias('GET', 'constructor'), 404, 'alias_not_found')
  assert.is(meant(), v1)

  assert.is((await alias('DELETE', 'live')).status, 204)
  assert.is(meant(), v2)
  refused(await alias('DELETE', 'live'), 404, 'alias_not_found')
  refused(await alias('DELETE', 'latest'), 422, 'invalid_field', 'alias')
})

test('deploys and alias moves at the same moment through two gateways all stand', async () => {
  await using at = await site()
  const { gateway } = at
  await using other = await startGateway(at.on)
  await untilKnown(other)
  const first = (await put(gateway, 'a', { code: 'export default 0' })).body.version
  const answers = await Promise.all(
    Array.from({ length: 8 }, (_, i) => {
      const through = i % 2 ? other : gateway
      return i < 4
        ? put(through, 'a', { code: `export default ${i + 1}` })
        : call(through, 'PUT', `/v1/functions/a/aliases/x${i}`, { body: { version: first } })
    }),
  )
  assert.equal(
    answers.map(({ status }) => status),
    answers.map(() => 201),
    JSON.stringify(answers.map(({ body }) => body)),
  )
  for (const one of [gateway, other])
    await until('both to know', () => {
      const record = one.registry.get('a')?.record
      return (record?.versions.length === 5 && Object.keys(record.aliases).length === 4) || undefined
    })
})

test('a function with a limit has a lane before it can be called', async () => {
  await using at = await site()
  const { gateway } = at
  const answer = await put(gateway, 'narrow', { code, concurrency: 5 })
  assert.is(answer.status, 201, JSON.stringify(answer.body))
  const [lane] = gateway.registry.lanes()
  assert.equal(lane, {
    lane: 'fn-narrow',
    isolation: 'isolate',
    function: 'narrow',
    concurrency: 5,
    rate: null,
  })
  const consumer = await gateway.bus.jsm.consumers.info(WORK, laneConsumer(lane!))
  assert.is(consumer.config.max_ack_pending, 5)
  await put(gateway, 'narrow', { code, concurrency: 7 })
  assert.is(gateway.registry.lanes()[0]?.concurrency, 7)
  // What is deployed beside the live version does not change what holds for that.
  const live = gateway.registry.get('narrow')!.record.latest
  await call(gateway, 'PUT', '/v1/functions/narrow/aliases/live', { body: { version: live } })
  const seen = new Set<number | null>()
  const unfollow = gateway.registry.onChange(() => seen.add(gateway.registry.lanes()[0]!.concurrency))
  assert.is((await put(gateway, 'narrow', { code, concurrency: 50 })).status, 201)
  unfollow()
  assert.equal([...seen], [7])
  const { config } = await gateway.bus.jsm.consumers.info(WORK, laneConsumer(lane!))
  assert.is(config.max_ack_pending, 7)
})

test('a version’s id depends on its content alone, in whatever order it is written', () => {
  const spec = FunctionSpec.parse({ code: 'x', env: { B: '2', A: '1' }, labels: { z: 'z', a: 'a' } })
  const turned = FunctionSpec.parse({ labels: { a: 'a', z: 'z' }, env: { A: '1', B: '2' }, code: 'x' })
  assert.is(canonical(spec), canonical(turned))
  assert.is(canonical({ b: [1, { d: null, c: undefined }], a: 'ä"' }), '{"a":"ä\\"","b":[1,{"d":null}]}')
})

test.run()
