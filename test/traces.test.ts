// timeout: 420
/**
 * One trace from the request to the fold, for a workload of each isolation that is here: a receiver of OTLP gets the
 * spans of all processes, and they stand as docs/observability.md says.
 */
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { createServer, type IncomingHttpHeaders } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Bus } from '../shared/bus.ts'
import { logSubject } from '../shared/subjects.ts'
import { LOGS } from '../shared/topology.ts'
import type { Isolation, Workload } from '../shared/workload.ts'
import { noDockerd, startDocker } from './dockerd.ts'
import { skip } from './harness.ts'
import { offerOf } from './offers.ts'
import { type ReceivedSpan, startOtlp, type Trace, type Values } from './otlp.ts'
import { http, startTestPlatform } from './platform.ts'
import { startRegistry, writeLayout } from './registry.ts'
import { history, until } from './shared/support.ts'

const scope = new AsyncDisposableStack()
const otlp = scope.use(await startOtlp())

/** What the code calls: keeps the headers that came. */
const heard: IncomingHttpHeaders[] = []
const upstream = createServer((request, response) => {
  heard.push(request.headers)
  response.end('hello')
})
upstream.listen(0, '127.0.0.1')
await once(upstream, 'listening')
scope.defer(() => {
  upstream.closeAllConnections()
  upstream.close()
})
const upstreamHost = `127.0.0.1:${(upstream.address() as AddressInfo).port}`

const docker = noDockerd() === undefined ? scope.use(await startDocker()) : undefined
const platform = scope.use(
  await startTestPlatform({
    ...otlp.env,
    ...(docker === undefined ? {} : { DOCKER_HOST: docker.host }),
    VULCAN_ISOLATIONS: `isolate,gvisor,microvm${docker === undefined ? '' : ',docker'}`,
    VULCAN_TRACE_URL: 'http://jaeger.test:16686/',
    VULCAN_EGRESS_ALLOW_PRIVATE: upstreamHost,
    VULCAN_LOG_LEVEL: 'debug',
  }),
)
const { url } = platform
const bus = scope.use(await Bus.connect({ url: platform.natsUrl, name: 'test' }))

type Headers = Record<string, string>

/** Runs to the end; whatever end. */
async function run(spec: Record<string, unknown>, headers: Headers = {}): Promise<Workload> {
  const answer = await http<Workload>(`${url}/v1/workloads`, { body: spec, headers })
  assert.is(answer.status, 200, JSON.stringify(answer.body))
  return answer.body
}

async function deploy(name: string, spec: Record<string, unknown>): Promise<void> {
  const answer = await http(`${url}/v1/functions/${name}`, { method: 'PUT', body: spec })
  assert.is(answer.status, 201, JSON.stringify(answer.body))
}

const get = async (id: string): Promise<Workload> => (await http<Workload>(`${url}/v1/workloads/${id}`)).body

/** The trace of a workload that has ended, once the dispatcher’s word on it has come, and every span’s parent. */
const traceOf = (traceId: string, ready?: (trace: Trace) => unknown): Promise<Trace> =>
  otlp.trace(
    traceId,
    (trace) =>
      trace.has('fold vulcan.events') &&
      trace.roots.length === 1 &&
      trace.roots[0]!.kind === 'server' &&
      (ready?.(trace) ?? true),
  )

/** Processes of one machine share its clock; each follows it within some milliseconds. */
const skew = 20

/** Connected, and nothing begins before what it stands under. */
function connected(trace: Trace): ReceivedSpan {
  const { root } = trace
  for (const span of trace.spans) {
    assert.ok(span.end >= span.start, `${span.name} ends before it begins:\n${trace}`)
    const parent = trace.parent(span)
    assert.ok(
      parent === undefined || span.start >= parent.start - skew,
      `${span.name} begins before ${parent?.name}:\n${trace}`,
    )
  }
  return root
}

/** The attributes that stand there, of those that are named. */
function has(span: ReceivedSpan, attributes: Values): void {
  const found = Object.fromEntries(Object.keys(attributes).map((name) => [name, span.attributes[name]]))
  assert.equal(found, attributes, span.name)
}

/** Names of events, oldest first. */
const eventsOf = (span: ReceivedSpan) => span.events.map(({ name }) => name)
const traceparentOf = (span: ReceivedSpan) => `00-${span.traceId}-${span.spanId}-01`
const unset = { code: 'unset', message: '' } as const

