import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { type LifecycleEvent, makeEvent } from '../../shared/events.ts'
import { newWorkloadId } from '../../shared/ids.ts'
import {
  begin,
  fold,
  hasEnded,
  mayRetry,
  moves,
  retryDelay,
  standing,
  toWorkload,
  type WorkloadRecord,
} from '../../shared/lifecycle.ts'
import { Cause, platformCauses, Retry, type Status, Workload } from '../../shared/workload.ts'
import { acceptedEvent, origin, seeded } from './support.ts'

const statuses: Status[] = ['pending', 'running', 'completed', 'failed', 'killed']
const kinds = ['accepted', 'started', 'retrying', 'completed', 'failed', 'killed'] as const
type Kind = (typeof kinds)[number]

const id = newWorkloadId()
const at = (ms: number) => new Date(1_700_000_000_000 + ms).toISOString()
const error = { message: 'it broke', stack: null }

/** An event of each kind, at second `second`. */
function event(kind: Kind, attempt: number, second: number): LifecycleEvent {
  const time = at(second * 1_000)
  const end = {
    attempt,
    runner: 'r1',
    started_at: at((second - 1) * 1_000),
    duration_ms: 1_000,
    cause: kind === 'completed' ? null : ('user_error' as const),
    error: kind === 'completed' ? null : error,
    output: kind === 'completed' ? { y: second } : null,
    output_blob: null,
    exit_code: null,
    logs: { last: 2, lines: 3, dropped: 0 },
    receipt: null,
  }
  switch (kind) {
    case 'accepted':
      return { ...acceptedEvent({}, id), time }
    case 'started':
      return makeEvent('started', id, attempt, { attempt, runner: 'r1' }, origin, time)
    case 'retrying':
      return makeEvent(
        'retrying',
        id,
        attempt,
        { attempt, runner: 'r1', cause: 'runner_lost', error, not_before: time },
        origin,
        time,
      )
    default:
      return makeEvent(kind, id, attempt, end, origin, time) as LifecycleEvent
  }
}

const inStatus = (status: Status): WorkloadRecord => ({
  ...begin(event('accepted', 0, 0) as Extract<LifecycleEvent, { type: 'vulcan.workload.accepted' }>, 1),
  status,
})

const legal: Record<Status, Partial<Record<Kind, Status>>> = {
  pending: { started: 'running', failed: 'failed', killed: 'killed' },
  running: { completed: 'completed', failed: 'failed', killed: 'killed', retrying: 'pending' },
  completed: {},
  failed: {},
  killed: {},
}

for (const from of statuses)
  for (const kind of kinds) {
    const to = legal[from][kind]
    test(`${kind} while ${from} ${to === undefined ? 'is illegal and changes nothing' : `leads to ${to}`}`, () => {
      const record = inStatus(from)
      const before = structuredClone(record)
      const folded = fold(record, event(kind, 1, 5), 2)
      if (to === undefined) assert.equal(folded, { illegal: `${kind} after ${from}` })
      else {
        assert.ok('record' in folded)
        assert.is(folded.record.status, to)
        assert.is(folded.record.last_seq, 2)
      }
      assert.equal(record, before, 'the record passed in is left as it was')
    })
  }

test('the table holds exactly the moves of the contract', () => {
  assert.equal(moves, legal)
})

test('only completed, failed and killed have ended', () => {
  assert.equal(statuses.filter(hasEnded), ['completed', 'failed', 'killed'])
})

test('an event of a workload that was never accepted is illegal, whatever its kind', () => {
  for (const kind of kinds.slice(1))
    assert.equal(fold(undefined, event(kind, 1, 1), 3), { illegal: `${kind} without accepted` })
})

test('a repeated or older sequence is stale, legal or not', () => {
  const record = { ...inStatus('running'), last_seq: 7 }
  for (const seq of [1, 6, 7])
    for (const kind of kinds) assert.equal(fold(record, event(kind, 1, 1), seq), { stale: true })
})

test('a whole life is told by its record', () => {
  let record: WorkloadRecord | undefined
  const life: [Kind, number, number][] = [
    ['accepted', 0, 0],
    ['started', 1, 2],
    ['retrying', 1, 3],
    ['started', 2, 5],
    ['completed', 2, 6],
  ]
  const seen: unknown[] = []
  life.forEach(([kind, attempt, second], i) => {
    const folded = fold(record, event(kind, attempt, second), i + 10)
    assert.ok('record' in folded)
    record = folded.record
    seen.push([record.status, record.attempts, record.cause, record.runner])
  })
  assert.equal(seen, [
    ['pending', 0, null, null],
    ['running', 1, null, 'r1'],
    ['pending', 1, 'runner_lost', null],
    ['running', 2, null, 'r1'],
    ['completed', 2, null, 'r1'],
  ])
  assert.is(record!.accepted_seq, 10)
  assert.is(record!.last_seq, 14)
  assert.is(record!.queue_ms, 5_000)
  assert.is(record!.duration_ms, 1_000)
  assert.is(record!.last_log, 2)
  assert.equal(record!.output, { y: 6 })
})

