import { spawnSync } from 'node:child_process'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { backendKey } from '../../shared/backends.ts'
import { fieldPath, Problem, type ProblemCode, problems } from '../../shared/errors.ts'
import { derivedWorkloadId, digestOf, newProcessId, newWorkloadId } from '../../shared/ids.ts'
import {
  acceptedSubject,
  controlSubject,
  eventSubject,
  lastToken,
  lateSubject,
  logSubject,
  storedEnds,
  workloadOf,
} from '../../shared/subjects.ts'
import { continueTrace, traceFields, traceLinks } from '../../shared/trace.ts'
import { WorkloadId } from '../../shared/workload.ts'

const uuid = /^[0-9a-f]{8}-[0-9a-f]{4}-([0-9a-f])[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/

test('new workload ids are UUIDv7 and sort by their time', async () => {
  const ids: string[] = []
  for (let i = 0; i < 20; i++) {
    ids.push(newWorkloadId())
    await new Promise((resolve) => setTimeout(resolve, 2))
  }
  assert.equal([...ids].sort(), ids)
  assert.is(new Set(ids).size, ids.length)
  for (const id of ids) {
    assert.is(uuid.exec(id)?.[1], '7')
    assert.ok(WorkloadId.safeParse(id).success)
  }
})

test('a derived id is a UUIDv8, always the same for a namespace and key', () => {
  for (const key of ['a', 'order-17', 'ключ', ' ', 'x'.repeat(255)]) {
    const id = derivedWorkloadId('default', key)
    assert.is(uuid.exec(id)?.[1], '8', id)
    assert.ok(WorkloadId.safeParse(id).success)
    assert.is(derivedWorkloadId('default', key), id)
  }
  assert.is(derivedWorkloadId('default', 'k'), derivedWorkloadId('default', 'k'))
  assert.is.not(derivedWorkloadId('default', 'k'), derivedWorkloadId('other', 'k'))
  assert.is.not(derivedWorkloadId('ab', 'c'), derivedWorkloadId('a', 'bc'))
})

test('process ids are single subject tokens and differ', () => {
  const ids = Array.from({ length: 50 }, () => newProcessId('gateway'))
  assert.is(new Set(ids).size, 50)
  for (const id of ids) assert.match(id, /^gateway-[0-9a-f]{12}$/)
})

test('a digest is sha256 in hex', () => {
  assert.is(digestOf('abc'), 'sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad')
})

test('the workload is found in every subject that names one', () => {
  const id = newWorkloadId()
  for (const subject of [
    acceptedSubject(id, 'isolate'),
    eventSubject(id, 'started'),
    lateSubject(id),
    logSubject(id),
    controlSubject(id),
  ])
    assert.is(workloadOf(subject), id, subject)
  for (const subject of storedEnds) assert.is(workloadOf(subject.replace('*', id)), id, subject)
  assert.is(lastToken(`vulcan.work.isolate.any.${id}`), id)
  assert.is(acceptedSubject(id, 'gvisor', 'host-7'), `vulcan.events.${id}.accepted.gvisor.host-7`)
})

test('a host has one key for each isolation, whatever its name', () => {
  assert.is(backendKey({ isolation: 'isolate', host: 'host-1' }), 'isolate.host-1')
  assert.is(backendKey({ isolation: 'gvisor', host: 'a.example.com' }), 'gvisor.a_example_com')
  for (const host of ['', '.', '*', '>', 'ü b', 'x'.repeat(64)])
    assert.match(backendKey({ isolation: 'isolate', host }), /^isolate\.[\w-]+$/)
})

const trace = '0af7651916cd43dd8448eb211c80319c'
const valid = `00-${trace}-b7ad6b7169203331-01`

test('a valid traceparent is continued with a span of our own and its flags', () => {
  const context = continueTrace(valid)
  assert.is(context.traceId, trace)
  assert.match(context.traceparent, new RegExp(`^00-${trace}-[0-9a-f]{16}-01$`))
  assert.not.match(context.traceparent, /b7ad6b7169203331/)
})

test('a later version of the header is continued too', () => {
  assert.is(continueTrace(`cc-${trace}-b7ad6b7169203331-01-what-comes-later`).traceId, trace)
})

test('what is no traceparent begins a trace', () => {
  const invalid = [
    undefined,
    '',
    'nonsense',
    `ff-${trace}-b7ad6b7169203331-01`,
    `00-${'0'.repeat(32)}-b7ad6b7169203331-01`,
    `00-${trace}-${'0'.repeat(16)}-01`,
    `00-${trace.toUpperCase()}-b7ad6b7169203331-01`,
    `00-${trace.slice(1)}-b7ad6b7169203331-01`,
    `${valid}x`,
  ]
  for (const header of invalid) {
    const context = continueTrace(header)
    assert.is.not(context.traceId, trace, header ?? 'none')
    assert.match(context.traceparent, new RegExp(`^00-${context.traceId}-[0-9a-f]{16}-00$`))
  }
})

test('two requests of one trace get spans of their own', () => {
  assert.is.not(continueTrace(valid).traceparent, continueTrace(valid).traceparent)
})

test('field paths read as clients write them', () => {
  assert.is(fieldPath(['limits', 'timeout_s']), 'limits.timeout_s')
  assert.is(fieldPath(['isolation', 1]), 'isolation[1]')
  assert.is(fieldPath(['network', 'egress', 0]), 'network.egress[0]')
  assert.is(fieldPath([]), '')
})

test('every problem is problem+json with a status of its own class', () => {
  for (const code of Object.keys(problems) as ProblemCode[]) {
    const body = JSON.parse(JSON.stringify(new Problem(code, { detail: 'why', field: 'a.b' })))
    assert.equal(Object.keys(body), ['type', 'title', 'status', 'code', 'detail', 'field'])
    assert.is(body.code, code)
    assert.ok(body.status >= 400 && body.status < 600)
  }
})

const readConfig = (env: Record<string, string>) =>
  spawnSync(
    process.execPath,
    [
      '--input-type=module',
      '-e',
      `import { CommonConfig, readConfig } from '${import.meta.resolve('../../shared/config.ts')}'
       console.log(JSON.stringify(readConfig(CommonConfig, {}, process.env)))`,
    ],
    { env: { PATH: process.env.PATH, ...env }, encoding: 'utf8' },
  )

test('an empty environment is a whole configuration', () => {
  const { status, stdout } = readConfig({ VULCAN_HOST: '' })
  assert.is(status, 0)
  const config = JSON.parse(stdout)
  assert.is(config.host, '127.0.0.1')
  assert.is(config.natsUrl, 'nats://127.0.0.1:4222')
  assert.is(config.topology.ackWaitMs, 15_000)
})

test('the environment sets what it names', () => {
  const { stdout } = readConfig({
    NATS_URL: 'nats://a:1,nats://b:2',
    VULCAN_ACK_WAIT_MS: '2000',
    VULCAN_REPLICAS: '3',
  })
  const config = JSON.parse(stdout)
  assert.is(config.natsUrl, 'nats://a:1,nats://b:2')
  assert.is(config.topology.ackWaitMs, 2_000)
  assert.is(config.topology.replicas, 3)
})

test('tracing is set by the variables of OpenTelemetry, and by ours', () => {
  const { stdout } = readConfig({
    OTEL_EXPORTER_OTLP_ENDPOINT: 'http://collector:4318',
    OTEL_TRACES_SAMPLER: 'parentbased_traceidratio',
    OTEL_TRACES_SAMPLER_ARG: '0.1',
    OTEL_SDK_DISABLED: 'false',
    VULCAN_TRACE_FAILURES: 'off',
    VULCAN_TRACE_URL: 'http://jaeger:16686',
  })
  const { telemetry, traceUrl } = JSON.parse(stdout)
  assert.is(telemetry.endpoint, 'http://collector:4318')
  assert.is(telemetry.sampler, 'parentbased_traceidratio')
  assert.is(telemetry.samplerArg, 0.1)
  assert.is(telemetry.disabled, false)
  assert.is(telemetry.failures, 'off')
  assert.is(traceUrl, 'http://jaeger:16686')
  const { status, stderr } = readConfig({
    OTEL_TRACES_SAMPLER: 'often',
    OTEL_EXPORTER_OTLP_PROTOCOL: 'grpc',
    VULCAN_TRACE_URL: 'jaeger',
  })
  assert.is(status, 78)
  for (const name of ['OTEL_TRACES_SAMPLER', 'OTEL_EXPORTER_OTLP_PROTOCOL', 'VULCAN_TRACE_URL'])
    assert.match(stderr, `${name}: `)
})

test('where a trace can be looked at is a template, or the address of a Jaeger UI', () => {
  const id = 'a'.repeat(32)
  assert.is(traceLinks(undefined)(id), null)
  assert.is(traceLinks('http://jaeger:16686/')(id), `http://jaeger:16686/trace/${id}`)
  assert.is(traceLinks('http://x/{trace_id}?a={trace_id}')(id), `http://x/${id}?a=${id}`)
  assert.is(traceLinks('http://jaeger:16686')(null), null)
})

test('a log line about a trace has its ids', () => {
  const { traceId, traceparent } = continueTrace(undefined)
  assert.equal(traceFields(traceparent), { trace_id: traceId, span_id: traceparent.slice(36, 52) })
  assert.equal(traceFields(undefined), {})
})

test('every bad variable is named and the process ends', () => {
  const { status, stderr } = readConfig({
    VULCAN_LOG_LEVEL: 'loud',
    VULCAN_ACK_WAIT_MS: '5',
    VULCAN_REPLICAS: 'x',
  })
  assert.is(status, 78)
  for (const name of ['VULCAN_LOG_LEVEL', 'VULCAN_ACK_WAIT_MS', 'VULCAN_REPLICAS'])
    assert.match(stderr, `${name}: `)
  assert.is(stderr.trim().split('\n').length, 3)
})

test.run()
