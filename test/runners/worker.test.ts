// timeout: 170
import { setTimeout as delay } from 'node:timers/promises'
import pino from 'pino'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { backendKey, Heartbeat } from '../../shared/backends.ts'
import { Bus } from '../../shared/bus.ts'
import { type EndEvent, type LogEvent, makeEvent } from '../../shared/events.ts'
import { newWorkloadId, sha256Hex } from '../../shared/ids.ts'
import {
  acceptedSubject,
  allRunners,
  controlSubject,
  eventSubject,
  lateSubject,
  lifecycleSubjects,
  logSubject,
  rollCallSubject,
  storedEnds,
} from '../../shared/subjects.ts'
import { EVENTS, LOGS, recreateConsumer, WORK } from '../../shared/topology.ts'
import {
  acceptedEvent,
  bareEnd,
  fill,
  type Ground,
  ground,
  history,
  kindsOf,
  origin,
  submit,
  until,
  untilEnd,
} from '../shared/support.ts'
import { type Code, codeOf, completed, failed, line, startWorker, untilStopped } from './support.ts'

const queued = async (bus: Bus) => (await bus.jsm.streams.info(WORK)).state.messages
const untilAcked = (bus: Bus) =>
  until('the acknowledgement', async () => (await queued(bus)) === 0 || undefined)

/** Every message stored on a subject, in order. */
async function stored<T>(bus: Bus, stream: string, subject: string): Promise<T[]> {
  const found: T[] = []
  for (let seq = 1; ; ) {
    const query = { seq, next_by_subj: subject }
    const message = await bus.jsm.streams
      .getMessage(stream, query)
      .catch((error) => (error.code === 10037 ? null : Promise.reject(error)))
    if (message === null) return found
    found.push(message.json<T>())
    seq = message.seq + 1
  }
}

/** Ends that the server sends on, from now on. */
async function heardEnds(on: Ground): Promise<EndEvent[]> {
  const got: EndEvent[] = []
  for (const subject of storedEnds) on.bus.listen(subject, (message) => got.push(message.json()))
  await on.bus.flush()
  return got
}

const never: Code = (_, signal) => untilStopped(signal)

test('a workload is run and its whole story is stored, in order', async () => {
  await using on = await ground()
  await using worker = await startWorker(on, (job) => completed({ y: JSON.parse(job.input!).x * 2 }))
  const { id } = await submit(on.bus, { code: 'the code', input: { x: 21 }, env: { MODE: 'test' } })
  const end = await untilEnd(on.bus, id)
  const events = await history(on.bus, id)
  assert.equal(kindsOf(events), ['accepted', 'started', 'completed'])
  assert.is(end.data.attempt, 1)
  assert.is(end.data.runner, worker.id)
  assert.equal(end.data.output, { y: 42 })
  assert.is(end.data.started_at, events[1]!.event.time)
  assert.equal(end.data.logs, { last: 0, lines: 0, dropped: 0 })
  assert.is(end.data.receipt!.code_sha256, sha256Hex('the code'))
  assert.is(end.data.receipt!.runner, worker.id)
  assert.equal(worker.runner.ran[0]!.env, { MODE: 'test' })
  assert.is(worker.runner.ran[0]!.attempt, 1)
  await untilAcked(on.bus)
  assert.is(worker.runner.released, 1)
})

test('started is stored before the code runs', async () => {
  await using on = await ground()
  const seen: string[][] = []
  await using _ = await startWorker(on, async (job) => {
    seen.push(kindsOf(await history(on.bus, job.id)))
    return completed()
  })
  const { id } = await submit(on.bus)
  await untilEnd(on.bus, id)
  assert.equal(seen, [['accepted', 'started']])
})

test('the end is stored before anybody hears of it', async () => {
  await using on = await ground()
  const atWord: string[][] = []
  for (const subject of storedEnds)
    on.bus.listen(subject, async (message) => {
      atWord.push(kindsOf(await history(on.bus, message.json<EndEvent>().subject)))
    })
  await using _ = await startWorker(on, () => completed(7))
  const { id } = await submit(on.bus)
  await until('the word', () => atWord.length > 0 || undefined)
  assert.equal(atWord, [['accepted', 'started', 'completed']])
  assert.is((await untilEnd(on.bus, id)).data.output, 7)
})

test('while the end cannot be stored there is neither word of it nor acknowledgement', async () => {
  await using on = await ground()
  const got = await heardEnds(on)
  const { config } = await on.bus.jsm.streams.info(EVENTS)
  let ran = false
  await using _ = await startWorker(on, async () => {
    const { state } = await on.bus.jsm.streams.info(EVENTS)
    await on.bus.jsm.streams.update(EVENTS, {
      ...config,
      max_bytes: state.bytes,
      discard: 'new',
    } as typeof config)
    ran = true
    return completed()
  })
  const { id } = await submit(on.bus)
  await until('the run', () => ran || undefined)
  await delay(500)
  assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'started'])
  assert.is(got.length, 0)
  assert.is(await queued(on.bus), 1)
  await on.bus.jsm.streams.update(EVENTS, config)
  await untilAcked(on.bus)
  await until('the word', () => got.length === 1 || undefined)
  assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'started', 'completed'])
})

