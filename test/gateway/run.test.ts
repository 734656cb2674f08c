// timeout: 150
import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { type AcceptedEvent, isEnd } from '../../shared/events.ts'
import { derivedWorkloadId, newWorkloadId, sha256Hex } from '../../shared/ids.ts'
import { EVENTS } from '../../shared/topology.ts'
import { Workload } from '../../shared/workload.ts'
import { type Code, codeOf, completed, failed, untilStopped } from '../runners/support.ts'
import { history, kindsOf, until, untilEnd } from '../shared/support.ts'
import { call, type Json, post, site, startDispatcher, startGateway, untilKnown } from './support.ts'

const spec = { code: 'export default (input) => input' }

/** Code by name: what the spec’s code says is what the runner does. */
const byName: Code = async (job, signal) => {
  switch (codeOf(job)) {
    case 'fail':
      return failed('user_error', 'you asked for it')
    case 'hang':
      return await untilStopped(signal)
    case 'slow':
      await delay(700)
      return completed('slowly')
    default:
      return completed(job.input === undefined ? null : JSON.parse(job.input))
  }
}

test('a workload that completes is answered 200 with all the contract names', async () => {
  await using here = await site()
  const trace = 'a'.repeat(32)
  const answer = await post(
    here.gateway,
    { ...spec, input: { x: 21 }, labels: { team: 'a' } },
    { traceparent: `00-${trace}-${'b'.repeat(16)}-01` },
  )
  assert.is(answer.status, 200)
  const workload = Workload.parse(answer.body)
  assert.is(workload.status, 'completed')
  assert.is(workload.cause, null)
  assert.is(workload.isolation, 'isolate')
  assert.match(workload.routing_reason, /^auto: /)
  assert.is(workload.attempts, 1)
  assert.equal(workload.output, { x: 21 })
  assert.is(workload.trace_id, trace)
  assert.equal(workload.labels, { team: 'a' })
  assert.is(workload.receipt!.runner, here.worker.id)
  assert.ok(workload.created_at <= workload.started_at! && workload.started_at! <= workload.ended_at!)
  assert.ok(workload.queue_ms! >= 0 && workload.duration_ms! >= 0)
  assert.is(here.gateway.waits.size, 0)
})

test('an input of null, none at all, and every JSON type come back as they are', async () => {
  await using here = await site()
  for (const input of [null, 0, -0.5, '', 'ü😀\u0000', true, [], {}, [1, [2, { a: null }]], { '': 1 }])
    assert.equal((await post(here.gateway, { ...spec, input })).body.output, input)
  assert.is((await post(here.gateway, spec)).body.output, null)
  assert.is(here.worker.runner.ran.at(-1)!.input, undefined)
})

test('a workload that fails is 200 as well: status and cause say so', async () => {
  await using here = await site({ code: byName })
  const { status, body } = await post(here.gateway, { code: 'fail' })
  assert.is(status, 200)
  assert.is(body.status, 'failed')
  assert.is(body.cause, 'user_error')
  assert.equal(body.error, { message: 'you asked for it', stack: null })
  assert.is(body.output, null)
})

test('a kill ends the wait of the one who waits: 200, killed, for both', async () => {
  await using here = await site({ code: byName })
  const waiting = post(here.gateway, { code: 'hang' })
  const job = await until('the start', () => here.worker.runner.ran[0])
  const kill = await call(here.gateway, 'POST', `/v1/workloads/${job.id}/kill`)
  const answer = await waiting
  for (const { status, body } of [kill, answer]) {
    assert.is(status, 200)
    assert.is(Workload.parse(body).status, 'killed')
    assert.is(body.cause, 'killed')
    assert.is(body.id, job.id)
  }
  const again = await call(here.gateway, 'DELETE', `/v1/workloads/${job.id}`)
  assert.is(again.status, 200)
  assert.equal(again.body, kill.body)
})

