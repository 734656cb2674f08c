import { request } from 'node:http'
import { setTimeout as delay } from 'node:timers/promises'
import { createClient } from '@libsql/client'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { tallyBatch } from '../../dispatcher/logs.ts'
import { makeEvent } from '../../shared/events.ts'
import { newWorkloadId } from '../../shared/ids.ts'
import { LogPage } from '../../shared/reads.ts'
import { folded, getJson, line, makeWorld, origin, until } from './support.ts'

interface SseEvent {
  event: string
  id: string | undefined
  // biome-ignore lint/suspicious/noExplicitAny: what came is what the test looks at
  data: any
}

/** Reads a log stream; `events` grows as they come, `ended` settles when the server closes it. */
function openStream(url: string, headers: Record<string, string> = {}) {
  const abort = new AbortController()
  const events: SseEvent[] = []
  const ended = (async () => {
    const response = await fetch(url, {
      headers: { accept: 'text/event-stream', ...headers },
      signal: abort.signal,
    })
    if (response.status !== 200) throw new Error(`status ${response.status}: ${await response.text()}`)
    assert.is(response.headers.get('content-type'), 'text/event-stream')
    let text = ''
    for await (const chunk of response.body!.pipeThrough(new TextDecoderStream())) {
      text += chunk
      for (let at = text.indexOf('\n\n'); at >= 0; at = text.indexOf('\n\n')) {
        const fields = new Map(
          text
            .slice(0, at)
            .split('\n')
            .map((field): [string, string] => [
              field.split(':', 1)[0]!,
              field.slice(field.indexOf(':') + 1).trim(),
            ]),
        )
        text = text.slice(at + 2)
        const event = fields.get('event')
        if (event !== undefined)
          events.push({ event, id: fields.get('id'), data: JSON.parse(fields.get('data') ?? 'null') })
      }
    }
  })()
  ended.catch(() => {})
  return { events, ended, close: () => abort.abort() }
}

const shown = (events: SseEvent[]) =>
  events.map(({ event, data }) =>
    event === 'log' ? data.text : event === 'gap' ? `${data.reason} ${data.count} ${data.unit}` : event,
  )

test('a stream replays, goes on live, and ends by itself after the last line', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const dispatcher = await world.dispatcher()
  const id = await publish.accepted()
  await publish.started(id)
  await publish.logs(id, 1, ['a', 'b'])
  await folded(dispatcher, bus)
  const stream = openStream(`${dispatcher.url}/v1/workloads/${id}/logs`)
  await until('the replay', () => stream.events.length === 2)
  await publish.logs(id, 2, ['c'])
  await until('the live line', () => stream.events.length === 3)
  // The end overtakes the last batch.
  const now = new Date().toISOString()
  await publish.ended(id, 'failed', { cause: 'user_error', logs: { last: 3, lines: 4, dropped: 0 } }, now)
  await delay(300)
  assert.is(stream.events.length, 3)
  await publish.logs(id, 3, ['d'])
  await stream.ended
  assert.equal(shown(stream.events), ['a', 'b', 'c', 'd', 'end'])
  assert.equal(stream.events.at(-1)!.data, { status: 'failed', cause: 'user_error' })
  assert.equal(stream.events[0]!.data, { ...line('a'), attempt: 1 })
  assert.match(stream.events[1]!.id!, /^\d+-2$/)
  assert.is(dispatcher.live.changes.size, 0)
})

test('Last-Event-ID resumes anywhere without loss or repeat', async () => {
  await using world = await makeWorld()
  const { publish } = world
  const dispatcher = await world.dispatcher()
  const id = await publish.accepted()
  await publish.started(id)
  for (let n = 1; n <= 12; n++)
    await publish.logs(id, n, [`${n}.1`, `${n}.2`, `${n}.3`], { dropped: n >= 5 ? 7 : 0 })
  await publish.ended(id, 'completed', { logs: { last: 12, lines: 36, dropped: 7 } })
  const url = `${dispatcher.url}/v1/workloads/${id}/logs`
  await until('a database', () => dispatcher.live.database)
  const whole = openStream(url)
  await whole.ended
  assert.is(whole.events.length, 36 + 1 + 1)
  assert.is(shown(whole.events)[15], 'dropped 7 lines')
  for (let i = 0; i < whole.events.length - 1; i++) {
    const rest = openStream(url, { 'last-event-id': whole.events[i]!.id! })
    await rest.ended
    assert.equal(rest.events, whole.events.slice(i + 1))
  }
  const byQuery = openStream(`${url}?last_event_id=${whole.events[20]!.id}`)
  await byQuery.ended
  assert.equal(byQuery.events, whole.events.slice(21))
  const bad = await fetch(url, { headers: { accept: 'text/event-stream', 'last-event-id': 'x' } })
  assert.is(bad.status, 400)
  assert.is(((await bad.json()) as { code: string }).code, 'invalid_header')
  const unknown = await fetch(`${dispatcher.url}/v1/workloads/${newWorkloadId()}/logs`, {
    headers: { accept: 'text/event-stream' },
  })
  assert.is(unknown.status, 404)
})