test('a redelivered workload that has ended is acknowledged, not run again; its end was told once', async () => {
  await using on = await ground({ ackWaitMs: 1_000 })
  const got = await heardEnds(on)
  const dead = await startWorker(on, never)
  const { id } = await submit(on.bus)
  await until('the start', () => dead.runner.ran.length === 1 || undefined)
  await dead.die()
  // Its end was stored, its acknowledgement lost.
  const last = (await on.bus.lastEvent(id))!
  const end = {
    ...last.event,
    type: 'vulcan.workload.completed',
    id: `${id}.completed.1`,
  } as unknown as EndEvent
  const data = { attempt: 1, runner: dead.id, started_at: null, duration_ms: null, cause: null, error: null }
  Object.assign(end, {
    data: { ...data, output: 1, output_blob: null, exit_code: null, logs: null, receipt: null },
  })
  assert.ok((await on.bus.settleEvent(`vulcan.events.${id}.completed`, end, last.seq)).stored)
  await using worker = await startWorker(on, () => completed(2))
  await untilAcked(on.bus)
  assert.is(worker.runner.prepared, 0)
  await until('the word', () => got.length > 0 || undefined)
  assert.is(got[0]!.data.output, 1)
  await on.bus.flush()
  assert.is(got.length, 1)
  assert.is((await history(on.bus, id)).length, 3)
  await dead[Symbol.asyncDispose]()
})

test('when a runner dies, another records the retry and runs attempt 2', async () => {
  await using on = await ground({ ackWaitMs: 1_000 })
  const got = await heardEnds(on)
  await using dead = await startWorker(on, never)
  const { id } = await submit(on.bus)
  await until('the start', () => dead.runner.ran.length === 1 || undefined)
  await using worker = await startWorker(on, () => completed('second'))
  await dead.die()
  const end = await untilEnd(on.bus, id)
  const events = await history(on.bus, id)
  assert.equal(kindsOf(events), ['accepted', 'started', 'retrying', 'started', 'completed'])
  const retrying = events[2]!.event
  assert.ok(retrying.type === 'vulcan.workload.retrying')
  assert.is(retrying.data.cause, 'runner_lost')
  assert.is(retrying.data.runner, dead.id)
  assert.is(end.data.attempt, 2)
  assert.is(end.data.runner, worker.id)
  assert.is(worker.runner.ran[0]!.attempt, 2)
  await untilAcked(on.bus)
  await until('the word', () => got.length > 0 || undefined)
  assert.is(got[0]!.data.output, 'second')
})

test('when a runner dies in the last attempt, it ends as failed, runner_lost, without running', async () => {
  await using on = await ground({ ackWaitMs: 1_000 })
  await using dead = await startWorker(on, never)
  const { id } = await submit(on.bus, { retry: { max_attempts: 1 } })
  await until('the start', () => dead.runner.ran.length === 1 || undefined)
  await using worker = await startWorker(on, () => completed())
  await dead.die()
  const end = await untilEnd(on.bus, id)
  assert.is(end.type, 'vulcan.workload.failed')
  assert.is(end.data.cause, 'runner_lost')
  assert.is(end.data.runner, dead.id)
  assert.match(end.data.error!.message, dead.id)
  assert.is(worker.runner.prepared, 0)
  await untilAcked(on.bus)
})

test('a completion that comes after another end is reported as late and changes nothing', async () => {
  await using on = await ground()
  let finish = () => {}
  await using worker = await startWorker(on, async () => {
    await new Promise<void>((resolve) => {
      finish = resolve
    })
    return completed('too late')
  })
  const { id } = await submit(on.bus)
  await until('the start', () => worker.runner.ran.length === 1 || undefined)
  const last = (await on.bus.lastEvent(id))!
  const killed = {
    ...last.event,
    type: 'vulcan.workload.killed',
    id: `${id}.killed.1`,
    data: {
      attempt: 1,
      runner: worker.id,
      started_at: last.event.time,
      duration_ms: 1,
      cause: 'killed',
      error: null,
      output: null,
      output_blob: null,
      exit_code: null,
      logs: null,
      receipt: null,
    },
  } as unknown as EndEvent
  assert.ok((await on.bus.settleEvent(`vulcan.events.${id}.killed`, killed, last.seq)).stored)
  finish()
  await untilAcked(on.bus)
  assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'started', 'killed'])
  const late = await stored<{ data: unknown }>(on.bus, EVENTS, lateSubject(id))
  assert.equal(
    late.map(({ data }) => data),
    [{ attempt: 1, runner: worker.id, status: 'completed', cause: null }],
  )
})

test('an attempt over its time is stopped and ends as failed, timeout', async () => {
  await using on = await ground()
  await using _ = await startWorker(on, never)
  const { id } = await submit(on.bus, { limits: { timeout_s: 0.3 } })
  const end = await untilEnd(on.bus, id)
  assert.is(end.type, 'vulcan.workload.failed')
  assert.is(end.data.cause, 'timeout')
  assert.is(end.data.error!.message, 'the workload ran longer than its limit of 0.3 s')
  assert.ok(end.data.duration_ms! >= 290)
})

