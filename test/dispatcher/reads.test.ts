import { setTimeout as delay } from 'node:timers/promises'
import { createClient } from '@libsql/client'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Blobs } from '../../shared/blobs.ts'
import { newWorkloadId } from '../../shared/ids.ts'
import { DispatcherReadiness, Stats, WorkloadList } from '../../shared/reads.ts'
import { Workload } from '../../shared/workload.ts'
import { startRemoteDatabase } from './hrana.ts'
import { folded, getJson, makeWorld, until } from './support.ts'

test('a list is newest first, filtered, paged by cursor, and stable while workloads come in', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const dispatcher = await world.dispatcher()
  const ids: string[] = []
  for (let i = 0; i < 25; i++) {
    const labels = { team: i % 2 === 0 ? 'a' : 'b', ...(i % 5 === 0 ? { five: 'yes' } : {}) }
    const isolation = i % 10 === 0 ? ('microvm' as const) : ('isolate' as const)
    const time = new Date(Date.UTC(2026, 10, 20, 0, 10 * i)).toISOString()
    const id = await publish.accepted({ isolation }, { spec: { labels }, time })
    ids.push(id)
    if (i % 3 === 0) await publish.started(id)
    if (i % 6 === 0) await publish.ended(id, 'failed', { cause: 'oom' })
  }
  await folded(dispatcher, bus)
  const list = async (query: string) => (await getJson(`${dispatcher.url}/v1/workloads?${query}`)).body
  const got = async (query: string) =>
    WorkloadList.parse(await list(query)).workloads.map(({ id }) => ids.indexOf(id))
  const where = (keep: (i: number) => boolean) =>
    ids
      .map((_, i) => i)
      .filter(keep)
      .reverse()

  assert.equal(
    await got(''),
    where(() => true),
  )
  assert.is('output' in (await list('limit=1')).workloads[0], false)
  assert.equal(
    await got('status=failed'),
    where((i) => i % 6 === 0),
  )
  assert.equal(
    await got('status=failed,running'),
    where((i) => i % 3 === 0),
  )
  assert.equal(
    await got('status=pending&status=running'),
    where((i) => i % 6 !== 0),
  )
  assert.equal(
    await got('isolation=microvm'),
    where((i) => i % 10 === 0),
  )
  assert.equal(
    await got('isolation=microvm&status=pending'),
    where((i) => i % 10 === 0 && i % 3 !== 0),
  )
  assert.equal(
    await got('label=team=a'),
    where((i) => i % 2 === 0),
  )
  assert.equal(
    await got('label=five'),
    where((i) => i % 5 === 0),
  )
  assert.equal(
    await got('label=five&label=team=b'),
    where((i) => i % 5 === 0 && i % 2 === 1),
  )
  assert.equal(
    await got('label=team=b&label=five=yes&status=pending'),
    where((i) => i % 5 === 0 && i % 2 === 1 && i % 3 !== 0),
  )
  assert.equal(await got('label=none'), [])
  assert.equal(await got('function=f'), [])
  assert.equal(
    await got('since=2026-11-20T02:00:00Z'),
    where((i) => i >= 12),
  )
  assert.equal(
    await got('since=2026-11-20T04:00:00%2B02:00&label=team=a'),
    where((i) => i >= 12 && i % 2 === 0),
  )
  assert.equal(await got('since=2027-01-01T00:00:00Z'), [])

  for (const filter of ['', 'label=team=a&', 'status=pending&']) {
    const all = await got(filter)
    const seen: number[] = []
    let cursor: string | null = ''
    while (cursor !== null) {
      const page = WorkloadList.parse(await list(`${filter}limit=4${cursor && `&cursor=${cursor}`}`))
      seen.push(...page.workloads.map(({ id }) => ids.indexOf(id)))
      cursor = page.next_cursor
      if (filter === '') await publish.accepted()
    }
    const known = (indexes: number[]) => indexes.filter((i) => i >= 0)
    assert.equal(known(seen), known(all))
  }
})

