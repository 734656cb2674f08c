// timeout: 420
/**
 * Traces as a real Jaeger has them: its OTLP receiver gets them, its query API gives them back. Needs `jaeger` (v2) in
 * PATH, or its path in VULCAN_JAEGER.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { accessSync, constants } from 'node:fs'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { delimiter, join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { tryPort } from '../scripts/ports.ts'
import type { Isolation, Workload } from '../shared/workload.ts'
import { noDockerd, startDocker } from './dockerd.ts'
import { skip } from './harness.ts'
import { offerOf } from './offers.ts'
import { type ReceivedSpan, Trace, type Values } from './otlp.ts'
import { http, startTestPlatform } from './platform.ts'
import { until } from './shared/support.ts'

const host = '127.0.0.1'

function findJaeger(): string | undefined {
  const folders = (process.env.PATH ?? '').split(delimiter)
  const paths = [process.env.VULCAN_JAEGER, ...folders.map((folder) => join(folder, 'jaeger'))]
  return paths.find((path) => {
    try {
      accessSync(path ?? '', constants.X_OK)
      return true
    } catch {
      return false
    }
  })
}

/** Ports of its own, everything in memory. */
async function startJaeger(binary: string, scope: AsyncDisposableStack) {
  const folder = await mkdtemp(join(tmpdir(), 'vulcan-jaeger-'))
  scope.defer(() => rm(folder, { recursive: true, force: true }))
  const [otlp, query, grpc] = [await tryPort(host, 0), await tryPort(host, 0), await tryPort(host, 0)]
  const config = join(folder, 'jaeger.yaml')
  // JSON is YAML.
  await writeFile(
    config,
    JSON.stringify({
      service: {
        extensions: ['jaeger_storage', 'jaeger_query'],
        pipelines: { traces: { receivers: ['otlp'], exporters: ['jaeger_storage_exporter'] } },
        telemetry: { metrics: { level: 'none' }, logs: { level: 'warn' } },
      },
      extensions: {
        jaeger_storage: { backends: { all: { memory: { max_traces: 1_000 } } } },
        jaeger_query: {
          storage: { traces: 'all' },
          http: { endpoint: `${host}:${query}` },
          grpc: { endpoint: `${host}:${grpc}` },
        },
      },
      receivers: { otlp: { protocols: { http: { endpoint: `${host}:${otlp}` } } } },
      exporters: { jaeger_storage_exporter: { trace_storage: 'all' } },
    }),
  )
  const child: ChildProcess = spawn(binary, ['--config', config], { stdio: ['ignore', 'ignore', 'pipe'] })
  let said = ''
  child.stderr!.setEncoding('utf8').on('data', (text) => {
    said = (said + text).slice(-4_000)
  })
  scope.defer(async () => {
    if (child.exitCode !== null || child.signalCode !== null) return
    const ended = once(child, 'exit')
    child.kill()
    await ended
  })
  const url = `http://${host}:${query}`
  await until(
    'Jaeger’s first answer',
    async () => {
      if (child.exitCode !== null) throw new Error(`Jaeger ended:\n${said}`)
      return fetch(`${url}/api/services`).then(
        ({ ok }) => ok || undefined,
        () => undefined,
      )
    },
    60_000,
  )
  return { url, endpoint: `http://${host}:${otlp}` }
}

/** What `/api/traces/<id>` answers: the form that Jaeger’s own pages read. Times in microseconds. */
interface JaegerTrace {
  spans: {
    traceID: string
    spanID: string
    operationName: string
    references: { refType: 'CHILD_OF' | 'FOLLOWS_FROM'; traceID: string; spanID: string }[]
    startTime: number
    duration: number
    tags: Tag[]
    logs: { timestamp: number; fields: Tag[] }[]
    processID: string
    warnings: string[] | null
  }[]
  processes: Record<string, { serviceName: string; tags: Tag[] }>
}
interface Tag {
  key: string
  value: string | number | boolean
}

const valuesOf = (tags: Tag[]): Values => Object.fromEntries(tags.map(({ key, value }) => [key, value]))

function spansOf({ spans, processes }: JaegerTrace): ReceivedSpan[] {
  return spans.map((span) => {
    const attributes = valuesOf(span.tags)
    const parent = span.references.find(({ refType }) => refType === 'CHILD_OF')
    const { serviceName, tags } = processes[span.processID]!
    return {
      traceId: span.traceID,
      spanId: span.spanID,
      parentSpanId: parent?.spanID,
      sampled: true,
      name: span.operationName,
      kind: (attributes['span.kind'] ?? 'internal') as ReceivedSpan['kind'],
      start: span.startTime / 1_000,
      end: (span.startTime + span.duration) / 1_000,
      attributes,
      events: span.logs.map(({ timestamp, fields }) => {
        const { event, ...others } = valuesOf(fields)
        return { name: String(event), at: timestamp / 1_000, attributes: others }
      }),
      links: span.references
        .filter(({ refType }) => refType === 'FOLLOWS_FROM')
        .map(({ traceID, spanID }) => ({ traceId: traceID, spanId: spanID, attributes: {} })),
      status: {
        code: attributes.error === true ? 'error' : 'unset',
        message: String(attributes['otel.status_description'] ?? ''),
      },
      service: serviceName,
      resource: valuesOf(tags),
    }
  })
}

