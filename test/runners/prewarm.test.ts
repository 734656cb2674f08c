import pino from 'pino'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Bundles } from '../../runners/bundles.ts'
import { startPrewarm } from '../../runners/prewarm.ts'
import type { Program, Runner } from '../../runners/runner.ts'
import { FunctionRecord, FunctionSpec, FunctionVersion } from '../../shared/functions.ts'
import { digestOf } from '../../shared/ids.ts'
import { Registry } from '../../shared/registry.ts'
import { startTracing, TelemetryOptions } from '../../shared/telemetry.ts'
import { tracingOff } from '../../shared/tracing.ts'
import type { Isolation } from '../../shared/workload.ts'
import { startOtlp } from '../otlp.ts'
import { type Ground, ground, until } from '../shared/support.ts'
import { codeOf } from './support.ts'

const versionId = (n: number) => `v${String(n).padStart(16, '0')}`

async function world() {
  const on = await ground()
  const registry = await Registry.open(on.bus, 1)
  const calls: { code: string; count: number; limits: { memory_mb: number } }[] = []
  const programs: Program[] = []
  const runner: Pick<Runner, 'prewarm'> = {
    prewarm(program, count) {
      programs.push(program)
      const { source, limits } = program
      calls.push({ code: source.kind === 'code' ? codeOf({ source }) : source.kind, count, limits })
    },
  }
  return {
    ...on,
    registry,
    calls,
    programs,
    /** What is kept warm now, by code. */
    warm: () => Object.fromEntries(calls.map(({ code, count }) => [code, count])),
    start: (isolation: Isolation = 'isolate', tracing = tracingOff) =>
      startPrewarm({
        tracing,
        isolation,
        functions: registry,
        stores: { blobs: on.blobs, bundles: new Bundles(on.blobs) },
        secrets: { values: (names) => Object.fromEntries(names.map((name) => [name, 'me:secret'])) },
        runner,
        log: pino({ level: 'silent' }),
      }),
    async [Symbol.asyncDispose]() {
      registry.close()
      await on[Symbol.asyncDispose]()
    },
  }
}

async function deploy(
  { blobs, registry }: Pick<Ground, 'blobs'> & { registry: Registry },
  name: string,
  n: number,
  spec: Partial<FunctionSpec>,
  { made = {}, ...over }: Partial<FunctionRecord> & { made?: Partial<FunctionVersion> } = {},
) {
  const bundle = await blobs.put(Buffer.from(`${name} ${n}`))
  const { code: _, ...rest } = FunctionSpec.parse({ code: 'x', ...spec })
  const now = new Date().toISOString()
  const version = FunctionVersion.parse({
    name,
    version: versionId(n),
    created_at: now,
    isolation: 'isolate',
    routing_reason: 'test',
    runtime: 'typescript',
    bundle: { ...bundle, map: null },
    source: null,
    spec: rest,
    warnings: [],
    ...made,
  })
  await registry.putVersion(version)
  const known = registry.get(name)
  const record = FunctionRecord.parse({
    name,
    created_at: now,
    updated_at: now,
    deleted_at: null,
    latest: version.version,
    versions: [{ version: version.version, deployed_at: now }, ...(known?.record.versions ?? [])],
    aliases: known?.record.aliases ?? {},
    ...over,
  })
  await registry.put(record, known?.revision ?? 0)
  return record
}

test('what a call without a ref means is kept warm: at the start, after a deploy, an alias move and a deletion', async () => {
  await using on = await world()
  await deploy(on, 'early', 1, { prewarm: 2 })
  await deploy(on, 'never', 1, {})
  using _ = on.start()
  await until('the first', () => on.warm()['early 1'] === 2 || undefined)

  await deploy(on, 'early', 2, { prewarm: 3 })
  await until('the second', () => (on.warm()['early 2'] === 3 && on.warm()['early 1'] === 0) || undefined)

  const { record, revision } = on.registry.get('early')!
  await on.registry.put({ ...record, aliases: { live: { version: versionId(1) } } }, revision)
  await until('the rollback', () => (on.warm()['early 1'] === 2 && on.warm()['early 2'] === 0) || undefined)

  const split = on.registry.get('early')!
  const weights = { [versionId(1)]: 90, [versionId(2)]: 10 }
  await on.registry.put({ ...split.record, aliases: { live: { weights } } }, split.revision)
  await until('both', () => (on.warm()['early 1'] === 2 && on.warm()['early 2'] === 3) || undefined)

  const last = on.registry.get('early')!
  await on.registry.put({ ...last.record, deleted_at: new Date().toISOString() }, last.revision)
  await until('neither', () => (on.warm()['early 1'] === 0 && on.warm()['early 2'] === 0) || undefined)
  assert.is(on.warm()['never 1'], undefined)
})

