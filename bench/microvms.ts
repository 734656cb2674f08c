/**
 * `npm run bench:microvms`: microVMs, each measurement beside the bare VMM doing the same, in rounds of one after the
 * other: a machine booted for a command, restored for it, and new JavaScript in a machine that stood ready, over HTTP
 * and by the driver alone; then cold runs per second, and the memory of a machine that stands ready.
 * `npm run bench:microvms -- 15 3`: runs a measurement, rounds.
 */
import { readFileSync } from 'node:fs'
import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { createQemu } from '../runners/microvm/qemu/index.ts'
import { cacheDirectory } from '../scripts/cache-directory.ts'
import type { Platform } from '../scripts/platform.ts'
import type { Backend } from '../shared/backends.ts'
import type { Workload } from '../shared/workload.ts'
import { tgzOf } from '../test/gateway/archives.ts'
import { http, startTestPlatform } from '../test/platform.ts'
import { descendants } from '../test/runners/conformance/census.ts'
import { bareMachines } from './bare-machine.ts'
import { watchSteal } from './cpu.ts'
import { repeat, summarise } from './load.ts'
import { ms, Taken } from './table.ts'

const [runs = 15, rounds = 3] = process.argv.slice(2).map(Number)
/** A machine that was taken is replaced within so many ms. */
const restockMs = 2_500
const settleMs = 3_000
/** Machines at once while cold runs are counted, and for how many seconds. */
const widths = [1, 2, 4]
const seconds = 8
/** Of a function that is kept ready, for the memory of one. */
const standing = 8

await using scope = new AsyncDisposableStack()
const start = async (env: Record<string, string> = {}) =>
  scope.use(await startTestPlatform({ VULCAN_ISOLATIONS: 'isolate,microvm', ...env }))
const platform = await start()
const booting = await start({ VULCAN_MICROVM_SNAPSHOTS: 'off' })
const backend = await offered(platform)
await offered(booting)
const dir = await mkdtemp(join(tmpdir(), 'bench-vm-'))
scope.defer(() => rm(dir, { recursive: true, force: true }))
await mkdir(join(dir, 'state'), { mode: 0o700 })
// The floor is of the VMM that machines run under without KVM, and with it where there is no Firecracker.
const driver = scope.use(await createQemu({ owner: `bench-${process.pid}`, stateDir: join(dir, 'state') }))
const bare = scope.use(await bareMachines(driver, cacheDirectory(process.env)))

const archives = new Map<Platform, string>()
for (const one of [platform, booting]) {
  archives.set(one, await upload(one, tgzOf({ 'nothing.txt': '' })))
  // Drives and templates are made.
  await command(one)
}
let unique = 0
const newCode = () => `export default ({ x }) => x * 2 // ${process.pid}.${++unique}`
await run(platform, { runtime: 'node', code: newCode(), input: { x: 1 } })

console.log(
  `${backend.capabilities!.version}, beside ${bare.name}; ${runs} runs a measurement, ${rounds} rounds, medians; Node ${process.version}`,
)
const stolen = watchSteal()
const taken = new Taken()
for (let round = 0; round < rounds; round++) {
  await delay(settleMs)
  const times: Record<string, number[]> = {}
  const keep = (name: string, took: number) => {
    times[name] ??= []
    times[name].push(took)
  }
  // In turns: a noisy moment touches both.
  for (let n = 0; n < runs; n++) {
    keep('bare boot', await timed(() => bare.boot()))
    keep('boot', await timed(() => command(booting, 'boot')))
    keep('bare restore', await timed(() => bare.restore()))
    keep('restore', await timed(() => command(platform, 'restore')))
    const machine = await bare.ready()
    await delay(restockMs)
    keep('bare pool', await timed(() => machine.evaluate(`((x) => x * 2)(${n})`)))
    await machine[Symbol.asyncDispose]()
    let receipt: Workload['receipt'] = null
    const took = await timed(async () => {
      receipt = (await run(platform, { runtime: 'node', code: newCode(), input: { x: 1 } })).receipt
    })
    if (receipt!.start === 'pooled') keep('pool', took)
    else console.log(`! no machine stood ready: ${JSON.stringify(receipt!.machine)}`)
  }
  for (const [name, all] of Object.entries(times)) {
    const total = all.reduce((sum, one) => sum + one, 0)
    taken.keep(name, { ...summarise(all, total / 1_000, 0), requests: all.length, errors: 0 })
  }
  for (const width of widths) {
    const one = async () => (await command(platform)).status === 'completed'
    taken.keep(`cold ${width}`, await repeat(one, width, seconds))
    const alone = async () => {
      await bare.restore()
      return true
    }
    taken.keep(`bare cold ${width}`, await repeat(alone, width, seconds))
  }
}
const memory = await memoryOfStanding()
const share = stolen()

