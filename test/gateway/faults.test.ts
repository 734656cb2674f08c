// timeout: 150
import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { EndEvent } from '../../shared/events.ts'
import { newWorkloadId } from '../../shared/ids.ts'
import { eventSubject } from '../../shared/subjects.ts'
import { EVENTS } from '../../shared/topology.ts'
import { type Code, completed, untilStopped } from '../runners/support.ts'
import { bareEnd, history, kindsOf, submit, until, untilEnd } from '../shared/support.ts'
import { type Answer, backendOf, call, post, type Site, site, startGateway, untilKnown } from './support.ts'

const spec = { code: 'export default (input) => input' }
const hang: Code = (_, signal) => untilStopped(signal)
const slow =
  (ms: number): Code =>
  async () => {
    await delay(ms)
    return completed('slowly')
  }

const assertUnavailable = ({ status, headers, body }: Answer, code = 'bus_unavailable') => {
  assert.is(status, 503)
  assert.is(headers.get('content-type'), 'application/problem+json')
  assert.is(body.code, code)
  assert.ok(Number(headers.get('retry-after')) >= 1)
}

async function loseServer({ on, gateway, worker }: Site) {
  await on.nats.kill()
  for (const { bus } of [on, gateway, worker]) await until('the loss', () => !bus.connected || undefined)
}

async function serverBack({ on, gateway, worker }: Site) {
  await on.nats.restart()
  for (const { bus } of [on, gateway, worker]) await bus.whenConnected()
}

test('a client that goes away frees its wait; its workload still ends', async () => {
  await using here = await site({ code: slow(800) })
  const leaving = new AbortController()
  const requests = Array.from({ length: 5 }, () =>
    call(here.gateway, 'POST', '/v1/workloads', { body: spec, signal: leaving.signal }).catch(() => 'left'),
  )
  await until('the starts', () => here.worker.runner.ran.length === 5 || undefined)
  assert.is(here.gateway.waits.size, 5)
  leaving.abort()
  assert.equal(await Promise.all(requests), Array(5).fill('left'))
  await until('no waits', () => here.gateway.waits.size === 0 || undefined, 700)
  for (const { id } of here.worker.runner.ran)
    assert.is((await untilEnd(here.on.bus, id)).data.output, 'slowly')
})

test('a client that goes away while its request is being stored leaves no wait either', async () => {
  await using here = await site({ code: hang })
  // Storing is held up by a server that does not answer for a while.
  process.kill(here.on.nats.pid, 'SIGSTOP')
  const leaving = new AbortController()
  const left = call(here.gateway, 'POST', '/v1/workloads', { body: spec, signal: leaving.signal }).catch(
    () => 'left',
  )
  await until('the wait', () => here.gateway.waits.size === 1 || undefined)
  leaving.abort()
  assert.is(await left, 'left')
  await delay(200)
  process.kill(here.on.nats.pid, 'SIGCONT')
  await until('no waits', () => here.gateway.waits.size === 0 || undefined, 8_000)
})

for (const kind of ['killed', 'failed'] as const)
  test(`a ${kind} end that somebody else publishes ends the wait at once`, async () => {
    await using here = await site({ code: hang })
    const begun = performance.now()
    const waiting = post(here.gateway, spec)
    const { id } = await until('the start', () => here.worker.runner.ran[0])
    const last = (await here.on.bus.lastEvent(id))!
    const cause = kind === 'killed' ? 'killed' : 'runner_lost'
    const end = bareEnd(kind, id, { attempt: 1, runner: here.worker.id, cause }, '/vulcan/dispatchers/d')
    assert.ok((await here.on.bus.settleEvent(eventSubject(id, kind), end, last.seq)).stored)
    const answer = await waiting
    assert.ok(performance.now() - begun < 700, 'well before it is looked for')
    assert.is(answer.status, 200)
    assert.is(answer.body.status, kind)
    assert.is(answer.body.cause, cause)
    assert.is(here.gateway.waits.size, 0)
  })

