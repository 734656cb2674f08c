import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { UserSpans } from '../../../runners/guest/spans.ts'
import { Traffic } from '../../../runners/guest/traffic.ts'
import { createIsolateRunner, type IsolateOptions } from '../../../runners/isolate/index.ts'
import { RunnerMetrics } from '../../../runners/metrics.ts'
import type { Outcome, Phase, Runner } from '../../../runners/runner.ts'
import { FrameError } from '../../../shared/frames.ts'
import { kinds, maxSpanAttributes, maxSpans, maxSpanValue } from '../../../shared/guest.ts'
import { preciseNow } from '../../../shared/tracing.ts'
import { hearing, type JobOptions, job, sleep } from './support.ts'

const trace = '0af7651916cd43dd8448eb211c80319c'
const runSpan = 'b7ad6b7169203331'
const traceparent = `00-${trace}-${runSpan}-01`

interface Traced {
  outcome: Outcome
  output: unknown
  phases: Phase[]
  before: number
  after: number
  one(name: string): Phase
}

/** Runs code whose attempt is traced. */
async function traced(
  runner: Runner,
  code: string,
  { timeoutMs = 20_000, ...options }: JobOptions & { timeoutMs?: number } = {},
): Promise<Traced> {
  const phases: Phase[] = []
  const before = preciseNow()
  const prepared = runner.prepare(job(code, { traced: true, traceparent, ...options }))
  const stop = AbortSignal.timeout(timeoutMs)
  const onPhase = (phase: Phase) => {
    // On a busy host there may be one.
    if (phase.name !== 'wait for sandbox') phases.push(phase)
  }
  const outcome = await prepared.run(stop, { ...hearing(), onPhase })
  const one = (name: string) => {
    const found = phases.filter((phase) => phase.name === name)
    if (found.length !== 1) throw new Error(`${found.length} of ${name} in ${JSON.stringify(phases)}`)
    return found[0]!
  }
  const output = outcome.status === 'completed' ? JSON.parse(outcome.output) : undefined
  return { outcome, output, phases, before, after: preciseNow(), one }
}

/** With one child, so that the second run of the same code is warm. */
const single = (options: IsolateOptions = {}) => createIsolateRunner({ min: 1, max: 1, ...options })
const names = (phases: Phase[]) => phases.map(({ name }) => name)

test('a cold start is told by its parts, in order and within the attempt; a warm one has none', async () => {
  await using runner = await single()
  const code = 'export default () => 1'
  const cold = await traced(runner, code)
  assert.equal(names(cold.phases), ['create isolate', 'compile', 'guest'])
  let at = cold.before
  for (const { start, end } of cold.phases) {
    assert.ok(start >= at - 0.001 && end >= start, JSON.stringify(cold.phases))
    at = end
  }
  assert.ok(at <= cold.after)
  const warm = await traced(runner, code)
  assert.equal(names(warm.phases), ['guest'])
  assert.is(warm.outcome.start, 'warm')
  assert.ok(warm.one('guest').start >= cold.one('guest').end)
})

test('a run that has to wait for a child says so', async () => {
  await using runner = await single()
  const signal = AbortSignal.timeout(20_000)
  const long = 'export default () => new Promise((resolve) => setTimeout(resolve, 200))'
  const first = runner.prepare(job(long)).run(signal, hearing())
  const phases: Phase[] = []
  const events = { ...hearing(), onPhase: (phase: Phase) => phases.push(phase) }
  await runner.prepare(job('export default () => 1', { traced: true, traceparent })).run(signal, events)
  await first
  const wait = phases.find(({ name }) => name === 'wait for sandbox')!
  const made = phases.find(({ name }) => name === 'create isolate')!
  assert.ok(wait.end - wait.start > 100 && wait.end <= made.start + 0.001, JSON.stringify(phases))
})