const perSecond = (rate: number) => `${rate.toFixed(1)}/s`
const row = (label: string, ours: string, beneath = '', ratio = '') =>
  console.log(`${label.padEnd(48)}${ours.padStart(14)}${beneath.padStart(14)}${ratio.padStart(16)}`)
row('p50', 'vulcan', 'bare VMM', 'vulcan / bare')
for (const [name, label] of [
  ['boot', 'cold, booted: a command'],
  ['restore', 'cold, restored: a command'],
  ['pool', 'new JavaScript in a machine that stood ready'],
] as const)
  row(
    label,
    ms(taken.of(name, 'p50')),
    ms(taken.of(`bare ${name}`, 'p50')),
    taken.times('p50', name, `bare ${name}`),
  )
for (const width of widths)
  row(
    `cold, restored, ${width} in flight: rate`,
    perSecond(taken.of(`cold ${width}`, 'rate')),
    perSecond(taken.of(`bare cold ${width}`, 'rate')),
    taken.times('rate', `cold ${width}`, `bare cold ${width}`),
  )
row(`memory of a machine that stands ready, of ${memory.machines}`, `${memory.pssMb.toFixed(1)} MB`)
console.log(
  '\nvulcan: a whole request by HTTP, with queue, recorded start and end. Bare: the driver alone, from spawn to the end' +
    '\nof `true` and of the VMM; of a machine that stood ready, an expression that Node in it evaluates.' +
    `\nMemory is the PSS of the VMM. The host gave ${share.toFixed(1)} % of this machine’s CPU time to others meanwhile.`,
)

/** A command on the root that has a POSIX shell and coreutils. */
async function command(on: Platform, began?: 'boot' | 'restore'): Promise<Workload> {
  const workload = await run(on, { archive: { blob: archives.get(on) }, entrypoint: ['true'] })
  const { machine } = workload.receipt!
  if (began !== undefined && machine?.start !== began)
    throw new Error(`the machine was to ${began}: ${JSON.stringify(machine)}`)
  return workload
}

async function run(on: Platform, spec: object): Promise<Workload> {
  const body = { isolation: 'microvm', ...spec }
  const answer = await http<Workload>(`${on.url}/v1/workloads`, { body })
  if (answer.status !== 200 || answer.body.status !== 'completed')
    throw new Error(`${answer.status}: ${JSON.stringify(answer.body)}`)
  return answer.body
}

async function timed(what: () => Promise<unknown>): Promise<number> {
  const before = performance.now()
  await what()
  return performance.now() - before
}

/** PSS of each VMM of a function that is kept ready, in MB. */
async function memoryOfStanding(): Promise<{ machines: number; pssMb: number }> {
  const spec = { isolation: 'microvm', runtime: 'node', code: newCode(), prewarm: standing }
  await http(`${platform.url}/v1/functions/standing`, { method: 'PUT', body: spec })
  const vmms = async () => {
    const { runners } = await offered(platform)
    return descendants(runners[0]!.pid).filter((pid) => /^(qemu|firecracker)/.test(textOf(pid, 'comm')))
  }
  for (let waited = 0; waited < 120_000 && (await vmms()).length < standing; waited += 500) await delay(500)
  await delay(settleMs)
  const found = (await vmms()).map((pid) =>
    Number(/^Pss:\s+(\d+) kB/m.exec(textOf(pid, 'smaps_rollup'))?.[1]),
  )
  const measured = found.filter(Number.isFinite)
  const total = measured.reduce((sum, kb) => sum + kb * 1_024, 0)
  return { machines: measured.length, pssMb: total / measured.length / 1e6 }
}

function textOf(pid: number, file: string): string {
  try {
    return readFileSync(`/proc/${pid}/${file}`, 'latin1')
  } catch {
    return ''
  }
}

/** The backend, once its runner has said what it can do. Throws where that is nothing. */
async function offered(on: Platform): Promise<Backend> {
  for (;;) {
    const { body } = await http<{ backends: Backend[] }>(`${on.url}/v1/backends`)
    const found = body.backends.find(({ isolation }) => isolation === 'microvm')!
    if (found.available && found.runners.length > 0) return found
    if (!found.available && found.reason !== 'no microvm runner has been seen')
      throw new Error(`microVMs are not available: ${found.reason}; ${found.fix}`)
    await delay(200)
  }
}

async function upload(on: Platform, bytes: Uint8Array): Promise<string> {
  const answer = await fetch(`${on.url}/v1/blobs`, { method: 'POST', body: Buffer.from(bytes) })
  return ((await answer.json()) as { blob: string }).blob
}