test('an attempt whose start takes its time ends as timeout too, and says what it waited for', async () => {
  await using on = await ground()
  await using _ = await startWorker(on, async (job, signal) => ({
    ...(await untilStopped(signal)),
    ...{ status: 'stopped', before: codeOf(job) },
  }))
  for (const [part, way] of [
    ['pull image', 'raise limits.timeout_s'],
    ['boot machine', 'try again soon, as that goes on, or raise limits.timeout_s'],
  ]) {
    const { id } = await submit(on.bus, { code: part, limits: { timeout_s: 0.2 } })
    const { data } = await untilEnd(on.bus, id)
    assert.is(data.cause, 'timeout')
    assert.is(data.error!.message, `its limit of 0.2 s was over before its code began (${part}): ${way}`)
  }
})

test('retry.on: a failure of the user’s own is retried where it is named, with its delay, to the last attempt', async () => {
  await using on = await ground()
  await using worker = await startWorker(on, (job, signal) =>
    codeOf(job) === 'slow' ? untilStopped(signal) : failed('user_error', `attempt ${job.attempt}`),
  )
  const once = await submit(on.bus)
  const three = await submit(on.bus, {
    retry: { max_attempts: 3, on: ['user_error'], backoff: 'exponential' },
  })
  const slow = await submit(on.bus, {
    code: 'slow',
    limits: { timeout_s: 0.2 },
    retry: { max_attempts: 2, on: ['timeout'], backoff: 'none' },
  })
  const end = await untilEnd(on.bus, three.id)
  assert.is(end.data.cause, 'user_error')
  assert.is(end.data.error!.message, 'attempt 3')
  const events = await history(on.bus, three.id)
  assert.equal(kindsOf(events), [
    'accepted',
    'started',
    'retrying',
    'started',
    'retrying',
    'started',
    'failed',
  ])
  for (const i of [2, 4]) {
    const retrying = events[i]!.event
    assert.ok(retrying.type === 'vulcan.workload.retrying')
    assert.ok(Date.parse(retrying.data.not_before) > Date.parse(retrying.time))
    assert.ok(events[i + 1]!.event.time >= retrying.data.not_before, 'not before its time')
  }
  assert.equal(kindsOf(await history(on.bus, once.id)), ['accepted', 'started', 'failed'])
  assert.is((await untilEnd(on.bus, slow.id)).data.attempt, 2)
  assert.is(worker.runner.ran.filter((job) => job.id === slow.id).length, 2)
  const jobs = worker.runner.ran.filter((job) => job.id === three.id)
  assert.equal(
    jobs.map(({ attempt }) => attempt),
    [1, 2, 3],
  )
  await untilAcked(on.bus)
})

test('a failure of the platform is retried unasked', async () => {
  await using on = await ground()
  await using _ = await startWorker(on, (job) =>
    job.attempt === 1 ? failed('backend_unavailable') : completed('second'),
  )
  const { id } = await submit(on.bus, { retry: { on: [], backoff: 'none' } })
  assert.is((await untilEnd(on.bus, id)).data.output, 'second')
})

test('killed while it runs: it ends as killed once it is dead', async () => {
  await using on = await ground()
  let dead = false
  await using worker = await startWorker(on, async (_, signal) => {
    const outcome = await untilStopped(signal)
    await delay(100)
    dead = true
    return outcome
  })
  const { id } = await submit(on.bus)
  await until('the start', () => worker.runner.ran.length === 1 || undefined)
  assert.ok(await on.bus.ask(controlSubject(id), '{"action":"kill"}', 2_000))
  const end = await untilEnd(on.bus, id)
  assert.is(end.type, 'vulcan.workload.killed')
  assert.is(end.data.cause, 'killed')
  assert.ok(dead)
  await untilAcked(on.bus)
})

test('a kill that is stored first: the code never runs', async () => {
  await using on = await ground()
  const { id, seq } = await submit(on.bus)
  const accepted = (await on.bus.lastEvent(id))!.event
  const killed = {
    ...accepted,
    type: 'vulcan.workload.killed',
    id: `${id}.killed.0.kill`,
    data: {
      attempt: 0,
      runner: null,
      started_at: null,
      duration_ms: null,
      cause: 'killed',
      error: null,
      output: null,
      output_blob: null,
      exit_code: null,
      logs: null,
      receipt: null,
    },
  } as unknown as EndEvent
  assert.ok((await on.bus.settleEvent(`vulcan.events.${id}.killed`, killed, seq)).stored)
  await using worker = await startWorker(on, () => completed())
  await untilAcked(on.bus)
  assert.is(worker.runner.ran.length, 0)
  assert.is(worker.runner.released, worker.runner.prepared)
  assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'killed'])
})

