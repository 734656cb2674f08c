/**
 * `npm run bench:tracing`: what tracing costs a warm function call: the platform with tracing off and with every call
 * sampled, beside the same code with tracing cut out of a call’s way (`bench/untraced.patch`); three platforms at once,
 * measured one after the other in many short rounds, as the machine is never the same for long.
 * `npm run bench:tracing -- 0.5 40`: seconds a measurement, rounds. Where the patch no longer fits: `git apply -3` it in
 * a worktree, mend it there, `git diff -U1 HEAD`.
 */
import { execFileSync, spawn } from 'node:child_process'
import { readdirSync, readFileSync, symlinkSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { createInterface } from 'node:readline'
import { pathToFileURL } from 'node:url'
import { startTestPlatform } from '../test/platform.ts'
import { watchSteal } from './cpu.ts'
import { deployCode } from './deploy.ts'
import { load } from './load.ts'
import { medianOf, ms, perSecond, Taken } from './table.ts'

const [seconds = 0.5, rounds = 40] = process.argv.slice(2).map(Number)
const patch = join(import.meta.dirname, 'untraced.patch')
const widths = [1, 64]
/** Of each, before anything is measured: in the first seconds compilers take a tenth of the cores. */
const warmUpSeconds = 12

const code = `export default {
  async fetch(request) {
    const { x } = await request.json()
    return Response.json({ y: x * 2 })
  },
}`
const body = JSON.stringify({ x: 21 })
const path = '/fn/double'
const root = resolve(import.meta.dirname, '..')

await using scope = new AsyncDisposableStack()

/** This code without its tracing. Throws where the patch does not fit it. */
async function untracedCode(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'vulcan-untraced-'))
  scope.defer(() => rm(folder, { recursive: true, force: true }))
  const tracked = execFileSync('git', ['ls-files', '-z'], { cwd: root })
  const archive = execFileSync('tar', ['-c', '--null', '--files-from=-'], {
    cwd: root,
    input: tracked,
    maxBuffer: 1 << 30,
  })
  execFileSync('tar', ['-x', '-C', folder], { input: archive })
  execFileSync('git', ['apply', patch], { cwd: folder })
  symlinkSync(join(root, 'node_modules'), join(folder, 'node_modules'))
  return folder
}