const scope = new AsyncDisposableStack()
const binary = findJaeger()
const names = {
  one: (isolation: Isolation) => `Jaeger has one tree of a workload of ${isolation}`,
  troubles: 'Jaeger shows a retry, a timeout and a kill',
}
const isolations: Isolation[] = ['isolate', 'gvisor', 'docker', 'microvm']

if (binary === undefined) {
  const why = 'no jaeger in PATH or VULCAN_JAEGER'
  for (const isolation of isolations) skip(test, names.one(isolation), why)
  skip(test, names.troubles, why)
} else {
  const jaeger = await startJaeger(binary, scope)
  const docker = noDockerd() === undefined ? scope.use(await startDocker()) : undefined
  const { url } = scope.use(
    await startTestPlatform({
      OTEL_EXPORTER_OTLP_ENDPOINT: jaeger.endpoint,
      OTEL_BSP_SCHEDULE_DELAY: '100',
      VULCAN_TRACE_URL: jaeger.url,
      VULCAN_ISOLATIONS: `isolate,gvisor,microvm${docker === undefined ? '' : ',docker'}`,
      ...(docker === undefined ? {} : { DOCKER_HOST: docker.host }),
    }),
  )
  const run = async (spec: Record<string, unknown>, headers: Record<string, string> = {}) =>
    (await http<Workload>(`${url}/v1/workloads`, { body: spec, headers })).body

  /** The trace, connected, once the fold is in it. */
  const traceOf = async ({ trace_id, trace_url }: Workload): Promise<Trace> => {
    assert.is(trace_url, `${jaeger.url}/trace/${trace_id}`)
    const found = await until(
      `trace ${trace_id} in Jaeger`,
      async () => {
        const { status, body } = await http<{ data: JaegerTrace[] }>(`${jaeger.url}/api/traces/${trace_id}`)
        if (status !== 200) return undefined
        const trace = new Trace(spansOf(body.data[0]!))
        return trace.has('fold vulcan.events') && trace.roots.length === 1 ? { trace, body } : undefined
      },
      20_000,
    )
    // It takes spans that begin after their parent’s end, as the fold does, for those of another clock, and those that
    // took no time, by the coarse clock of an emulated machine, for negative ones.
    for (const { operationName, warnings } of found.body.data[0]!.spans)
      assert.equal(
        warnings?.filter((text) => !/^(clock skew|Negative duration)/.test(text)) ?? [],
        [],
        operationName,
      )
    assert.is(found.trace.root.kind, 'server', String(found.trace))
    if (process.env.VULCAN_TEST_LOG) console.log(`${trace_url}\n${found.trace}\n`)
    return found.trace
  }

  const oneTree = async (isolation: Isolation) => {
    const runtime = isolation === 'isolate' ? {} : { runtime: 'node' }
    const code = `export default (_, ctx) => ctx.span('mine', ({ traceparent }) => traceparent)`
    const workload = await run({ isolation, ...runtime, code, limits: { timeout_s: 180, memory_mb: 256 } })
    assert.is(workload.status, 'completed', JSON.stringify(workload))
    const trace = await traceOf(workload)
    const attempt = trace.all('process vulcan.work').at(-1)!
    assert.is(trace.parent(attempt), trace.one('publish vulcan.events', trace.root))
    const ran = trace.one('run', attempt)
    trace.one('guest', ran)
    assert.match(String(workload.output), trace.one('mine', ran).spanId)
    trace.one('fold vulcan.events', trace.one('publish completed', attempt))
    assert.equal([...new Set(trace.spans.map(({ service }) => service))].toSorted(), [
      'vulcan-dispatcher',
      'vulcan-gateway',
      'vulcan-runner',
    ])
  }
  for (const isolation of isolations) {
    const { available, reason } = await offerOf(url, isolation)
    if (available) test(names.one(isolation), () => oneTree(isolation))
    else skip(test, names.one(isolation), `${isolation} is unavailable: ${reason}`)
  }

  test(names.troubles, async () => {
    const code = `export default (_, ctx) => { if (ctx.attempt === 1) throw new Error('not yet') }`
    const retried = await traceOf(await run({ code, retry: { on: ['user_error'] } }))
    const [first, second] = retried.all('process vulcan.work')
    assert.equal([first!.status.code, second!.status.code], ['error', 'unset'])
    assert.ok(first!.events.some(({ name }) => name === 'retry'))
    assert.equal(
      second!.links.map(({ spanId }) => spanId),
      [retried.one('publish retrying', first).spanId],
    )

    const forever = 'export default () => new Promise(() => {})'
    const late = await traceOf(await run({ code: forever, limits: { timeout_s: 0.5 } }))
    assert.is(late.one('process vulcan.work').attributes['error.type'], 'timeout')
    assert.equal(
      late.one('run').events.map(({ name }) => name),
      ['timeout'],
    )

    const { id } = await run({ code: forever }, { prefer: 'respond-async' })
    await until('it runs', async () => {
      const { body } = await http<Workload>(`${url}/v1/workloads/${id}`)
      return body.status === 'running' || undefined
    })
    const { body } = await http<Workload>(`${url}/v1/workloads/${id}/kill`, { method: 'POST' })
    const killed = await traceOf(body)
    assert.is(killed.one('process vulcan.work').attributes['error.type'], 'killed')
    assert.equal(
      killed.one('run').events.map(({ name }) => name),
      ['kill'],
    )
    assert.is(killed.one('publish killed').links.length, 1)
  })
}

test('everything ends', async () => {
  await scope[Symbol.asyncDispose]()
})

test.run()
