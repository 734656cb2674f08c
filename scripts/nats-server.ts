import { execFile } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { globSync } from 'node:fs'
import { copyFile, mkdir, mkdtemp, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { availableParallelism, tmpdir } from 'node:os'
import { delimiter, isAbsolute, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'

const execute = promisify(execFile)

/** Message schedules, per-message TTL and atomic batches: the first version that has all the project uses. */
export const MINIMUM_VERSION = '2.14.0'

const keyring = '/usr/share/keyrings/debian-archive-keyring.gpg'
/** Debian's suites that carry a new enough package, most stable first. */
const suites = ['forky', 'sid']
const aptTimeoutMs = 120_000

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
  const mirrors = new Set(await configuredMirrors())
  if (mirrors.size === 0) throw new Error('found no Debian mirror in the apt sources of this machine')
  const failures: string[] = []
  for (const mirror of mirrors) {
    for (const suite of suites) {
      try {
        return await downloadFrom(mirror, suite, target)
      } catch (error) {
        const { code, stderr, message } = error as Error & { code?: unknown; stderr?: string }
        if (code === 'ENOENT') throw new Error('needs apt-get and dpkg, which this machine does not have')
        failures.push(`${mirror} ${suite}: ${stderr?.trim().split('\n').pop() || message}`)
      }
    }
  }
  throw new Error(failures.join('; '))
}

async function downloadFrom(mirror: string, suite: string, target: string): Promise<void> {
  const work = await mkdtemp(join(tmpdir(), 'vulcan-nats-'))
  await using scope = new AsyncDisposableStack()
  scope.defer(() => rm(work, { recursive: true, force: true }))

  // Lists, package cache and sources are all private: the system's apt neither sees nor gains anything. The
  // keyring on the machine verifies what comes.
  await mkdir(join(work, 'lists', 'partial'), { recursive: true })
  await mkdir(join(work, 'cache', 'archives', 'partial'), { recursive: true })
  await writeFile(join(work, 'sources.list'), `deb [signed-by=${keyring}] ${mirror} ${suite} main\n`)
  const apt = (...args: string[]) =>
    execute(
      'apt-get',
      [
        '--quiet=2',
        ...['-o', `Dir::Etc::sourcelist=${join(work, 'sources.list')}`],
        ...['-o', 'Dir::Etc::sourceparts=/dev/null'],
        ...['-o', `Dir::State::Lists=${join(work, 'lists')}`],
        ...['-o', `Dir::Cache=${join(work, 'cache')}`],
        ...['-o', 'Acquire::Languages=none'],
        // The work folder is private to this user, so apt's own user could not write there anyway.
        ...['-o', 'APT::Sandbox::User='],
        ...args,
      ],
      { cwd: work, timeout: aptTimeoutMs },
    )
  await apt('update')
  await apt('download', 'nats-server')
  const [archive] = globSync('*.deb', { cwd: work })
  if (!archive) throw new Error('apt-get downloaded no package')
  await execute('dpkg', ['-x', archive, 'root'], { cwd: work, timeout: 30_000 })

  const [binary] = globSync('root/usr/{s,}bin/nats-server', { cwd: work })
  const version = binary && (await versionOf(join(work, binary)))
  if (!version || !isAtLeast(version, MINIMUM_VERSION)) throw new Error(`has version ${version ?? 'unknown'}`)

  // Copied beside its place and renamed, so that a parallel start sees the whole file or none.
  const beside = `${target}.${randomUUID()}`
  await copyFile(join(work, binary!), beside)
  await rename(beside, target)
}

async function configuredMirrors(): Promise<string[]> {
  const files = ['sources.list', 'sources.list.d/*.list', 'sources.list.d/*.sources']
  const mirrors: string[] = []
  for (const file of globSync(files, { cwd: '/etc/apt' })) {
    const text = await readFile(join('/etc/apt', file), 'utf8').catch(() => '')
    mirrors.push(...debianMirrors(text))
  }
  return mirrors
}

/**
 * The mirrors of Debian's main archive in one of apt's source files, in either of its formats (sources.list(5): lines
 * of `deb [options] uri suite component…`, or deb822 stanzas). Security and third-party archives are left out.
 */
export function debianMirrors(text: string): string[] {
  const uncommented = text.replace(/^\s*#.*\n?/gm, '')
  const uris: string[] = []
  for (const [, uri, components] of uncommented.matchAll(/^deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+\S+\s+(.*)$/gm)) {
    if (components!.split(/\s+/).includes('main')) uris.push(uri!)
  }
  for (const stanza of uncommented.split(/\n\s*\n/)) {
    const fields = new Map(
      [...stanza.matchAll(/^([\w-]+):[ \t]*(.*(?:\n[ \t]+.*)*)/gm)].map(([, key, value]) => [
        key!.toLowerCase(),
        value!.trim().split(/\s+/),
      ]),
    )
    if (!fields.get('types')?.includes('deb') || !fields.get('components')?.includes('main')) continue
    if (fields.get('enabled')?.[0] === 'no') continue
    uris.push(...(fields.get('uris') ?? []))
  }
  const isDebian = (uri: string) => /debian/.test(uri) && !/security|backports|^cdrom/.test(uri)
  return [...new Set(uris.filter(isDebian).map((uri) => uri.replace(/\/$/, '')))]
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
    if ((await greeting(host, port))?.server_name === name) return
    await sleep(5)
  }
}

/** The first line a nats-server sends, `INFO {…}`, parsed; undefined when nothing answers within a second. */
function greeting(host: string, port: number): Promise<{ server_name?: string } | undefined> {
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
