import { execFile } from 'node:child_process'
import { globSync } from 'node:fs'
import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { connect } from 'node:net'
import { availableParallelism, tmpdir } from 'node:os'
import { delimiter, isAbsolute, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { openDebian, putInPlace, unpackPackage } from './debian.ts'

const execute = promisify(execFile)

/** Message schedules, per-message TTL and atomic batches: the first version that has all the project uses. */
export const MINIMUM_VERSION = '2.14.0'

/** Debian's suites that carry a new enough package, most stable first. */
const suites = ['forky', 'sid']

export type FindOptions = {
  /** Where a downloaded server is kept between runs. */
  cacheDir: string
  log: (line: string) => void
  /** Folders to search, as in PATH. */
  path?: string | undefined
  /** False: search PATH and the cache only. */
  download?: boolean
}

/**
 * The path of a nats-server that is new enough: from PATH, else from the cache, else Debian's package, unpacked into
 * the cache without touching the system and without root.
 *
 * @throws Error that says what to install
 */
export async function findNatsServer(options: FindOptions): Promise<string> {
  const { cacheDir, log, path = process.env.PATH ?? '', download = true } = options
  const tooOld: string[] = []
  for (const folder of path.split(delimiter).filter(isAbsolute)) {
    const candidate = join(folder, 'nats-server')
    const version = await versionOf(candidate)
    if (version && isAtLeast(version, MINIMUM_VERSION)) return candidate
    if (version) tooOld.push(`${candidate} is ${version}`)
  }
  const cached = join(cacheDir, 'nats-server')
  const version = await versionOf(cached)
  if (version && isAtLeast(version, MINIMUM_VERSION)) return cached

  let why = 'not tried'
  if (download) {
    log('fetching nats-server from Debian (once, about 5 MB)')
    try {
      await mkdir(cacheDir, { recursive: true })
      await fetchDebianPackage(cached)
      return cached
    } catch (error) {
      why = (error as Error).message.trim()
    }
  }
  throw new Error(
    `nats-server ${MINIMUM_VERSION} or newer is needed${tooOld.length ? ` (${tooOld.join(', ')})` : ''}. ` +
      'Put one on PATH (https://github.com/nats-io/nats-server/releases), or set NATS_URL to a running server. ' +
      `Fetching Debian's package: ${why}`,
  )
}

/** The version that a nats-server binary reports, such as `2.15.1`; undefined when it does not run. */
async function versionOf(binary: string): Promise<string | undefined> {
  try {
    const { stdout } = await execute(binary, ['--version'], { timeout: 5_000 })
    return /v?(\d+\.\d+\.\d+)/.exec(stdout)?.[1]
  } catch {
    return undefined
  }
}

/** Compares dotted versions number by number. */
export function isAtLeast(version: string, minimum: string): boolean {
  const [have, need] = [version, minimum].map((text) => text.split('.').map(Number))
  for (const [index, wanted] of need!.entries()) {
    const got = have![index] ?? 0
    if (got !== wanted) return got > wanted
  }
  return true
}

async function fetchDebianPackage(target: string): Promise<void> {
  const failures: string[] = []
  for (const suite of suites) {
    try {
      return await downloadFrom(suite, target)
    } catch (error) {
      failures.push(`${suite}: ${(error as Error).message}`)
    }
  }
  throw new Error(failures.join('; '))
}

async function downloadFrom(suite: string, target: string): Promise<void> {
  await using scope = new AsyncDisposableStack()
  const work = await mkdtemp(join(tmpdir(), 'vulcan-nats-'))
  scope.defer(() => rm(work, { recursive: true, force: true }))
  const archive = scope.use(await openDebian([suite]))
  const [file] = await archive.download(await archive.find(['nats-server']), work)
  await unpackPackage(file!, work)

  const [binary] = globSync('usr/{s,}bin/nats-server', { cwd: work })
  const version = binary && (await versionOf(join(work, binary)))
  if (!version || !isAtLeast(version, MINIMUM_VERSION)) throw new Error(`has version ${version ?? 'unknown'}`)
  await putInPlace(join(work, binary!), target)
}

export type NatsSettings = { host: string; port: number; storeDir: string; name: string }

/** The command line and environment that run `binary` with the project's nats.conf. */
export function natsCommand(binary: string, settings: NatsSettings) {
  return {
    command: binary,
    args: ['--config', join(import.meta.dirname, '..', 'nats.conf'), '--name', settings.name],
    env: {
      // The configuration's parser reads these values: text is quoted for it.
      VULCAN_NATS_HOST: JSON.stringify(settings.host),
      VULCAN_NATS_PORT: String(settings.port),
      VULCAN_NATS_STORE: JSON.stringify(settings.storeDir),
      // It shares the machine with everything else here: with all cores to itself on paper, Go's idle threads spin
      // for work that the others need the cores for.
      GOMAXPROCS: String(Math.max(1, Math.floor(availableParallelism() / 2))),
    },
  }
}

/**
 * Waits until a nats-server of this name answers at the port. Another server's answer does not count: it would mean
 * that ours could not bind and that everything would be connected to a stranger.
 *
 * @throws the signal's reason when it aborts first
 */
export async function natsAnswers(
  host: string,
  port: number,
  name: string,
  signal: AbortSignal,
): Promise<void> {
  for (;;) {
    signal.throwIfAborted()
    if ((await natsGreeting(host, port))?.server_name === name) return
    await sleep(5)
  }
}

/** What a nats-server says of itself, of which only this is used. */
export type NatsGreeting = { server_name?: string; version?: string; jetstream?: boolean }

/** The first line a nats-server sends, `INFO {…}`, parsed; undefined when nothing answers within a second. */
export function natsGreeting(host: string, port: number): Promise<NatsGreeting | undefined> {
  return new Promise((resolve) => {
    let text = ''
    const socket = connect({ host, port }).setEncoding('utf8').setTimeout(1_000)
    const finish = () => {
      socket.destroy()
      const json = /^INFO (\{.*\})\s*\r\n/.exec(text)?.[1]
      try {
        resolve(json && JSON.parse(json))
      } catch {
        resolve(undefined)
      }
    }
    socket.on('data', (chunk) => {
      text += chunk
      if (text.includes('\r\n')) finish()
    })
    socket.on('timeout', finish).on('error', finish).on('close', finish)
  })
}
