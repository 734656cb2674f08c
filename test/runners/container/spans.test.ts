/** What a run tells its trace and its figures of: spans of user code by the shims, phases, metrics. */
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Phases } from '../../../runners/container/phases.ts'
import type { Phase } from '../../../runners/runner.ts'
import { code, job, type RunOptions, run } from './jobs.ts'
import { localRunner, localTest } from './local-engine.ts'
import { seriesSum } from './metric-values.ts'

const local = await localRunner()
const { runner, engine, metrics } = local
test.after(async () => local[Symbol.asyncDispose]())

const traceId = '4bf92f3577b34da6a3ce929d0e0e4736'
const traceparent = `00-${traceId}-00f067aa0ba902b7-01`
const traced: RunOptions = { traced: true, traceparent }
const python = { ...traced, runtime: 'python' } as const
const named = (phases: Phase[], name: string): Phase => {
  const found = phases.find((phase) => phase.name === name)
  assert.ok(found, `no ${name} among ${phases.map((phase) => phase.name).join(', ')}`)
  return found!
}
const within = (inner: Phase, outer: { start: number; end: number }) =>
  assert.ok(
    inner.start >= outer.start && inner.end <= outer.end && inner.start <= inner.end,
    `${JSON.stringify(inner)} is not within ${JSON.stringify(outer)}`,
  )
const timed = async (text: string, options: RunOptions) => {
  const start = performance.timeOrigin + performance.now()
  const ran = await run(runner, text, options)
  assert.is(ran.outcome.status, 'completed', JSON.stringify(ran.outcome))
  const end = performance.timeOrigin + performance.now()
  const output = ran.outcome.status === 'completed' ? JSON.parse(ran.outcome.output) : undefined
  return { ...ran, output, whole: { start, end } }
}

const nodeSpans = `export default async (input, ctx) => {
  const whole = await ctx.span('outer', async (outer) => {
    outer.set({ rows: 3, wrong: { deep: true } })
    await new Promise((resolve) => setTimeout(resolve, 20))
    const sum = outer.span('inner', (inner) => { inner.set({ ok: true }); return inner.traceparent }, { first: 'a' })
    try { outer.span('broken', () => { throw new TypeError('no luck') }) } catch {}
    return { outer: outer.traceparent, inner: sum }
  }, { 'vulcan.cause': 'mine', long: 'x'.repeat(2000) })
  const plain = ctx.span('sync', () => 7)
  return { ...whole, plain, run: ctx.traceparent }
}`

const pythonSpans = `import time
def handler(input, ctx):
    with ctx.span("outer", attributes={"vulcan.cause": "mine", "long": "x" * 2000}) as outer:
        outer.set({"rows": 3, "wrong": {"deep": True}})
        time.sleep(0.02)
        inner = outer.span("inner", lambda span: (span.set({"ok": True}), span.traceparent)[1], {"first": "a"})
        try:
            with outer.span("broken"):
                raise TypeError("no luck")
        except TypeError:
            pass
    plain = ctx.span("sync", lambda span: 7)
    return {"outer": outer.traceparent, "inner": inner, "plain": plain, "run": ctx.traceparent}`

for (const [language, text, options] of [
  ['node', nodeSpans, traced],
  ['python', pythonSpans, python],
] as const)
  localTest(`${language}: spans of user code, their parents, attributes, errors and times`, async () => {
    const { phases, output, whole } = await timed(text, options)
    const guest = named(phases, 'guest')
    within(guest, whole)
    assert.is(guest.error, undefined)
    const [outer, inner, broken, sync] = ['outer', 'inner', 'broken', 'sync'].map((name) =>
      named(phases, name),
    ) as [Phase, Phase, Phase, Phase]
    for (const phase of [outer, inner, broken, sync]) {
      assert.match(phase.spanId!, /^[0-9a-f]{16}$/)
      within(phase, whole)
    }
    assert.is(outer.parentSpanId, undefined)
    assert.is(inner.parentSpanId, outer.spanId)
    assert.is(broken.parentSpanId, outer.spanId)
    assert.is(sync.parentSpanId, undefined)
    assert.equal(outer.attributes, { rows: 3, long: '[2000 characters]' })
    assert.equal(inner.attributes, { first: 'a', ok: true })
    assert.is(outer.error, undefined)
    assert.is(broken.error, 'TypeError: no luck')
    assert.ok(outer.end - outer.start >= 19, `${outer.end - outer.start}`)
    within(inner, outer)
    assert.equal(output, {
      outer: `00-${traceId}-${outer.spanId}-01`,
      inner: `00-${traceId}-${inner.spanId}-01`,
      plain: 7,
      run: traceparent,
    })
  })