/** The spans that every workload has: those of the attempt that was its last. */
function attemptOf(trace: Trace, end: 'completed' | 'failed' | 'killed' = 'completed') {
  const publish = trace.one('publish vulcan.events', connected(trace))
  const attempt = trace.all('process vulcan.work').at(-1)
  assert.ok(attempt !== undefined && trace.parent(attempt) === publish, String(trace))
  const ended = trace.one(`publish ${end}`, attempt)
  return {
    root: trace.root,
    publish,
    queue: trace.all('queue').at(-1)!,
    attempt,
    started: trace.one('publish started', attempt),
    run: trace.one('run', attempt),
    ended,
    fold: trace.one('fold vulcan.events', ended),
  }
}

const callerId = '00f067aa0ba902b7'
let traces = 0
/** A caller’s header for a trace of its own. */
const fromCaller = (flags = '01') => {
  const traceId = (++traces).toString(16).padStart(32, 'c')
  return { traceId, headers: { traceparent: `00-${traceId}-${callerId}-${flags}` } }
}

/** Code with a span of its own, and the parts of a cold start that must be there, one of each group. */
const kinds: Record<Isolation, { spec: Record<string, unknown>; parts: string[][] }> = {
  isolate: {
    spec: { code: spanning('(input, ctx)') },
    parts: [['create isolate'], ['compile']],
  },
  gvisor: {
    spec: { runtime: 'node', code: spanning('(input, ctx)') },
    parts: [['create container'], ['start handler']],
  },
  docker: {
    spec: { runtime: 'node', code: spanning('(input, ctx)') },
    parts: [['create container'], ['start handler']],
  },
  microvm: {
    spec: { runtime: 'node', code: spanning('(input, ctx)') },
    parts: [['boot machine', 'restore machine'], ['mount files']],
  },
}

function spanning(parameters: string): string {
  return `export default async ${parameters} => {
    console.log('a line')
    return await ctx.span('outer', async (outer) => {
      outer.set({ 'app.step': 'one' })
      const inner = await outer.span('inner', (span) => span.traceparent)
      return { run: ctx.traceparent, outer: outer.traceparent, inner }
    }, { 'app.size': 3 })
  }`
}

