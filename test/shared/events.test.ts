import { Ajv2020 } from 'ajv/dist/2020.js'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import {
  type AcceptedEvent,
  type AnyEvent,
  eventJsonSchemas,
  eventSchemas,
  isEnd,
  LifecycleEvent,
  makeEvent,
  readEvent,
} from '../../shared/events.ts'
import { newWorkloadId } from '../../shared/ids.ts'
import { WorkloadSpec } from '../../shared/workload.ts'
import { acceptedEvent } from './support.ts'

const id = newWorkloadId()
const origin = {
  source: '/vulcan/runners/isolate-1',
  traceparent: `00-${'a'.repeat(32)}-${'b'.repeat(16)}-01`,
}
const now = new Date().toISOString()
const error = { message: 'it broke', stack: 'at main.js:1:1' }
const limits = { timeout_s: 30, memory_mb: 128, cpu: 1, pids: 64, output_mb: 6, disk_mb: 64 }
const digest = `sha256:${'0'.repeat(64)}`
const end = {
  attempt: 1,
  runner: 'isolate-1',
  started_at: now,
  duration_ms: 1.25,
  cause: null,
  error: null,
  output: { y: 42 },
  output_blob: null,
  exit_code: null,
  logs: { last: 1, lines: 2, dropped: 0 },
  receipt: {
    code_sha256: 'f'.repeat(64),
    image_digest: null,
    machine: null,
    runner: 'isolate-1',
    isolation: 'isolate' as const,
    walls: ['bubblewrap'],
    start: 'warm' as const,
    limits,
    usage: {
      ...{ cpu_ms: 0.5, memory_peak_mb: null, disk_read_bytes: 0, disk_written_bytes: null },
      ...{ network_received_bytes: 12, network_sent_bytes: null },
    },
  },
}
const neverRan = {
  ...end,
  attempt: 0,
  runner: null,
  started_at: null,
  duration_ms: null,
  cause: 'killed' as const,
  error,
  output: null,
  logs: null,
  receipt: null,
}
const line = { time: now, level: 'info' as const, stream: 'console' as const, text: 'hello' }

/** Of a microVM. */
const inMachine = {
  ...end,
  receipt: { ...end.receipt, machine: { vmm: 'QEMU 7.2.22 (emulation)', start: 'restore' as const } },
}

/** As it was before the limits and receipts knew of disks, images and machines. */
const ofOld = (event: object) =>
  JSON.parse(
    JSON.stringify(event, (name, value) =>
      /^(disk_mb|image_digest|machine)$/.test(name) ? undefined : value,
    ),
  )

test('an event of before a field was added is read with its default', () => {
  const accepted = eventSchemas.accepted.parse(ofOld(acceptedEvent({}, id)))
  assert.is(accepted.data.spec.limits.disk_mb, 64)
  const completed = eventSchemas.completed.parse(ofOld(makeEvent('completed', id, 1, end, origin)))
  const { image_digest, machine, limits } = completed.data.receipt!
  assert.equal([image_digest, machine, limits.disk_mb], [null, null, 64])
})

/** Each event as the platform makes it. */
const examples: Record<string, AnyEvent[]> = {
  accepted: [
    acceptedEvent({ input: { x: 21 }, labels: { team: 'a' } }, id),
    acceptedEvent({ isolation: ['isolate', 'microvm'], network: { egress: ['api.example.com:443'] } }, id),
    acceptedEvent({}, id, { payload: { blob: digest, size: 900_000 }, rerun_of: newWorkloadId() }),
    acceptedEvent({ secrets: ['KEY'] }, id, {
      function: { name: 'double', version: `v${'0'.repeat(16)}`, ref: 'latest' },
      bundle: { blob: digest, size: 12, map: null },
      http: {
        ...{ method: 'POST', url: 'http://a/fn/double', headers: [['host', 'a']], sealed: null },
        ...{ body: { text: '{}' }, gateway: 'gateway-1' },
      },
    }),
  ],
  started: [makeEvent('started', id, 1, { attempt: 1, runner: 'isolate-1' }, origin)],
  retrying: [
    makeEvent(
      'retrying',
      id,
      1,
      { attempt: 1, runner: 'isolate-1', cause: 'runner_lost', error, not_before: now },
      origin,
    ),
  ],
  completed: [
    makeEvent('completed', id, 1, end, origin),
    makeEvent('completed', id, 1, { ...end, output: null, output_blob: { blob: digest, size: 3 } }, origin),
    makeEvent('completed', id, 1, inMachine, origin),
    makeEvent(
      'completed',
      id,
      1,
      { ...end, response: { status: 200, headers: [], sealed: null, body: { base64: 'AAAA' } } },
      origin,
    ),
  ],
  failed: [makeEvent('failed', id, 1, { ...end, cause: 'timeout', error, output: null }, origin)],
  killed: [makeEvent('killed', id, '0.kill', neverRan, { source: '/vulcan/gateways/g' })],
  late: [
    makeEvent('late', id, 1, { attempt: 1, runner: 'isolate-1', status: 'completed', cause: null }, origin),
  ],
  log: [makeEvent('log', id, '1.1', { attempt: 1, n: 1, lines: [line], dropped: 0 }, origin)],
}

