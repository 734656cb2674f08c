/**
 * `npm run bench:containers`: containers, each measurement beside what it stands on, in rounds of one after the other:
 * a cold run under gVisor beside bare `runsc run` of the same root, a handler in a box that stood ready, a warm handler
 * over the whole HTTP path beside the warm isolate, and a cold run under Docker beside bare `docker run`.
 * `npm run bench:containers -- 15 3`: runs a measurement, rounds.
 */
import { setTimeout as delay } from 'node:timers/promises'
import { cacheDirectory } from '../scripts/cache-directory.ts'
import type { Isolation, Workload } from '../shared/workload.ts'
import { noDockerd, startDocker } from '../test/dockerd.ts'
import { tgzOf } from '../test/gateway/archives.ts'
import { http, startTestPlatform } from '../test/platform.ts'
import { bareDocker, bareRunsc, type Floor } from './bare.ts'
import { watchSteal } from './cpu.ts'
import { load, summarise } from './load.ts'
import { ms, Taken } from './table.ts'

const [runs = 15, rounds = 3] = process.argv.slice(2).map(Number)
/** Load on warm handlers, each in turn so many times a round, for so long. */
const slices = 4
const seconds = 1
const settleMs = 3_000
/** What a run leaves is cleared away behind its answer: the next of either kind does not pay for it. */
const clearMs = 150
/** A box that was taken is replaced within so many ms. */
const restockMs = 1_500

await using scope = new AsyncDisposableStack()
const missing = noDockerd()
const docker = missing === undefined ? scope.use(await startDocker()) : undefined
const platform = scope.use(
  await startTestPlatform({
    VULCAN_ISOLATIONS: ['isolate', 'gvisor', ...(docker === undefined ? [] : ['docker'])].join(),
    ...(docker === undefined ? {} : { DOCKER_HOST: docker.host }),
  }),
)
const { url } = platform
const available = await offered()
const { blob } = await upload(tgzOf({ 'nothing.txt': '' }))
/** On the image that has a POSIX shell and coreutils. */
const command = (isolation: Isolation) => ({ isolation, archive: { blob }, entrypoint: ['true'] })

const handler = `export default { async fetch(request) { const { x } = await request.json(); return Response.json({ y: x * 2 }) } }`
const body = JSON.stringify({ x: 21 })
for (const isolation of available) {
  const spec = { isolation, runtime: isolation === 'isolate' ? 'javascript' : 'node', code: handler }
  const { status, body } = await http(`${url}/v1/functions/double-${isolation}`, {
    method: 'PUT',
    body: spec,
  })
  if (status >= 300) throw new Error(`deploying was answered ${status}: ${JSON.stringify(body)}`)
}
/** Images are fetched and unpacked, and what stands ready is made. */
for (const isolation of available) {
  if (isolation !== 'isolate') await run(command(isolation))
  await load({ origin: url, path: `/fn/double-${isolation}`, body, connections: 1, seconds: 2, expect: 200 })
}
const floors: Partial<Record<Isolation, Floor>> = {}
if (available.includes('gvisor')) floors.gvisor = scope.use(await bareRunsc(cacheDirectory(process.env)))
if (docker !== undefined && available.includes('docker'))
  floors.docker = await bareDocker(docker, cacheDirectory(process.env))