async function oneTree(isolation: Isolation): Promise<void> {
  const { spec, parts } = kinds[isolation]
  const { traceId, headers } = fromCaller()
  const workload = await run({ isolation, ...spec, limits: { memory_mb: 256, timeout_s: 180 } }, headers)
  assert.is(workload.status, 'completed', JSON.stringify(workload))
  assert.equal([workload.trace_id, workload.isolation], [traceId, isolation])
  const trace = await traceOf(traceId)
  const { root, publish, queue, attempt, started, run: ran, ended, fold } = attemptOf(trace)

  assert.is(root.parentSpanId, callerId, 'the caller’s trace goes on')
  const spans = [root, publish, queue, attempt, started, ran, ended, fold]
  assert.equal(
    spans.map(({ kind, service }) => `${kind} ${service}`),
    [
      'server vulcan-gateway',
      'producer vulcan-gateway',
      'internal vulcan-runner',
      'consumer vulcan-runner',
      'producer vulcan-runner',
      'internal vulcan-runner',
      'producer vulcan-runner',
      'consumer vulcan-dispatcher',
    ],
    String(trace),
  )
  for (const span of [...spans, ...trace.under(attempt), ...trace.under(ran)])
    assert.equal(span.status, unset, `${span.name}\n${trace}`)
  assert.match(String(attempt.resource['service.instance.id']), new RegExp(`^${isolation}-`))

  has(root, {
    'http.request.method': 'POST',
    'http.route': '/v1/workloads',
    'url.path': '/v1/workloads',
    'http.response.status_code': 200,
    'server.address': '127.0.0.1',
    'vulcan.workload.id': workload.id,
    'vulcan.isolation': isolation,
    'vulcan.status': 'completed',
  })
  assert.is(root.name, 'POST /v1/workloads')
  for (const span of [publish, started, ended])
    has(span, {
      'messaging.system': 'nats',
      'messaging.operation.type': 'send',
      'messaging.destination.name': 'vulcan.events',
    })
  has(publish, { 'vulcan.workload.id': workload.id, 'messaging.message.id': `${workload.id}.accepted.0` })
  has(attempt, {
    'messaging.system': 'nats',
    'messaging.operation.type': 'process',
    'messaging.destination.name': 'vulcan.work',
    'messaging.message.id': `${workload.id}.accepted.0`,
    'vulcan.workload.id': workload.id,
    'vulcan.isolation': isolation,
    'vulcan.attempt': workload.attempts,
    'vulcan.status': 'completed',
    'vulcan.runner': workload.receipt!.runner,
    'vulcan.start': workload.receipt!.start,
    'faas.invocation_id': workload.id,
    'faas.coldstart': workload.receipt!.start === 'cold',
    'faas.trigger': 'pubsub',
  })
  if (isolation === 'microvm') {
    const { vmm, start } = workload.receipt!.machine!
    has(attempt, { 'vulcan.machine.vmm': vmm, 'vulcan.machine.start': start })
  }
  assert.is(fold.attributes['messaging.system'], 'nats')
  assert.is(fold.attributes['vulcan.workload.id'], workload.id)

  for (const names of parts) {
    const part = trace.under(attempt).find(({ name }) => names.includes(name))
    assert.ok(part, `no ${names.join(' or ')} in:\n${trace}`)
  }
  const guest = trace.one('guest', ran)
  const outer = trace.one('outer', ran)
  const inner = trace.one('inner', outer)
  has(outer, { 'app.step': 'one', 'app.size': 3 })
  assert.equal(workload.output, {
    run: traceparentOf(ran),
    outer: traceparentOf(outer),
    inner: traceparentOf(inner),
  })
  const within = [guest, outer, inner].filter(
    ({ start, end }) => start < ran.start - skew || end > ran.end + skew,
  )
  assert.is(within.length, 0, `not within the run:\n${trace}`)

  // The queue ends where the attempt begins, and the run lies between the events that tell of it.
  assert.ok(Math.abs(queue.end - attempt.start) < skew, String(trace))
  assert.ok(started.start <= ran.start + skew && ran.end <= ended.start + skew, String(trace))

  const events = await history(bus, workload.id)
  assert.equal(
    [events[0], ...events.slice(-2)].map((stored) => stored?.event.traceparent),
    [publish, started, ended].map(traceparentOf),
    'each event carries the span that published it',
  )
  const batch = await until('the line', async () =>
    bus.jsm.streams
      .getMessage(LOGS, { last_by_subj: logSubject(workload.id) })
      .catch(() => undefined)
      .then((message) => message ?? undefined),
  )
  assert.is(batch.json<{ traceparent: string }>().traceparent, traceparentOf(ran), 'lines belong to the run')
}

async function under(isolation: Isolation, name: string, check: () => Promise<void>): Promise<void> {
  const { available, reason } = await offerOf(url, isolation)
  if (available) test(name, check)
  else skip(test, name, `${isolation} is unavailable: ${reason}`)
}

for (const isolation of Object.keys(kinds) as Isolation[])
  await under(isolation, `a workload of ${isolation} is one connected trace`, () => oneTree(isolation))

await under('gvisor', 'an image’s way from the registry can be read, and one that is not there', async () => {
  await using registry = await startRegistry()
  const layout = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  scope.defer(() => rm(layout, { recursive: true, force: true }))
  // Bytes that are nowhere yet; nothing in them can run.
  await writeLayout(layout, { layers: [{ entries: [{ path: 'x', content: randomUUID() }] }] })
  const { reference } = await registry.push(layout, 'team/new:1')
  const spec = { isolation: 'gvisor', entrypoint: ['/x'], retry: { max_attempts: 1 } }
  const found = fromCaller()
  const ran = await run({ ...spec, image: reference }, found.headers)
  assert.is(ran.status, 'failed')
  const trace = await traceOf(found.traceId)
  const { attempt } = attemptOf(trace, 'failed')
  assert.is(attempt.attributes['error.type'], ran.cause)
  for (const name of ['pull image', 'unpack image'])
    assert.equal(trace.one(name, attempt).status, unset, String(trace))

  const missing = fromCaller()
  const none = await run({ ...spec, image: reference.replace('new:1', 'none:1') }, missing.headers)
  assert.is(none.cause, 'image_not_found')
  const other = await traceOf(missing.traceId)
  const failed = attemptOf(other, 'failed').attempt
  assert.is(failed.attributes['error.type'], 'image_not_found')
  assert.is(other.one('pull image', failed).status.code, 'error', String(other))
})