localTest('untraced: the functions of spans are called all the same, and nothing is told', async () => {
  for (const [text, options] of [
    [nodeSpans, { traceparent }],
    [pythonSpans, { traceparent, runtime: 'python' }],
  ] as const) {
    const { output, phases } = await timed(text, options)
    assert.equal(output, { outer: traceparent, inner: traceparent, plain: 7, run: traceparent })
    assert.equal(phases, [])
  }
})

localTest('python: a span of what is awaited ends with it', async () => {
  const text = `import asyncio
async def handler(input, ctx):
    async def work(span):
        await asyncio.sleep(0.03)
        return span.traceparent
    return await ctx.span("later", work)`
  const { phases, output } = await timed(text, python)
  const later = named(phases, 'later')
  assert.ok(later.end - later.start >= 29, `${later.end - later.start}`)
  assert.is(output, `00-${traceId}-${later.spanId}-01`)
})

localTest('spans without number are bounded', async () => {
  const node = `export default (input, ctx) => { for (let i = 0; i < 400; i++) ctx.span('s', () => {}) }`
  const inPython = `def handler(input, ctx):
    for _ in range(400):
        with ctx.span("s"):
            pass`
  for (const [text, options] of [
    [node, traced],
    [inPython, python],
  ] as const) {
    const { phases } = await timed(text, options)
    assert.is(phases.filter(({ name }) => name === 's').length, 256)
  }
})

localTest('a span that is open when the run is stopped ends with it, and says so', async () => {
  const stop = new AbortController()
  const text = `export default (input, ctx) =>
    ctx.span('stuck', () => { console.log('in'); return new Promise(() => {}) })`
  const { outcome, phases } = await run(runner, text, {
    ...traced,
    signal: stop.signal,
    onLine: () => stop.abort('killed'),
  })
  assert.is(outcome.status, 'stopped')
  assert.is(named(phases, 'stuck').error, 'the run ended before it')
  assert.is(named(phases, 'guest').error, 'killed')
})

localTest('what a run was stopped in the midst of is told, and nothing after it', async () => {
  const stop = new AbortController()
  setTimeout(() => stop.abort('timeout'), 50)
  const source = { kind: 'image', reference: 'endless' } as const
  const { outcome, phases } = await run(runner, source, { ...traced, signal: stop.signal })
  assert.is(outcome.status, 'stopped')
  const told = phases.map(({ name, error }) => [name, error])
  assert.equal(told, [['pull image', 'the run ended before it']])
  await new Promise((resolve) => setTimeout(resolve, 100))
  assert.is(phases.length, 1)
})

