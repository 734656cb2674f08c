/** What every part of vulcan needs of its host: ports, disk, clock. Looks only, and changes nothing. */
import { execFile } from 'node:child_process'
import { accessSync, constants, existsSync } from 'node:fs'
import { readFile, statfs } from 'node:fs/promises'
import { dirname } from 'node:path'
import { promisify } from 'node:util'
import { natsGreeting } from '../nats-server.ts'
import type { PlatformConfig } from '../platform.ts'
import { tryPort } from '../ports.ts'
import type { Finding } from './report.ts'

const execute = promisify(execFile)

const answerMs = 3_000
const gibibyte = 2 ** 30
/** Below the first nothing is started, below the second (GiB) streams cannot grow to what they may. */
const leastDiskGib = { bad: 1, warn: 12 }
/** Runners and dispatcher compare times of several hosts; a wrong clock also makes certificates invalid. */
const clockToleranceMs = 5_000
/** Reading these is a trip out of the processor, each time. */
const slowClocks = ['hpet', 'acpi_pm', 'jiffies', 'refined-jiffies']

export async function checkPorts(config: PlatformConfig): Promise<Finding[]> {
  return await Promise.all([checkHttpPort(config), checkNatsPort(config)])
}

async function checkHttpPort({ host, port }: PlatformConfig): Promise<Finding> {
  const what = 'http'
  const where = `${host}:${port}`
  try {
    await tryPort(host, port)
    return { state: 'ok', what, says: port === 0 ? 'any free port' : `${where} is free` }
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    if (code === 'EADDRINUSE' && (await isVulcan(host, port)))
      return { state: 'ok', what, says: `vulcan answers at ${where}` }
    const why = code === 'EADDRINUSE' ? `another program has ${where}` : `cannot listen on ${where} (${code})`
    return { state: 'bad', what, says: why, fixes: ['VULCAN_PORT=<a free port> npm start'] }
  }
}

/** An address on this machine for what listens on `host`. */
const reachable = (host: string): string => (host === '0.0.0.0' || host === '::' ? '127.0.0.1' : host)

async function isVulcan(host: string, port: number): Promise<boolean> {
  const name = reachable(host)
  const url = `http://${name.includes(':') ? `[${name}]` : name}:${port}/v1/backends`
  try {
    const answer = await fetch(url, { signal: AbortSignal.timeout(answerMs), redirect: 'error' })
    return Array.isArray(((await answer.json()) as { backends?: unknown }).backends)
  } catch {
    return false
  }
}

async function checkNatsPort({ natsUrl, natsHost, natsPort }: PlatformConfig): Promise<Finding> {
  const what = 'nats'
  if (natsUrl !== undefined) return checkNatsUrl(natsUrl)
  const where = `${natsHost}:${natsPort}`
  try {
    await tryPort(natsHost, natsPort)
    return { state: 'ok', what, says: natsPort === 0 ? 'any free port' : `${where} is free` }
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    if (code === 'EADDRINUSE') {
      const server = await natsGreeting(reachable(natsHost), natsPort)
      const by = server === undefined ? '' : ` by nats-server ${server.version}`
      return { state: 'ok', what, says: `${where} is in use${by}: \`npm start\` takes the next free one` }
    }
    const fixes = ['VULCAN_NATS_HOST=127.0.0.1 npm start']
    return { state: 'bad', what, says: `cannot listen on ${where} (${code})`, fixes }
  }
}

/** The servers that NATS_URL names: one of them has to be a server with JetStream. */
async function checkNatsUrl(natsUrl: string): Promise<Finding> {
  const what = 'nats'
  const fixes = ['start that server, or unset NATS_URL: `npm start` brings one of its own']
  const said: string[] = []
  for (const server of natsUrl.split(',')) {
    const url = URL.parse(server.includes('://') ? server.trim() : `nats://${server.trim()}`)
    if (url === null) {
      said.push('NATS_URL holds something that is no URL')
      continue
    }
    // Without the credentials that may stand before it.
    const where = url.host
    const host = url.hostname.replace(/^\[|\]$/g, '')
    const greeting = await natsGreeting(host, Number(url.port || 4222))
    if (greeting === undefined) said.push(`no nats-server answers at ${where}`)
    else if (greeting.jetstream !== true) said.push(`the nats-server at ${where} has no JetStream`)
    else return { state: 'ok', what, says: `nats-server ${greeting.version} with JetStream at ${where}` }
  }
  return { state: 'bad', what, says: said.join('; '), fixes }
}