test('the answer and what is read later tell the trace, and where to look at it', async () => {
  const { traceId, headers } = fromCaller()
  const answer = await http<Workload>(`${url}/v1/workloads`, {
    body: { code: 'export default () => 1' },
    headers,
  })
  const link = `http://jaeger.test:16686/trace/${traceId}`
  const trace = await traceOf(traceId)
  assert.is(answer.headers.get('traceparent'), traceparentOf(trace.root))
  assert.equal([answer.body.trace_id, answer.body.trace_url], [traceId, link])
  const { trace_id, trace_url } = await get(answer.body.id)
  assert.equal([trace_id, trace_url], [traceId, link])
})

test('a function called by HTTP: what it sends carries its trace, and its second call has no cold start', async () => {
  await deploy('relay', {
    network: { egress: [upstreamHost] },
    code: `export default { async fetch(request, env, ctx) {
      const { status } = await fetch('http://${upstreamHost}/path?token=secret')
      return Response.json({ status, header: request.headers.get('traceparent'), run: ctx.traceparent })
    } }`,
  })
  const call = async () => {
    const { traceId, headers } = fromCaller()
    heard.length = 0
    const answer = await fetch(`${url}/fn/relay/deep/path?key=hidden`, { headers })
    const body = (await answer.json()) as { status: number; header: string; run: string }
    assert.is(answer.status, 200)
    const trace = await traceOf(traceId, (all) => all.has('GET'))
    return { answer, body, trace, ...attemptOf(trace) }
  }
  const { answer, body, trace, root, attempt, run: ran } = await call()
  assert.is(answer.headers.get('traceparent'), traceparentOf(root))
  assert.is(root.name, 'GET /fn/:name')
  const id = answer.headers.get('x-vulcan-workload-id')!
  has(root, {
    'http.request.method': 'GET',
    'http.route': '/fn/:name',
    'url.path': '/fn/relay/deep/path',
    'http.response.status_code': 200,
    'faas.invoked_name': 'relay',
    'faas.trigger': 'http',
    'vulcan.workload.id': id,
  })
  has(attempt, { 'vulcan.function': 'relay', 'faas.trigger': 'http', 'faas.coldstart': true })
  for (const name of ['fetch bundle', 'compile']) trace.one(name, attempt)

  const sent = trace.one('GET', ran)
  assert.is(sent.kind, 'client')
  has(sent, {
    'http.request.method': 'GET',
    'http.response.status_code': 200,
    'server.address': '127.0.0.1',
    'server.port': Number(upstreamHost.split(':')[1]),
  })
  assert.equal([body.run, body.header], [traceparentOf(ran), traceparentOf(ran)])
  assert.equal(
    heard.map(({ traceparent }) => traceparent),
    [traceparentOf(sent)],
  )

  const warm = await call()
  has(warm.attempt, { 'faas.coldstart': false, 'vulcan.start': 'warm' })
  const cold = ['fetch bundle', 'create isolate', 'compile'].filter((name) => warm.trace.has(name))
  assert.equal(cold, [], String(warm.trace))
  for (const { attributes, name } of [...trace.spans, ...warm.trace.spans])
    assert.not.match(JSON.stringify(attributes), /hidden|token=secret/, name)
})