test('DELETE of a pending workload ends it before it starts', async () => {
  await using here = await site({ code: byName, slots: 1 })
  const first = await post(here.gateway, { code: 'hang' }, {}, '/v1/workloads/async')
  await until('the start', () => here.worker.runner.ran[0])
  const second = await post(here.gateway, spec, {}, '/v1/workloads/async')
  const killed = await call(here.gateway, 'DELETE', `/v1/workloads/${second.body.id}`)
  assert.is(killed.body.status, 'killed')
  assert.is(killed.body.started_at, null)
  assert.is(killed.body.attempts, 0)
  await call(here.gateway, 'DELETE', `/v1/workloads/${first.body.id}`)
  assert.is(here.worker.runner.ran.length, 1)
})

test('async: 202, the way to it, and the workload in pending; it runs all the same', async () => {
  await using here = await site()
  const answer = await post(here.gateway, { ...spec, input: 5 }, {}, '/v1/workloads/async')
  assert.is(answer.status, 202)
  assert.is(answer.headers.get('location'), `/v1/workloads/${answer.body.id}`)
  assert.is(Workload.parse(answer.body).status, 'pending')
  assert.is((await untilEnd(here.on.bus, answer.body.id)).data.output, 5)
})

test('respond-async is async, and said to be applied', async () => {
  await using here = await site({ code: byName })
  const answer = await post(here.gateway, { code: 'slow' }, { prefer: 'respond-async' })
  assert.is(answer.status, 202)
  assert.is(answer.headers.get('preference-applied'), 'respond-async')
  assert.is(answer.body.status, 'pending')
})

test('Prefer: wait is 202 when it is not done in time, with what the dispatcher knows of it', async () => {
  const asked: string[] = []
  await using dispatcher = await startDispatcher((request, response) => {
    asked.push(request.url!)
    response.setHeader('content-type', 'application/json')
    response.end(JSON.stringify({ id: request.url!.split('/').at(-1), status: 'running' }))
  })
  await using here = await site({ code: byName, dispatcherUrl: dispatcher.url })
  const late = await post(here.gateway, { code: 'slow' }, { prefer: 'wait=0.1' })
  assert.is(late.status, 202)
  assert.is(late.headers.get('preference-applied'), 'wait=0.1')
  const location = late.headers.get('location')!
  assert.equal(asked, [location])
  assert.is(late.body.status, 'running')
  assert.is(here.gateway.waits.size, 0)
  const read = await call(here.gateway, 'GET', location)
  assert.is(read.status, 200)
  assert.equal(location, `/v1/workloads/${read.body.id}`)
  const inTime = await post(here.gateway, { code: 'slow' }, { prefer: 'wait=20' })
  assert.is(inTime.status, 200)
  assert.is(inTime.body.output, 'slowly')
})

test('without a database a wait that runs out is answered all the same', async () => {
  await using here = await site({ code: byName })
  const late = await post(here.gateway, { code: 'slow' }, { prefer: 'wait=0.1' })
  assert.is(late.status, 202)
  assert.is(Workload.parse(late.body).status, 'pending')
})

test('no wait is longer than the gateway’s own limit', async () => {
  await using here = await site({ code: byName, maxWaitS: 0.2 })
  assert.is((await post(here.gateway, { code: 'slow' })).status, 202)
  assert.is((await post(here.gateway, { code: 'slow' }, { prefer: 'wait=100' })).status, 202)
})

test('the same key and body is the same workload, whether it still runs or has ended', async () => {
  await using here = await site({ code: byName })
  const key = { 'idempotency-key': 'order-17' }
  const first = post(here.gateway, { code: 'slow' }, key)
  await until('the start', () => here.worker.runner.ran[0])
  const [one, two] = await Promise.all([first, post(here.gateway, { code: 'slow' }, key)])
  assert.is(one.status, 200)
  assert.is(one.headers.get('idempotency-replayed'), null)
  assert.is(two.headers.get('idempotency-replayed'), 'true')
  assert.equal(two.body, one.body)
  const three = await post(here.gateway, { code: 'slow' }, key)
  assert.is(three.status, 200)
  assert.equal(three.body, one.body)
  assert.is(one.body.id, derivedWorkloadId('default', 'order-17'))
  assert.is(here.worker.runner.ran.length, 1)
  const inBackground = await post(here.gateway, { code: 'slow' }, key, '/v1/workloads/async')
  assert.is(inBackground.status, 202)
  assert.is(inBackground.headers.get('location'), `/v1/workloads/${one.body.id}`)
  assert.is(inBackground.body.status, 'completed')
})