test('a call by HTTP is folded whatever its URL is', () => {
  const call = { method: 'GET', headers: [], sealed: null, body: null, gateway: null }
  const pathOf = (url: string) => {
    const accepted = acceptedEvent()
    return begin({ ...accepted, data: { ...accepted.data, http: { ...call, url } } }, 1).http!.path
  }
  assert.is(pathOf('http://h/fn/a/b?token=x'), '/fn/a/b')
  assert.is(pathOf('http://1.2.3.999/fn/a?token=x'), 'http://1.2.3.999/fn/a')
})

test('random event sequences fold to the same record once, with repeats and with late duplicates', () => {
  const seed = Date.now() % 1_000_000
  const random = seeded(seed)
  const pick = <T>(items: readonly T[]): T => items[Math.floor(random() * items.length)]!
  for (let round = 0; round < 500; round++) {
    const stored = Array.from({ length: 1 + Math.floor(random() * 12) }, (_, i) => ({
      event: event(i === 0 ? 'accepted' : pick(kinds), 1 + Math.floor(random() * 3), i + 1),
      seq: i * 2 + 1,
    }))
    const replay = (deliveries: typeof stored) => {
      let record: WorkloadRecord | undefined
      for (const { event, seq } of deliveries) {
        const folded = fold(record, event, seq)
        if ('record' in folded) record = folded.record
      }
      return record
    }
    const noisy = stored.flatMap((one, i) => [
      one,
      ...Array.from({ length: Math.floor(random() * 3) }, () => stored[Math.floor(random() * (i + 1))]!),
    ])
    const once = replay(stored)
    assert.equal(replay(noisy), once, `seed ${seed}, round ${round}`)
    assert.equal(replay([...stored, ...stored]), once, `seed ${seed}, round ${round}`)
    assert.ok(once !== undefined)
  }
})

test('nothing leaves an end, in any random sequence', () => {
  const random = seeded(7)
  for (let round = 0; round < 300; round++) {
    let record: WorkloadRecord | undefined
    let end: WorkloadRecord | undefined
    for (let seq = 1; seq < 20; seq++) {
      const kind = seq === 1 ? 'accepted' : kinds[Math.floor(random() * kinds.length)]!
      const folded = fold(record, event(kind, 1, seq), seq)
      if ('record' in folded) record = folded.record
      if (end !== undefined) assert.equal(record, end)
      else if (record !== undefined && hasEnded(record.status)) end = record
    }
  }
})

test('the public answer has the schema of a workload and nothing of the platform', () => {
  for (const status of statuses) {
    const workload = toWorkload(inStatus(status))
    assert.equal(Workload.parse(workload), workload)
    assert.not('spec' in workload)
  }
})

test('an output that stood in a blob is put in its place', () => {
  assert.equal(toWorkload(inStatus('completed'), [1, 2]).output, [1, 2])
})

test('where a workload stands is read off its last event', () => {
  assert.equal(standing(event('accepted', 0, 0)), { at: 'pending', attempts: 0, notBefore: 0 })
  assert.equal(standing(event('started', 2, 1)), {
    at: 'running',
    attempts: 2,
    runner: 'r1',
    startedAt: at(1_000),
  })
  assert.equal(standing(event('retrying', 2, 9)), {
    at: 'pending',
    attempts: 2,
    notBefore: Date.parse(at(9_000)),
  })
  for (const kind of ['completed', 'failed', 'killed'] as const)
    assert.is(standing(event(kind, 1, 1)).at, 'ended')
})

test('failures of the platform are retried unasked, those of the user only where retry.on names them', () => {
  const plain = Retry.parse({ on: [] })
  for (const cause of Cause.options)
    assert.is(mayRetry(plain, cause, 1), platformCauses.includes(cause), cause)
  for (const cause of Cause.options) assert.ok(mayRetry(Retry.parse({ on: [cause] }), cause, 1), cause)
})

test('attempts are limited by max_attempts', () => {
  const policy = Retry.parse({ max_attempts: 2 })
  assert.ok(mayRetry(policy, 'runner_lost', 1))
  assert.not(mayRetry(policy, 'runner_lost', 2))
  assert.not(mayRetry(Retry.parse({ max_attempts: 1 }), 'runner_lost', 1))
})

test('delays double from 0.25 s to 30 s, half of each random; without backoff there are none', () => {
  const policy = Retry.parse({})
  assert.equal(
    [1, 2, 3].map((n) => retryDelay(policy, n, () => 0)),
    [125, 250, 500],
  )
  assert.equal(
    [1, 2, 3].map((n) => retryDelay(policy, n, () => 1)),
    [250, 500, 1_000],
  )
  assert.is(
    retryDelay(policy, 19, () => 1),
    30_000,
  )
  assert.is(retryDelay(Retry.parse({ backoff: 'none' }), 5), 0)
})

test.run()