test('missing batches are a gap where they are missing, also at the end', async () => {
  await using world = await makeWorld()
  const { publish } = world
  const dispatcher = await world.dispatcher()
  const id = await publish.accepted()
  await publish.started(id)
  await publish.logs(id, 2, ['b'])
  await publish.logs(id, 5, ['e'])
  await publish.ended(id, 'completed', { logs: { last: 7, lines: 9, dropped: 0 } }, new Date().toISOString())
  await until('a database', () => dispatcher.live.database)
  const stream = openStream(`${dispatcher.url}/v1/workloads/${id}/logs`)
  await stream.ended
  assert.equal(shown(stream.events), ['lost 1 batches', 'b', 'lost 2 batches', 'e', 'lost 2 batches', 'end'])
  const page = LogPage.parse((await getJson(`${dispatcher.url}/v1/workloads/${id}/logs`)).body)
  assert.is(page.complete, true)
  assert.is(page.lines.length, 5)
  const resumed = openStream(`${dispatcher.url}/v1/workloads/${id}/logs`, {
    'last-event-id': page.lines.at(-1)!.id,
  })
  await resumed.ended
  assert.equal(shown(resumed.events), ['end'])
})

test('pages go on from a cursor to the complete end', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const dispatcher = await world.dispatcher()
  const id = await publish.accepted()
  await publish.started(id)
  await folded(dispatcher, bus)
  const url = `${dispatcher.url}/v1/workloads/${id}/logs`
  assert.equal((await getJson(url)).body, { lines: [], next_cursor: null, complete: false })
  for (let n = 1; n <= 9; n++)
    await publish.logs(
      id,
      n,
      ['1', '2', '3', '4', '5'].map((text) => `${n}.${text}`),
    )
  await folded(dispatcher, bus)
  const running = LogPage.parse((await getJson(url)).body)
  assert.is(running.lines.length, 45)
  assert.is(running.complete, false)
  assert.is(running.next_cursor, running.lines.at(-1)!.id)
  const nothing = LogPage.parse((await getJson(`${url}?cursor=${running.next_cursor}`)).body)
  assert.equal(nothing, { lines: [], next_cursor: running.next_cursor, complete: false })
  await publish.ended(id, 'completed', { logs: { last: 9, lines: 45, dropped: 0 } })
  for (const limit of [1, 4, 5, 7, 44, 45, 46]) {
    const lines: unknown[] = []
    let cursor: string | null = ''
    let pages = 0
    while (cursor !== null) {
      const page = LogPage.parse(
        (await getJson(`${url}?limit=${limit}${cursor && `&cursor=${cursor}`}`)).body,
      )
      assert.ok(page.lines.length <= limit)
      assert.is(page.complete, page.next_cursor === null)
      lines.push(...page.lines)
      cursor = page.next_cursor
      pages++
    }
    assert.equal(lines, running.lines)
    assert.is(pages, Math.ceil(45 / limit))
  }
})

test('the limit holds over all attempts and marks where lines were cut', async () => {
  await using world = await makeWorld()
  const { publish } = world
  const dispatcher = await world.dispatcher({ logLines: 5 })
  const id = await publish.accepted()
  await publish.started(id)
  await publish.logs(id, 1, ['1', '2', '3'])
  await publish.retrying(id)
  await publish.started(id, 2)
  await publish.logs(id, 1, ['4', '5', '6'], { attempt: 2 })
  await publish.logs(id, 2, ['7'], { attempt: 2, dropped: 3 })
  await publish.ended(id, 'completed', { attempt: 2, logs: { last: 2, lines: 4, dropped: 3 } })
  await until('a database', () => dispatcher.live.database)
  const stream = openStream(`${dispatcher.url}/v1/workloads/${id}/logs`)
  await stream.ended
  assert.equal(shown(stream.events), ['1', '2', '3', '4', '5', 'dropped 1 lines', 'dropped 4 lines', 'end'])
  assert.equal(stream.events[4]!.data.attempt, 2)
})