test('a control message reaches only the runner that has the workload', async () => {
  await using on = await ground()
  await using holder = await startWorker(on, never)
  const { id } = await submit(on.bus)
  await until('the start', () => holder.runner.ran.length === 1 || undefined)
  await using other = await startWorker(on, never)
  assert.is(
    await on.bus.ask(controlSubject('01890000-0000-7000-8000-000000000000'), '{"action":"kill"}', 300),
    undefined,
  )
  assert.ok(await on.bus.ask(controlSubject(id), '{"action":"kill"}', 2_000))
  await untilEnd(on.bus, id)
  assert.is(other.runner.ran.length, 0)
})

test('told to stop, a runner waits for what soon ends and hands the rest back as a retry', async () => {
  await using on = await ground()
  let stopping: Promise<void> | undefined
  const first = await startWorker(on, async (job, signal) => {
    if (codeOf(job) === 'long') return await untilStopped(signal)
    while (stopping === undefined) await delay(10)
    await delay(200)
    return completed('in time')
  })
  const short = await submit(on.bus, { code: 'short' })
  const long = await submit(on.bus, { code: 'long' })
  await until('both', () => first.runner.ran.length === 2 || undefined)
  stopping = first.stop()
  const unstarted = await submit(on.bus, { code: 'later' })
  await stopping
  assert.is((await untilEnd(on.bus, short.id)).data.output, 'in time')
  assert.equal(kindsOf(await history(on.bus, long.id)), ['accepted', 'started', 'retrying'])
  assert.equal(kindsOf(await history(on.bus, unstarted.id)), ['accepted'])
  await first[Symbol.asyncDispose]()
  await using _ = await startWorker(on, (job) => completed(job.attempt))
  assert.is((await untilEnd(on.bus, long.id)).data.output, 2)
  assert.is((await untilEnd(on.bus, unstarted.id)).data.output, 1)
  await untilAcked(on.bus)
})

test('when the server is gone for longer than the ack wait nothing runs any more; back, it is retried', async () => {
  await using on = await ground({ ackWaitMs: 1_200 })
  const reasons: unknown[] = []
  await using worker = await startWorker(on, async (job, signal) => {
    if (job.attempt > 1) return completed('again')
    const outcome = await untilStopped(signal)
    reasons.push(signal.reason)
    return outcome
  })
  const { id } = await submit(on.bus)
  await until('the start', () => worker.runner.ran.length === 1 || undefined)
  const gone = performance.now()
  await on.nats.kill()
  await until('the stop', () => reasons.length === 1 || undefined)
  assert.ok(performance.now() - gone < 1_200, 'before another may take over')
  assert.equal(reasons, ['lease_lost'])
  await delay(500)
  await on.nats.restart()
  assert.is((await untilEnd(on.bus, id)).data.output, 'again')
  assert.equal(kindsOf(await history(on.bus, id)), [
    'accepted',
    'started',
    'retrying',
    'started',
    'completed',
  ])
})

test('a server that goes silent without closing the connection loses the lease as well', async () => {
  await using on = await ground({ ackWaitMs: 1_200 })
  const reasons: unknown[] = []
  await using worker = await startWorker(on, async (_, signal) => {
    const outcome = await untilStopped(signal)
    reasons.push(signal.reason)
    return outcome
  })
  await submit(on.bus)
  await until('the start', () => worker.runner.ran.length === 1 || undefined)
  process.kill(on.nats.pid, 'SIGSTOP')
  try {
    await until('the stop', () => reasons.length === 1 || undefined, 4_000)
    assert.equal(reasons, ['lease_lost'])
  } finally {
    process.kill(on.nats.pid, 'SIGCONT')
  }
})

test('a shorter absence of the server interrupts nothing', async () => {
  await using on = await ground({ ackWaitMs: 10_000 })
  let finish = () => {}
  await using worker = await startWorker(on, async (_, signal) => {
    await new Promise<void>((resolve) => {
      finish = resolve
    })
    return signal.aborted ? failed('internal') : completed('whole')
  })
  const { id } = await submit(on.bus)
  await until('the start', () => worker.runner.ran.length === 1 || undefined)
  await on.nats.kill()
  await until('the loss', () => !worker.bus.connected || undefined)
  finish()
  await delay(300)
  await on.nats.restart()
  assert.is((await untilEnd(on.bus, id)).data.output, 'whole')
  assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'started', 'completed'])
  await untilAcked(on.bus)
})

test('work longer than the ack wait is run once', async () => {
  await using on = await ground({ ackWaitMs: 1_000 })
  await using a = await startWorker(on, async () => {
    await delay(3_000)
    return completed()
  })
  await using b = await startWorker(on, () => completed())
  const ids = []
  for (let i = 0; i < 4; i++) ids.push((await submit(on.bus)).id)
  for (const id of ids) {
    await untilEnd(on.bus, id)
    assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'started', 'completed'])
  }
  assert.is(a.runner.ran.length + b.runner.ran.length, 4)
})

