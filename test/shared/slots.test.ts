import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { type Queue, Slots } from '../../shared/slots.ts'
import { seeded } from './support.ts'

interface Source extends Queue {
  name: string
  bound: number
  held: number
  asked: number
  waiting: number
}

/** Queues with messages in them, and a server that answers an ask when it is told to. */
function world(total: number) {
  let now = 0
  const queues: Source[] = []
  const slots = new Slots<Source>(
    total,
    (queue, count) => (queue.asked += count),
    () => now,
  )
  return {
    slots,
    queues,
    handed: 0,
    pass(ms: number) {
      now += ms
      slots.tick()
    },
    add(name: string, waiting = 0, bound = Number.POSITIVE_INFINITY) {
      const queue: Source = {
        name,
        common: name === 'common',
        bound,
        held: 0,
        asked: 0,
        waiting,
        room: () => queue.bound - slots.heldOf(queue),
      }
      queues.push(queue)
      slots.add(queue)
      return queue
    },
    /** Delivers what is asked for and there, in rounds over all queues. */
    deliver() {
      for (let moved = true; moved; ) {
        moved = false
        for (const queue of queues) {
          if (queue.asked === 0 || queue.waiting === 0) continue
          moved = true
          queue.asked--
          queue.waiting--
          if (slots.arrived(queue, queue.waiting)) queue.held++
          else {
            this.handed++
            queue.waiting++
            // The server would offer it again at once to whoever asks.
            moved = queue.asked > 0
          }
        }
      }
    },
    end(queue: Source) {
      queue.held--
      slots.released(queue)
    },
  }
}

test('a common queue alone has all slots, and asks again as they become free', () => {
  const one = world(8)
  const common = one.add('common', 20)
  assert.is(common.asked, 8)
  one.deliver()
  assert.is(common.held, 8)
  one.end(common)
  one.deliver()
  assert.is(common.held, 8)
  assert.is(one.handed, 0)
})

test('idle lanes keep one ask each, beyond the slots, and are not asked twice', () => {
  const one = world(4)
  const common = one.add('common')
  for (let i = 0; i < 100; i++) one.add(`lane-${i}`)
  one.pass(10_000)
  assert.is(common.asked, 4)
  for (const lane of one.queues.slice(1)) assert.is(lane.asked, 1)
  const [, lane] = one.queues
  lane!.waiting = 3
  one.deliver()
  assert.is(lane!.held, 3)
  assert.is(one.handed, 0)
})

test('what comes without a free slot is handed back, and asked for again when one is free', () => {
  const one = world(2)
  const a = one.add('lane-a', 5)
  const b = one.add('lane-b')
  one.deliver()
  assert.is(a.held, 2)
  b.waiting = 1
  one.deliver()
  assert.is(one.handed, 1)
  assert.is(b.asked, 0)
  for (let i = 0; i < 2; i++) {
    one.end(a)
    one.deliver()
  }
  assert.is(b.held, 1)
})

test('a lane asks for no more than it has room for', () => {
  const one = world(50)
  const lane = one.add('lane', 100, 5)
  one.deliver()
  assert.is(lane.held, 5)
  assert.is(lane.asked, 0)
  one.end(lane)
  assert.is(lane.asked, 1)
  lane.bound = 7
  one.slots.wake(lane)
  one.deliver()
  assert.is(lane.held, 7)
})

test('a slot promised to a queue that does not fill it goes to another after a moment', () => {
  const one = world(4)
  const taken = one.add('lane-taken', 10)
  one.deliver()
  assert.is(taken.held, 4)
  // Another runner took the rest.
  taken.waiting = 0
  for (let i = 0; i < 4; i++) one.end(taken)
  const other = one.add('lane-other', 4)
  one.pass(1_000)
  one.deliver()
  assert.is(other.held, 4)
})

test('an ask that ran out is made anew, one that is void too', () => {
  const one = world(4)
  const lane = one.add('lane')
  lane.asked = 0
  one.slots.lapsed(lane, 1)
  assert.is(lane.asked, 1)
  one.slots.close()
  lane.asked = 0
  one.slots.lapsed(lane, 1)
  assert.is(lane.asked, 0)
  one.slots.reopen()
  assert.is(lane.asked, 1)
})

test('the common queue and the lanes have half of the slots each where both want them, lanes in turn', () => {
  const one = world(16)
  const common = one.add('common', 10_000)
  const lanes = Array.from({ length: 40 }, (_, i) => one.add(`lane-${i}`, 10_000))
  const random = seeded(7)
  const ended = new Map<Source, number>()
  for (let i = 0; i < 4_000; i++) {
    one.deliver()
    const busy = one.queues.flatMap((queue) => Array.from({ length: queue.held }, () => queue))
    const queue = busy[Math.floor(random() * busy.length)]!
    ended.set(queue, (ended.get(queue) ?? 0) + 1)
    one.end(queue)
  }
  const share = ended.get(common)! / 4_000
  assert.ok(share > 0.35 && share < 0.65, `the common queue had ${share}`)
  for (const lane of lanes) assert.ok((ended.get(lane) ?? 0) >= 15, `${lane.name} had ${ended.get(lane)}`)
})

test('whatever happens, no more is held than there are slots, and all that waits is taken in the end', () => {
  for (let seed = 1; seed <= 30; seed++) {
    const random = seeded(seed)
    const total = 1 + Math.floor(random() * 12)
    const one = world(total)
    one.add('common', Math.floor(random() * 50))
    for (let i = 0; i < 20; i++) one.add(`lane-${i}`, Math.floor(random() * 30), 1 + Math.floor(random() * 6))
    for (let i = 0; i < 20_000 && one.queues.some(({ waiting, held }) => waiting + held > 0); i++) {
      if (random() < 0.5) one.deliver()
      const busy = one.queues.filter(({ held }) => held > 0)
      if (busy.length > 0 && random() < 0.7) one.end(busy[Math.floor(random() * busy.length)]!)
      if (random() < 0.05) one.queues[Math.floor(random() * one.queues.length)]!.waiting++
      if (random() < 0.1) one.pass(200)
      const held = one.queues.reduce((sum, queue) => sum + queue.held, 0)
      assert.ok(held <= total && held === one.slots.held, `seed ${seed}: ${held} of ${total}`)
      for (const queue of one.queues) assert.ok(queue.held <= queue.bound)
      if (i > 5_000) for (const queue of one.queues) queue.waiting = Math.min(queue.waiting, 5)
    }
    one.deliver()
    for (let i = 0; i < 2_000; i++) {
      for (const queue of one.queues) while (queue.held > 0) one.end(queue)
      one.pass(200)
      one.deliver()
    }
    assert.equal(
      one.queues.filter(({ waiting, held }) => waiting + held > 0).map(({ name }) => name),
      [],
      `seed ${seed}`,
    )
  }
})

test.run()