test('a tally ignores a batch it has seen, and cuts by bytes', () => {
  const id = newWorkloadId()
  const batch = (n: number, texts: string[], dropped = 0) =>
    makeEvent('log', id, `1.${n}`, { attempt: 1, n, lines: texts.map(line), dropped }, origin)
  const limits = { lines: 100, bytes: 300 }
  const first = tallyBatch(
    { lines: 0, bytes: 0, attempts: new Map() },
    batch(1, ['x'.repeat(100)]),
    { seq: 1, at: 0 },
    limits,
  )!
  assert.is(first.row.bytes, 164)
  assert.is(tallyBatch(first.tally, batch(1, ['again']), { seq: 2, at: 0 }, limits), undefined)
  const second = tallyBatch(first.tally, batch(4, ['y'.repeat(100), 'z']), { seq: 3, at: 0 }, limits)!
  assert.is(second.row.missing, 2)
  assert.is(second.row.dropped, 1)
  assert.equal(JSON.parse(second.row.lines), [line('z')])
})

test('an end that could not count its logs still shows all that were stored', async () => {
  await using world = await makeWorld()
  const { publish } = world
  const dispatcher = await world.dispatcher()
  const id = await publish.accepted()
  await publish.started(id)
  for (let n = 1; n <= 200; n++) await publish.logs(id, n, [String(n)])
  await publish.ended(id, 'failed', { cause: 'runner_lost', logs: null })
  await until('a database', () => dispatcher.live.database)
  const stream = openStream(`${dispatcher.url}/v1/workloads/${id}/logs`)
  await stream.ended
  assert.is(stream.events.length, 201)
})

test('what retention removed is a gap, not silence', async () => {
  await using world = await makeWorld()
  const { publish, bus, databaseUrl } = world
  const dispatcher = await world.dispatcher({ keepLogsH: 1 })
  const id = await publish.accepted()
  await publish.started(id)
  for (let n = 1; n <= 3; n++) await publish.logs(id, n, [String(n)])
  const longAgo = new Date(Date.now() - 7_200_000).toISOString()
  await publish.ended(id, 'completed', { logs: { last: 3, lines: 3, dropped: 0 } }, longAgo)
  await folded(dispatcher, bus)
  const client = createClient({ url: databaseUrl })
  await client.execute('DELETE FROM log_batches WHERE n < 3')
  const some = openStream(`${dispatcher.url}/v1/workloads/${id}/logs`)
  await some.ended
  assert.equal(shown(some.events), ['retention 2 batches', '3', 'end'])
  await client.execute('DELETE FROM log_batches')
  const none = openStream(`${dispatcher.url}/v1/workloads/${id}/logs`)
  await none.ended
  assert.equal(shown(none.events), ['retention 3 batches', 'end'])
  client.close()
})

test('a slow client holds back the reading, a gone one leaves nothing behind', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const dispatcher = await world.dispatcher({ logLines: 1_000_000, logBytes: 1e9 })
  const id = await publish.accepted()
  await publish.started(id)
  const batch = Array.from({ length: 150 }, () => 'x'.repeat(1_000))
  for (let n = 1; n <= 400; n++) await publish.logs(id, n, batch)
  await publish.ended(id, 'completed', { logs: { last: 400, lines: 60_000, dropped: 0 } })
  await folded(dispatcher, bus)
  globalThis.gc?.()
  const before = process.memoryUsage()
  const slow = await new Promise<import('node:http').IncomingMessage>((resolve) =>
    request(
      `${dispatcher.url}/v1/workloads/${id}/logs`,
      { headers: { accept: 'text/event-stream' } },
      resolve,
    ).end(),
  )
  slow.pause()
  await delay(500)
  const held = process.memoryUsage()
  // 60 MB of lines are to come; what is on its way is a few chunks and the sockets’ buffers.
  assert.ok(
    held.external + held.heapUsed - before.external - before.heapUsed < 30e6,
    JSON.stringify({ before, held }),
  )
  let bytes = 0
  let text = ''
  for await (const chunk of slow) {
    bytes += chunk.length
    text = (text + chunk).slice(-200)
  }
  assert.ok(bytes > 60e6)
  assert.match(text, /event: end\ndata: \{"status":"completed","cause":null\}\n\n$/)

  const other = await publish.accepted()
  const streams = Array.from({ length: 20 }, () => openStream(`${dispatcher.url}/v1/workloads/${other}/logs`))
  await until('all listen', () => dispatcher.live.changes.size === 1)
  await delay(100)
  for (const stream of streams) stream.close()
  await until('nobody listens', () => dispatcher.live.changes.size === 0)
})

test.run()