test('log lines are stored in numbered batches, in order, before the end, which counts them', async () => {
  await using on = await ground()
  await using _ = await startWorker(on, async (_, __, log) => {
    for (let i = 0; i < 2_500; i++) log(line(`line ${i}`))
    await delay(60)
    log(line('last'))
    return completed()
  })
  const { id } = await submit(on.bus)
  const end = await untilEnd(on.bus, id)
  assert.equal(end.data.logs, { last: 4, lines: 2_501, dropped: 0 })
  const batches = await stored<LogEvent>(on.bus, LOGS, logSubject(id))
  assert.equal(
    batches.map(({ data }) => [data.attempt, data.n]),
    [
      [1, 1],
      [1, 2],
      [1, 3],
      [1, 4],
    ],
  )
  const texts = batches.flatMap(({ data }) => data.lines.map(({ text }) => text))
  assert.equal(texts, [...Array.from({ length: 2_500 }, (_, i) => `line ${i}`), 'last'])
})

test('lines over the limit are dropped and counted; each attempt counts anew', async () => {
  await using on = await ground()
  await using _ = await startWorker(
    on,
    (job, __, log) => {
      for (let i = 0; i < 100; i++) log(line(String(i)))
      return job.attempt === 1 ? failed('internal') : completed()
    },
    { logLimits: { lines: 30, bytes: 1_000_000 } },
  )
  const { id } = await submit(on.bus, { retry: { backoff: 'none' } })
  const end = await untilEnd(on.bus, id)
  assert.equal(end.data.logs, { last: 1, lines: 30, dropped: 70 })
  const batches = await stored<LogEvent>(on.bus, LOGS, logSubject(id))
  assert.equal(
    batches.map(({ data }) => [data.attempt, data.n, data.lines.length, data.dropped]),
    [
      [1, 1, 30, 70],
      [2, 1, 30, 70],
    ],
  )
})

test('a flood of long lines ends well', async () => {
  await using on = await ground()
  await using _ = await startWorker(on, (_, __, log) => {
    for (let i = 0; i < 30; i++) log(line('\u0001'.repeat(300_000)))
    return completed('done')
  })
  const { id } = await submit(on.bus)
  const end = await untilEnd(on.bus, id)
  assert.is(end.data.output, 'done')
  assert.is((await stored<LogEvent>(on.bus, LOGS, logSubject(id))).length, end.data.logs!.last)
})

test('a large output goes by blob, a small one in the end itself', async () => {
  await using on = await ground()
  const values: Record<string, unknown> = {
    small: 'x'.repeat(100_000),
    large: Array.from({ length: 200_000 }, (_, i) => i),
    wide: '€'.repeat(300_000),
  }
  await using _ = await startWorker(on, (job) =>
    codeOf(job) === 'growing'
      ? { ...completed(), output: `[${Array(90_000).fill('1e20').join()}]` }
      : completed(values[codeOf(job)]),
  )
  for (const [code, value] of Object.entries(values)) {
    const { id } = await submit(on.bus, { code })
    const { data } = await untilEnd(on.bus, id)
    if (code === 'small') {
      assert.equal(data.output, value)
      assert.is(data.output_blob, null)
    } else {
      assert.is(data.output, null)
      const bytes = (await on.blobs.get(data.output_blob!.blob))!
      assert.is(bytes.byteLength, data.output_blob!.size)
      assert.equal(JSON.parse(Buffer.from(bytes).toString()), value)
    }
  }
  const { id } = await submit(on.bus, { code: 'growing' })
  assert.ok((await untilEnd(on.bus, id)).data.output_blob !== null)
})

test('an error of any length ends the workload', async () => {
  await using on = await ground()
  await using _ = await startWorker(on, () => ({
    ...(failed('user_error') as Extract<ReturnType<typeof failed>, { status: 'failed' }>),
    error: { message: '\u0001'.repeat(2_000_000), stack: 'at x\n'.repeat(500_000) },
  }))
  const { id } = await submit(on.bus)
  const end = await untilEnd(on.bus, id)
  assert.is(end.data.cause, 'user_error')
  assert.ok(end.data.error!.message.length > 1_000)
})

test('code and input from a blob reach the runner whole', async () => {
  await using on = await ground()
  await using worker = await startWorker(on, (job) => completed(JSON.parse(job.input!).length))
  const code = `// ${'c'.repeat(700_000)}`
  const payload = await on.blobs.put(Buffer.from(JSON.stringify({ code, input: 'i'.repeat(800_000) })))
  const { id } = await submit(on.bus, {}, { payload })
  assert.is((await untilEnd(on.bus, id)).data.output, 800_000)
  assert.is(codeOf(worker.runner.ran[0]!), code)
  assert.equal(worker.runner.ran[0]!.source, { kind: 'code', text: code, sha256: sha256Hex(code) })
})

for (const [what, spoil] of [
  ['gone', (on: Ground) => on.bus.jsm.streams.purge('OBJ_vulcan_blobs')],
  [
    'without its bytes',
    (on: Ground) => on.bus.jsm.streams.purge('OBJ_vulcan_blobs', { filter: '$O.vulcan_blobs.C.>' }),
  ],
  ['damaged', (on: Ground) => on.bus.jsm.streams.deleteMessage('OBJ_vulcan_blobs', 1)],
] as const)
  test(`a workload whose payload is ${what} fails once and for all, and says so`, async () => {
    await using on = await ground()
    const payload = await on.blobs.put(Buffer.from(JSON.stringify({ code: 'x'.repeat(400_000) })))
    await spoil(on)
    await using worker = await startWorker(on, () => completed())
    const { id } = await submit(on.bus, {}, { payload })
    const end = await untilEnd(on.bus, id)
    assert.is(end.type, 'vulcan.workload.failed')
    assert.is(end.data.cause, 'internal')
    assert.match(end.data.error!.message, payload.blob)
    assert.is(worker.runner.ran.length, 0)
    await untilAcked(on.bus)
  })