test('a retry can be read: two attempts, the second linked to the first', async () => {
  const { traceId, headers } = fromCaller()
  const workload = await run(
    {
      code: `export default (_, ctx) => { if (ctx.attempt === 1) throw new Error('not yet'); return ctx.attempt }`,
      retry: { on: ['user_error'], max_attempts: 3 },
    },
    headers,
  )
  assert.equal([workload.output, workload.attempts], [2, 2])
  const trace = await traceOf(traceId)
  const publish = trace.one('publish vulcan.events', connected(trace))
  const [first, second, ...more] = trace.all('process vulcan.work')
  assert.equal([first?.parentSpanId, second?.parentSpanId, more.length], [publish.spanId, publish.spanId, 0])
  has(first!, {
    'vulcan.attempt': 1,
    'vulcan.cause': 'user_error',
    'error.type': 'user_error',
    'vulcan.status': 'retrying',
  })
  assert.is(first!.status.code, 'error')
  const retry = first!.events.find(({ name }) => name === 'retry')
  const retrying = trace.one('publish retrying', first)
  assert.ok(
    Date.parse(String(retry?.attributes['vulcan.not_before'])) >= retrying.start - skew,
    String(trace),
  )
  assert.is(trace.one('run', first).attributes['error.type'], 'user_error')

  has(second!, { 'vulcan.attempt': 2, 'vulcan.status': 'completed' })
  assert.equal(second!.status, unset)
  assert.equal(
    second!.links.map(({ traceId, spanId }) => [traceId, spanId]),
    [[traceId, retrying.spanId]],
  )
  trace.one('publish completed', second)
  assert.equal(trace.root.status, unset, 'it went well in the end')
})

test('a timeout can be read', async () => {
  const { traceId, headers } = fromCaller()
  const workload = await run(
    {
      code: `export default async (_, ctx) => await ctx.span('long', () => new Promise(() => {}))`,
      limits: { timeout_s: 0.5 },
    },
    headers,
  )
  assert.is(workload.cause, 'timeout')
  const { root, attempt, run: ran, ended, fold } = attemptOf(await traceOf(traceId), 'failed')
  for (const span of [root, attempt, ran, fold]) {
    assert.is(span.status.code, 'error', span.name)
    assert.is(span.attributes['error.type'], 'timeout', span.name)
  }
  has(attempt, { 'vulcan.status': workload.status, 'vulcan.cause': 'timeout' })
  has(root, { 'vulcan.status': workload.status, 'vulcan.cause': 'timeout' })
  assert.equal(eventsOf(ran), ['timeout'])
  const after = ran.events[0]!.at - ran.start
  assert.ok(after > 400 && after < 5_000, `the timeout came after ${after} ms`)
  assert.ok(ended.start >= ran.events[0]!.at - skew)
  const trace = await otlp.trace(traceId, (all) => all.has('long'))
  assert.is(trace.parent(trace.one('long')), trace.one('run'), 'a span of the code that never ended')
})

test('a runner that dies can be read: the dispatcher’s word, and the next attempt linked to it', async () => {
  await using small = await startTestPlatform({ ...otlp.env, VULCAN_ACK_WAIT_MS: '2000' })
  const { traceId, headers } = fromCaller()
  const { body } = await http<Workload>(`${small.url}/v1/workloads`, {
    body: {
      code: `export default (_, ctx) => ctx.attempt === 1 ? new Promise(() => {}) : ctx.attempt`,
      limits: { timeout_s: 120 },
    },
    headers: { ...headers, prefer: 'respond-async' },
  })
  const now = async () => (await http<Workload>(`${small.url}/v1/workloads/${body.id}`)).body
  await until('it runs', async () => (await now()).status === 'running' || undefined)
  process.kill(small.supervisor.pid('runner')!, 'SIGKILL')
  await until('its end', async () => (await now()).status === 'completed' || undefined, 60_000)

  const trace = await otlp.trace(traceId, (all) => all.has('fold vulcan.events'))
  const publish = trace.one('publish vulcan.events')
  const retrying = trace.one('publish retrying')
  assert.equal(retrying.attributes['error.type'], 'runner_lost', String(trace))
  const second = trace.all('process vulcan.work').at(-1)!
  assert.is(trace.parent(second), publish)
  has(second, { 'vulcan.attempt': 2, 'vulcan.status': 'completed' })
  assert.equal(
    second.links.map(({ spanId }) => spanId),
    [retrying.spanId],
    String(trace),
  )
})