test('the same key with another body is 409, and the first one stands', async () => {
  await using here = await site()
  const key = { 'idempotency-key': 'k' }
  const first = await post(here.gateway, { ...spec, input: 1 }, key)
  const second = await post(here.gateway, { ...spec, input: 2 }, key)
  assert.is(second.status, 409)
  assert.is(second.body.code, 'idempotency_conflict')
  assert.is(second.body.field, 'Idempotency-Key')
  assert.equal((await post(here.gateway, { ...spec, input: 1 }, key)).body, first.body)
  assert.is(here.worker.runner.ran.length, 1)
})

test('ten at once with one key, on two gateways, are one workload', async () => {
  await using here = await site({ code: byName })
  await using other = await startGateway(here.on)
  await untilKnown(other)
  for (let round = 0; round < 5; round++) {
    const key = { 'idempotency-key': `round-${round}` }
    const answers = await Promise.all(
      Array.from({ length: 10 }, (_, i) =>
        post(i % 2 ? here.gateway : other, { ...spec, input: round }, key),
      ),
    )
    for (const { status, body } of answers) {
      assert.is(status, 200)
      assert.is(body.output, round)
      assert.is(body.id, answers[0]!.body.id)
    }
    assert.is(answers.filter(({ headers }) => headers.get('idempotency-replayed') === null).length, 1)
  }
  assert.is(here.worker.runner.ran.length, 5)
})

test('at once with one key but other bodies, on one gateway: one runs, the others are 409', async () => {
  await using here = await site()
  for (let round = 0; round < 10; round++) {
    const key = { 'idempotency-key': `round-${round}` }
    const answers = await Promise.all(
      Array.from({ length: 6 }, (_, input) => post(here.gateway, { ...spec, input }, key)),
    )
    const statuses = answers.map(({ status }) => status).sort()
    assert.equal(statuses, [200, 409, 409, 409, 409, 409], `round ${round}`)
  }
  assert.is(here.worker.runner.ran.length, 10)
})

test('what is published is the whole request, under the caller’s trace, from the gateway that took it', async () => {
  await using here = await site()
  const body = { ...spec, input: { a: 1 }, isolation: ['isolate'], env: { A: 'b' } }
  const answer = await post(here.gateway, body, { traceparent: `00-${'c'.repeat(32)}-${'d'.repeat(16)}-01` })
  const stored = (await here.on.bus.acceptedEvent(answer.body.id))!
  const event = stored.event as AcceptedEvent
  assert.is(event.source, `/vulcan/gateways/${here.gateway.id}`)
  assert.is(event.data.request_sha256, sha256Hex(JSON.stringify(body)))
  assert.is(event.data.trace_id, 'c'.repeat(32))
  assert.match(event.traceparent!, /^00-c{32}-(?!d{16})[0-9a-f]{16}-01$/)
  assert.equal(event.data.spec.input, { a: 1 })
  assert.equal(event.data.spec.env, { A: 'b' })
  const message = (await here.on.bus.jsm.streams.getMessage(EVENTS, { seq: stored.seq }))!
  assert.is(message.header.get('Content-Type'), 'application/cloudevents+json')
  assert.is(message.header.get('traceparent'), event.traceparent)
  assert.is(here.worker.runner.ran[0]!.traceparent, event.traceparent)
})