localTest('node: a fetch carries the trace and is a span of kind client, without its query', async () => {
  const text = `import { createServer } from 'node:http'
export default async (input, ctx) => {
  const seen = []
  const server = createServer((request, response) => {
    seen.push(request.headers.traceparent)
    response.statusCode = request.url.startsWith('/bad') ? 503 : 200
    response.end(request.method)
  })
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve))
  const base = 'http://127.0.0.1:' + server.address().port
  const texts = [
    await (await fetch(base + '/a?token=secret')).text(),
    await (await fetch(new Request(base + '/b', { method: 'PUT', body: 'x' }))).text(),
    await (await fetch(new URL(base + '/bad'), { method: 'post', headers: { traceparent: 'mine' } })).text(),
    await ctx.span('asks', async ({ traceparent }) => await (await fetch(base + '/d', { headers: { traceparent } })).text()),
    await (await fetch(base + '/c', new Request('http://other.test/', { method: 'DELETE' }))).text(),
    await (await fetch(base + '/bad')).text(),
  ]
  server.close()
  const refused = await fetch('http://127.0.0.1:2/none').catch((error) => error.message)
  return { seen, texts, refused, data: await (await fetch('data:,hello')).text(), port: server.address()?.port }
}`
  const { phases, output } = await timed(text, traced)
  const clients = phases.filter(({ kind }) => kind === 'client')
  assert.equal(
    clients.map(({ name }) => name),
    ['GET', 'PUT', 'POST', 'GET', 'DELETE', 'GET', 'GET', 'GET'],
  )
  const under = (phase: Phase | undefined) => `00-${traceId}-${phase?.spanId}-01`
  const [get, put, , asks, remove, bad, refused, data] = clients
  assert.equal(output.seen, [under(get), under(put), 'mine', under(asks), under(remove), under(bad)])
  assert.equal(output.texts, ['GET', 'PUT', 'POST', 'GET', 'DELETE', 'GET'])
  assert.is(asks!.parentSpanId, named(phases, 'asks').spanId)
  assert.is(get!.parentSpanId, undefined)
  assert.is(output.data, 'hello')
  const { 'server.port': port, 'url.full': url, ...rest } = get!.attributes!
  assert.equal(rest, {
    'http.request.method': 'GET',
    'server.address': '127.0.0.1',
    'http.response.status_code': 200,
  })
  assert.is(url, `http://127.0.0.1:${port}/a`)
  assert.is(bad!.error, 'answered 503')
  assert.is(refused!.attributes!['error.type'], 'ECONNREFUSED')
  assert.ok(refused!.error)
  assert.is(data!.attributes!['url.full'], undefined)
})

localTest('the parts of a cold start are told and counted, those of a warm one are not', async () => {
  const text = `export default () => 'cold and warm'`
  const options: RunOptions = { ...traced, env: { A: 'of this test alone' } }
  const counts = async () =>
    Promise.all(
      ['create container', 'start handler', 'mount files'].map((phase) =>
        seriesSum(metrics.registry, 'vulcan_cold_start_phase_seconds_count', { phase }),
      ),
    )
  const cold = await timed(text, { ...options, limits: { memory_mb: 137 } })
  assert.is(cold.outcome.start, 'cold')
  const names = cold.phases.map(({ name }) => name)
  for (const name of ['create container', 'start handler', 'guest'])
    assert.ok(names.includes(name), names.join())
  for (const phase of cold.phases) within(phase, cold.whole)
  const before = await counts()
  assert.ok(before[0]! > 0 && before[1]! > 0, before.join())
  const warm = await timed(text, { ...options, limits: { memory_mb: 137 } })
  assert.is(warm.outcome.start, 'warm')
  assert.equal(
    warm.phases.map(({ name }) => name),
    ['guest'],
  )
  assert.equal(await counts(), before)
  assert.ok((await seriesSum(metrics.registry, 'vulcan_starts_total', { start: 'warm' })) > 0)
  assert.ok((await seriesSum(metrics.registry, 'vulcan_starts_total', { start: 'cold' })) > 0)
  assert.ok((await seriesSum(metrics.registry, 'vulcan_cold_start_seconds_count', { start: 'cold' })) > 0)
})

localTest('a command tells of its start and of its time, and a failing one of its exit code', async () => {
  const { phases, outcome } = await run(runner, code('x'), { ...traced, entrypoint: ['sh', '-c', 'exit 3'] })
  assert.is(outcome.status, 'failed')
  assert.is(named(phases, 'guest').error, 'exit code 3')
  within(named(phases, 'start handler'), { start: 0, end: named(phases, 'guest').start })
  const [trace] = (
    await run(runner, code('x'), { traceparent, entrypoint: ['sh', '-c', 'echo $TRACEPARENT'] })
  ).texts
  assert.is(trace, traceparent)
})