test('a kill can be read, and is linked to who asked for it', async () => {
  const { traceId, headers } = fromCaller()
  const running = await http<Workload>(`${url}/v1/workloads`, {
    body: { code: 'export default () => new Promise(() => {})' },
    headers: { ...headers, prefer: 'respond-async' },
  })
  assert.is(running.status, 202)
  await until('it runs', async () => (await get(running.body.id)).status === 'running' || undefined)
  const killer = fromCaller()
  const { status } = await http(`${url}/v1/workloads/${running.body.id}/kill`, {
    method: 'POST',
    headers: killer.headers,
  })
  assert.is(status, 200)
  const { attempt, run: ran, ended } = attemptOf(await traceOf(traceId), 'killed')
  for (const span of [attempt, ran]) assert.is(span.attributes['error.type'], 'killed', span.name)
  assert.equal(eventsOf(ran), ['kill'])
  has(attempt, { 'vulcan.status': 'killed', 'vulcan.cause': 'killed' })

  const request = await otlp.trace(killer.traceId, ({ spans }) => spans.length > 0)
  assert.is(request.root.name, 'POST /v1/workloads/:id/kill')
  assert.is(request.root.attributes['vulcan.workload.id'], running.body.id)
  assert.equal(
    ended.links.map((link) => [link.traceId, link.spanId]),
    [[killer.traceId, request.root.spanId]],
  )
})

test('a kill before it ran is the gateway’s span, in the workload’s trace', async () => {
  await deploy('single', {
    code: 'export default () => new Promise(() => {})',
    concurrency: 1,
    limits: { timeout_s: 60 },
  })
  const call = async (headers: Headers) =>
    (
      await http<Workload>(`${url}/v1/functions/single/invocations`, {
        body: {},
        headers: { ...headers, prefer: 'respond-async' },
      })
    ).body
  const first = await call({})
  await until('the first runs', async () => (await get(first.id)).status === 'running' || undefined)
  const { traceId, headers } = fromCaller()
  const second = await call(headers)
  const killer = fromCaller()
  for (const { id } of [second, first])
    await http(`${url}/v1/workloads/${id}/kill`, { method: 'POST', headers: killer.headers })
  assert.is((await get(second.id)).status, 'killed')
  const trace = await traceOf(traceId)
  const ended = trace.one('publish killed', trace.one('publish vulcan.events', connected(trace)))
  assert.is(ended.service, 'vulcan-gateway')
  assert.is(ended.attributes['error.type'], 'killed')
  trace.one('fold vulcan.events', ended)
  assert.not.ok(trace.has('run'))
  const request = await otlp.trace(killer.traceId, ({ spans }) => spans.length > 1)
  const [link] = ended.links
  assert.ok(
    request.spans.some(({ spanId, traceId }) => spanId === link?.spanId && traceId === link.traceId),
    'linked to the request for it',
  )
})

test('what fails is exported though its trace is not sampled, and nothing else of such traces', async () => {
  const well = fromCaller('00')
  const badly = fromCaller('00')
  const sampled = fromCaller()
  const fine = await run({ code: 'export default () => 1' }, well.headers)
  assert.equal([fine.trace_id, fine.status], [well.traceId, 'completed'])
  const broken = await run(
    {
      code: `export default (_, ctx) => ctx.span('mine', () => { throw new TypeError('broken') })`,
    },
    badly.headers,
  )
  assert.is(broken.cause, 'user_error')
  const trace = await traceOf(badly.traceId, (all) => all.has('mine'))
  const { root, attempt, run: ran, fold } = attemptOf(trace, 'failed')
  for (const span of [root, attempt, ran, fold])
    assert.is(span.attributes['error.type'], 'user_error', String(trace))
  for (const name of ['create isolate', 'compile']) trace.one(name, attempt)
  const mine = trace.one('mine', ran)
  assert.is(mine.status.code, 'error')
  assert.match(mine.status.message, 'broken')

  // By the time that a later trace is whole, the first would have come.
  await run({ code: 'export default () => 2' }, sampled.headers)
  await traceOf(sampled.traceId)
  assert.equal(otlp.of(well.traceId), [])
})

test('log lines about a workload have the ids of its trace', async () => {
  const { traceId, headers } = fromCaller()
  const { id } = await run({ code: 'export default () => 1' }, headers)
  const trace = await traceOf(traceId)
  const line = await until('its line', () =>
    platform.lines.find((text) => text.includes(id) && text.includes(traceId)),
  )
  const said = JSON.parse(line.slice(line.indexOf('{')))
  assert.equal([said.workload, said.trace_id], [id, traceId])
  assert.ok(
    trace.spans.some(({ spanId }) => spanId === said.span_id),
    line,
  )
})

test('everything ends', async () => {
  await scope[Symbol.asyncDispose]()
})

test.run()
