// timeout: 240
import { Parser, type ReadEntry } from 'tar'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { ByteSource, Job } from '../../runners/runner.ts'
import { blobGraceMs } from '../../shared/blobs.ts'
import { digestOf, sha256Hex } from '../../shared/ids.ts'
import type { Isolation } from '../../shared/workload.ts'
import { type Code, completed, failed, startWorker } from '../runners/support.ts'
import { tarOf, tgzOf, zipOf } from './archives.ts'
import { fetchRaw, responded } from './functions.ts'
import { type Answer, call, type Gateway, post, site, untilKnown } from './support.ts'

/** A gateway with a runner of each isolation that tells what it was given. */
async function containers(code: Code = () => completed(), isolations: Isolation[] = ['gvisor']) {
  await using scope = new AsyncDisposableStack()
  const here = scope.use(await site())
  const jobs: Job[] = []
  for (const isolation of isolations) {
    const keep: Code = (job, ...rest) => {
      jobs.push(job)
      return code(job, ...rest)
    }
    scope.use(await startWorker(here.on, keep, { isolation }))
    await untilKnown(here.gateway, isolation)
  }
  const resources = scope.move()
  return { ...here, jobs, [Symbol.asyncDispose]: () => resources.disposeAsync() }
}

async function bytesOf(source: ByteSource): Promise<Buffer> {
  const parts: Uint8Array[] = []
  for await (const part of source) parts.push(part)
  return Buffer.concat(parts)
}

async function blob(gateway: Gateway, bytes: Buffer): Promise<string> {
  const headers = { 'content-type': 'application/octet-stream' }
  const answer = await call(gateway, 'POST', '/v1/blobs', { raw: new Uint8Array(bytes), headers })
  return answer.body.blob
}

const put = (gateway: Gateway, name: string, body: unknown) =>
  call(gateway, 'PUT', `/v1/functions/${name}`, { body })

/** Path → text and whether it is a program, of a tar. */
async function entriesOf(tar: Buffer): Promise<Record<string, { text: string; program: boolean }>> {
  const found: Record<string, { text: string; program: boolean }> = {}
  await new Promise<void>((resolve, reject) => {
    const parser = new Parser({
      strict: true,
      onReadEntry(entry: ReadEntry) {
        const parts: Buffer[] = []
        entry.on('data', (part: Buffer) => parts.push(part))
        entry.on('end', () => {
          found[entry.path] = {
            text: Buffer.concat(parts).toString(),
            program: ((entry.mode ?? 0) & 0o111) !== 0,
          }
        })
        entry.resume()
      },
    })
    parser.on('end', resolve)
    parser.on('error', reject)
    parser.end(tar)
  })
  return found
}

const refused = (answer: Answer, status: number, code: string, field?: string) =>
  assert.equal(
    [answer.status, answer.body.code, answer.body.field],
    [status, code, field],
    JSON.stringify(answer.body),
  )