test('rerun is a new workload from the same spec: async by itself, with the end when asked to wait', async () => {
  await using here = await site()
  const first = await post(here.gateway, { ...spec, input: [1], labels: { a: 'b' } })
  const path = `/v1/workloads/${first.body.id}/rerun`
  const again = await call(here.gateway, 'POST', path)
  assert.is(again.status, 202)
  assert.is.not(again.body.id, first.body.id)
  assert.is(again.headers.get('location'), `/v1/workloads/${again.body.id}`)
  assert.equal((await untilEnd(here.on.bus, again.body.id)).data.output, [1])
  const event = (await here.on.bus.acceptedEvent(again.body.id))!.event as AcceptedEvent
  assert.is(event.data.rerun_of, first.body.id)
  const waited = await call(here.gateway, 'POST', path, { headers: { prefer: 'wait=20' } })
  assert.is(waited.status, 200)
  assert.equal(waited.body.output, [1])
  assert.equal(waited.body.labels, { a: 'b' })
  assert.is((await call(here.gateway, 'POST', path, { headers: { prefer: 'return=minimal' } })).status, 202)
  assert.is((await call(here.gateway, 'POST', path, { headers: { prefer: 'wait=never' } })).status, 400)
})

test('rerun of what the stream no longer has is made from the database', async () => {
  let record: Json
  await using dispatcher = await startDispatcher((request, response) => {
    response.statusCode =
      record !== undefined && request.url === `/internal/workloads/${record.id}` ? 200 : 404
    response.setHeader('content-type', 'application/json')
    response.end(JSON.stringify(response.statusCode === 200 ? record : {}))
  })
  await using here = await site({ dispatcherUrl: dispatcher.url })
  const first = await post(here.gateway, { ...spec, input: 'old' })
  const { data } = (await here.on.bus.acceptedEvent(first.body.id))!.event as AcceptedEvent
  record = { ...first.body, ...data, id: newWorkloadId() }
  const answer = await call(here.gateway, 'POST', `/v1/workloads/${record.id}/rerun`, {
    headers: { prefer: 'wait=20' },
  })
  assert.is(answer.status, 200)
  assert.is(answer.body.output, 'old')
  const unknown = await call(here.gateway, 'POST', `/v1/workloads/${newWorkloadId()}/rerun`)
  assert.is(unknown.status, 404)
  assert.is(unknown.body.code, 'workload_not_found')
})

test('killing what nobody knows is 404; what only the database knows is answered as it is', async () => {
  const old = newWorkloadId()
  await using dispatcher = await startDispatcher((request, response) => {
    response.statusCode = request.url === `/v1/workloads/${old}` ? 200 : 404
    response.setHeader('content-type', 'application/json')
    response.end(JSON.stringify({ id: old, status: 'completed' }))
  })
  await using here = await site({ dispatcherUrl: dispatcher.url })
  const unknown = await call(here.gateway, 'POST', `/v1/workloads/${newWorkloadId()}/kill`)
  assert.is(unknown.status, 404)
  assert.is(unknown.body.code, 'workload_not_found')
  const known = await call(here.gateway, 'DELETE', `/v1/workloads/${old}`)
  assert.is(known.status, 200)
  assert.is(known.body.status, 'completed')
})

test('a hundred at once, sync, each get their own answer', async () => {
  await using here = await site()
  const answers = await Promise.all(
    Array.from({ length: 100 }, (_, input) => post(here.gateway, { ...spec, input })),
  )
  assert.equal(
    answers.map(({ body }) => body.output),
    Array.from({ length: 100 }, (_, i) => i),
  )
  assert.is(new Set(answers.map(({ body }) => body.id)).size, 100)
  assert.is(here.gateway.waits.size, 0)
  for (const { body } of answers.slice(0, 10)) {
    const events = await history(here.on.bus, body.id)
    assert.equal(kindsOf(events), ['accepted', 'started', 'completed'])
    assert.is(events.filter(({ event }) => isEnd(event)).length, 1)
  }
})

test.run()
