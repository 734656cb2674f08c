import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Bus } from '../../shared/bus.ts'
import { GatewayExchanges, RunnerExchange, StreamBroken, windowBytes } from '../../shared/exchange.ts'
import { newWorkloadId } from '../../shared/ids.ts'
import { replySubject } from '../../shared/subjects.ts'
import { startNats } from '../nats.ts'
import { until } from './support.ts'

/** A gateway and a runner, each with a connection of its own. */
async function ends() {
  await using scope = new AsyncDisposableStack()
  const nats = scope.use(await startNats())
  const gatewayBus = scope.use(await Bus.connect({ url: nats.url, name: 'gateway' }))
  const runnerBus = scope.use(await Bus.connect({ url: nats.url, name: 'runner' }))
  const exchanges = new GatewayExchanges(gatewayBus, 'g')
  await gatewayBus.flush()
  const id = newWorkloadId()
  const gateway = exchanges.open(id)
  const runner = new RunnerExchange(runnerBus, 'g', id)
  const resources = scope.move()
  return {
    nats,
    id,
    gatewayBus,
    runnerBus,
    exchanges,
    gateway,
    runner,
    async [Symbol.asyncDispose]() {
      runner.close()
      exchanges.close()
      await resources.disposeAsync()
    },
  }
}

/** The bytes of a stream and how it ended. */
async function collect(
  stream: AsyncIterable<Uint8Array>,
): Promise<{ text: string; error: string | undefined }> {
  let text = ''
  try {
    for await (const bytes of stream) text += Buffer.from(bytes).toString()
    return { text, error: undefined }
  } catch (error) {
    assert.instance(error, StreamBroken)
    return { text, error: (error as Error).message }
  }
}

test('head, chunks and end arrive in order', async () => {
  await using here = await ends()
  const sink = here.runner.respond({ status: 200, headers: [['a', 'b']] })
  for (let i = 0; i < 100; i++) await sink.write(Buffer.from(`${i},`))
  sink.end()
  const response = await here.gateway.answered
  assert.is(response!.status, 200)
  assert.equal(response!.headers, [['a', 'b']])
  const { text, error } = await collect(response!.body)
  assert.is(error, undefined)
  assert.is(text, Array.from({ length: 100 }, (_, i) => `${i},`).join(''))
})

test('a writer is held back at the window, and goes on as its reader does', async () => {
  await using here = await ends()
  const sink = here.runner.respond({ status: 200, headers: [] })
  let written = 0
  const writing = (async () => {
    for (let i = 0; i < 100; i++) {
      await sink.write(Buffer.alloc(64 * 1024))
      written++
    }
    sink.end()
  })()
  const response = await here.gateway.answered
  await delay(300)
  assert.ok(written >= (512 * 1024) / (64 * 1024), `only ${written} chunks were let through`)
  assert.ok(written <= windowBytes / (64 * 1024) + 1, `${written} chunks were let through`)
  let read = 0
  for await (const bytes of response!.body) read += bytes.byteLength
  await writing
  assert.is(read, 100 * 64 * 1024)
})

test('a gap breaks the response off; what came before it is given out', async () => {
  await using here = await ends()
  const sink = here.runner.respond({ status: 200, headers: [] })
  await sink.write(Buffer.from('one'))
  const response = await here.gateway.answered
  // The next is lost on the way: what is sent while disconnected is dropped.
  here.runnerBus.connected = false
  await sink.write(Buffer.from('two'))
  here.runnerBus.connected = true
  await sink.write(Buffer.from('three'))
  assert.equal(await collect(response!.body), { text: 'one', error: 'chunk 2 was lost' })
})

test('a failure of the writer reaches the reader as it was said', async () => {
  await using here = await ends()
  const sink = here.runner.respond({ status: 200, headers: [] })
  await sink.write(Buffer.from('one'))
  sink.fail('it broke')
  const response = await here.gateway.answered
  assert.equal(await collect(response!.body), { text: 'one', error: 'it broke' })
})

test('an attempt that is over with its response open fails it', async () => {
  await using here = await ends()
  await here.runner.respond({ status: 200, headers: [] }).write(Buffer.from('one'))
  here.runner.close()
  const response = await here.gateway.answered
  assert.match((await collect(response!.body)).error!, 'ended before')
})

test('another attempt breaks off what the first one began', async () => {
  await using here = await ends()
  await here.runner.respond({ status: 200, headers: [] }).write(Buffer.from('one'))
  const response = await here.gateway.answered
  const second = new RunnerExchange(here.runnerBus, 'g', here.id)
  second.respond({ status: 200, headers: [] })
  assert.match((await collect(response!.body)).error!, 'another attempt')
  second.close()
})

test('a request’s body is sent when it is asked for, once', async () => {
  await using here = await ends()
  let begun = false
  here.gateway.offer(
    (async function* () {
      begun = true
      for (let i = 0; i < 50; i++) yield Buffer.alloc(60_000, 'x')
    })(),
  )
  await delay(100)
  assert.not.ok(begun)
  const { text, error } = await collect(here.runner.body())
  assert.is(error, undefined)
  assert.is(text.length, 3_000_000)
  const second = new RunnerExchange(here.runnerBus, 'g', here.id)
  assert.match((await collect(second.body())).error!, 'attempt before')
  second.close()
})

test('a request that breaks off, or a caller that leaves, ends the body as broken', async () => {
  await using here = await ends()
  here.gateway.offer(
    (async function* () {
      yield Buffer.from('one')
      throw new Error('socket hang up')
    })(),
  )
  const broken = await collect(here.runner.body())
  assert.is(broken.text, 'one')
  assert.match(broken.error!, 'broke the request off')
  here.runner.leave()
  assert.match((await collect(here.runner.body())).error!, 'gone')
  const sink = here.runner.respond({ status: 200, headers: [] })
  const refused = await sink.write(Buffer.from('x')).catch((error) => error)
  assert.instance(refused, StreamBroken)
})

test('a writer whose gateway has closed the call, or is gone, does not wait for ever', async () => {
  await using here = await ends()
  const fill = async (sink: { write(bytes: Uint8Array): Promise<void> }) => {
    for (;;) await sink.write(Buffer.alloc(64 * 1024))
  }
  const sink = here.runner.respond({ status: 200, headers: [] })
  await here.gateway.answered
  const filling = fill(sink).catch((error) => error)
  here.gateway.close()
  assert.match((await filling).message, 'gone')
  const other = new RunnerExchange(here.runnerBus, 'nobody', newWorkloadId())
  const alone = await fill(other.respond({ status: 200, headers: [] })).catch((error) => error)
  assert.match(alone.message, 'gone')
  other.close()
})

test('what is no frame is passed over', async () => {
  await using here = await ends()
  for (const rubbish of ['', 'H', 'Hxxxxyyyynot json', 'D00000000rubbish'])
    here.runnerBus.send(replySubject('g', here.id), rubbish)
  const sink = here.runner.respond({ status: 204, headers: [] })
  sink.end()
  const response = await here.gateway.answered
  assert.is(response!.status, 204)
  assert.equal(await collect(response!.body), { text: '', error: undefined })
})

test('nothing is left over once both ends have closed', async () => {
  await using here = await ends()
  const sink = here.runner.respond({ status: 200, headers: [] })
  sink.end()
  const response = await here.gateway.answered
  await collect(response!.body)
  here.gateway.close()
  here.runner.close()
  await until('no call', () => here.exchanges.size === 0 || undefined)
})

test.run()