test('code, archives and images reach the runner as they were posted, and the receipt says what ran', async () => {
  const imageDigest = digestOf('the manifest')
  await using here = await containers((job) => ({
    ...completed(job.runtime),
    start: 'pooled',
    ...(job.source.kind.startsWith('image') ? { imageDigest } : {}),
  }))
  const { gateway, jobs } = here
  const run = async (spec: Record<string, unknown>) => {
    const answer = await post(gateway, { isolation: 'gvisor', ...spec })
    assert.is(answer.body.status, 'completed', JSON.stringify(answer.body))
    return { job: jobs.at(-1)!, receipt: answer.body.receipt, output: answer.body.output }
  }

  const python = 'def handler(input, ctx): return input'
  const code = await run({ code: python, runtime: 'python', working_dir: '/tmp', user: '1000:1000' })
  assert.equal(code.job.source, { kind: 'code', text: python, sha256: sha256Hex(python) })
  assert.equal(
    [code.output, code.job.entrypoint, code.job.workingDir, code.job.user],
    ['python', undefined, '/tmp', '1000:1000'],
  )
  assert.equal(
    [code.receipt.code_sha256, code.receipt.image_digest, code.receipt.start, code.receipt.limits.disk_mb],
    [sha256Hex(python), null, 'pooled', 64],
  )
  assert.is(code.receipt.machine, null)
  assert.is((await run({ code: 'print(1)', entrypoint: 'main.py' })).output, 'python')
  assert.is((await run({ code: 'echo hello', entrypoint: ['sh', 'code'] })).output, 'oci')
  assert.is((await run({ code: 'export default 1', runtime: 'node' })).output, 'node')

  const tar = tgzOf({ 'run.sh': 'echo $1' })
  const archive = await run({
    archive: { blob: await blob(gateway, tar) },
    entrypoint: ['./run.sh', 'x'],
    limits: { disk_mb: 7 },
  })
  assert.is(archive.job.source.kind, 'archive')
  assert.ok(archive.job.source.kind === 'archive')
  assert.equal(await bytesOf(await archive.job.source.open()), tar)
  assert.equal(
    [archive.output, archive.job.entrypoint, archive.job.limits.disk_mb, archive.receipt.code_sha256],
    ['oci', ['./run.sh', 'x'], 7, sha256Hex(tar)],
  )

  const image = await run({ image: 'registry.example/name:1' })
  assert.equal(image.job.source, { kind: 'image', reference: 'registry.example/name:1' })
  assert.equal(
    [image.output, image.receipt.code_sha256, image.receipt.image_digest],
    ['oci', null, imageDigest],
  )
  const handler = await run({ image: 'registry.example/name:1', runtime: 'python', entrypoint: '/app/h.py' })
  assert.equal([handler.output, handler.job.entrypoint], ['python', '/app/h.py'])

  const packed = tarOf([{ path: 'index.json', text: '{}' }])
  const loaded = await run({ image: { blob: await blob(gateway, packed) }, entrypoint: ['true'] })
  assert.ok(loaded.job.source.kind === 'image-archive')
  assert.equal(await bytesOf(await loaded.job.source.open()), packed)
  assert.equal([loaded.receipt.code_sha256, loaded.receipt.image_digest], [null, imageDigest])
})

test('the receipt of a microVM names its VMM and how the machine started, however the run ends', async () => {
  const machine = { vmm: 'QEMU 7.2.22 (emulation)', start: 'pool' as const }
  await using here = await containers(
    (job) => ({ ...(job.runtime === 'python' ? failed('oom') : completed()), machine }),
    ['microvm', 'gvisor'],
  )
  const receiptOf = async (spec: Record<string, unknown>) => (await post(here.gateway, spec)).body.receipt
  for (const runtime of ['node', 'python']) {
    const receipt = await receiptOf({ isolation: 'microvm', code: 'x', runtime })
    assert.equal([receipt.isolation, receipt.machine], ['microvm', machine])
  }
  const { body } = await call(here.gateway, 'GET', '/openapi.json')
  const { Receipt, MachineReceipt } = body.components.schemas
  assert.equal(Receipt.properties.machine.anyOf[0], { $ref: '#/components/schemas/MachineReceipt' })
  assert.equal(MachineReceipt.properties.start.enum, ['boot', 'restore', 'pool'])
})

