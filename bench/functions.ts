/**
 * `npm run bench:functions`: a deployed function called over HTTP, beside workerd serving the same code without a
 * queue and Restate running the same handler durably, in rounds of one after the other; and a cold function beside
 * raw isolated-vm. `npm run bench:functions -- 4 3`: seconds a measurement, rounds.
 */
import { startTestPlatform } from '../test/platform.ts'
import { coldFloor } from './cold.ts'
import { deployCode } from './deploy.ts'
import { load } from './load.ts'
import { installPeers } from './peers/install.ts'
import { startRestate } from './peers/restate.ts'
import { startWorkerd } from './peers/workerd.ts'
import { ms, perSecond, Taken } from './table.ts'

const [seconds = 4, rounds = 3] = process.argv.slice(2).map(Number)
const widths = [1, 64]
/** Before anything is measured, of each: in the first seconds compilers take a tenth of the cores. */
const warmUpSeconds = 12
/** Functions that are called once each. */
const coldFunctions = 60

const codeTimes = (factor: number) => `export default {
  async fetch(request) {
    const { x } = await request.json()
    return Response.json({ y: x * ${factor} })
  },
}`
const code = codeTimes(2)
const body = JSON.stringify({ x: 21 })

const peers = await installPeers(console.log)
await using platform = await startTestPlatform()
await using workerd = await startWorkerd(peers, code)
await using restate = await startRestate(peers)
await deployCode(platform.url, 'double', code)
for (let n = 0; n < coldFunctions * rounds; n++) await deployCode(platform.url, `cold-${n}`, codeTimes(n + 3))

console.log(
  `${seconds} s a measurement, ${rounds} rounds, medians, after ${warmUpSeconds} s of load; Node ${process.version}, ${process.platform}`,
)
const targets = [
  { name: 'vulcan', origin: platform.url, path: '/fn/double' },
  { name: 'workerd', origin: workerd.url, path: '/' },
  { name: 'Restate', origin: restate.url, path: '/bench/double' },
]
const taken = new Taken()
for (const { origin, path } of targets)
  await load({ origin, path, body, connections: 64, seconds: warmUpSeconds, expect: 200 })
let cold = 0
for (let round = 0; round < rounds; round++) {
  for (const connections of widths)
    for (const { name, origin, path } of targets) {
      await load({ origin, path, body, connections, seconds: 0.5, expect: 200 })
      taken.keep(
        `${name} ${connections}`,
        await load({ origin, path, body, connections, seconds, expect: 200 }),
      )
    }
  taken.keep('raw isolate', coldFloor(seconds / 2))
  const until = cold + coldFunctions
  const latencies: number[] = []
  while (cold < until) {
    const before = performance.now()
    const answer = await fetch(`${platform.url}/fn/cold-${cold++}`, { method: 'POST', body })
    await answer.body?.cancel()
    latencies.push(performance.now() - before)
    if (answer.status !== 200) throw new Error(`a cold function answered ${answer.status}`)
  }
  latencies.sort((a, b) => a - b)
  const p50 = latencies[latencies.length >> 1]!
  taken.keep('cold', {
    rate: 1_000 / p50,
    p50,
    p99: latencies.at(-1)!,
    requests: latencies.length,
    errors: 0,
  })
}

const row = (...cells: string[]) =>
  console.log(cells.map((cell, i) => (i ? cell.padStart(14) : cell.padEnd(30))).join(''))
row('', ...targets.map(({ name }) => name), '÷ workerd', '÷ Restate')
for (const connections of widths)
  for (const field of ['p50', 'rate'] as const)
    row(
      `warm HTTP, ${connections} in flight: ${field}`,
      ...targets.map(({ name }) =>
        (field === 'p50' ? ms : perSecond)(taken.of(`${name} ${connections}`, field)),
      ),
      taken.times(field, `vulcan ${connections}`, `workerd ${connections}`),
      taken.times(field, `vulcan ${connections}`, `Restate ${connections}`),
    )
console.log(
  `cold function, alone: p50 ${ms(taken.of('cold', 'p50'))}; raw isolated-vm (isolate, context, compile, run): ` +
    `${ms(taken.of('raw isolate', 'p50'))}; a warm call: ${ms(taken.of('vulcan 1', 'p50'))}`,
)