test('who is not traced is told nothing, and ctx.span calls its function all the same', async () => {
  await using runner = await single()
  const phases: Phase[] = []
  const code = `export default async (_, ctx) => {
    const seen = []
    const value = await ctx.span('a', async (span) => { span.set({ x: 1 }); seen.push(span.traceparent); return 1 })
    seen.push(value, ctx.span('b', (span) => span.span('c', () => 2)), ctx.traceparent)
    return seen
  }`
  const prepared = runner.prepare(job(code, { traceparent, traced: false }))
  const events = { ...hearing(), onPhase: (phase: Phase) => phases.push(phase) }
  const outcome = await prepared.run(AbortSignal.timeout(20_000), events)
  assert.ok(outcome.status === 'completed')
  assert.equal(JSON.parse(outcome.output), [traceparent, 1, 2, traceparent])
  assert.equal(phases, [])
})

test('user code draws spans: below each other, with attributes, failed where it throws', async () => {
  await using runner = await single()
  const {
    phases,
    output: seen,
    one,
    before,
    after,
  } = await traced(
    runner,
    `export default async (_, ctx) => {
      const { span } = ctx
      const outer = await span('outer', async (outer) => {
        outer.set({ late: true, n: 2 })
        const inner = outer.span('inner', (inner) => inner.traceparent, { k: 'v' })
        await new Promise((resolve) => setTimeout(resolve, 20))
        return { inner, outer: outer.traceparent }
      }, { n: 1, list: [1], no: undefined, nan: NaN, big: 'x'.repeat(2000) })
      const caught = []
      try { span('thrown', () => { throw new TypeError('one') }) } catch (error) { caught.push(error.message) }
      await span('rejected', async () => { throw new Error('two') }).catch((error) => caught.push(error.message))
      try { span('nothing') } catch (error) { caught.push(error.message) }
      return { ...outer, caught, value: span('plain', () => 7) }
    }`,
  )
  const output = seen as { outer: string; inner: string; caught: string[]; value: number }
  const outer = one('outer')
  assert.is(output.outer, `00-${trace}-${outer.spanId}-01`)
  assert.is(output.inner, `00-${trace}-${one('inner').spanId}-01`)
  assert.is(one('inner').parentSpanId, outer.spanId)
  assert.is(outer.parentSpanId, undefined)
  assert.equal(outer.attributes, { n: 2, big: '[2000 characters]', late: true })
  assert.equal(one('inner').attributes, { k: 'v' })
  assert.ok(outer.end - outer.start >= 15)
  assert.ok(outer.start >= before && outer.end <= after)
  assert.equal([one('thrown').error, one('rejected').error, one('plain').error], ['one', 'two', undefined])
  assert.equal(output.caught, ['one', 'two', 'ctx.span(name, fn, attributes): fn is no function'])
  assert.is(output.value, 7)
  assert.is(new Set(phases.map(({ spanId }) => spanId)).size, phases.length - 2)
})

test('a span that is open when the run is stopped, or dies, is told with its end', async () => {
  await using runner = await single()
  const waiting = await traced(
    runner,
    `export default (_, ctx) => ctx.span('waits', () => new Promise(() => {}), { on: 'nothing' })`,
    { timeoutMs: 300 },
  )
  assert.is(waiting.outcome.status, 'stopped')
  assert.equal(
    [waiting.one('waits').error, waiting.one('waits').attributes],
    ['the run ended before it', { on: 'nothing' }],
  )
  assert.is(waiting.one('guest').error, 'stopped')
  const spinning = await traced(runner, `export default (_, ctx) => ctx.span('spins', () => { for (;;); })`, {
    timeoutMs: 300,
  })
  assert.is(spinning.outcome.status, 'stopped')
  assert.ok(spinning.one('spins').end - spinning.one('spins').start >= 100)
  assert.is(spinning.one('guest').error, 'stopped')
  const full = await traced(
    runner,
    `export default (_, ctx) => ctx.span('fills', () => { const all = []; for (;;) all.push(new Array(1e5).fill(all.length)) })`,
    { limits: { memory_mb: 16 } },
  )
  assert.ok(full.outcome.status === 'failed' && full.outcome.cause === 'oom', JSON.stringify(full.outcome))
  assert.is(full.one('guest').error, 'oom')
  assert.is(full.one('fills').error, 'the run ended before it')
})