test('a word of the end that is lost costs a moment, not the answer: the recorded end is found', async () => {
  await using here = await site({ code: hang })
  // What the server sends on goes astray.
  const { config } = await here.on.bus.jsm.streams.info(EVENTS)
  const astray = { src: config.republish!.src, dest: 'test.astray.{{wildcard(1)}}.{{wildcard(2)}}' }
  await here.on.bus.jsm.streams.update(EVENTS, { ...config, republish: astray })
  const heard: string[] = []
  here.on.bus.listen('vulcan.stored.>', (message) => heard.push(message.subject))
  await here.on.bus.flush()
  const waiting = post(here.gateway, spec)
  const { id } = await until('the start', () => here.worker.runner.ran[0])
  await here.worker.die()
  const last = (await here.on.bus.lastEvent(id))!
  const data = {
    attempt: 1,
    runner: here.worker.id,
    started_at: last.event.time,
    duration_ms: 1,
    cause: null,
  }
  const end = {
    ...last.event,
    type: 'vulcan.workload.completed',
    id: `${id}.completed.1`,
    data: {
      ...data,
      error: null,
      output: 'kept',
      output_blob: null,
      exit_code: null,
      logs: null,
      receipt: null,
    },
  } as unknown as EndEvent
  const stored = performance.now()
  assert.ok((await here.on.bus.settleEvent(eventSubject(id, 'completed'), end, last.seq)).stored)
  const answer = await waiting
  assert.is(answer.status, 200)
  assert.is(answer.body.output, 'kept')
  assert.ok(performance.now() - stored < 2_500)
  assert.equal(heard, [])
})

test('while the bus is away everything that needs it is 503 with Retry-After, at once; a bad spec is still bad', async () => {
  await using here = await site()
  const { body } = await post(here.gateway, spec)
  await loseServer(here)
  const begun = performance.now()
  assertUnavailable(await post(here.gateway, spec))
  assertUnavailable(await post(here.gateway, spec, { prefer: 'respond-async' }))
  assertUnavailable(await post(here.gateway, spec, {}, '/v1/workloads/async'))
  assertUnavailable(await post(here.gateway, { ...spec, input: 'x'.repeat(5_000_000) }))
  assertUnavailable(await post(here.gateway, spec, { 'idempotency-key': 'k' }))
  assertUnavailable(await call(here.gateway, 'POST', `/v1/workloads/${body.id}/kill`))
  assertUnavailable(await call(here.gateway, 'DELETE', `/v1/workloads/${newWorkloadId()}`))
  assertUnavailable(await call(here.gateway, 'POST', `/v1/workloads/${body.id}/rerun`))
  assert.ok(performance.now() - begun < 2_000, 'no timeout was waited for')
  assert.is((await post(here.gateway, { ...spec, extra: 1 })).status, 422)
  assert.is((await call(here.gateway, 'GET', '/healthz')).status, 200)
  const ready = await call(here.gateway, 'GET', '/readyz')
  assert.is(ready.status, 503)
  assert.match(ready.body.parts.bus, 'cannot be reached')
  assert.is(here.gateway.waits.size, 0)

  await serverBack(here)
  const again = await until('an answer', async () => {
    const answer = await post(here.gateway, { ...spec, input: 'back' })
    return answer.status === 200 ? answer : undefined
  })
  assert.is(again.body.output, 'back')
  assert.is((await call(here.gateway, 'GET', '/readyz')).body.parts.bus, 'ok')
})

test('who waits when the server crashes is answered when it is back', async () => {
  await using here = await site({ code: slow(500) })
  const waiting = Array.from({ length: 8 }, () => post(here.gateway, spec))
  await until('the starts', () => here.worker.runner.ran.length === 8 || undefined)
  await here.on.nats.restart()
  for (const answer of await Promise.all(waiting)) {
    assert.is(answer.status, 200)
    assert.is(answer.body.output, 'slowly')
  }
  for (const { id } of here.worker.runner.ran)
    assert.equal(kindsOf(await history(here.on.bus, id)), ['accepted', 'started', 'completed'])
})