/** A process of its own that swallows traces. */
async function startReceiver(): Promise<{ url: string; bytes(): Promise<number> }> {
  const child = spawn(process.execPath, [join(import.meta.dirname, 'receiver.ts')], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  scope.defer(() => void child.kill())
  const lines = createInterface(child.stdout)[Symbol.asyncIterator]()
  const next = async () => Number((await lines.next()).value)
  const url = `http://127.0.0.1:${await next()}`
  return {
    url,
    bytes: () => {
      child.stdin.write('\n')
      return next()
    },
  }
}

type Started = Awaited<ReturnType<typeof startTestPlatform>>
const parts = ['nats-server', 'dispatcher', 'runner', 'gateway'] as const

/** Nanoseconds of CPU by thread (`/proc/<pid>/task/<tid>/schedstat`), of a process and all below it. */
function cpuByThread(root: number): Map<string, number> {
  const found = new Map<string, number>()
  const pids = [root]
  for (let pid = pids.pop(); pid !== undefined; pid = pids.pop())
    try {
      for (const thread of readdirSync(`/proc/${pid}/task`)) {
        const task = `/proc/${pid}/task/${thread}`
        found.set(task, Number(readFileSync(`${task}/schedstat`, 'utf8').split(' ', 1)[0]))
        const below = readFileSync(`${task}/children`, 'utf8').trim()
        if (below !== '') pids.push(...below.split(' ').map(Number))
      }
    } catch {
      // It has ended.
    }
  return found
}

/** Looks now; what it gives tells the microseconds of CPU that each part of the platform has used since. */
function watchCpu({ supervisor }: Started): () => number[] {
  const then = parts.map((part) => cpuByThread(supervisor.pid(part)!))
  return () =>
    parts.map((part, i) => {
      let used = 0
      for (const [thread, now] of cpuByThread(supervisor.pid(part)!))
        used += now - (then[i]!.get(thread) ?? 0)
      return used / 1_000
    })
}

const receiver = await startReceiver()
const folder = await untracedCode()
const untraced: { startTestPlatform: typeof startTestPlatform } = await import(
  pathToFileURL(join(folder, 'test/platform.ts')).href
)
/** No variable of the caller’s may turn on what is to be off. */
for (const name of Object.keys(process.env)) if (name.startsWith('OTEL_')) delete process.env[name]
const targets = {
  without: scope.use(await untraced.startTestPlatform()),
  off: scope.use(await startTestPlatform()),
  sampled: scope.use(await startTestPlatform({ OTEL_EXPORTER_OTLP_ENDPOINT: receiver.url })),
}
type Target = keyof typeof targets
const names = Object.keys(targets) as Target[]

console.log(
  `${seconds} s a measurement, ${rounds} rounds, after ${warmUpSeconds} s of load each; Node ${process.version}, ${process.platform}`,
)
for (const name of names) {
  const { url } = targets[name]
  await deployCode(url, 'double', code)
  await load({ origin: url, path, body, connections: 64, seconds: warmUpSeconds, expect: 200 })
}

const steal = watchSteal()
const taken = new Taken()
let sampledCalls = 0
const bytesBefore = await receiver.bytes()
for (let round = 0; round < rounds; round++)
  for (const connections of widths)
    for (let turn = 0; turn < names.length; turn++) {
      const name = names[(turn + round) % names.length]!
      const platform = targets[name]
      const options = { origin: platform.url, path, body, connections, expect: 200 }
      const warm = await load({ ...options, seconds: 0.1 })
      const used = watchCpu(platform)
      const result = await load({ ...options, seconds })
      const byPart = used().map((value) => value / result.requests)
      const cpu = byPart.reduce((sum, value) => sum + value, 0)
      taken.keep(`${name} ${connections}`, { ...result, cpu })
      for (const [i, part] of parts.entries())
        taken.keep(`${name} ${connections} ${part}`, { ...result, errors: 0, cpu: byPart[i]! })
      if (name === 'sampled') sampledCalls += warm.requests + result.requests
    }

const row = (...cells: string[]) =>
  console.log(cells.map((cell, i) => (i ? cell.padStart(i < 4 ? 12 : 20) : cell.padEnd(26))).join(''))
const microseconds = (value: number) => `${value.toFixed(0)} µs`
const fields = [
  ['cpu', 'CPU a call', microseconds],
  ['p50', 'p50', ms],
  ['rate', 'rate', perSecond],
] as const

/** By how much more than without, in per cent: the median of the rounds, and its standard error. */
function more(field: 'cpu' | 'p50' | 'rate', name: Target, connections: number): string {
  const ours = taken.all(`${name} ${connections}`, field)
  const theirs = taken.all(`without ${connections}`, field)
  const ratios = ours.map((value, i) => 100 * (value / theirs[i]! - 1)).toSorted((a, b) => a - b)
  const at = (share: number) => ratios[Math.round((ratios.length - 1) * share)]!
  // Of a median of values that are spread like a normal distribution, by the width of their middle half.
  const error = (0.93 * (at(0.75) - at(0.25))) / Math.sqrt(ratios.length)
  return `${medianOf(ratios).toFixed(1)} % ± ${error.toFixed(1)}`
}

row('', ...names, 'off ÷ without', 'sampled ÷ without')
for (const connections of widths)
  for (const [field, word, format] of fields)
    row(
      `${connections} in flight: ${word}`,
      ...names.map((name) => format(taken.of(`${name} ${connections}`, field))),
      more(field, 'off', connections),
      more(field, 'sampled', connections),
    )
for (const part of parts)
  row(`64 in flight: ${part}`, ...names.map((name) => microseconds(taken.of(`${name} 64 ${part}`, 'cpu'))))
const bytes = (await receiver.bytes()) - bytesBefore
const dropped = targets.sampled.lines.filter((line) => /dropped/i.test(line))
console.log(
  `medians; ÷ is the median of the rounds’ own ratios. Promised: CPU off +2 %, sampled +25 % at most. ` +
    `${(bytes / sampledCalls).toFixed(0)} bytes of spans a call; ${dropped.length} warnings of dropped spans; ` +
    `${steal().toFixed(1)} % of CPU time went to other guests of the host.`,
)
for (const line of dropped.slice(0, 3)) console.log(`! ${line}`)