console.log(
  `${runs} runs a measurement, ${rounds} rounds, medians; Node ${process.version}, ${process.platform}`,
)
const stolen = watchSteal()
const taken = new Taken()
let unique = 0
const containers = available.filter((isolation) => isolation !== 'isolate')
for (let round = 0; round < rounds; round++) {
  // What the round before has left is let go, and what stands ready is made again.
  await delay(settleMs)
  for (let slice = 0; slice < slices; slice++)
    for (const isolation of available) {
      const call = { origin: url, path: `/fn/double-${isolation}`, body, connections: 1, expect: 200 }
      await load({ ...call, seconds: 0.3 })
      taken.keep(`warm ${isolation}`, await load({ ...call, seconds }))
    }
  for (const isolation of containers) {
    const bare: number[] = []
    const cold: number[] = []
    // In turns: a noisy moment touches both.
    for (let n = 0; n < runs; n++) {
      await delay(clearMs)
      bare.push(await timed(() => floors[isolation]!.run()))
      await delay(clearMs)
      cold.push(await timed(() => run(command(isolation))))
    }
    keep(`bare ${isolation}`, bare)
    keep(`cold ${isolation}`, cold)
    const ready: number[] = []
    for (let n = 0; n < runs; n++) {
      await delay(restockMs)
      const code = `export default ({ x }) => x * 2 // ${process.pid}.${++unique}`
      let start = ''
      const took = await timed(async () => {
        start = (await run({ isolation, runtime: 'node', code, input: { x: 1 } })).receipt!.start
      })
      if (start === 'pooled') ready.push(took)
    }
    keep(`ready ${isolation}`, ready)
    if (ready.length < runs)
      console.log(`! ${isolation}: for ${runs - ready.length} of ${runs} runs no box stood ready`)
  }
}
const share = stolen()

const row = (label: string, ours: string, beneath = '', ratio = '') =>
  console.log(`${label.padEnd(44)}${ours.padStart(14)}${beneath.padStart(14)}${ratio.padStart(16)}`)
row('', 'vulcan', 'floor', 'vulcan / floor')
for (const isolation of containers) {
  const of = (what: string) => ms(taken.of(`${what} ${isolation}`, 'p50'))
  row(
    `${isolation}: cold, beside ${floors[isolation]!.name}`,
    of('cold'),
    of('bare'),
    taken.times('p50', `cold ${isolation}`, `bare ${isolation}`),
  )
  row(`${isolation}: new code in a box that stood ready`, of('ready'))
  row(
    `${isolation}: warm over HTTP, beside the isolate`,
    of('warm'),
    ms(taken.of('warm isolate', 'p50')),
    taken.times('p50', `warm ${isolation}`, 'warm isolate'),
  )
}
if (missing !== undefined) console.log(`docker was left out: ${missing}`)
console.log(
  '\nEach figure is a whole request: HTTP, queue, recorded start and end. Floors are from spawn to exit, of `true` on' +
    '\nthe same root; that of warm calls is the same function in an isolate, over the same path.' +
    `\nThe host gave ${share.toFixed(1)} % of this machine’s CPU time to others meanwhile.`,
)

async function run(spec: object): Promise<Workload> {
  const { status, body } = await http<Workload>(`${url}/v1/workloads`, { body: spec })
  if (status !== 200 || body.status !== 'completed') throw new Error(`${status}: ${JSON.stringify(body)}`)
  return body
}

async function timed(what: () => Promise<unknown>): Promise<number> {
  const before = performance.now()
  await what()
  return performance.now() - before
}

function keep(name: string, latencies: number[]): void {
  const total = latencies.reduce((sum, one) => sum + one, 0)
  taken.keep(name, { ...summarise(latencies, total / 1_000, 0), requests: latencies.length, errors: 0 })
}

/** The isolations of this platform, once each runner has said what it can do. */
async function offered(): Promise<Isolation[]> {
  for (;;) {
    const { body } = await http<{
      backends: { isolation: Isolation; available: boolean; reason: string | null }[]
    }>(`${url}/v1/backends`)
    const asked = body.backends.filter(({ isolation }) => platform.isolations.includes(isolation as never))
    const silent = asked.filter(({ isolation, reason }) => reason === `no ${isolation} runner has been seen`)
    if (silent.length === 0) {
      for (const { isolation, available, reason } of asked)
        if (!available) console.log(`${isolation} is left out: ${reason}`)
      return asked.filter((one) => one.available).map(({ isolation }) => isolation)
    }
    await delay(200)
  }
}

async function upload(bytes: Uint8Array): Promise<{ blob: string }> {
  const answer = await fetch(`${url}/v1/blobs`, { method: 'POST', body: Buffer.from(bytes) })
  return (await answer.json()) as { blob: string }
}