test('under restarts of the server each request is either answered or refused, and each key runs one workload', async () => {
  await using here = await site({ slots: 16 })
  const outcomes: number[] = []
  let restarting = true
  const client = async (n: number) => {
    for (let i = 0; restarting; i++) {
      const body = { ...spec, input: `${n}.${i}` }
      for (;;) {
        const answer = await post(here.gateway, body, { 'idempotency-key': `${n}.${i}` })
        outcomes.push(answer.status)
        if (answer.status === 200) {
          assert.is(answer.body.output, body.input)
          break
        }
        assertUnavailable(answer)
        await delay(50)
      }
    }
  }
  const clients = Array.from({ length: 6 }, (_, n) => client(n))
  for (let i = 0; i < 3; i++) {
    await delay(400)
    await here.on.nats.restart()
    await until('the return', () => here.gateway.bus.connected || undefined)
  }
  await delay(400)
  restarting = false
  await Promise.all(clients)
  assert.equal(
    [...new Set(outcomes)].filter((status) => status !== 200 && status !== 503),
    [],
  )
  const attempts = new Set(here.worker.runner.ran.map(({ id }) => id))
  for (const id of attempts) {
    const kinds = kindsOf(await history(here.on.bus, id))
    assert.is(kinds.filter((kind) => kind === 'completed').length, 1, kinds.join())
  }
})

test('a full stream is 503 with Retry-After, and nothing waits on', async () => {
  await using here = await site()
  await post(here.gateway, spec)
  const { config, state } = await here.on.bus.jsm.streams.info(EVENTS)
  await here.on.bus.jsm.streams.update(EVENTS, {
    ...config,
    max_bytes: state.bytes,
    discard: 'new',
  } as typeof config)
  assertUnavailable(await post(here.gateway, spec), 'storage_full')
  assert.is(here.gateway.waits.size, 0)
  await here.on.bus.jsm.streams.update(EVENTS, config)
  assert.is((await post(here.gateway, spec)).status, 200)
})

test('a gateway that closes answers those who wait with 202 and the way to their workload', async () => {
  await using here = await site({ code: slow(600) })
  const waiting = post(here.gateway, spec)
  await until('the start', () => here.worker.runner.ran[0])
  here.gateway.waits.close()
  const answer = await waiting
  assert.is(answer.status, 202)
  const id = answer.headers.get('location')!.split('/').at(-1)!
  assert.is((await untilEnd(here.on.bus, id)).data.output, 'slowly')
})

test('work is queued while no runner is alive but its kind is known; after a new gateway’s start too', async () => {
  await using here = await site()
  await here.worker.die()
  const queued = await post(here.gateway, { ...spec, input: 1 }, {}, '/v1/workloads/async')
  assert.is(queued.status, 202)
  await using gateway = await startGateway(here.on)
  await until('the last word', () => gateway.roster.ability('isolate').available || undefined)
  const late = await post(gateway, { ...spec, input: 2 }, { prefer: 'wait=0.2' })
  assert.is(late.status, 202)
  assert.is((await here.on.bus.lastEvent(late.body.id))!.event.type, 'vulcan.workload.accepted')
})

test('heartbeats missed while the bus was away do not make a runner lost', async () => {
  await using here = await site()
  await loseServer(here)
  await delay(300)
  await serverBack(here)
  assert.is(backendOf(here.gateway, 'isolate').runners.length, 1)
  assert.not(here.gateway.roster.lost(here.worker.id))
})

test('an end of a workload that nobody waits for here is harmless, as is one that is no event', async () => {
  await using here = await site({ code: slow(300) })
  const { id } = await submit(here.on.bus, spec)
  await untilEnd(here.on.bus, id)
  const waiting = post(here.gateway, spec)
  const job = await until('the start', () => here.worker.runner.ran[1])
  const heard: boolean[] = []
  here.gateway.bus.onConnection((connected) => heard.push(connected))
  const foreign = JSON.stringify(bareEnd('completed', id, { attempt: 1, runner: 'r', output: 'of another' }))
  for (const nonsense of ['nonsense', 'null', '{}', '{"type":"vulcan.workload.completed"}', foreign])
    here.on.bus.send(`vulcan.stored.${job.id}.completed`, nonsense)
  assert.is((await waiting).body.output, 'slowly')
  assert.equal(heard, [])
})

test('two gateways: the kill of one ends the wait at the other', async () => {
  await using here = await site({ code: hang })
  await using other = await startGateway(here.on)
  await untilKnown(other)
  const waiting = post(here.gateway, spec)
  const { id } = await until('the start', () => here.worker.runner.ran[0])
  assert.is((await call(other, 'DELETE', `/v1/workloads/${id}`)).body.status, 'killed')
  assert.is((await waiting).body.status, 'killed')
})

test.run()