export async function checkDisk({
  dataDir,
  cacheDir,
}: Pick<PlatformConfig, 'dataDir' | 'cacheDir'>): Promise<Finding[]> {
  return [
    await checkFolder('data', dataDir, 'VULCAN_DATA_DIR=<a folder with room> npm start'),
    await checkFolder('cache', cacheDir, 'VULCAN_CACHE_DIR=<a folder with room> npm start'),
  ]
}

async function checkFolder(what: string, folder: string, fix: string): Promise<Finding> {
  let nearest = folder
  while (!existsSync(nearest)) nearest = dirname(nearest)
  const fixes = [fix]
  try {
    accessSync(nearest, constants.W_OK | constants.X_OK)
  } catch {
    return { state: 'bad', what, says: `${folder}: this user cannot write to ${nearest}`, fixes }
  }
  const { bavail, bsize, ffree, files } = await statfs(nearest)
  const free = (Number(bavail) * Number(bsize)) / gibibyte
  const says = `${folder}: ${free.toFixed(1)} GiB free`
  // Some file systems make inodes as they go and say that they have none.
  if (Number(files) > 0 && Number(ffree) < 10_000)
    return { state: 'bad', what, says: `${says}, and ${ffree} inodes`, fixes }
  if (free < leastDiskGib.bad) return { state: 'bad', what, says, fixes }
  return free < leastDiskGib.warn
    ? { state: 'warn', what, says: `${says}; streams may want up to ${leastDiskGib.warn}`, fixes }
    : { state: 'ok', what, says }
}

/** Compares it with that of npm’s registry, which is reached anyway; `env` may name another one. */
export async function checkClock(env: NodeJS.ProcessEnv): Promise<Finding> {
  const what = 'clock'
  const [source, off] = await Promise.all([clockSource(), differenceFromRegistry(env)])
  const seconds = Math.abs((off ?? 0) / 1_000).toFixed(0)
  const isWrong = off !== undefined && Math.abs(off) > clockToleranceMs
  const compared =
    off === undefined
      ? 'not compared: npm’s registry does not answer'
      : isWrong
        ? `${seconds} s ${off > 0 ? 'ahead of' : 'behind'} that of npm’s registry`
        : 'agrees with that of npm’s registry'
  const says = source === undefined ? compared : `${compared}; source ${source}`
  if (isWrong)
    return { state: 'bad', what, says, fixes: ['set the clock, and keep it: apt-get install chrony'] }
  if (source !== undefined && slowClocks.includes(source))
    return { state: 'warn', what, says, fixes: [`${source} is slow to read; tsc or kvm-clock is not`] }
  return { state: off === undefined ? 'warn' : 'ok', what, says }
}

async function clockSource(): Promise<string | undefined> {
  const file = '/sys/devices/system/clocksource/clocksource0/current_clocksource'
  return (await readFile(file, 'utf8').catch(() => '')).trim() || undefined
}

/** Milliseconds that this clock is ahead, give or take a second; undefined where nobody answers in time. */
async function differenceFromRegistry(env: NodeJS.ProcessEnv): Promise<number | undefined> {
  try {
    const { stdout } = await execute('npm', ['config', 'get', 'registry'], { cwd: '/', env, timeout: 10_000 })
    const before = Date.now()
    const answer = await fetch(stdout.trim(), { method: 'HEAD', signal: AbortSignal.timeout(answerMs) })
    const middle = (before + Date.now()) / 2
    // The header is cut off to a whole second, and one from a cache is as old as that says.
    const told = Date.parse(answer.headers.get('date') ?? '') + 500
    const off = middle - told - Number(answer.headers.get('age') ?? 0) * 1_000
    return Number.isFinite(off) ? off : undefined
  } catch {
    return undefined
  }
}
