/**
 * `npm run bench`: starts its own platform and prints, from one run, what vulcan costs beside the floor beneath it.
 * Rounds of floor and platform take turns, so that a noisy minute touches both; figures are medians of the rounds.
 * `npm run bench -- 5 3`: seconds a measurement, rounds.
 */
import { startNats } from '../test/nats.ts'
import { startTestPlatform } from '../test/platform.ts'
import { coldFloor } from './cold.ts'
import { watchSteal } from './cpu.ts'
import { acceptFloor, floor } from './floor.ts'
import { load } from './load.ts'
import { logFloor, logLines } from './logs.ts'
import { ms, perSecond, Taken } from './table.ts'

const [seconds = 4, rounds = 3] = process.argv.slice(2).map(Number)
const widths = [1, 16, 64]

const warmBody = JSON.stringify({ code: 'export default ({ x }) => ({ y: x * 2 })', input: { x: 21 } })
let unique = 0
const coldBody = () =>
  JSON.stringify({
    code: `export default ({ x }) => ({ y: x * 2, n: ${process.pid}.${++unique} })`,
    input: { x: 21 },
  })

await using platform = await startTestPlatform()
await using bare = await startNats()
const post = (
  path: string,
  connections: number,
  body: string | (() => string),
  expect: number,
  time = seconds,
) => load({ origin: platform.url, path, connections, body, expect, seconds: time })

console.log(
  `${seconds} s a measurement, ${rounds} rounds, medians; Node ${process.version}, ${process.platform}`,
)
await post('/v1/workloads', 64, warmBody, 200, 8)

const stolen = watchSteal()
const taken = new Taken()
for (let round = 0; round < rounds; round++) {
  // Side by side at each width, each after half a second that does not count.
  for (const n of widths) {
    taken.keep(`floor ${n}`, await floor(bare.url, n, seconds))
    await post('/v1/workloads', n, warmBody, 200, 0.5)
    taken.keep(`sync ${n}`, await post('/v1/workloads', n, warmBody, 200))
  }
  taken.keep('accept floor', await acceptFloor(bare.url, 64, seconds))
  taken.keep('accept', await post('/v1/workloads/async', 64, warmBody, 202))
  await settled()
  taken.keep('cold floor', coldFloor(seconds))
  taken.keep('cold', await post('/v1/workloads', 1, coldBody, 200))
  taken.keep('log floor', await logFloor(bare.url, 9_000))
  taken.keep('log', await logLines(platform.url, 9_000))
}

const share = stolen()

const row = (label: string, ours: string, beneath: string, ratio: string) =>
  console.log(`${label.padEnd(34)}${ours.padStart(24)}${beneath.padStart(24)}${ratio.padStart(16)}`)
row('', 'vulcan', 'floor', 'vulcan / floor')
for (const n of widths) {
  row(
    `sync warm, ${n} in flight: p50`,
    ms(taken.of(`sync ${n}`, 'p50')),
    ms(taken.of(`floor ${n}`, 'p50')),
    taken.times('p50', `sync ${n}`, `floor ${n}`),
  )
  row(
    `sync warm, ${n} in flight: rate`,
    perSecond(taken.of(`sync ${n}`, 'rate')),
    perSecond(taken.of(`floor ${n}`, 'rate')),
    taken.times('rate', `sync ${n}`, `floor ${n}`),
  )
}
row(
  'async accept, 64 in flight: rate',
  perSecond(taken.of('accept', 'rate')),
  perSecond(taken.of('accept floor', 'rate')),
  taken.times('rate', 'accept', 'accept floor'),
)
const coldBeneath = taken.of('cold floor', 'p50') + taken.of('floor 1', 'p50')
row(
  'cold isolate, alone: p50',
  ms(taken.of('cold', 'p50')),
  ms(coldBeneath),
  `${(taken.of('cold', 'p50') / coldBeneath).toFixed(2)}×`,
)
row(
  'log lines, end to end',
  perSecond(taken.of('log', 'rate')),
  perSecond(taken.of('log floor', 'rate')),
  taken.times('rate', 'log', 'log floor'),
)
console.log(
  '\nfloor: accepted event published and acknowledged → sourced queue → pull consumer → core reply, one process each;' +
    '\naccept floor: the same event published and acknowledged; cold floor: raw isolated-vm (isolate, context, compile,' +
    '\nrun) plus one floor round trip; log floor: the same batches through JetStream into one consumer.' +
    `\nThe host gave ${share.toFixed(1)} % of this machine’s CPU time to others meanwhile.`,
)

/** Waits until nothing that was accepted is left unfinished, so that one measurement does not weigh on the next. */
async function settled(): Promise<void> {
  for (;;) {
    const answer = await fetch(`${platform.url}/v1/workloads?status=pending,running&limit=1`)
    const { workloads } = (await answer.json()) as { workloads: unknown[] }
    if (workloads.length === 0) return
    await new Promise((resolve) => setTimeout(resolve, 200))
  }
}
