// timeout: 240
/** The whole platform as a user meets it: HTTP in, events on the broker, rows and lines out. */
import { createConnection } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import { Ajv2020 } from 'ajv/dist/2020.js'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { startNats } from './nats.ts'
import { http, startTestPlatform } from './platform.ts'

interface Workload {
  id: string
  status: string
  cause: string | null
  output: unknown
  attempts: number
  error: { message: string } | null
}

/** A NATS subscriber in nothing but TCP: speaks just enough of the protocol to receive messages with headers. */
async function rawSubscriber(natsUrl: string, subject: string) {
  const { hostname, port } = new URL(natsUrl)
  const socket = createConnection({ host: hostname, port: Number(port) })
  const received: { subject: string; headers: string; payload: string }[] = []
  let buffer: Buffer = Buffer.alloc(0)
  const ready = Promise.withResolvers<void>()
  socket.on('data', (chunk: Buffer) => {
    buffer = Buffer.concat([buffer, chunk])
    for (;;) {
      const end = buffer.indexOf('\r\n')
      if (end < 0) return
      const line = buffer.subarray(0, end).toString()
      const [verb, ...words] = line.split(' ')
      if (verb === 'MSG' || verb === 'HMSG') {
        const total = Number(words.at(-1))
        if (buffer.length < end + 2 + total + 2) return
        const headerBytes = verb === 'HMSG' ? Number(words.at(-2)) : 0
        const body = buffer.subarray(end + 2, end + 2 + total)
        received.push({
          subject: words[0]!,
          headers: body.subarray(0, headerBytes).toString(),
          payload: body.subarray(headerBytes).toString(),
        })
        buffer = buffer.subarray(end + 2 + total + 2)
        continue
      }
      buffer = buffer.subarray(end + 2)
      if (verb === 'INFO') {
        socket.write(
          'CONNECT {"verbose":false,"pedantic":false,"headers":true,"lang":"none","version":"0"}\r\n',
        )
        socket.write(`SUB ${subject} 1\r\nPING\r\n`)
      }
      if (verb === 'PING') socket.write('PONG\r\n')
      if (verb === 'PONG') ready.resolve()
    }
  })
  await ready.promise
  return { received, close: () => socket.destroy() }
}

test('a workload goes from HTTP to its recorded end, seen by GET, by SSE and by a foreign NATS subscriber', async () => {
  await using platform = await startTestPlatform()
  const { url } = platform

  const sync = await http<Workload>(`${url}/v1/workloads`, {
    body: { code: 'export default ({ x }) => ({ y: x * 2 })', input: { x: 21 } },
  })
  assert.is(sync.status, 200)
  assert.equal(sync.body.output, { y: 42 })
  assert.equal(
    (await http(`${url}/v1/workloads/${sync.body.id}`)).body,
    sync.body as never,
    'GET tells the same',
  )

  const subscriber = await rawSubscriber(platform.natsUrl, 'vulcan.events.>')
  const code = `export default async () => {
    for (let i = 0; i < 5; i++) { console.log('tick', i); await new Promise((r) => setTimeout(r, 200)) }
    return 'done'
  }`
  const accepted = await http<Workload>(`${url}/v1/workloads/async`, { body: { code } })
  assert.is(accepted.status, 202)
  assert.is(accepted.body.status, 'pending')
  assert.is(accepted.headers.get('location'), `/v1/workloads/${accepted.body.id}`)

  const seen = new Set<string>([accepted.body.status])
  const stream = await fetch(`${url}/v1/workloads/${accepted.body.id}/logs`, {
    headers: { accept: 'text/event-stream' },
  })
  assert.is(stream.status, 200)
  let text = ''
  let statusAtFirstLine: string | undefined
  const decoder = new TextDecoder()
  for await (const chunk of stream.body!) {
    text += decoder.decode(chunk, { stream: true })
    if (statusAtFirstLine === undefined && text.includes('tick 0')) {
      const now = await http<Workload>(`${url}/v1/workloads/${accepted.body.id}`)
      statusAtFirstLine = now.body.status
      seen.add(now.body.status)
    }
  }
  assert.is(statusAtFirstLine, 'running', 'lines come while it runs')
  for (let i = 0; i < 5; i++) assert.match(text, `tick ${i}`)
  assert.match(text, /event: end\n/)
  seen.add((await http<Workload>(`${url}/v1/workloads/${accepted.body.id}`)).body.status)
  assert.equal([...seen], ['pending', 'running', 'completed'])

  const events = subscriber.received.filter(({ subject }) => subject.includes(accepted.body.id))
  subscriber.close()
  assert.equal(
    events.map(({ subject }) => subject.split('.').slice(3).join('.')),
    ['accepted.isolate.any', 'started', 'completed'],
  )
  for (const { subject, headers, payload } of events) {
    assert.match(headers, /content-type: application\/cloudevents\+json/i)
    const kind = subject.split('.')[3]
    const schema = await http(`${url}/v1/schemas/events/${kind}`)
    const validate = new Ajv2020({ strict: false, validateFormats: false }).compile(schema.body)
    assert.ok(validate(JSON.parse(payload)), `${kind}: ${JSON.stringify(validate.errors)}`)
    const broken = { ...JSON.parse(payload), type: 'something.else' }
    assert.not.ok(validate(broken), 'the schema can say no')
  }
})