test('auto sends archives to a microVM runner, and refuses them where there is none', async () => {
  await using here = await containers(() => completed(), ['gvisor', 'microvm'])
  const { gateway, jobs } = here
  const archive = { blob: await blob(gateway, tgzOf({ 'main.py': 'def handler(i, c): return 1' })) }
  for (const spec of [{ runtime: 'python' }, { entrypoint: ['sh', '-c', 'true'] }]) {
    const { body } = await post(gateway, { archive, ...spec })
    assert.equal(
      [body.isolation, body.receipt.isolation, body.routing_reason],
      ['microvm', 'microvm', 'auto: an archive runs in a microvm'],
    )
  }
  const project = { files: { 'main.py': 'def handler(i, c): return 1' }, runtime: 'python' }
  const deployed = await put(gateway, 'auto', project)
  assert.equal(
    [deployed.body.isolation, deployed.body.routing_reason, deployed.body.runtime],
    ['microvm', 'auto: an archive runs in a microvm', 'python'],
    JSON.stringify(deployed.body),
  )
  const called = await call(gateway, 'POST', '/v1/functions/auto/invocations', { body: 1 })
  assert.equal([called.body.status, called.body.isolation], ['completed', 'microvm'])
  assert.is(jobs.length, 3)

  await using without = await containers()
  const stored = { blob: await blob(without.gateway, tgzOf({ 'main.py': '' })) }
  const answer = await post(without.gateway, { archive: stored, runtime: 'python' })
  refused(answer, 422, 'isolation_unavailable', 'isolation')
  assert.match(answer.body.detail, 'npm run setup -- microvm')
  assert.match(answer.body.detail, 'gvisor could run it')
  refused(await put(without.gateway, 'auto', project), 422, 'isolation_unavailable', 'isolation')
  assert.is(without.jobs.length, 0)
})

test('the secret of a registry goes with the image alone, and is hidden', async () => {
  await using here = await containers((job) =>
    failed('image_not_found', `denied: ${JSON.stringify(job.source)} ${JSON.stringify(job.env)}`),
  )
  const { gateway, jobs } = here
  await gateway.secrets.put('REGISTRY', 'me:pass:word')
  await gateway.secrets.put('NO_COLON', 'something')
  const spec = { isolation: 'gvisor', image: 'registry.example/name:1' }
  const answer = await post(gateway, { ...spec, image_auth: 'REGISTRY', env: { A: 'b' } })
  assert.equal(jobs[0]!.source, {
    kind: 'image',
    reference: 'registry.example/name:1',
    auth: { username: 'me', password: 'pass:word' },
  })
  assert.equal(jobs[0]!.env, { A: 'b' })
  assert.is(answer.body.cause, 'image_not_found')
  assert.not.match(JSON.stringify(answer.body), 'pass:word')
  assert.match(answer.body.error.message, '[redacted: REGISTRY')

  const wrong = await post(gateway, { ...spec, image_auth: 'NO_COLON' })
  assert.equal([wrong.body.status, wrong.body.cause], ['failed', 'invalid_workload'])
  assert.match(wrong.body.error.message, 'user:password')
  refused(await post(gateway, { ...spec, image_auth: 'NEVER' }), 422, 'secret_not_found', 'image_auth')
  refused(
    await post(gateway, { isolation: 'gvisor', code: 'x', image_auth: 'REGISTRY' }),
    422,
    'invalid_field',
    'image_auth',
  )
})

test('what does not fit together, or names bytes that are not there, is refused by its field', async () => {
  await using here = await containers()
  const { gateway } = here
  const archive = { blob: await blob(gateway, tarOf([{ path: 'a', text: 'a' }])) }
  const never = { blob: digestOf('never') }
  const wrong: [spec: Record<string, unknown>, status: number, code: string, field: string][] = [
    [{ archive: never, entrypoint: ['a'] }, 404, 'blob_not_found', 'archive.blob'],
    [{ image: never }, 404, 'blob_not_found', 'image.blob'],
    [{ archive }, 422, 'invalid_field', 'runtime'],
    [{ archive, entrypoint: 'README' }, 422, 'invalid_field', 'runtime'],
    [{ archive, runtime: 'oci' }, 422, 'invalid_field', 'entrypoint'],
    [{ code: 'x', runtime: 'oci' }, 422, 'invalid_field', 'entrypoint'],
    [{ image: 'a/b', runtime: 'go' }, 422, 'invalid_field', 'runtime'],
    [{ image: 'a/b', entrypoint: '/bin/sh' }, 422, 'invalid_field', 'entrypoint'],
    [{ image: 'a/b', working_dir: 'relative' }, 422, 'invalid_field', 'working_dir'],
    [{ image: 'a/b', user: 'a b' }, 422, 'invalid_field', 'user'],
  ]
  for (const [spec, ...expected] of wrong)
    refused(await post(gateway, { isolation: 'gvisor', ...spec }), ...expected)
  assert.is(here.jobs.length, 0)
})

