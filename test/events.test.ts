// timeout: 240
/**
 * Those who read the events from outside: the programs of `examples/consumers`, as the reader that nats.conf shows, on
 * a server with that file’s accounts.
 */
import { type ChildProcess, execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { promisify } from 'node:util'
import { jetstreamManager } from '@nats-io/jetstream'
import { Kvm } from '@nats-io/kv'
import { connect, type NatsConnection } from '@nats-io/transport-node'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { systemPath, which } from '../scripts/host-tools.ts'
import type { Platform } from '../scripts/platform.ts'
import { Bus, serversOf } from '../shared/bus.ts'
import { newWorkloadId } from '../shared/ids.ts'
import { eventSubject, lateSubject } from '../shared/subjects.ts'
import { EVENTS, ensureTopology, LOGS, TopologyOptions } from '../shared/topology.ts'
import type { Workload } from '../shared/workload.ts'
import { skip } from './harness.ts'
import { startNats, type TestNats } from './nats.ts'
import { http, startTestPlatform } from './platform.ts'
import { submit, until } from './shared/support.ts'

const execute = promisify(execFile)
const root = join(import.meta.dirname, '..')
const consumers = join(root, 'examples/consumers')
/** Each with what a URL or the server’s parser would take for something else. */
const passwords = { vulcan: 'p/w:1@ %', reader: '007' }

/** A server with nats.conf as its own words say that accounts are had: the `#`s removed, the streams moved. */
async function startGuarded(scope: AsyncDisposableStack): Promise<TestNats & { platformUrl: string }> {
  const folder = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  scope.defer(() => rm(folder, { recursive: true, force: true }))
  const dir = join(folder, 'store')
  {
    await using before = await startNats({ dir })
    await using bus = await Bus.connect({ url: before.url, name: 'test' })
    await ensureTopology(bus.jsm, TopologyOptions.parse({}))
    await submit(bus, { labels: { from: 'before' } })
  }
  await rename(join(dir, 'jetstream', '$G'), join(dir, 'jetstream', 'VULCAN'))

  const text = await readFile(join(root, 'nats.conf'), 'utf8')
  const at = text.indexOf('\n#accounts {\n')
  assert.ok(at > 0)
  const config = join(folder, 'nats.conf')
  await writeFile(config, text.slice(0, at) + text.slice(at).replace(/^#/gm, ''))
  const env = {
    VULCAN_NATS_PASSWORD: JSON.stringify(passwords.vulcan),
    VULCAN_NATS_READER_PASSWORD: JSON.stringify(passwords.reader),
  }
  const nats = scope.use(await startNats({ dir, config, env }))
  const platformUrl = nats.url.replace('//', `//vulcan:${encodeURIComponent(passwords.vulcan)}@`)
  return { ...nats, platformUrl }
}

const asReader = (url: string) => ({
  NATS_URL: url,
  NATS_USER: 'reader',
  NATS_PASSWORD: passwords.reader,
})

interface Context {
  scope: AsyncDisposableStack
  folder: string
  nats: TestNats & { platformUrl: string }
  platform: Platform
  bus: Bus
}

const events = suite<Context>('events')

events.before(async (context) => {
  const scope = new AsyncDisposableStack()
  context.scope = scope
  context.folder = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  scope.defer(() => rm(context.folder, { recursive: true, force: true }))
  context.nats = await startGuarded(scope)
  context.bus = scope.use(await Bus.connect({ url: context.nats.platformUrl, name: 'test' }))
  context.platform = scope.use(await startTestPlatform({ NATS_URL: context.nats.platformUrl }))
})
events.after(async ({ scope }) => {
  await scope?.disposeAsync()
})

/** The TypeScript consumer as a process; what it says is shown where a test fails. */
function follow({ nats }: Context, file: string, ...args: string[]): ChildProcess {
  const command = [join(consumers, 'main.ts'), '--file', file, '--prefix', 'vulcan.js', ...args]
  return spawn(process.execPath, command, {
    env: { ...process.env, ...asReader(nats.url) },
    stdio: ['ignore', 'ignore', 'inherit'],
  })
}

type View = { seq: number; workloads: Record<string, Record<string, unknown>> }
const readView = async (file: string): Promise<View | undefined> =>
  readFile(file, 'utf8').then(
    (text) => JSON.parse(text),
    () => undefined,
  )

const run = (url: string, spec: Record<string, unknown>) =>
  http<Workload>(`${url}/v1/workloads`, { body: spec })

/** One of each way to end, a retry, a call by HTTP, and one that still runs; its id. */
async function work({ platform: { url } }: Context): Promise<string> {
  const done = await run(url, { code: 'export default (x) => [x, null]', input: 1, labels: { team: 'a' } })
  assert.is(done.body.status, 'completed', JSON.stringify(done.body))
  const failing = 'export default () => { throw new Error("no") }'
  const retry = { max_attempts: 2, on: ['user_error'], backoff: 'none' }
  assert.is((await run(url, { code: failing, retry })).body.attempts, 2)
  const slow = await run(url, { code: 'export default () => { for (;;); }', limits: { timeout_s: 1 } })
  assert.is(slow.body.cause, 'timeout')

  const put = { method: 'PUT', body: { code: 'export default { fetch: () => new Response("hi") }' } }
  await http(`${url}/v1/functions/hi`, put)
  assert.is(await (await fetch(`${url}/fn/hi/a/b?c=d`)).text(), 'hi')

  const forever = { code: 'export default () => new Promise((r) => setTimeout(r, 20_000))' }
  const [killed, running] = await Promise.all(
    [forever, forever].map((body) => http<Workload>(`${url}/v1/workloads/async`, { body })),
  )
  await http(`${url}/v1/workloads/${killed!.body.id}/kill`, { method: 'POST' })
  await until('the start', async () => {
    const { body } = await http<Workload>(`${url}/v1/workloads/${running!.body.id}`)
    return body.status === 'running'
  })
  return running!.body.id
}

/** What the API tells of every workload, by id. */
async function viewOfApi(url: string): Promise<Record<string, Record<string, unknown>>> {
  // A list may be a little behind; before an id is said to be unknown, all events are taken in.
  assert.is((await http(`${url}/v1/workloads/${newWorkloadId()}`)).status, 404)
  const all: Record<string, Record<string, unknown>> = {}
  for (let cursor = ''; ; ) {
    const query = cursor === '' ? '' : `&cursor=${cursor}`
    const { body } = await http<{ workloads: Workload[]; next_cursor: string | null }>(
      `${url}/v1/workloads?limit=4${query}`,
    )
    for (const { id } of body.workloads) all[id] = (await http(`${url}/v1/workloads/${id}`)).body
    if (body.next_cursor === null) return all
    cursor = body.next_cursor
  }
}

/** A link to where traces are shown is the gateway’s own and in no event. */
const noEvent = ['trace_url']

function assertSame(view: Record<string, Record<string, unknown>>, api: typeof view): void {
  assert.equal(Object.keys(view).sort(), Object.keys(api).sort())
  for (const [id, fields] of Object.entries(api)) {
    const told = Object.fromEntries(Object.entries(fields).filter(([name]) => !noEvent.includes(name)))
    assert.equal(view[id], told, id)
  }
}

events('a subscriber that was away replays and ends with the same view as the API', async (context) => {
  const { platform, bus, folder } = context
  const file = join(folder, 'view.json')
  const early = await work(context)

  const follower = follow(context, file)
  const gone = once(follower, 'exit')
  try {
    await until('replay', async () => (await readView(file))?.workloads[early]?.status === 'running')
    // It is there now, and hears what happens.
    const { body } = await run(platform.url, { code: 'export default () => "live"' })
    await until('the live one', async () => (await readView(file))?.workloads[body.id]?.output === 'live')
  } finally {
    follower.kill('SIGKILL')
    await gone
  }

  const late = await work(context)
  for (const id of [early, late]) await http(`${platform.url}/v1/workloads/${id}/kill`, { method: 'POST' })
  // What is no event moves nothing, and what is behind the last event is passed over.
  await bus.js.publish(eventSubject(early, 'started'), 'nothing')
  await bus.js.publish(lateSubject(early), '{}')
  const away = (await readView(file))!
  assert.is(away.workloads[early]?.status, 'running')

  // Killed while it reads, it goes on from what it had.
  const hasty = follow(context, file)
  const hastyGone = once(hasty, 'exit')
  await delay(250)
  hasty.kill('SIGKILL')
  await hastyGone

  const [code] = await once(follow(context, file, '--once'), 'exit')
  assert.is(code, 0)
  const view = (await readView(file))!
  assert.is(view.seq, (await bus.jsm.streams.info(EVENTS)).state.last_seq)
  assertSame(view.workloads, await viewOfApi(platform.url))

  const statuses = Object.values(view.workloads).map(({ status }) => status)
  assert.equal([...new Set(statuses)].sort(), ['completed', 'failed', 'killed'])
  assert.ok(
    Object.values(view.workloads).some(({ http }) => (http as Workload['http'])?.path === '/fn/hi/a/b'),
  )
  const before = ({ labels }: Record<string, unknown>) => (labels as Workload['labels']).from === 'before'
  assert.ok(Object.values(view.workloads).some(before), 'streams that were kept before are the account’s')
})

const cli = process.env.VULCAN_NATS_CLI ?? which('nats', process.env.PATH ?? systemPath)
const byCli = 'the same by plain nats commands: replay from the last sequence, and a durable consumer'
if (cli === undefined)
  skip(events, byCli, 'there is no nats command on PATH or in VULCAN_NATS_CLI, and Debian has no package')
else
  events(byCli, async ({ nats, platform, bus, folder }) => {
    const env = { ...process.env, PATH: `${dirname(cli)}:${process.env.PATH}` }
    const file = join(folder, 'events.tsv')
    const replay = () =>
      execute(join(consumers, 'replay.sh'), [file, 'once'], {
        env: { ...env, ...asReader(nats.url), PREFIX: 'vulcan.js' },
        timeout: 60_000,
      })
    await run(platform.url, { code: 'export default () => 1' })
    await replay()
    await run(platform.url, { code: 'export default () => { throw 1 }' })
    await replay()
    const lines = (await readFile(file, 'utf8')).trimEnd().split('\n')
    const sequences = lines.map((line) => Number(line.split('\t')[0]))
    assert.equal(
      sequences,
      [...new Set(sequences)].sort((a, b) => a - b),
    )
    const ends: Record<string, unknown> = {}
    for (const line of lines) {
      const { subject, type } = JSON.parse(line.slice(line.indexOf('\t')))
      const kind = type?.replace('vulcan.workload.', '')
      if (['completed', 'failed', 'killed'].includes(kind)) ends[subject] = kind
    }
    const api = await viewOfApi(platform.url)
    assert.equal(ends, Object.fromEntries(Object.entries(api).map(([id, { status }]) => [id, status])))

    // More than two requests bring, from a server without accounts.
    await using scope = new AsyncDisposableStack()
    const open = await openServer(scope, join(folder, 'unused.json'))
    await Promise.all(Array.from({ length: 450 }, () => submit(open.bus)))
    const many = join(folder, 'many.tsv')
    await execute(join(consumers, 'replay.sh'), [many, 'once'], { env: { ...env, NATS_URL: open.nats.url } })
    const read = (await readFile(many, 'utf8')).trimEnd().split('\n')
    assert.equal(
      read.map((line) => line.split('\t')[0]),
      Array.from({ length: 450 }, (_, i) => String(i + 1)),
    )

    const nats_ = (...args: string[]) =>
      execute(cli, args, {
        env: { ...env, NATS_URL: nats.url, NATS_USER: 'vulcan', NATS_PASSWORD: passwords.vulcan },
        timeout: 30_000,
      })
    const durable = ['--pull', '--deliver=all', '--ack=explicit', '--defaults']
    await nats_('consumer', 'add', EVENTS, 'ledger', ...durable)
    await nats_('consumer', 'next', EVENTS, 'ledger', '--count=3')
    assert.is((await bus.jsm.consumers.info(EVENTS, 'ledger')).delivered.stream_seq, 3)
    await nats_('consumer', 'next', EVENTS, 'ledger', '--count=2')
    const { ack_floor } = await bus.jsm.consumers.info(EVENTS, 'ledger')
    assert.is(ack_floor.stream_seq, 5, 'it went on where it stood')
  })

/** What the client says of a subscription or a request that the server refuses; undefined: it was taken. */
async function refusal(attempt: (signal: AbortSignal) => Promise<unknown>): Promise<string | undefined> {
  const over = AbortSignal.timeout(2_000)
  return attempt(over).then(
    () => undefined,
    (error: Error) => error.name,
  )
}

const subscribed = (nats: NatsConnection, subject: string) =>
  refusal(
    () =>
      new Promise((resolve, reject) => {
        nats.subscribe(subject, { callback: (error) => void (error && reject(error)) })
        void nats.flush().then(() => setTimeout(resolve, 50))
      }),
  )

events('a reader hears, replays and reads, and can do nothing else', async ({ nats, platform, bus }) => {
  const reader = await connect({ servers: nats.url, user: 'reader', pass: passwords.reader })
  try {
    const streams = await jetstreamManager(reader, { apiPrefix: 'vulcan.js', checkAPI: false })
    const heard: string[] = []
    reader.subscribe('vulcan.events.*.completed', { callback: (_, { subject }) => void heard.push(subject) })
    await reader.flush()
    const code = 'export default () => console.log("a line")'
    const { id } = (await run(platform.url, { code })).body
    await until('an event', () => heard.includes(eventSubject(id, 'completed')))
    for (const stream of [EVENTS, LOGS]) {
      const { state } = await streams.streams.info(stream)
      assert.ok(await streams.streams.getMessage(stream, { seq: state.last_seq }))
      const batch = await streams.direct.getBatch(stream, { seq: 1, batch: 2 })
      const sequences: number[] = []
      for await (const { seq } of batch) sequences.push(seq)
      assert.is(sequences.length, Math.min(2, state.messages), stream)
    }

    const secret = await (await new Kvm(bus.js).open('vulcan_secrets')).put('mine', 'sealed')
    const allStreams = async () => {
      const all: Record<string, number> = {}
      for await (const { config, state } of bus.jsm.streams.list()) all[config.name] = state.last_seq
      return all
    }
    const before = await allStreams()
    assert.ok(before.KV_vulcan_secrets! >= secret)

    const foreign = [
      '>',
      'vulcan.>',
      'vulcan.stored.>',
      'vulcan.request.*',
      'vulcan.control.*',
      '$KV.>',
      '$JS.>',
    ]
    for (const subject of foreign)
      assert.is(await subscribed(reader, subject), 'PermissionViolationError', subject)

    const ask = (subject: string, body: unknown = {}) =>
      refusal(() => reader.request(subject, JSON.stringify(body), { timeout: 1_000 }))
    for (const call of [
      `STREAM.DELETE.${EVENTS}`,
      `STREAM.PURGE.${EVENTS}`,
      `STREAM.UPDATE.${EVENTS}`,
      `STREAM.MSG.DELETE.${EVENTS}`,
      `CONSUMER.CREATE.${EVENTS}`,
      'STREAM.NAMES',
      'STREAM.INFO.KV_vulcan_secrets',
      'STREAM.MSG.GET.KV_vulcan_secrets',
      'DIRECT.GET.KV_vulcan_secrets.$KV.vulcan_secrets.mine',
      'DIRECT.GET.OBJ_vulcan_blobs',
    ]) {
      assert.ok(await ask(`$JS.API.${call}`, { seq: 1 }), call)
      assert.ok(await ask(`vulcan.js.${call}`, { seq: 1 }), call)
    }

    reader.publish(eventSubject(id, 'killed'), 'forged')
    reader.publish('$KV.vulcan_secrets.mine', 'forged')
    reader.publish('vulcan.work.isolate.any.x', 'forged')
    // The server sends answers where it is told to: within the account of the one who asked.
    const answered: string[] = []
    for (const subject of ['vulcan.control.x', '$KV.vulcan_secrets.x'])
      bus.nc.subscribe(subject, { callback: (_, message) => void answered.push(message.subject) })
    await bus.nc.flush()
    const trick = (nc: NatsConnection, prefix: string) => {
      for (const reply of ['vulcan.control.x', '$KV.vulcan_secrets.x', `vulcan.events.${id}.killed`])
        nc.publish(`${prefix}.DIRECT.GET.${EVENTS}`, '{"seq":1}', { reply })
      return nc.flush()
    }
    await trick(reader, 'vulcan.js')
    await delay(300)
    assert.equal(answered, [])
    assert.equal(await allStreams(), before)
    await trick(bus.nc, '$JS.API')
    await until('what the platform’s own user can do', () => answered.length === 2)
  } finally {
    await reader.close()
  }
})

events('nobody comes in without a password', async ({ nats }) => {
  for (const credentials of [{}, { user: 'reader', pass: '7' }, { user: 'vulcan', pass: passwords.reader }]) {
    const error = await connect({ servers: nats.url, ...credentials, reconnect: false }).then(
      () => undefined,
      (error: Error) => error,
    )
    assert.match(error?.name ?? 'connected', /Authorization/)
  }
})

events('credentials stand in the URL of the servers', () => {
  assert.equal(serversOf('nats://a:4222, b'), { servers: ['nats://a:4222', 'b'] })
  const named = serversOf('tls://me:p%40%3A@a:1,tls://me:p%40%3A@[::1]:2')
  assert.equal(named, { servers: ['tls://a:1', 'tls://[::1]:2'], user: 'me', pass: 'p@:' })
})

/** A server without accounts and without a platform, and a view of it. */
async function openServer(scope: AsyncDisposableStack, file: string) {
  const nats = scope.use(await startNats())
  const bus = scope.use(await Bus.connect({ url: nats.url, name: 'test' }))
  await ensureTopology(bus.jsm, TopologyOptions.parse({}))
  const command = [join(consumers, 'main.ts'), '--file', file]
  const env = { ...process.env, NATS_URL: nats.url }
  return {
    nats,
    bus,
    ids: async () => Object.keys((await readView(file))?.workloads ?? {}),
    /** Reads what there is; resolves with what it complains of. */
    read: async () => (await execute(process.execPath, [...command, '--once'], { env })).stderr,
    follow: () => spawn(process.execPath, command, { env, stdio: 'ignore' }),
  }
}

events('in another stream the view begins anew, and what is no longer kept is said', async ({ folder }) => {
  await using scope = new AsyncDisposableStack()
  const { bus, ids, read } = await openServer(scope, join(folder, 'other.json'))
  // More than one request brings.
  for (let i = 0; i < 1_100; i += 50) await Promise.all(Array.from({ length: 50 }, () => submit(bus)))
  assert.is(await read(), '')
  assert.is((await ids()).length, 1_100)
  await submit(bus)
  await bus.jsm.streams.purge(EVENTS)
  const last = await submit(bus)
  assert.match(await read(), `no longer keeps 1101 to ${last.seq - 1}`)
  assert.is((await ids()).length, 1_101)

  await bus.jsm.streams.delete(EVENTS)
  await ensureTopology(bus.jsm, TopologyOptions.parse({}))
  const { id } = await submit(bus)
  assert.match(await read(), 'begins anew')
  assert.equal(await ids(), [id])
})

events('a subscriber goes on when the server has died and come back', async ({ folder }) => {
  await using scope = new AsyncDisposableStack()
  const { nats, bus, ids, follow } = await openServer(scope, join(folder, 'restart.json'))
  const follower = follow()
  const gone = once(follower, 'exit')
  scope.defer(async () => {
    follower.kill('SIGTERM')
    assert.equal(await gone, [0, null])
  })
  const { id } = await submit(bus)
  await until('the first', async () => (await ids()).includes(id))
  await nats.restart()
  await bus.whenConnected()
  const second = await until('a publish', () => submit(bus).catch(() => undefined))
  await until('the second', async () => (await ids()).includes(second.id), 30_000)
})

events.run()