/** Code that will not stop by itself, or grows without end, and what it may end as. */
const hostile: [name: string, code: string, causes: string[]][] = [
  ['an endless loop', 'export default () => { while (true) {} }', ['timeout']],
  ['a promise that never settles', 'export default () => new Promise(() => {})', ['timeout']],
  ['an await that never returns', 'export default async () => { await new Promise(() => {}) }', ['timeout']],
  [
    'an endless chain of promises',
    'export default () => { const next = () => Promise.resolve().then(next); return next() }',
    ['timeout', 'oom'],
  ],
  [
    'an endless array',
    'export default () => { const all = []; for (;;) all.push({ n: all.length }) }',
    ['oom'],
  ],
  [
    'a giant string',
    "export default () => { const all = []; for (;;) all.push('x'.repeat(2 ** 24 + all.length).split('').join('y')) }",
    ['oom'],
  ],
  [
    'a giant ArrayBuffer',
    'export default () => { const all = []; for (;;) { all.push(new Uint8Array(2 ** 26).fill(1)) } }',
    ['oom'],
  ],
  ['infinite recursion', 'export default function f() { return f() + 1 }', ['user_error']],
  [
    'a regular expression that backtracks for ever',
    "export default () => /^(a+)+$/.test('a'.repeat(64) + '!')",
    ['timeout'],
  ],
]

test('whatever code does, it ends in time with its cause, and the next workload runs', async () => {
  await using platform = await startTestPlatform({ VULCAN_SLOTS: '8' })
  for (const [name, code, causes] of hostile) {
    const before = performance.now()
    const answer = await http<Workload>(`${platform.url}/v1/workloads`, {
      body: { code, limits: { timeout_s: 2, memory_mb: 64 } },
    })
    const took = performance.now() - before
    assert.is(answer.status, 200, name)
    assert.is(answer.body.status, 'failed', name)
    assert.ok(
      causes.includes(answer.body.cause!),
      `${name}: ${answer.body.cause} ${answer.body.error?.message}`,
    )
    assert.ok(took < 3_000, `${name}: ended after ${Math.round(took)} ms`)
    const next = await http<Workload>(`${platform.url}/v1/workloads`, {
      body: { code: 'export default () => 1' },
    })
    assert.is(next.body.output, 1, `the workload after ${name}`)
  }
})