test('a bad parameter is refused by its name', async () => {
  await using world = await makeWorld()
  const dispatcher = await world.dispatcher()
  for (const [query, field] of [
    ['status=done', 'status'],
    ['isolation=jail', 'isolation'],
    ['limit=0', 'limit'],
    ['limit=201', 'limit'],
    ['limit=x', 'limit'],
    ['cursor=zzz', 'cursor'],
    ['since=yesterday', 'since'],
    ['label=', 'label'],
    ['stauts=failed', 'stauts'],
  ]) {
    const response = await getJson(`${dispatcher.url}/v1/workloads?${query}`)
    assert.is(response.status, 400, query)
    assert.is(response.body.code, 'invalid_query')
    assert.is(response.body.field, field)
    assert.is(response.headers.get('content-type'), 'application/problem+json')
  }
  const id = newWorkloadId()
  assert.is((await getJson(`${dispatcher.url}/v1/workloads/${id}/logs?limit=10001`)).body.field, 'limit')
  assert.is((await getJson(`${dispatcher.url}/v1/stats?since=x`)).body.field, 'since')
  assert.is((await getJson(`${dispatcher.url}/nothing`)).body.code, 'not_found')
})

test('what was published is read at once, and only what nobody published is unknown', async () => {
  await using world = await makeWorld()
  const { publish } = world
  const dispatcher = await world.dispatcher()
  await until('a first answer', async () => (await fetch(`${dispatcher.url}/readyz`)).status === 200)
  for (let i = 0; i < 50; i++) {
    const id = await publish.accepted()
    const url = `${dispatcher.url}/v1/workloads/${id}`
    assert.is((await getJson(url)).body.status, 'pending')
    await publish.started(id)
    assert.is((await getJson(url)).body.status, 'running')
    await publish.ended(id)
    const { body } = await getJson(url)
    assert.equal(Workload.parse(body).output, { y: 42 })
    assert.is(body.status, 'completed')
  }
  for (const id of [newWorkloadId(), 'x', '*', '%3E', 'a.b']) {
    for (const path of [`/v1/workloads/${id}`, `/internal/workloads/${id}`, `/v1/workloads/${id}/logs`]) {
      const response = await getJson(dispatcher.url + path)
      assert.is(response.status, 404, path)
      assert.is(response.body.code, 'workload_not_found')
    }
  }
})

test('an output in the object store is part of the answer', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const dispatcher = await world.dispatcher()
  const blobs = await Blobs.open(bus, 1)
  const output = { text: 'ü'.repeat(400_000), list: [1, 2, { three: null }] }
  const ref = await blobs.put(Buffer.from(JSON.stringify(output)))
  const id = await publish.run({}, { output: null, output_blob: ref })
  await folded(dispatcher, bus)
  const { status, body } = await getJson(`${dispatcher.url}/v1/workloads/${id}`)
  assert.is(status, 200)
  assert.equal(Workload.parse(body).output, output)
})

test('with the bus gone, known workloads are answered and unknown ones are 503', async () => {
  await using world = await makeWorld()
  const { publish, bus, nats } = world
  const dispatcher = await world.dispatcher()
  const ended = await publish.run()
  const running = await publish.accepted()
  await publish.started(running)
  await folded(dispatcher, bus)
  await nats.kill()
  await until('the loss noticed', () => dispatcher.live.connectedBus === undefined)
  assert.is((await getJson(`${dispatcher.url}/v1/workloads/${ended}`)).body.status, 'completed')
  assert.is((await getJson(`${dispatcher.url}/v1/workloads/${running}`)).body.status, 'running')
  const unknown = await getJson(`${dispatcher.url}/v1/workloads/${newWorkloadId()}`)
  assert.is(unknown.status, 503)
  assert.is(unknown.body.code, 'bus_unavailable')
  assert.ok(Number(unknown.headers.get('retry-after')) > 0)
  const ready = await getJson(`${dispatcher.url}/readyz`)
  assert.is(ready.status, 503)
  assert.is(DispatcherReadiness.parse(ready.body).parts.bus.ready, false)
  assert.is((await fetch(`${dispatcher.url}/healthz`)).status, 200)
  await nats.restart()
  await until('ready again', async () => (await fetch(`${dispatcher.url}/readyz`)).status === 200)
})