test('a queued message that is no accepted event is dropped with a warning; nothing is recorded for it', async () => {
  await using on = await ground({ ackWaitMs: 1_000 })
  const warnings: { workload: string }[] = []
  const log = pino({ level: 'warn' }, { write: (line) => warnings.push(JSON.parse(line)) })
  const victim = acceptedEvent({}, newWorkloadId(), { isolation: 'docker' })
  const { stored } = await on.bus.publishEvent(acceptedSubject(victim.subject, 'docker'), victim, 0)
  assert.ok(stored)

  const without = (...fields: string[]) => {
    const event = acceptedEvent()
    for (const field of fields) delete (event.data.spec as Record<string, unknown>)[field]
    return event
  }
  const bodies: [id: string, body: string][] = [
    'nonsense',
    'null',
    '[]',
    '17',
    '"text"',
    '{"type":"vulcan.workload.accepted"}',
    JSON.stringify(victim),
  ].map((body) => [newWorkloadId(), body])
  for (const event of [without('limits'), without('retry'), without('limits', 'retry', 'env')])
    bodies.push([event.subject, JSON.stringify(event)])
  const started = acceptedEvent()
  const other = makeEvent('started', started.subject, 1, { attempt: 1, runner: 'r' }, origin)
  bodies.push([started.subject, JSON.stringify(other)])
  bodies.push(['x', 'nonsense'])
  const places = new Map<string, number>()
  for (const [id, body] of bodies)
    places.set(id, (await on.bus.js.publish(`vulcan.events.${id}.accepted.isolate.any`, body)).seq)

  await using worker = await startWorker(on, () => completed(), { log })
  const { id } = await submit(on.bus)
  await untilEnd(on.bus, id)
  await until('all but the victim', async () => (await queued(on.bus)) === 1 || undefined)
  // Had one come back, it would have by now.
  await delay(1_500)
  const { delivered } = await on.bus.jsm.consumers.info(WORK, 'isolate')
  assert.is(delivered.consumer_seq, bodies.length + 1, 'each was delivered once')
  assert.equal(warnings.map(({ workload }) => workload).sort(), bodies.map(([id]) => id).sort())
  assert.equal(
    worker.runner.ran.map((job) => job.id),
    [id],
  )
  for (const [id, seq] of places) assert.is(await on.bus.lastSequence(EVENTS, lifecycleSubjects(id)), seq, id)
  assert.equal(kindsOf(await history(on.bus, victim.subject)), ['accepted'])
  assert.is(await on.bus.lastSequence(EVENTS, lateSubject(victim.subject)), 0)
})

test('a runner that throws where it must not is taken for lost, and the workload goes on', async () => {
  await using on = await ground()
  await using worker = await startWorker(on, (job) => {
    if (job.attempt === 1) throw new Error('a bug in the runner')
    return completed(job.attempt)
  })
  const { id } = await submit(on.bus)
  assert.is((await untilEnd(on.bus, id)).data.output, 2)
  assert.is(worker.runner.released, worker.runner.prepared)
})

test('two workers share a queue, none over its slots', async () => {
  await using on = await ground()
  let now = [0, 0]
  const most = [0, 0]
  const code =
    (i: number): Code =>
    async () => {
      now = now.map((n, j) => n + (i === j ? 1 : 0))
      most[i] = Math.max(most[i]!, now[i]!)
      await delay(5)
      now = now.map((n, j) => n - (i === j ? 1 : 0))
      return completed()
    }
  await using a = await startWorker(on, code(0), { slots: 3 })
  await using b = await startWorker(on, code(1), { slots: 6 })
  const ids = await Promise.all(Array.from({ length: 120 }, async () => (await submit(on.bus)).id))
  for (const id of ids)
    assert.equal(kindsOf(await untilHistory(on.bus, id)), ['accepted', 'started', 'completed'])
  assert.is(a.runner.ran.length + b.runner.ran.length, 120)
  assert.ok(a.runner.ran.length > 0 && b.runner.ran.length > 0)
  assert.ok(most[0]! <= 3 && most[1]! <= 6, most.join())
})

async function untilHistory(bus: Bus, id: string) {
  await untilEnd(bus, id)
  return await history(bus, id)
}