localTest('what sandboxes fail of is counted by cause', async () => {
  const failures = (cause: string) => seriesSum(metrics.registry, 'vulcan_sandbox_failures_total', { cause })
  const [lost, oom] = [await failures('lost'), await failures('oom')]
  const killed = await run(runner, `export default () => process.kill(process.pid, 'SIGKILL')`)
  assert.is(killed.outcome.status === 'failed' && killed.outcome.cause, 'runner_lost')
  assert.is(await failures('lost'), lost + 1)
  const spent = await run(
    runner,
    `export default () => { const all = []; for (;;) all.push(new Array(1e5).fill(Math.random())) }`,
    { limits: { memory_mb: 64 } },
  )
  assert.is(spent.outcome.status === 'failed' && spent.outcome.cause, 'oom')
  assert.is(await failures('oom'), oom + 1)
})

localTest(
  'each run of a box that is used again has its own share of its disk, and boxes without a network none',
  async () => {
    const options: RunOptions = { env: { A: 'disk' } }
    const text = 'export default () => 1'
    const first = await run(runner, text, options)
    assert.is(first.outcome.usage.disk_read_bytes, null)
    assert.is(first.outcome.usage.network_received_bytes, 0)
    const usages: (number | null)[][] = []
    for (const disk of [
      { in: 100, out: 10 },
      { in: 150, out: 10 },
      { in: 150, out: 4_106 },
    ]) {
      for (const box of engine.boxes) box.disk = disk
      const { usage, start } = (await run(runner, text, options)).outcome
      assert.is(start, 'warm')
      usages.push([usage.disk_read_bytes, usage.disk_written_bytes, usage.network_sent_bytes])
    }
    assert.equal(usages.slice(1), [
      [50, 0, 0],
      [0, 4_096, 0],
    ])
  },
)

localTest('boxes are counted by what they do, and their clean-up is timed', async () => {
  const boxes = (state: string) => seriesSum(metrics.registry, 'vulcan_pool_sandboxes', { state })
  const stop = new AbortController()
  let running = 0
  const text = `export default () => { console.log('in'); return new Promise(() => {}) }`
  const options: RunOptions = { signal: stop.signal }
  await run(runner, text, {
    ...options,
    onLine: () =>
      void boxes('running').then((count) => {
        running = count
        stop.abort('killed')
      }),
  })
  assert.ok(running >= 1, `${running}`)
  assert.ok((await boxes('warm')) >= 1)
  while ((await boxes('paused')) === 0) await new Promise((resolve) => setTimeout(resolve, 20))
  const cleaned = () => seriesSum(metrics.registry, 'vulcan_sandbox_cleanup_seconds_count')
  const before = await cleaned()
  await run(runner, 'export default () => process.exit(1)')
  while ((await cleaned()) === before) await new Promise((resolve) => setTimeout(resolve, 20))
  runner.prepare(job('export default 1')).release()
})

test('a part that is under way when the run ends is told as failed; one that was none is not told', () => {
  const told: Phase[] = []
  const phases = new Phases({ function: undefined, traceparent, traced: true })
  phases.begin('restore machine').drop()
  phases.begin('mount files').done(() => ({ bytes: 3 }))
  phases.begin('open network').fail(new Error('no wire'))
  const late = phases.begin('boot machine')
  phases.tell((phase) => told.push(phase))
  phases.close()
  late.done()
  assert.equal(
    told.map(({ name, error, attributes }) => ({ name, error, attributes })),
    [
      { name: 'mount files', error: undefined, attributes: { bytes: 3 } },
      { name: 'open network', error: 'no wire', attributes: undefined },
      { name: 'boot machine', error: 'the run ended before it', attributes: undefined },
    ],
  )
})

test.run()
