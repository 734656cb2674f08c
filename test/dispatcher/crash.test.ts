import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { BusUnavailable } from '../../shared/errors.ts'
import { EVENTS, LOGS } from '../../shared/topology.ts'
import { dump, folded, getJson, makeWorld, until, type World } from './support.ts'

const main = join(import.meta.dirname, '../../dispatcher/main.ts')

/** A dispatcher as a process of its own; resolves with its URL when it listens. */
async function spawnDispatcher(
  world: World,
): Promise<{ child: ChildProcess; url: string; end(signal: NodeJS.Signals): Promise<number | null> }> {
  const child = spawn(process.execPath, [main], {
    env: {
      ...process.env,
      NATS_URL: world.nats.url,
      VULCAN_DISPATCHER_PORT: '0',
      VULCAN_DATABASE_URL: world.databaseUrl,
    },
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  let output = ''
  child.stdout!.setEncoding('utf8').on('data', (text) => {
    output += text
  })
  const url = await until('its address', () => /"url":"([^"]+)"/.exec(output)?.[1])
  return {
    child,
    url,
    async end(signal) {
      const exit = once(child, 'exit')
      child.kill(signal)
      await exit
      return child.exitCode
    },
  }
}

/** The same streams, folded in peace. */
async function foldedInPeace(world: World) {
  const databaseUrl = `${world.databaseUrl}.peace`
  const dispatcher = await world.dispatcher({ databaseUrl })
  await folded(dispatcher, world.bus)
  const tables = await dump(databaseUrl)
  await dispatcher[Symbol.asyncDispose]()
  return tables
}

async function publishLives({ publish }: World, n: number): Promise<void> {
  await Promise.all(
    Array.from({ length: 20 }, async () => {
      for (let i = 0; i < n / 20; i++) {
        const id = await publish.accepted({}, { spec: { labels: { a: 'b' } } })
        await publish.started(id)
        await publish.logs(id, 1, ['x', 'y'])
        await publish.ended(id)
      }
    }),
  )
}

async function checkpointsAtEnd(world: World, url: string): Promise<void> {
  for (const stream of [EVENTS, LOGS]) {
    const { state } = await world.bus.jsm.streams.info(stream)
    await until(`${stream} folded to ${state.last_seq}`, async () => {
      const { checkpoints } = await dump(world.databaseUrl).catch(() => ({ checkpoints: [] as string[] }))
      return checkpoints!.some(
        (row) => JSON.parse(row).stream === stream && JSON.parse(row).seq >= state.last_seq,
      )
    })
  }
  assert.is((await fetch(`${url}/readyz`)).status, 200)
}

test('killed again and again while it folds, it ends with the same rows', async () => {
  await using world = await makeWorld()
  let publishing = true
  const published = publishLives(world, 3_000).finally(() => {
    publishing = false
  })
  let kills = 0
  while (publishing || kills < 6) {
    const { end } = await spawnDispatcher(world)
    await delay(150 + Math.random() * 500)
    await end('SIGKILL')
    kills++
  }
  await published
  const last = await spawnDispatcher(world)
  try {
    await checkpointsAtEnd(world, last.url)
    assert.is(await last.end('SIGTERM'), 0)
    const rows = await dump(world.databaseUrl)
    assert.is(rows.workloads!.length, 3_000)
    assert.equal(rows, await foldedInPeace(world))
  } finally {
    last.child.kill('SIGKILL')
  }
})

test('a killed and restarted nats-server is followed on without loss', async () => {
  await using world = await makeWorld()
  const { publish, bus, nats, databaseUrl } = world
  const dispatcher = await world.dispatcher()
  let killing = true
  const published = (async () => {
    let lives = 0
    while (killing) {
      const id = await publish.accepted().catch((error) => {
        if (error instanceof BusUnavailable) return undefined
        throw error
      })
      if (id === undefined) await delay(50)
      else lives++
    }
    return lives
  })()
  for (let i = 0; i < 4; i++) {
    await delay(400)
    await nats.restart()
    await bus.whenConnected()
  }
  await delay(400)
  killing = false
  const lives = await published
  await folded(dispatcher, bus)
  const rows = await dump(databaseUrl)
  const { state } = await bus.jsm.streams.info(EVENTS)
  assert.ok(lives > 100)
  assert.is(rows.workloads!.length, state.messages)
  assert.equal(rows, await foldedInPeace(world))
})

test('a deleted consumer is replaced, and following goes on behind the last message', async () => {
  await using world = await makeWorld()
  const { publish, bus } = world
  const dispatcher = await world.dispatcher()
  for (let round = 0; round < 3; round++) {
    const id = await publish.run()
    await folded(dispatcher, bus)
    assert.is((await getJson(`${dispatcher.url}/v1/workloads/${id}`)).body.status, 'completed')
    for await (const { name } of bus.jsm.consumers.list(EVENTS)) await bus.jsm.consumers.delete(EVENTS, name)
  }
})

test('it serves before there is a bus, and stops cleanly at any time', async () => {
  await using world = await makeWorld()
  await world.nats.kill()
  const { url, end } = await spawnDispatcher(world)
  assert.is((await fetch(`${url}/healthz`)).status, 200)
  assert.is((await fetch(`${url}/readyz`)).status, 503)
  assert.is(await end('SIGTERM'), 0)
  await world.nats.restart()
})

test.run()