test('a runner says what it is: at its start, when asked, and when it leaves', async () => {
  await using on = await ground()
  const beats: Heartbeat[] = []
  on.bus.listen(allRunners, (message) => beats.push(Heartbeat.parse(message.json())))
  await on.bus.flush()
  const worker = await startWorker(on, never, { slots: 5 })
  await until('the first', () => beats.length > 0 || undefined)
  assert.is(beats[0]!.runner, worker.id)
  assert.is(beats[0]!.slots, 5)
  assert.ok(beats[0]!.available)
  await submit(on.bus)
  await until('the start', () => worker.runner.ran.length === 1 || undefined)
  worker.runner.metrics = () => ({ runs: 1, never_ms_p50: Number.NaN })
  const before = beats.length
  on.bus.send(rollCallSubject, '')
  await until('the answer', () => beats[before])
  assert.is(beats[before]!.active, 1)
  assert.equal(beats[before]!.metrics, { runs: 1 })
  await on.bus.ask(controlSubject(worker.runner.ran[0]!.id), '{"action":"kill"}', 1_000)
  await worker.stop()
  await until('the last', () => beats.at(-1)!.leaving || undefined)
  const known = await (await on.bus.backends(1)).get(backendKey(beats[0]!))
  assert.ok(Heartbeat.parse(known!.json()).available)
  await worker[Symbol.asyncDispose]()
})

test('an end is heard once by everybody who listens, whoever asked for the workload', async () => {
  await using on = await ground()
  await using other = await Bus.connect({ url: on.nats.url, name: 'other' })
  const heard: string[][] = [[], []]
  for (const [i, bus] of [on.bus, other].entries()) {
    for (const subject of storedEnds) bus.listen(subject, (message) => heard[i]!.push(message.subject))
    await bus.flush()
  }
  await using _ = await startWorker(on, (job) => (codeOf(job) === 'bad' ? failed('user_error') : completed()))
  const good = await submit(on.bus)
  const bad = await submit(on.bus, { code: 'bad' })
  await untilEnd(on.bus, good.id)
  await untilEnd(on.bus, bad.id)
  await untilAcked(on.bus)
  await delay(100)
  const expected = [`vulcan.stored.${good.id}.completed`, `vulcan.stored.${bad.id}.failed`].sort()
  assert.equal(
    heard.map((subjects) => subjects.sort()),
    [expected, expected],
  )
})

for (const [who, slots] of [
  ['another runner', 1],
  ['the same runner', 4],
] as const)
  test(`when the consumer is made anew, ${who} gets what still runs, and leaves it alone`, async () => {
    await using on = await ground({ ackWaitMs: 1_000 })
    let finish = () => {}
    const wait: Code = async (job) => {
      await new Promise<void>((resolve) => {
        finish = resolve
      })
      return completed(job.attempt)
    }
    await using holder = await startWorker(on, wait, { slots })
    const { id } = await submit(on.bus)
    await until('the start', () => holder.runner.ran.length === 1 || undefined)
    await using other = slots === 1 ? await startWorker(on, wait) : undefined
    await recreateConsumer(on.bus.jsm, on.topology, 'isolate')
    await until('the redelivery', async () => {
      const { delivered } = await on.bus.jsm.consumers.info(WORK, 'isolate')
      return delivered.consumer_seq > 0 || undefined
    })
    // Long enough for the question, and for the message to come back once more.
    await delay(1_800)
    finish()
    assert.is((await untilEnd(on.bus, id)).data.output, 1)
    await untilAcked(on.bus)
    assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'started', 'completed'])
    assert.is(holder.runner.ran.length + (other?.runner.ran.length ?? 0), 1)
  })

test('a runner says that it has a workload for the attempt that runs there alone', async () => {
  await using on = await ground()
  await using worker = await startWorker(on, never)
  const { id } = await submit(on.bus)
  await until('the start', () => worker.runner.ran.length === 1 || undefined)
  const ask = (request: unknown) => on.bus.ask(controlSubject(id), JSON.stringify(request), 300)
  assert.ok(await ask({ action: 'have', attempt: 1 }))
  for (const request of [{ action: 'have', attempt: 2 }, { action: 'have' }, { action: 'what' }, null])
    assert.is(await ask(request), undefined, JSON.stringify(request))
  assert.is(worker.runner.ran.length, 1)
})

test('told to stop while an attempt is over its time, a runner does not begin the next', async () => {
  await using on = await ground()
  let die: (() => void) | undefined
  const first = await startWorker(on, async (_, signal) => {
    const outcome = await untilStopped(signal)
    await new Promise<void>((resolve) => {
      die = resolve
    })
    return outcome
  })
  const { id } = await submit(on.bus, {
    limits: { timeout_s: 0.2 },
    retry: { on: ['timeout'], backoff: 'none' },
  })
  await until('the timeout', () => die)
  const stopping = first.stop()
  // Longer than what runs is given to end by itself.
  await delay(5_300)
  die!()
  await stopping
  assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'started', 'retrying'])
  assert.is(first.runner.ran.length, 1)
  await first[Symbol.asyncDispose]()
})