test('what is made warm is a trace of its own, and says where it cannot be', async () => {
  await using on = await world()
  await using otlp = await startOtlp()
  const options = TelemetryOptions.parse({ endpoint: otlp.url, delayMs: 50 })
  const log = pino({ level: 'silent' })
  await using tracing = await startTracing(options, { service: 'vulcan-runner', id: 'r1', log })
  using _ = on.start('isolate', tracing)
  await deploy(on, 'warm', 1, { prewarm: 2 })
  const bundle = { blob: digestOf('never stored'), size: 1, map: null }
  await deploy(on, 'gone', 2, { prewarm: 1 }, { made: { bundle } })
  const [warm, gone] = await until('both', () => {
    const found = ['warm', 'gone'].map((name) =>
      otlp.spans.find(({ attributes }) => attributes['vulcan.function'] === name),
    )
    return found.every((span) => span !== undefined) ? found : undefined
  })
  assert.equal([warm!.name, warm!.parentSpanId, warm!.status.code], ['prewarm', undefined, 'unset'])
  assert.is(warm!.attributes['vulcan.sandboxes'], 2)
  assert.is(gone!.status.code, 'error')
  assert.match(gone!.status.message, 'cannot be read')
})

test('of containers the same code is kept for each network and user that it is to have', async () => {
  await using on = await world()
  using _ = on.start('gvisor')
  const source = await on.blobs.put(Buffer.from('files'))
  const made = { isolation: 'gvisor' as const, bundle: null, source, runtime: 'node' as const }
  await deploy(on, 'none', 1, { prewarm: 1, user: '1234' }, { made })
  await deploy(on, 'some', 2, { prewarm: 2, network: { egress: ['db.test:5432'] } }, { made })
  await until('both', () => on.calls.length === 2 || undefined)
  assert.equal(
    on.programs.map(({ egress, user }) => [egress, user]),
    [
      ['none', '1234'],
      [['db.test:5432'], undefined],
    ],
  )
  assert.equal(
    on.calls.map(({ count }) => count),
    [1, 2],
  )
})

test('each change is told once, with the limits of the version', async () => {
  await using on = await world()
  using _ = on.start()
  await deploy(on, 'one', 1, {
    prewarm: 1,
    limits: { timeout_s: 5, memory_mb: 64, cpu: 1, pids: 1, output_mb: 1, disk_mb: 1 },
  })
  await until('it', () => on.calls.length > 0 || undefined)
  const { record, revision } = on.registry.get('one')!
  await on.registry.put({ ...record, aliases: { beta: { version: versionId(1) } } }, revision)
  await deploy(on, 'two', 1, { prewarm: 1 })
  await until('the other', () => on.warm()['two 1'] === 1 || undefined)
  assert.is(on.calls.length, 2)
  assert.is(on.calls[0]!.limits.memory_mb, 64)
})

test('archives and images are kept warm like code, with what their registry asks for', async () => {
  await using on = await world()
  using _ = on.start('gvisor')
  const source = await on.blobs.put(Buffer.from('a tar'))
  const made = { isolation: 'gvisor', bundle: null } as const
  await deploy(
    on,
    'archived',
    1,
    { prewarm: 1, entrypoint: 'main.py' },
    { made: { ...made, runtime: 'python', source } },
  )
  await until('the archive', () => on.programs.length === 1 || undefined)
  const image = { image: 'host/name:1', image_auth: 'REGISTRY' }
  await deploy(
    on,
    'named',
    1,
    { prewarm: 2, code: undefined, ...image },
    { made: { ...made, runtime: 'oci' } },
  )
  await until('the image', () => on.programs.length === 2 || undefined)
  const [archived, named] = on.programs
  assert.ok(archived!.source.kind === 'archive')
  assert.equal(
    [archived!.runtime, archived!.entrypoint, archived!.source.sha256],
    ['python', 'main.py', source.blob.slice('sha256:'.length)],
  )
  const parts: Uint8Array[] = []
  for await (const part of await archived!.source.open()) parts.push(part)
  assert.is(Buffer.concat(parts).toString(), 'a tar')
  assert.equal(named!.source, {
    kind: 'image',
    reference: 'host/name:1',
    auth: { username: 'me', password: 'secret' },
  })
  assert.equal(
    on.calls.map(({ count }) => count),
    [1, 2],
  )

  // The same again changes nothing; another entrypoint is another program.
  const known = on.registry.get('archived')!
  await on.registry.put({ ...known.record, updated_at: new Date().toISOString() }, known.revision)
  await deploy(
    on,
    'archived',
    2,
    { prewarm: 1, entrypoint: 'other.py' },
    { made: { ...made, runtime: 'python', source } },
  )
  await until('the other', () => on.programs.some(({ entrypoint }) => entrypoint === 'other.py') || undefined)
  assert.equal(
    on.programs.slice(2).map(({ entrypoint }, i) => [entrypoint, on.calls[i + 2]!.count]),
    [
      ['main.py', 0],
      ['other.py', 1],
    ],
  )
})

test.run()