test('a workload keeps the sweep off its bytes, and runs again from them', async () => {
  await using here = await containers()
  const { gateway, on } = here
  const digest = await blob(gateway, tarOf([{ path: 'a', text: 'a' }]))
  const first = await post(gateway, { isolation: 'gvisor', archive: { blob: digest }, entrypoint: ['a'] })
  assert.is(first.body.status, 'completed')
  // As young as what was put just now: the sweep looks at nothing within its grace.
  assert.ok((await on.blobs.list())[0]!.at > Date.now() - blobGraceMs)
  await on.blobs.remove(digest as `sha256:${string}`)
  const again = await call(gateway, 'POST', `/v1/workloads/${first.body.id}/rerun`)
  refused(again, 404, 'blob_not_found')
})

test('a function of one file for Python or Go is kept as it was put, and called by JSON and by HTTP', async () => {
  const seen: Job[] = []
  await using here = await containers((job) => {
    seen.push(job)
    return job.http === undefined ? completed(JSON.parse(job.input ?? 'null')) : responded(201, job.http.url)
  })
  const { gateway } = here
  const code = 'def handler(input, ctx):\n  return input\n'
  const answer = await put(gateway, 'py', { code, runtime: 'python', isolation: ['gvisor'], prewarm: 1 })
  assert.is(answer.status, 201, JSON.stringify(answer.body))
  assert.equal(
    [answer.body.runtime, answer.body.isolation, answer.body.bundle.map],
    ['python', 'gvisor', null],
  )
  assert.is(answer.body.bundle.blob, digestOf(code))
  const again = await put(gateway, 'py', { code, runtime: 'python', isolation: ['gvisor'], prewarm: 1 })
  assert.equal([again.status, again.body.version], [200, answer.body.version])

  const json = await call(gateway, 'POST', '/v1/functions/py/invocations', { body: { a: 1 } })
  assert.equal([json.body.output, json.body.function.version], [{ a: 1 }, answer.body.version])
  const web = await fetchRaw(gateway, '/fn/py/some/path?q=1')
  assert.equal([web.status, web.body.toString().endsWith('/some/path?q=1')], [201, true])
  const later = await call(gateway, 'GET', '/fn/py/x', { headers: { prefer: 'respond-async' } })
  assert.is(later.status, 202)
  for (const job of seen)
    assert.equal(
      [job.source, job.runtime, job.entrypoint],
      [{ kind: 'code', text: code, sha256: sha256Hex(code) }, 'python', undefined],
    )
})