test('a kill that comes while an attempt is over its time holds for the next', async () => {
  await using on = await ground()
  let die: (() => void) | undefined
  await using worker = await startWorker(on, async (_, signal) => {
    const outcome = await untilStopped(signal)
    await new Promise<void>((resolve) => {
      die = resolve
    })
    return outcome
  })
  const { id } = await submit(on.bus, {
    limits: { timeout_s: 0.2 },
    retry: { on: ['timeout'], backoff: 'none' },
  })
  await until('the timeout', () => die)
  assert.ok(await on.bus.ask(controlSubject(id), '{"action":"kill"}', 2_000))
  die!()
  assert.is((await untilEnd(on.bus, id)).data.cause, 'killed')
  assert.is(worker.runner.ran.length, 1)
})

test('garbage on a workload’s subjects, before and while it runs, costs it nothing', async () => {
  await using on = await ground()
  const garbage: number[] = []
  const spoil = async (id: string, kind: 'started' | 'completed') => {
    garbage.push((await on.bus.js.publish(eventSubject(id, kind), 'nonsense')).seq)
  }
  const { id } = await submit(on.bus)
  await spoil(id, 'completed')
  await using worker = await startWorker(on, async (job) => {
    await spoil(job.id, 'started')
    await spoil(job.id, 'completed')
    return completed(job.attempt)
  })
  assert.is((await untilEnd(on.bus, id)).data.output, 1)
  await untilAcked(on.bus)
  for (const seq of garbage) await on.bus.jsm.streams.deleteMessage(EVENTS, seq)
  assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'started', 'completed'])
  assert.is(await on.bus.lastSequence(EVENTS, lateSubject(id)), 0)
  assert.is(worker.runner.ran.length, 1)
})

test('garbage behind an end does not bring the workload back', async () => {
  await using on = await ground({ ackWaitMs: 1_000 })
  const { id, seq } = await submit(on.bus)
  const end = bareEnd('killed', id, { attempt: 0, runner: null, cause: 'killed' })
  assert.ok((await on.bus.settleEvent(eventSubject(id, 'killed'), end, seq)).stored)
  await on.bus.js.publish(eventSubject(id, 'started'), 'nonsense')
  await using worker = await startWorker(on, () => completed())
  await untilAcked(on.bus)
  assert.is(worker.runner.ran.length, 0)
})

for (const deliveries of [1, 2])
  test(`a workload whose events are gone at delivery ${deliveries} ends as failed, without running`, async () => {
    await using on = await ground({ ackWaitMs: 1_000 })
    const { id } = await submit(on.bus)
    await until('the queue', async () => (await queued(on.bus)) === 1 || undefined)
    if (deliveries === 2) {
      const consumer = await on.bus.js.consumers.get(WORK, 'isolate')
      assert.ok(await consumer.next({ expires: 2_000 }))
    }
    await on.bus.jsm.streams.purge(EVENTS)
    await using worker = await startWorker(on, () => completed())
    const end = await untilEnd(on.bus, id)
    assert.is(end.type, 'vulcan.workload.failed')
    assert.is(end.data.cause, 'internal')
    assert.match(end.data.error!.message, 'no longer in the stream')
    await untilAcked(on.bus)
    assert.is(worker.runner.ran.length, 0)
    assert.equal(kindsOf(await history(on.bus, id)), ['failed'])
  })

for (const [what, stream, spare, size] of [
  ['in the event', EVENTS, 20_000, 100_000],
  ['in a blob', 'OBJ_vulcan_blobs', 50_000, 700_000],
] as const)
  test(`a completion with its output ${what} that finds no room ends as failed, disk_full, after a while`, async () => {
    await using on = await ground()
    let filledAt = 0
    await using worker = await startWorker(
      on,
      async () => {
        await fill(on.bus, stream, spare)
        filledAt = performance.now()
        return completed('x'.repeat(size))
      },
      { fullMs: 700 },
    )
    const { id } = await submit(on.bus)
    const end = await untilEnd(on.bus, id)
    assert.ok(performance.now() - filledAt >= 690, 'not before its time')
    assert.is(end.type, 'vulcan.workload.failed')
    assert.is(end.data.cause, 'disk_full')
    assert.match(end.data.error!.message, `${size + '""'.length} bytes`)
    assert.is(end.data.output_blob, null)
    assert.is(end.data.receipt!.runner, worker.id)
    await untilAcked(on.bus)
    assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'started', 'failed'])
    assert.is(worker.runner.ran.length, 1)
  })

test('where there is room for no end at all, storing one is tried on', async () => {
  await using on = await ground()
  let undo: (() => Promise<unknown>) | undefined
  await using worker = await startWorker(
    on,
    async () => {
      undo = await fill(on.bus, EVENTS)
      return completed('x'.repeat(1_000))
    },
    { fullMs: 300 },
  )
  const { id } = await submit(on.bus)
  await until('the run', () => undo)
  await delay(2_500)
  assert.equal(kindsOf(await history(on.bus, id)), ['accepted', 'started'])
  assert.is(await queued(on.bus), 1)
  await undo!()
  const end = await untilEnd(on.bus, id)
  assert.ok(end.type === 'vulcan.workload.completed' || end.data.cause === 'disk_full')
  await untilAcked(on.bus)
  assert.is((await history(on.bus, id)).length, 3)
  assert.is(worker.runner.ran.length, 1)
})

test.run()
