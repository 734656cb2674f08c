/**
 * `npm run bench:memory`: calls many deployed functions very often and watches the resident memory of the runner and
 * of its sandboxes. `npm run bench:memory -- 200000 2000`: calls, functions.
 */
import { readFileSync } from 'node:fs'
import { startTestPlatform } from '../test/platform.ts'
import { deployCode } from './deploy.ts'
import { load } from './load.ts'

const [calls = 200_000, functions = 2_000] = process.argv.slice(2).map(Number)
const connections = 32
/** Growth is counted from this share of the calls on. */
const settledAfter = 0.25
const body = JSON.stringify({ x: 21 })
const code = (n: number) =>
  `export default { async fetch(request) { const { x } = await request.json(); return Response.json({ y: x * ${n} }) } }`

await using platform = await startTestPlatform()
console.log(`deploying ${functions} functions`)
const names = Array.from({ length: functions }, (_, n) => `f-${n}`)
const left = [...names.keys()]
await Promise.all(
  Array.from({ length: 4 }, async () => {
    for (let n = left.pop(); n !== undefined; n = left.pop())
      await deployCode(platform.url, names[n]!, code(n))
  }),
)

const runner = platform.supervisor.pid('runner')!
let next = 0
let done = 0
const taken: { calls: number; runnerMb: number; sandboxesMb: number }[] = []
while (done < calls) {
  const { requests, errors, statuses } = await load({
    origin: platform.url,
    path: () => `/fn/${names[next++ % functions]}`,
    body,
    connections,
    seconds: 5,
    expect: 200,
  })
  if (errors > 0) throw new Error(`${errors} calls failed: ${JSON.stringify(statuses)}`)
  done += requests
  const sample = { calls: done, runnerMb: residentMb(runner), sandboxesMb: sandboxesMb(runner) }
  taken.push(sample)
  console.log(
    `${done} calls: runner ${sample.runnerMb.toFixed(0)} MiB, sandboxes ${sample.sandboxesMb.toFixed(0)} MiB`,
  )
}
const settled = taken.find((sample) => sample.calls >= calls * settledAfter)!
const last = taken.at(-1)!
const growth = (of: (sample: typeof last) => number) => `${((of(last) / of(settled) - 1) * 100).toFixed(1)} %`
console.log(
  `growth from call ${settled.calls} to ${last.calls}: runner ${growth((s) => s.runnerMb)}, ` +
    `runner and sandboxes ${growth((s) => s.runnerMb + s.sandboxesMb)}`,
)

function residentMb(pid: number): number {
  return Number(/^VmRSS:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1] ?? 0) / 1024
}

/** Of everything below the runner. */
function sandboxesMb(pid: number): number {
  const children = readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim()
  return children === ''
    ? 0
    : children.split(' ').reduce((sum, child) => {
        try {
          return sum + residentMb(Number(child)) + sandboxesMb(Number(child))
        } catch {
          return sum
        }
      }, 0)
}