test('a project for Python, Go or Node is kept as a tar; where it begins is found at deploy', async () => {
  await using here = await containers()
  const { gateway, jobs } = here
  const files = { 'handler.py': 'def handler(i, c): return 1', 'lib/a.py': 'A = 1' }
  const python = await put(gateway, 'p', { files, runtime: 'python', isolation: 'gvisor' })
  assert.is(python.status, 201, JSON.stringify(python.body))
  assert.equal(
    [python.body.runtime, python.body.bundle, python.body.spec.entrypoint],
    ['python', null, 'handler.py'],
  )
  const invoked = await call(gateway, 'POST', '/v1/functions/p/invocations', { body: 1 })
  assert.is(invoked.body.status, 'completed')
  assert.is(invoked.body.receipt.code_sha256, python.body.source.blob.slice('sha256:'.length))
  const [job] = jobs
  assert.ok(job!.source.kind === 'archive')
  assert.equal(Object.keys(await entriesOf(await bytesOf(await job!.source.open()))), [
    'handler.py',
    'lib/a.py',
  ])
  assert.equal([job!.runtime, job!.entrypoint], ['python', 'handler.py'])

  const node = await put(gateway, 'n', {
    files: { 'package.json': '{"main":"lib/here.cjs"}', 'lib/here.cjs': 'module.exports = () => 1' },
    runtime: 'node',
    isolation: 'gvisor',
  })
  assert.equal(
    [node.body.runtime, node.body.spec.entrypoint],
    ['node', 'lib/here.cjs'],
    JSON.stringify(node.body),
  )
  const typed = await put(gateway, 't', {
    files: { 'index.ts': 'import fs from "node:fs"; export default (): number => 1' },
    runtime: 'node',
    isolation: 'gvisor',
  })
  assert.equal([typed.status, typed.body.spec.entrypoint], [201, 'index.ts'], JSON.stringify(typed.body))
  const go = await put(gateway, 'g', {
    files: { 'go.mod': 'module x', 'main.go': 'package main\nfunc main() {}' },
    runtime: 'go',
    isolation: 'gvisor',
  })
  assert.equal([go.body.runtime, go.body.spec.entrypoint], ['go', undefined], JSON.stringify(go.body))
  for (const [spec, field] of [
    [{ files: { 'a.py': '', 'b.py': '' }, runtime: 'python' }, 'entrypoint'],
    [{ files, runtime: 'python', entrypoint: 'none.py' }, 'entrypoint'],
    [{ files, runtime: 'node' }, 'entrypoint'],
    [{ files, runtime: 'node', entrypoint: 'handler.py' }, 'entrypoint'],
    [{ files, runtime: 'oci' }, 'entrypoint'],
  ] as const)
    refused(await put(gateway, 'bad', { ...spec, isolation: 'gvisor' }), 422, 'invalid_field', field)
})

test('JavaScript without runtime node is one module in a container too', async () => {
  await using here = await containers()
  const { gateway, jobs } = here
  const spec = { files: { 'index.ts': 'export default (n: number) => n' }, isolation: 'gvisor' }
  const answer = await put(gateway, 'js', spec)
  assert.equal([answer.status, answer.body.runtime], [201, 'javascript'], JSON.stringify(answer.body))
  await call(gateway, 'POST', '/v1/functions/js/invocations', { body: 1 })
  const [job] = jobs
  assert.ok(job!.source.kind === 'code')
  assert.not.match(job!.source.text, ': number')
  assert.equal([job!.runtime, job!.entrypoint], ['javascript', undefined])
  const builtin = await put(gateway, 'fs', {
    code: 'import "node:fs"; export default 1',
    isolation: 'gvisor',
  })
  refused(builtin, 422, 'build_failed')
  assert.match(builtin.body.detail, 'runtime node')
})

test('an archive for a command is kept byte by byte, links and programs and all', async () => {
  await using here = await containers()
  const { gateway, jobs } = here
  const tar = tarOf([
    { path: 'run.sh', text: '#!/bin/sh\necho 1' },
    { path: 'link', type: 'SymbolicLink', linkpath: 'run.sh' },
    { path: 'vulcan.json', text: '{"entrypoint":["./run.sh"],"env":{"A":"b"}}' },
  ])
  const query = '?isolation=gvisor'
  const headers = { 'content-type': 'application/x-tar' }
  const own = await call(gateway, 'PUT', `/v1/functions/own${query}`, { raw: new Uint8Array(tar), headers })
  assert.equal([own.status, own.body.runtime], [201, 'oci'], JSON.stringify(own.body))
  assert.equal(
    [own.body.source.blob, own.body.spec.entrypoint, own.body.spec.env],
    [digestOf(tar), ['./run.sh'], { A: 'b' }],
  )
  const beside = await put(gateway, 'beside', {
    archive: { blob: await blob(gateway, tar) },
    entrypoint: ['sh', 'run.sh'],
    isolation: 'gvisor',
  })
  assert.is(beside.body.source.blob, digestOf(tar), JSON.stringify(beside.body))
  await call(gateway, 'POST', '/v1/functions/beside/invocations', { body: 1 })
  assert.equal([jobs[0]!.runtime, jobs[0]!.entrypoint], ['oci', ['sh', 'run.sh']])

  // A folder around everything means nothing, and what is a program stays one.
  const wrapped = zipOf([
    { path: 'app/run.sh', text: 'echo', mode: 0o100755 },
    { path: 'app/data', text: 'x', mode: 0o100644 },
    { path: 'app/vulcan.json', text: '{"entrypoint":["./run.sh"]}' },
  ])
  const zip = await call(gateway, 'PUT', `/v1/functions/zip${query}`, {
    raw: new Uint8Array(wrapped),
    headers: { 'content-type': 'application/zip' },
  })
  assert.is(zip.status, 201, JSON.stringify(zip.body))
  const entries = await entriesOf(Buffer.from((await here.on.blobs.get(zip.body.source.blob))!))
  assert.equal(
    Object.entries(entries).map(([path, { program }]) => [path, program]),
    [
      ['data', false],
      ['run.sh', true],
      ['vulcan.json', false],
    ],
  )
})