/** The same JSON, wrong or unusual in one place. */
function* spoilt(json: unknown): Generator<unknown> {
  const others = [
    null,
    true,
    '',
    'x',
    `${now}Z`,
    digest,
    -1,
    0,
    0.5,
    1e300,
    [],
    ['x'],
    [null],
    {},
    { text: 1 },
  ]
  const mend = '{"__proto__":{"a":1},"more":1}'
  yield* others
  if (typeof json !== 'object' || json === null) return
  yield Array.isArray(json) ? [...json, ...json] : { ...json, ...JSON.parse(mend) }
  for (const [name, value] of Object.entries(json)) {
    const put = (one: unknown) =>
      Object.assign(Array.isArray(json) ? [...json] : { ...json }, { [name]: one })
    for (const one of spoilt(value)) yield put(one)
    if (!Array.isArray(json))
      yield Object.fromEntries(Object.entries(json).filter(([other]) => other !== name))
  }
}

const schemas = eventJsonSchemas()
const overTheWire = (event: unknown) => JSON.parse(JSON.stringify(event))
const validator = (kind: string) =>
  new Ajv2020({ strict: false, validateFormats: false }).compile(schemas[kind] as object)

test('every kind of event has a schema of draft 2020-12, and an example here', () => {
  assert.equal(Object.keys(schemas).sort(), Object.keys(eventSchemas).sort())
  assert.equal(Object.keys(examples).sort(), Object.keys(schemas).sort())
  for (const schema of Object.values(schemas))
    assert.is((schema as { $schema: string }).$schema, 'https://json-schema.org/draft/2020-12/schema')
})

for (const kind of Object.keys(eventSchemas)) {
  test(`a ${kind} event as it is published is valid by its served schema`, () => {
    const validate = validator(kind)
    for (const event of examples[kind]!)
      assert.ok(validate(overTheWire(event)), JSON.stringify(validate.errors))
  })

  test(`reading a ${kind} event gives what its schema gives, whatever is wrong with it`, () => {
    const name = kind as keyof typeof eventSchemas
    for (const event of examples[kind]!)
      for (const json of [overTheWire(event), ofOld(event), ...spoilt(overTheWire(event))])
        assert.equal(readEvent(name, structuredClone(json)), eventSchemas[name].safeParse(json).data)
  })

  test(`a ${kind} event as it is published is taken without a copy`, () => {
    for (const event of examples[kind]!) {
      const json = overTheWire(event)
      if (!('base64' in (json.data.response?.body ?? {})))
        assert.ok(readEvent(kind as keyof typeof eventSchemas, json) === json)
    }
  })

  test(`the schema of ${kind} refuses every other kind, and each missing field`, () => {
    const validate = validator(kind)
    for (const [other, events] of Object.entries(examples))
      if (other !== kind) assert.not(validate(overTheWire(events[0])), other)
    const whole = overTheWire(examples[kind]![0])
    for (const field of [
      'specversion',
      'id',
      'source',
      'type',
      'subject',
      'time',
      'datacontenttype',
      'data',
    ]) {
      const { [field]: _, ...rest } = whole
      assert.not(validate(rest), field)
    }
    for (const field of Object.keys(whole.data)) {
      const { [field]: _, ...data } = whole.data
      if (field !== 'output') assert.not(validate({ ...whole, data }), `data.${field}`)
    }
  })

  test(`zod and the served schema agree on ${kind}`, () => {
    const schema = eventSchemas[kind as keyof typeof eventSchemas]
    const validate = validator(kind)
    for (const event of examples[kind]!) {
      const wire = overTheWire(event)
      assert.ok(schema.safeParse(wire).success)
      for (const path of ['subject', 'time', 'type', 'specversion']) {
        const bent = { ...wire, [path]: 17 }
        assert.not(schema.safeParse(bent).success, path)
        assert.not(validate(bent), path)
      }
    }
  })

  test(`a field that a later version adds to ${kind} is let through`, () => {
    const wire = overTheWire(examples[kind]![0])
    const later = { ...wire, tenant: 't', data: { ...wire.data, tenant: 't' } }
    assert.ok(validator(kind)(later))
    assert.ok(eventSchemas[kind as keyof typeof eventSchemas].safeParse(later).success)
  })
}