test('a locked database makes it unready, and nothing is lost', async () => {
  await using world = await makeWorld()
  const { publish, bus, databaseUrl } = world
  const dispatcher = await world.dispatcher()
  const first = await publish.run()
  await folded(dispatcher, bus)
  const other = createClient({ url: databaseUrl })
  const lock = await other.transaction('write')
  const second = await publish.run()
  await until('unready', async () => {
    const { status, body } = await getJson(`${dispatcher.url}/readyz`)
    return status === 503 && body.parts.database.ready === false
  })
  assert.is((await getJson(`${dispatcher.url}/v1/workloads/${first}`)).status, 200)
  await lock.rollback()
  other.close()
  await folded(dispatcher, bus)
  assert.is((await getJson(`${dispatcher.url}/v1/workloads/${second}`)).body.status, 'completed')
  await until('ready', async () => (await fetch(`${dispatcher.url}/readyz`)).status === 200)
})

test('a remote database out of reach makes it unready, and it keeps trying', async () => {
  await using world = await makeWorld()
  const dispatcher = await world.dispatcher({ databaseUrl: 'http://127.0.0.1:9' })
  await delay(300)
  const ready = await getJson(`${dispatcher.url}/readyz`)
  assert.is(ready.status, 503)
  assert.is(ready.body.parts.database.ready, false)
  const answer = await getJson(`${dispatcher.url}/v1/workloads/${newWorkloadId()}`)
  assert.is(answer.body.code, 'database_unavailable')
  assert.is((await fetch(`${dispatcher.url}/healthz`)).status, 200)
})

test('a remote database is folded into, through its absence and the loss of its tables', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  await using remote = await startRemoteDatabase()
  const dispatcher = await world.dispatcher({ databaseUrl: remote.url })
  const ids = [await publish.run({ labels: { a: 'b' } })]
  await publish.logs(ids[0]!, 1, ['x'])
  await folded(dispatcher, bus)
  remote.down = true
  ids.push(await publish.run({ labels: { a: 'b' } }))
  await until('unready', async () => (await fetch(`${dispatcher.url}/readyz`)).status === 503)
  assert.is((await getJson(`${dispatcher.url}/v1/workloads/${ids[0]}`)).body.code, 'database_unavailable')
  remote.down = false
  await folded(dispatcher, bus)
  const list = async () => (await getJson(`${dispatcher.url}/v1/workloads?label=a`)).body.workloads
  assert.is((await list()).length, 2)
  assert.equal((await getJson(`${dispatcher.url}/v1/workloads/${ids[1]}`)).body.output, { y: 42 })
  assert.is((await getJson(`${dispatcher.url}/v1/workloads/${ids[0]}/logs`)).body.lines.length, 1)

  const tables = remote.database
    .prepare("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    .all()
  for (const { name } of tables) remote.database.exec(`DROP TABLE "${name}"`)
  ids.push(await publish.run({ labels: { a: 'b' } }))
  await until('all rebuilt', async () => (await list())?.length === 3)
})

test('statistics count by status and isolation and take percentiles of what ended', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const dispatcher = await world.dispatcher()
  for (let i = 1; i <= 20; i++) {
    const id = await publish.accepted()
    await publish.started(id)
    const now = new Date().toISOString()
    if (i <= 16) await publish.ended(id, 'completed', { duration_ms: i }, now)
    else if (i <= 19) await publish.ended(id, 'failed', { cause: 'oom', duration_ms: null }, now)
  }
  const killed = await publish.accepted({ isolation: 'microvm' })
  await publish.ended(killed, 'killed', { cause: 'killed', attempt: 0, started_at: null, duration_ms: null })
  await folded(dispatcher, bus)
  const stats = Stats.parse((await getJson(`${dispatcher.url}/v1/stats`)).body)
  assert.equal(stats.counts, { pending: 0, running: 1, completed: 16, failed: 3, killed: 1 })
  assert.is(stats.by_isolation.isolate!.counts.completed, 16)
  assert.is(stats.by_isolation.microvm!.counts.killed, 1)
  assert.is(stats.success_rate, 16 / 19)
  assert.equal(stats.by_isolation.isolate!.duration_ms, { count: 16, mean: 8.5, p50: 8, p95: 16, p99: 16 })
  assert.is(stats.by_isolation.isolate!.queue_ms.p50, 10)
  assert.is(stats.by_isolation.gvisor, undefined)
  const none = Stats.parse((await getJson(`${dispatcher.url}/v1/stats?since=2030-01-01T00:00:00Z`)).body)
  assert.is(none.sample.size, 0)
  assert.is(none.counts.completed, 16)
})

test.run()