test('an image is a function by its reference and by its bytes', async () => {
  await using here = await containers()
  const { gateway, jobs } = here
  const named = await put(gateway, 'named', { image: 'registry.example/name:1', isolation: 'gvisor' })
  assert.equal(
    [named.status, named.body.runtime, named.body.source],
    [201, 'oci', null],
    JSON.stringify(named.body),
  )
  await call(gateway, 'POST', '/v1/functions/named/invocations', { body: 1 })
  assert.equal(jobs[0]!.source, { kind: 'image', reference: 'registry.example/name:1' })
  // Without a word about the isolation it is gvisor.
  assert.is((await put(gateway, 'auto', { image: 'registry.example/name:1' })).body.isolation, 'gvisor')

  const bytes = tarOf([{ path: 'index.json', text: '{}' }])
  const digest = await blob(gateway, bytes)
  const loaded = await put(gateway, 'loaded', {
    image: { blob: digest },
    runtime: 'node',
    entrypoint: '/app/index.js',
    isolation: 'gvisor',
  })
  assert.equal(loaded.body.source, { blob: digest, size: bytes.byteLength }, JSON.stringify(loaded.body))
  await call(gateway, 'POST', '/v1/functions/loaded/invocations', { body: 1 })
  assert.equal(
    [jobs[1]!.source.kind, jobs[1]!.runtime, jobs[1]!.entrypoint],
    ['image-archive', 'node', '/app/index.js'],
  )
  refused(
    await put(gateway, 'bad', { image: { blob: digestOf('never') }, isolation: 'gvisor' }),
    404,
    'blob_not_found',
    'image.blob',
  )
  refused(
    await put(gateway, 'bad', { image: 'a/b', isolation: 'gvisor', image_auth: 'NEVER' }),
    422,
    'secret_not_found',
    'image_auth',
  )
})

test('what a Node project depends on is installed at deploy, and kept with it', async () => {
  await using here = await containers()
  const { gateway } = here
  const answer = await put(gateway, 'n', {
    files: {
      'package.json': '{"type":"module","dependencies":{"is-number":"7.0.0"}}',
      'index.ts': 'import isNumber from "is-number"\nexport default (n: unknown): boolean => isNumber(n)\n',
    },
    runtime: 'node',
    isolation: 'gvisor',
  })
  assert.is(answer.status, 201, JSON.stringify(answer.body))
  assert.match(answer.body.warnings[0].message, 'package-lock.json')
  const entries = await entriesOf(Buffer.from((await here.on.blobs.get(answer.body.source.blob))!))
  assert.match(entries['index.ts']!.text, 'n: unknown')
  assert.is(JSON.parse(entries['node_modules/is-number/package.json']!.text).version, '7.0.0')
  refused(
    await put(gateway, 'bad', {
      files: { 'package.json': '{"dependencies":{"a":"file:/etc"}}', 'index.js': '' },
      runtime: 'node',
      isolation: 'gvisor',
    }),
    422,
    'build_failed',
    'dependencies.a',
  )
})

test.run()