test('a running workload whose runner is gone for good ends as runner_lost', async () => {
  await using platform = await startTestPlatform()
  const code = 'export default () => new Promise(() => {})'
  const body = { code, limits: { timeout_s: 600 }, retry: { max_attempts: 1 } }
  const { id } = (await http<Workload>(`${platform.url}/v1/workloads/async`, { body })).body
  const read = async () => (await http<Workload>(`${platform.url}/v1/workloads/${id}`)).body
  while ((await read()).status !== 'running') await delay(20)
  await platform.supervisor.abandon('runner')
  const deadline = Date.now() + 60_000
  let workload = await read()
  while (workload.status === 'running' && Date.now() < deadline) {
    await delay(500)
    workload = await read()
  }
  assert.is(workload.status, 'failed')
  assert.is(workload.cause, 'runner_lost')
})

test('a flood of 100,000 lines is cut at its limit, and the stream says so', async () => {
  await using platform = await startTestPlatform()
  const code =
    "export default () => { for (let i = 0; i < 100_000; i++) console.log('line', i); return 'flooded' }"
  const answer = await http<Workload>(`${platform.url}/v1/workloads`, { body: { code } })
  assert.is(answer.body.status, 'completed', JSON.stringify(answer.body.error))
  assert.is(answer.body.output, 'flooded')
  const stream = await fetch(`${platform.url}/v1/workloads/${answer.body.id}/logs`, {
    headers: { accept: 'text/event-stream' },
  })
  const events = (await stream.text()).split('\n\n').map((event) => {
    const field = (name: string) => new RegExp(`^${name}: (.*)$`, 'm').exec(event)?.[1]
    return { name: field('event'), id: field('id'), data: JSON.parse(field('data') ?? 'null') }
  })
  const lines = events.filter(({ name }) => name === 'log')
  assert.is(lines.length, 10_000)
  for (const [i, { data }] of lines.entries()) assert.is(data.text, `line ${i}`)
  assert.is(new Set(lines.map(({ id }) => id)).size, 10_000, 'every line has an id of its own')
  const gaps = events.filter(({ name }) => name === 'gap')
  for (const { data } of gaps) assert.is(data.reason, 'dropped')
  assert.is(
    gaps.reduce((sum, { data }) => sum + data.count, 0),
    90_000,
    JSON.stringify(gaps.map(({ data }) => data)),
  )
  assert.is(events.filter(({ name }) => name !== undefined).at(-1)!.name, 'end')
})

test('two platforms side by side do not disturb each other', async () => {
  await using one = await startTestPlatform()
  await using other = await startTestPlatform()
  assert.is.not(one.url, other.url)
  assert.is.not(one.natsUrl, other.natsUrl)
  const ran = await http<Workload>(`${one.url}/v1/workloads`, { body: { code: 'export default () => 1' } })
  assert.is(ran.body.output, 1)
  assert.is((await http(`${one.url}/v1/workloads/${ran.body.id}`)).status, 200)
  assert.is((await http(`${other.url}/v1/workloads/${ran.body.id}`)).status, 404)
})

test('without its broker the platform says so at once, and every process comes back by itself', async () => {
  await using nats = await startNats()
  await using platform = await startTestPlatform({ NATS_URL: nats.url })
  const pids = () => ['gateway', 'dispatcher', 'runner'].map((name) => platform.supervisor.pid(name))
  const before = pids()
  const body = { code: 'export default () => 1' }
  await nats.kill()

  const ready = () => http<{ parts: Record<string, unknown> }>(`${platform.url}/readyz`)
  let state = await ready()
  while (state.body.parts.bus === 'ok') state = await ready()
  assert.is(state.status, 503)
  assert.match(String(state.body.parts.bus), /cannot be reached/)
  const refused = await http<{ code: string }>(`${platform.url}/v1/workloads/async`, { body })
  assert.is(refused.status, 503)
  assert.is(refused.body.code, 'bus_unavailable')
  assert.ok(Number(refused.headers.get('retry-after')) > 0)

  await nats.restart()
  const deadline = Date.now() + 20_000
  while (state.status !== 200 && Date.now() < deadline) {
    await delay(50)
    state = await ready()
  }
  assert.is(state.status, 200, JSON.stringify(state.body))
  assert.is((await http<Workload>(`${platform.url}/v1/workloads`, { body })).body.output, 1)
  assert.equal(pids(), before, 'none had to be started again')
})

test.run()