test('spans of a call that is over are nobody’s, also while the next one runs', async () => {
  await using runner = await single()
  const code = `let kept
  export default (input, ctx) => {
    if (kept === undefined) { ctx.span('first', (span) => { kept = { ctx, span } }); return 1 }
    kept.span.set({ late: 1 })
    kept.ctx.span('stale', () => 1)
    kept.span.span('stale too', () => 1)
    return ctx.span('second', () => 2)
  }`
  assert.equal(names((await traced(runner, code)).phases).sort(), [
    'compile',
    'create isolate',
    'first',
    'guest',
  ])
  const { phases, output } = await traced(runner, code)
  assert.equal(names(phases).sort(), ['guest', 'second'])
  assert.is(output, 2)
})

test('what code does to the language breaks no span, and floods end where they are bounded', async () => {
  await using runner = await single()
  const tampered = await traced(
    runner,
    `export default async (_, ctx) => {
      Object.prototype.toJSON = () => ({ id: 'x' })
      String.prototype.slice = () => 'x'
      Promise.prototype.then = () => { throw new Error('then') }
      JSON.stringify = () => '{'
      Object.defineProperty(Object.prototype, 'parent', { set() { throw new Error('set') }, get() { return 'x' } })
      ctx.traceparent = 'x'
      ctx.span('a', (span) => span.span('b', () => 1), { __proto__: null, ok: 1 })
      return 1
    }`,
  )
  assert.is(tampered.one('b').parentSpanId, tampered.one('a').spanId)
  assert.equal(tampered.one('a').attributes, { ok: 1 })
  const flooded = await traced(
    runner,
    `export default (_, ctx) => {
      const many = Object.fromEntries(Array.from({ length: 100 }, (_, i) => ['k' + i, i]))
      for (let i = 0; i < 1000; i++) ctx.span('s' + i, (span) => span.set(many), { 'vulcan.cause': 'x', 'a b': 1 })
      ctx.span('x'.repeat(1e6), () => 1)
      return ctx.span('more', () => 3)
    }`,
  )
  assert.is(flooded.output, 3)
  assert.is(flooded.phases.filter(({ name }) => /^s\d+$/.test(name)).length, maxSpans)
  for (const { attributes } of flooded.phases)
    assert.ok(
      Object.keys(attributes ?? {}).length <= maxSpanAttributes && attributes?.['vulcan.cause'] === undefined,
    )
  const wide = await traced(
    runner,
    `export default (_, ctx) => ctx.span('\\u0000n'.repeat(1e6), () => 1, { huge: 'x'.repeat(1e6), k: 1 })`,
  )
  const escaped = await traced(
    runner,
    `export default (_, ctx) => {
      const text = '\\ud800'.repeat(20_000)
      return ctx.span(text, (span) => (span.set({ text }), ctx.span('next', () => 2)), { text, k: 1 })
    }`,
    { limits: { output_mb: 0.001 } },
  )
  assert.is(escaped.output, 2)
  assert.is(escaped.phases.filter(({ spanId }) => spanId !== undefined).length, 2)
  const span = wide.phases.find(({ spanId }) => spanId !== undefined)!
  assert.ok(span.name.length <= 16_000 && span.name.startsWith(' n n'))
  assert.is(wide.output, 1)
})

test('a span that makes no sense is a broken protocol, and what it says is bounded', () => {
  const told: Phase[] = []
  const spans = new UserSpans(
    (phase) => told.push(phase),
    (ms) => ms,
  )
  const id = 'aaaaaaaaaaaaaaaa'
  for (const wrong of [
    ...[null, 1, 'x', [], {}, { id }, { id: 'x', name: 'n', start: 1 }, { id, start: 1 }],
    ...[
      { id: '0'.repeat(16), name: 'n', start: 1 },
      { id, name: 'n', start: Number.NaN },
      { id, name: 1, start: 1 },
      { id, name: 'n', start: 1, parent: 'up' },
      { id, name: 'n', start: 1, attributes: 1 },
    ],
  ])
    assert.throws(
      () => spans.handle(wrong),
      (error: unknown) => error instanceof FrameError,
      JSON.stringify(wrong),
    )
  assert.equal(told, [])
  spans.handle({
    id,
    name: 'n',
    start: 1,
    kind: 'client',
    attributes: { a: 'x'.repeat(maxSpanValue + 1), b: {} },
  })
  spans.handle({ id, name: 'twice', start: 2 })
  spans.handle({ id: 'b'.repeat(16), end: 2 })
  spans.handle({ id, end: 0, attributes: { c: true }, error: 'e'.repeat(20_000) })
  spans.handle({ id, end: 5 })
  assert.is(told.length, 1)
  const { error, ...rest } = told[0]!
  assert.is(error!.length, 16_000)
  assert.equal(rest, {
    name: 'n',
    kind: 'client',
    start: 1,
    end: 1,
    spanId: id,
    attributes: { a: `[${maxSpanValue + 1} characters]`, c: true },
  })
})