/** Every object in a value, with what makes another value in which that object is replaced. */
function* objectsIn(
  value: unknown,
  replace: (part: unknown) => unknown = (part) => part,
): Generator<{
  object: Record<string, unknown>
  replace(part: unknown): unknown
}> {
  if (value === null || typeof value !== 'object') return
  if (!Array.isArray(value)) yield { object: value as Record<string, unknown>, replace }
  for (const [key, part] of Object.entries(value))
    yield* objectsIn(part, (other) =>
      replace(
        Array.isArray(value)
          ? value.map((one, i) => (String(i) === key ? other : one))
          : { ...value, [key]: other },
      ),
    )
}

test('a field may be added at any depth of any event, but for maps of names, which hold texts', () => {
  let objects = 0
  for (const [kind, events] of Object.entries(examples))
    for (const event of events)
      for (const { object, replace } of objectsIn(overTheWire(event))) {
        if (Object.keys(object).length === 0 || 'team' in object) continue
        objects++
        const later = replace({ ...object, later: { a: 1 } })
        const validate = validator(kind)
        assert.ok(validate(later), `${kind} ${Object.keys(object)}: ${JSON.stringify(validate.errors)}`)
        const parsed = eventSchemas[kind as keyof typeof eventSchemas].safeParse(later)
        assert.ok(parsed.success, `${kind} ${Object.keys(object)}`)
        assert.equal(parsed.data, later, 'and it is kept')
      }
  assert.ok(objects > 40, String(objects))
})

test('the spec in an event has every default filled in: without one it is no event', () => {
  const [whole] = examples.accepted as [AcceptedEvent]
  const wire = overTheWire(whole)
  for (const field of ['isolation', 'env', 'secrets', 'limits', 'network', 'retry', 'labels']) {
    const { [field]: _, ...spec } = wire.data.spec
    const bent = { ...wire, data: { ...wire.data, spec } }
    assert.not(eventSchemas.accepted.safeParse(bent).success, field)
    assert.not(validator('accepted')(bent), field)
  }
  for (const field of ['limits', 'retry'])
    assert.not(
      eventSchemas.accepted.safeParse({
        ...wire,
        data: { ...wire.data, spec: { ...wire.data.spec, [field]: {} } },
      }).success,
      field,
    )
})

test('what a client posts stays closed: an unknown field is refused at any depth', () => {
  const spec = { code: 'x', limits: {}, retry: {}, network: {} }
  assert.ok(WorkloadSpec.safeParse(spec).success)
  for (const bent of [
    { ...spec, later: 1 },
    { ...spec, limits: { later: 1 } },
    { ...spec, retry: { later: 1 } },
    { ...spec, network: { later: 1 } },
    { archive: { blob: digest, later: 1 } },
  ])
    assert.not(WorkloadSpec.safeParse(bent).success, JSON.stringify(bent))
})

test('the same step has the same event id, whoever publishes it', () => {
  const one = makeEvent('started', id, 2, { attempt: 2, runner: 'a' }, { source: '/a' })
  const other = makeEvent('started', id, 2, { attempt: 2, runner: 'b' }, { source: '/b' })
  assert.is(one.id, `${id}.started.2`)
  assert.is(other.id, one.id)
})

test('an event without a trace carries no traceparent', () => {
  assert.not('traceparent' in makeEvent('started', id, 1, { attempt: 1, runner: 'a' }, { source: '/a' }))
})

test('completed, failed and killed are ends, the others are not', () => {
  const ends = Object.entries(examples)
    .filter(([, [event]]) => LifecycleEvent.safeParse(event).success && isEnd(event as LifecycleEvent))
    .map(([kind]) => kind)
  assert.equal(ends.sort(), ['completed', 'failed', 'killed'])
})

test.run()
