import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Rate } from '../../shared/functions.ts'
import { type Grant, grant, type Meter, startable } from '../../shared/rate.ts'
import { seeded } from './support.ts'

const rate = (limit: number, per_s = 1, burst = 1) => Rate.parse({ limit, per_s, burst })

test('the first start is due now, the next one an interval later', () => {
  const first = grant(undefined, rate(10), 1_000, 1, 0)
  assert.equal(first, { starts: [1_000], meter: { due: 1_100, interval: 100 }, next: 1_100 })
  const second = grant(first.meter, rate(10), 1_050, 1, 0)
  assert.equal(second, { starts: [], meter: undefined, next: 1_100 })
  assert.equal(grant(first.meter, rate(10), 1_050, 1, 50).starts, [1_100])
  assert.equal(grant(first.meter, rate(10), 1_130, 1, 0).starts, [1_130])
})

test('several are granted at once, as many as fall due in time', () => {
  const { starts, meter, next } = grant(undefined, rate(10), 0, 100, 250)
  assert.equal(starts, [0, 100, 200])
  assert.equal(meter, { due: 300, interval: 100 })
  assert.is(next, 300)
  assert.equal(grant(undefined, rate(10), 0, 2, 250).starts, [0, 100])
})

test('a burst starts at once and comes back with time', () => {
  const { starts, meter, next } = grant(undefined, rate(1, 1, 3), 0, 10, 0)
  assert.equal(starts, [0, 0, 0])
  assert.is(next, 1_000)
  assert.is(startable(meter, rate(1, 1, 3), 0), 0)
  assert.is(startable(meter, rate(1, 1, 3), 1_000), 1)
  assert.is(startable(meter, rate(1, 1, 3), 2_500), 2)
  assert.is(startable(meter, rate(1, 1, 3), 60_000), 3)
  assert.is(startable(undefined, rate(1, 1, 3), 0), 3)
})

test('a rate that changed is read anew: what was granted ahead counts in starts, not in time', () => {
  const slow = grant(undefined, rate(1, 3_600), 0, 1, 0).meter!
  assert.is(slow.due, 3_600_000)
  assert.equal(grant(slow, rate(10), 0, 1, 0).next, 100)
  assert.equal(grant(slow, rate(10), 100, 1, 100).starts.length, 1)
  const fast = grant(undefined, rate(1_000, 1, 500), 0, 500, 0).meter!
  assert.is(startable(fast, rate(1, 1, 2), 0), 0)
  assert.ok(grant(fast, rate(1, 1, 2), 0, 1, 0).next <= 1_000)
})

test('in no window of time are there more starts than the rate allows and one burst', () => {
  for (let seed = 1; seed <= 20; seed++) {
    const random = seeded(seed)
    const limit = 1 + Math.floor(random() * 50)
    const burst = 1 + Math.floor(random() * 10)
    const one = rate(limit, 1, burst)
    let meter: Meter | undefined
    let now = 0
    const starts: number[] = []
    for (let i = 0; i < 300; i++) {
      now += random() < 0.1 ? 2_000 * random() : 30 * random()
      const given: Grant = grant(meter, one, now, Math.ceil(random() * 5), 100)
      meter = given.meter ?? meter
      for (const at of given.starts) assert.ok(at >= now && at <= now + 100)
      starts.push(...given.starts)
    }
    starts.sort((a, b) => a - b)
    for (let from = 0; from < starts.length; from++)
      for (let to = from; to < starts.length; to++) {
        const allowed = burst + ((starts[to]! - starts[from]!) * limit) / 1_000
        assert.ok(to - from + 1 <= allowed + 1e-6, `seed ${seed}: ${to - from + 1} where ${allowed}`)
      }
  }
})

test('nothing is lost: who asks all the time gets the whole rate', () => {
  let meter: Meter | undefined
  let count = 0
  for (let now = 0; now < 10_000; now += 3) {
    const given = grant(meter, rate(200, 1, 2), now, 50, 0)
    meter = given.meter ?? meter
    count += given.starts.length
  }
  assert.ok(count >= 1_995 && count <= 2_003, String(count))
})

test.run()