test('a span of a run that is not traced is a broken protocol', () => {
  const message = {
    kind: kinds.span,
    run: 1,
    number: 0,
    parts: [Buffer.from('{"id":"aaaaaaaaaaaaaaaa","end":1}')],
  }
  const traffic = (traced: boolean) =>
    new Traffic(job('', { traced }), { ...hearing(), onPhase() {} }, undefined, () => {})
  assert.throws(
    () => traffic(false).handle(message),
    (error: unknown) => error instanceof FrameError,
  )
  assert.not.throws(() => traffic(true).handle(message))
})

/** A server on loopback that keeps the headers of what it is asked. */
async function serve() {
  const heard: { path: string; traceparent: string | undefined }[] = []
  const server = createServer((request, response) => {
    heard.push({ path: request.url!, traceparent: request.headers.traceparent as string | undefined })
    const { pathname } = new URL(request.url!, 'http://x')
    if (pathname === '/moved') response.writeHead(302, { location: '/there' })
    if (pathname === '/broken') response.writeHead(503)
    if (pathname === '/never') return
    response.end('12345')
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  return {
    host: `127.0.0.1:${port}`,
    port,
    heard,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

test('a fetch is a client span, and its traceparent goes out', async () => {
  await using web = await serve()
  await using runner = await single({ egress: { allowPrivate: [web.host] } })
  const options = { egress: [web.host], input: `http://${web.host}` }
  const { one, output, outcome } = await traced(
    runner,
    `export default async (base, ctx) => {
      const answer = await fetch(base + '/path?token=hidden', { method: 'POST', body: 'abc' })
      return (await answer.text()).length
    }`,
    options,
  )
  const span = one('POST')
  assert.is(output, 5)
  assert.equal([span.kind, span.parentSpanId, span.error], ['client', undefined, undefined])
  assert.equal(span.attributes, {
    'http.request.method': 'POST',
    'server.address': '127.0.0.1',
    'server.port': web.port,
    'url.full': `http://${web.host}/path`,
    'http.request.resend_count': undefined,
    'http.response.status_code': 200,
  })
  assert.equal(web.heard, [{ path: '/path?token=hidden', traceparent: `00-${trace}-${span.spanId}-01` }])
  const { network_received_bytes, network_sent_bytes } = outcome.usage
  assert.equal([network_received_bytes, network_sent_bytes], [5, 3])
})

test('a fetch stands under the span whose traceparent it is given; a foreign one stays as it is', async () => {
  await using web = await serve()
  await using runner = await single({ egress: { allowPrivate: [web.host] } })
  const foreign = `00-${'c'.repeat(32)}-${'d'.repeat(16)}-01`
  const { one, phases } = await traced(
    runner,
    `export default async (base, ctx) => {
      const get = (path, traceparent) => fetch(base + path, { headers: { traceparent } })
      await ctx.span('user', (span) => get('/moved', span.traceparent))
      await get('/foreign', '${foreign}')
      await get('/strange', 'x')
    }`,
    { egress: [web.host], input: `http://${web.host}` },
  )
  const [moved, there, ...others] = phases.filter(({ name }) => name === 'GET')
  for (const hop of [moved, there]) assert.is(hop!.parentSpanId, one('user').spanId)
  assert.equal(
    [there!.attributes!['http.request.resend_count'], there!.attributes!['url.full']],
    [1, `http://${web.host}/there`],
  )
  assert.equal(
    others.map(({ parentSpanId }) => parentSpanId),
    [undefined, undefined],
  )
  assert.equal(
    web.heard.map((one) => one.traceparent),
    [`00-${trace}-${moved!.spanId}-01`, `00-${trace}-${there!.spanId}-01`, foreign, 'x'],
  )
})

test('fetches that fail say how: refused by policy, answered with an error, cut by a stop', async () => {
  await using web = await serve()
  await using runner = await single({ egress: { allowPrivate: [web.host] } })
  const options = { egress: [web.host], input: `http://${web.host}` }
  const denied = await traced(
    runner,
    `export default async () => { await fetch('http://example.test/x').catch(() => {}) }`,
    options,
  )
  const { attributes } = denied.one('GET')
  assert.equal([attributes!['error.type'], attributes!['server.address']], ['egress_denied', 'example.test'])
  const broken = await traced(
    runner,
    `export default async (base) => { await fetch(base + '/broken') }`,
    options,
  )
  assert.is(broken.one('GET').attributes!['error.type'], '503')
  const odd = await traced(
    runner,
    `export default async (base) => { await fetch(base + '/', { method: 'INVENTED' }) }`,
    options,
  )
  assert.is(odd.one('HTTP').attributes!['http.request.method'], '_OTHER')
  const never = await traced(runner, `export default async (base) => { await fetch(base + '/never') }`, {
    ...options,
    timeoutMs: 500,
  })
  assert.is(never.outcome.status, 'stopped')
  // It is told a moment behind the outcome.
  for (let i = 0; i < 200 && !names(never.phases).includes('GET'); i++) await sleep(10)
  assert.match(never.one('GET').error!, 'aborted')
})

test('starts, cold parts, fetches, failures and what is held warm are counted', async () => {
  await using web = await serve()
  const metrics = new RunnerMetrics('r1', 'isolate')
  await using runner = await single({ metrics, egress: { allowPrivate: [web.host] } })
  const options = { egress: [web.host], input: `http://${web.host}` }
  const fetching = 'export default async (base) => (await fetch(base + "/")).status'
  for (let i = 0; i < 2; i++) assert.is((await traced(runner, fetching, options)).output, 200)
  await traced(runner, 'export default () => fetch("http://example.test/").catch(() => 0)', options)
  const seen = await metrics.registry.metrics()
  for (const pattern of [
    /vulcan_starts_total{[^}]*start="cold"[^}]*} 2/,
    /vulcan_starts_total{[^}]*start="warm"[^}]*} 1/,
    /vulcan_cold_start_seconds_count{[^}]*start="cold"[^}]*} 2/,
    /vulcan_cold_start_phase_seconds_count{[^}]*phase="create isolate"[^}]*} 2/,
    /vulcan_cold_start_phase_seconds_count{[^}]*phase="compile"[^}]*} 2/,
    /vulcan_egress_requests_total{[^}]*result="sent"[^}]*} 2/,
    /vulcan_egress_requests_total{[^}]*result="denied"[^}]*} 1/,
    /vulcan_pool_sandboxes{[^}]*state="idle"[^}]*} 1/,
    // With that of the trial when the runner was made.
    /vulcan_pool_sandboxes{[^}]*state="warm"[^}]*} 3/,
    /vulcan_cache_bytes{[^}]*cache="warm isolates"[^}]*} [1-9]\d{5,}/,
  ])
    assert.match(seen, pattern)
  const full = `export default () => { const all = []; for (;;) all.push(new Array(1e5).fill(1)) }`
  assert.is((await traced(runner, full, { limits: { memory_mb: 16 } })).outcome.status, 'failed')
  await traced(runner, 'export default () => { for (;;); }', { timeoutMs: 300 })
  await traced(runner, 'export default () => 1')
  const after = await metrics.registry.metrics()
  assert.match(after, /vulcan_sandbox_failures_total{[^}]*cause="oom"[^}]*} 1/)
  assert.match(after, /vulcan_sandbox_cleanup_seconds_count{[^}]*} [1-9]/)
})

test.run()
