import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Logbook } from '../../runners/logbook.ts'
import { line } from './support.ts'

interface Batch {
  n: number
  texts: string[]
  dropped: number
}

/** A logbook whose batches are kept; `store` may be slow or fail. */
function book(
  limits = { lines: 10_000, bytes: 5_000_000 },
  store: (n: number) => Promise<void> = async () => {},
) {
  const batches: Batch[] = []
  let open = 0
  let most = 0
  const logbook = new Logbook(limits, async (n, lines, dropped) => {
    most = Math.max(most, ++open)
    batches.push({ n, texts: lines.map(({ text }) => text), dropped })
    await store(n).finally(() => open--)
  })
  return {
    logbook,
    batches,
    texts: () => batches.flatMap(({ texts }) => texts),
    get most() {
      return most
    },
  }
}

test('lines go out together after a moment, in order, in batches numbered from 1', async () => {
  const { logbook, batches } = book()
  for (const text of ['a', 'b', 'c']) logbook.write(line(text))
  assert.is(batches.length, 0)
  await delay(60)
  logbook.write(line('d'))
  const count = logbook.close()
  await logbook.flushed()
  assert.equal(batches, [
    { n: 1, texts: ['a', 'b', 'c'], dropped: 0 },
    { n: 2, texts: ['d'], dropped: 0 },
  ])
  assert.equal(count, { last: 2, lines: 4, dropped: 0 })
})

test('without a line there is no batch', async () => {
  const { logbook, batches } = book()
  assert.equal(logbook.close(), { last: 0, lines: 0, dropped: 0 })
  await logbook.flushed()
  assert.is(batches.length, 0)
  assert.ok(logbook.settled)
})

test('one batch is on its way at a time, in order, however slow the stream', async () => {
  const slow = book(undefined, (n) => delay(n === 1 ? 50 : 1))
  const texts = Array.from({ length: 3_500 }, (_, i) => String(i))
  for (const text of texts) slow.logbook.write(line(text))
  const count = slow.logbook.close()
  assert.not(slow.logbook.settled)
  await slow.logbook.flushed()
  assert.ok(slow.logbook.settled)
  assert.is(slow.most, 1)
  assert.equal(slow.texts(), texts)
  assert.equal(
    slow.batches.map(({ n }) => n),
    [1, 2, 3, 4],
  )
  assert.equal(count, { last: 4, lines: 3_500, dropped: 0 })
})

test('a batch that cannot be stored is a gap; the next ones still come', async () => {
  const broken = book(undefined, async (n) => {
    if (n === 1) throw new Error('no room')
  })
  for (let i = 0; i < 2_000; i++) broken.logbook.write(line(String(i)))
  assert.is(broken.logbook.close().last, 2)
  await broken.logbook.flushed()
  assert.equal(
    broken.batches.map(({ n }) => n),
    [1, 2],
  )
})

test('lines over the limit are dropped and counted, in the last batch too', async () => {
  const { logbook, batches, texts } = book({ lines: 10, bytes: 5_000_000 })
  for (let i = 0; i < 25; i++) logbook.write(line(String(i)))
  assert.equal(logbook.close(), { last: 1, lines: 10, dropped: 15 })
  await logbook.flushed()
  assert.is(texts().length, 10)
  assert.is(batches.at(-1)!.dropped, 15)
})

test('what is dropped after the last batch went out is told in one of its own', async () => {
  const { logbook, batches } = book({ lines: 2, bytes: 5_000_000 })
  logbook.write(line('a'))
  logbook.write(line('b'))
  await delay(60)
  logbook.write(line('c'))
  assert.equal(logbook.close(), { last: 2, lines: 2, dropped: 1 })
  await logbook.flushed()
  assert.equal(batches.at(-1), { n: 2, texts: [], dropped: 1 })
})

test('each batch tells how many lines have been dropped so far, in all', async () => {
  const { logbook, batches } = book({ lines: 10_000, bytes: 1_200 })
  const long = 'x'.repeat(800)
  logbook.write(line('a'))
  await delay(60)
  logbook.write(line(long))
  logbook.write(line(long))
  await delay(60)
  logbook.write(line('b'))
  logbook.write(line(long))
  logbook.close()
  await logbook.flushed()
  assert.equal(
    batches.map(({ dropped }) => dropped),
    [0, 1, 2],
  )
})

test('bytes over the limit are dropped', () => {
  const { logbook } = book({ lines: 10_000, bytes: 10_000 })
  for (let i = 0; i < 100; i++) logbook.write(line('x'.repeat(1_000)))
  const count = logbook.close()
  assert.ok(count.lines >= 8 && count.lines <= 10, String(count.lines))
  assert.is(count.lines + count.dropped, 100)
})

test('no batch is larger than a message, whatever the lines hold', async () => {
  const sizes: number[] = []
  const logbook = new Logbook({ lines: 100_000, bytes: 50_000_000 }, async (n, lines) => {
    sizes.push(Buffer.byteLength(JSON.stringify({ n, lines })))
  })
  for (const text of ['\u0001', '\ud800', '€', '"', 'x', '😀'])
    for (const length of [1, 300, 20_000, 70_000, 2_000_000])
      for (let i = 0; i < (length > 1_000 ? 3 : 400); i++) logbook.write(line(text.repeat(length)))
  logbook.close()
  await logbook.flushed()
  assert.ok(sizes.length > 10)
  assert.ok(Math.max(...sizes) < 1_030_000, String(Math.max(...sizes)))
})

test.run()
