import { createHash } from 'node:crypto'
import { mkdirSync, readFileSync, realpathSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { pathToFileURL } from 'node:url'
import { z } from 'zod'
import { cacheDirectory } from './cache-directory.ts'
import { isolations, missingFor, type OfferedIsolation, runnerName } from './isolations.ts'
import { LockedError, lockDirectory } from './lock.ts'
import { findNatsServer, natsAnswers, natsCommand } from './nats-server.ts'
import { nextFreePort, tryPort } from './ports.ts'
import { gone, signal as send, startedWith } from './process-identity.ts'
import { NotReadyError, type ProcessSpec, Supervisor } from './supervisor.ts'

const port = z.coerce.number().int().min(0).max(65_535)

const Environment = z.object({
  VULCAN_HOST: z.string().default('127.0.0.1'),
  VULCAN_PORT: port.default(8080),
  VULCAN_DATA_DIR: z.string().default('.vulcan'),
  VULCAN_NATS_HOST: z.string().default('127.0.0.1'),
  VULCAN_NATS_PORT: port.default(4222),
  NATS_URL: z.string().optional(),
  VULCAN_DATABASE_URL: z.string().optional(),
  VULCAN_DISPATCHER_PORT: port.default(0),
  VULCAN_ISOLATIONS: z
    .string()
    .transform((text) => text.split(',').map((name) => name.trim()))
    .pipe(z.array(z.enum(isolations)).min(1))
    .optional(),
})

/** How one platform runs. Directories are absolute; port 0 means any free one. */
export type PlatformConfig = {
  host: string
  port: number
  dataDir: string
  cacheDir: string
  natsHost: string
  /** The first to try; the next free one is used when it is taken. */
  natsPort: number
  /** A running server to use in place of an own one. */
  natsUrl: string | undefined
  databaseUrl: string
  dispatcherPort: number
  /** A runner is started for each; at least one, the lightest first. */
  isolations: OfferedIsolation[]
  /** What the processes inherit, next to what is set for them. */
  env: NodeJS.ProcessEnv
}

/** Something a person has to put right before the platform can start; the message says what. */
export class StartError extends Error {
  override name = 'StartError'
}

/** An operator's shell may hold tokens; processes that start other people's code get only what they can need. */
const inherited =
  /^(VULCAN_.+|DOCKER_HOST|OTEL_.+|NODE_.+|PATH|HOME|USER|LANG|LC_.+|TZ|TMPDIR|XDG_.+|SSL_CERT_.+|(HTTPS?|NO)_PROXY|NPM_CONFIG_(REGISTRY|(HTTPS_)?PROXY|NOPROXY|CA|CAFILE|STRICT_SSL)|PIP_((EXTRA_)?INDEX_URL|PROXY|CERT|TRUSTED_HOST)|REQUESTS_CA_BUNDLE)$/i

/**
 * Reads the configuration from environment variables. An empty variable counts as unset.
 *
 * @throws StartError that names the wrong variable
 */
export function platformConfig(env: NodeJS.ProcessEnv): PlatformConfig {
  const set = Object.fromEntries(Object.entries(env).filter(([, value]) => value))
  const parsed = Environment.safeParse(set)
  if (!parsed.success) throw new StartError(z.prettifyError(parsed.error))
  const values = parsed.data
  const dataDir = resolve(values.VULCAN_DATA_DIR)
  return {
    host: values.VULCAN_HOST,
    port: values.VULCAN_PORT,
    dataDir,
    cacheDir: cacheDirectory(set),
    natsHost: values.VULCAN_NATS_HOST,
    natsPort: values.VULCAN_NATS_PORT,
    natsUrl: values.NATS_URL,
    databaseUrl: values.VULCAN_DATABASE_URL ?? `file:${pathToFileURL(join(dataDir, 'vulcan.db')).pathname}`,
    dispatcherPort: values.VULCAN_DISPATCHER_PORT,
    isolations: isolations.filter(
      (name) => values.VULCAN_ISOLATIONS?.includes(name) ?? missingFor(name, set) === undefined,
    ),
    env: Object.fromEntries(Object.entries(set).filter(([name]) => inherited.test(name))),
  }
}

/** Short-lived garbage is all these processes make: a larger nursery has it collected a few per cent cheaper. */
const nodeFlags = ['--max-semi-space-size=64']

/** A script and its arguments for each process; a runner is told its isolation behind them. */
export type Entrypoints = Record<'dispatcher' | 'runner' | 'gateway', string[]>

const root = resolve(import.meta.dirname, '..')
const entrypoints: Entrypoints = {
  dispatcher: [join(root, 'dispatcher/main.ts')],
  runner: [join(root, 'runners/main.ts')],
  gateway: [join(root, 'gateway/main.ts')],
}

export type Platform = AsyncDisposable & {
  /** Of the gateway, without a trailing slash. */
  url: string
  natsUrl: string
  dataDir: string
  /** Those that a runner was started for. */
  isolations: readonly OfferedIsolation[]
  /** Knows the pids of `nats-server`, `dispatcher`, `runner` (of isolates), `runner-gvisor`, `runner-docker`, `runner-microvm` and `gateway`. */
  supervisor: Supervisor
  /** Ends every process; a second call waits for the same end. */
  stop(): Promise<void>
}

export type PlatformOptions = {
  log: (line: string) => void
  /** Gives up the start; what runs already is stopped. */
  signal?: AbortSignal
  entrypoints?: Entrypoints
  /** For the whole to be ready once its processes are. Default 60,000. */
  readyTimeoutMs?: number
}

/**
 * Starts nats-server (unless one is given), dispatcher, runners and gateway as processes of their own, and resolves
 * when the gateway says that everything is ready: with one runner at least. What others can offer shows later.
 *
 * @throws StartError when a port or the data directory is in use, or no nats-server is found
 * @throws NotReadyError when a part does not become ready, with its last lines
 */
export async function startPlatform(config: PlatformConfig, options: PlatformOptions): Promise<Platform> {
  const { log, signal, readyTimeoutMs = 60_000 } = options
  const scripts = options.entrypoints ?? entrypoints
  mkdirSync(config.dataDir, { recursive: true, mode: 0o700 })
  const dataDir = realpathSync(config.dataDir)

  await using scope = new AsyncDisposableStack()
  scope.use(lock(dataDir))
  const pidsFile = join(dataDir, 'pids.json')
  await endOrphans(pidsFile, dataDir, log)
  const port = await gatewayPort(config)
  const dispatcherPort = await nextFreePort('127.0.0.1', config.dispatcherPort, [port])
  const supervisor = scope.use(new Supervisor({ log, pidsFile }))

  const natsUrl =
    config.natsUrl ??
    (await startNats(supervisor, { ...config, dataDir }, [port, dispatcherPort], log, signal))
  const url = `http://${reachable(config.host)}:${port}`
  const dispatcherUrl = `http://127.0.0.1:${dispatcherPort}`
  const env = {
    ...config.env,
    NATS_URL: natsUrl,
    VULCAN_HOST: config.host,
    VULCAN_PORT: String(port),
    VULCAN_DATA_DIR: dataDir,
    VULCAN_CACHE_DIR: config.cacheDir,
    VULCAN_DATABASE_URL: config.databaseUrl,
    VULCAN_DISPATCHER_PORT: String(dispatcherPort),
    VULCAN_DISPATCHER_URL: dispatcherUrl,
  }
  const node = (part: keyof Entrypoints, over: Partial<ProcessSpec> = {}): ProcessSpec => ({
    name: part,
    command: process.execPath,
    env,
    ...over,
    args: [...nodeFlags, ...scripts[part], ...(over.args ?? [])],
  })
  const runner = (isolation: OfferedIsolation, over: Partial<ProcessSpec> = {}) =>
    node('runner', { name: runnerName(isolation), args: [isolation], ...over })
  const [first, ...others] = config.isolations
  // Stopped in reverse: nothing new is accepted, then nothing new is run, then what happened is recorded.
  await supervisor.start(
    node('dispatcher', { ready: (over) => answersOk(`${dispatcherUrl}/healthz`, over) }),
    signal,
  )
  await supervisor.start(runner(first!), signal)
  await supervisor.start(node('gateway', { ready: (over) => answersOk(`${url}/healthz`, over) }), signal)
  const parts = ['dispatcher', runnerName(first!), 'gateway']
  await allReady(url, supervisor, parts, readyTimeoutMs, signal)
  // They take their time to try the host out.
  for (const isolation of others)
    await supervisor.start(runner(isolation, { behind: runnerName(first!) }), signal)

  const resources = scope.move()
  let stopped: Promise<void> | undefined
  const stop = () => (stopped ??= resources.disposeAsync())
  const { isolations } = config
  return { url, natsUrl, dataDir, isolations, supervisor, stop, [Symbol.asyncDispose]: stop }
}

function lock(dataDir: string): Disposable {
  try {
    return lockDirectory(dataDir)
  } catch (cause) {
    if (!(cause instanceof LockedError)) throw cause
    const advice =
      'Stop that one, or set VULCAN_DATA_DIR to another directory (and VULCAN_PORT to another port).'
    throw new StartError(`a platform is running on this data directory: ${cause.message}. ${advice}`, {
      cause,
    })
  }
}

/** Ends what an earlier, killed platform left running here: two nats-servers on one store would corrupt it. */
async function endOrphans(pidsFile: string, dataDir: string, log: PlatformOptions['log']): Promise<void> {
  let recorded: Record<string, number>
  try {
    recorded = JSON.parse(readFileSync(pidsFile, 'utf8'))
  } catch {
    return
  }
  for (const [name, pid] of Object.entries(recorded)) {
    if (!startedWith(pid, 'VULCAN_DATA_DIR', dataDir)) continue
    log(`ending ${name} (process ${pid}), left over from an earlier start`)
    send(pid, 'SIGTERM')
    if (!(await gone(pid, 5_000))) send(-pid, 'SIGKILL')
    if (!(await gone(pid, 5_000)))
      throw new StartError(`${name} (process ${pid}) uses ${dataDir} and does not end`)
  }
}

async function gatewayPort({ host, port }: PlatformConfig): Promise<number> {
  try {
    return await tryPort(host, port)
  } catch (cause) {
    const { code } = cause as NodeJS.ErrnoException
    const why =
      code === 'EADDRINUSE' ? `${host}:${port} is in use` : `cannot listen on ${host}:${port} (${code})`
    throw new StartError(`${why}. Set VULCAN_PORT to a free port (or VULCAN_HOST to another address).`, {
      cause,
    })
  }
}

async function startNats(
  supervisor: Supervisor,
  { natsHost, natsPort, cacheDir, dataDir, env }: PlatformConfig,
  promised: readonly number[],
  log: PlatformOptions['log'],
  signal?: AbortSignal,
): Promise<string> {
  let binary: string
  try {
    binary = await findNatsServer({ cacheDir, log, path: env.PATH })
  } catch (cause) {
    throw new StartError((cause as Error).message, { cause })
  }
  const name = `vulcan-${createHash('sha256').update(dataDir).digest('hex').slice(0, 12)}`
  const host = reachable(natsHost)
  for (let first = natsPort; ; ) {
    const port = await nextFreePort(natsHost, first, promised)
    const settings = natsCommand(binary, { host: natsHost, port, storeDir: join(dataDir, 'nats'), name })
    try {
      await supervisor.start(
        {
          ...settings,
          name: 'nats-server',
          env: { ...env, ...quotedPasswords(env), ...settings.env, VULCAN_DATA_DIR: dataDir },
          ready: (over) => natsAnswers(host, port, name, over),
        },
        signal,
      )
      const user = env.VULCAN_NATS_PASSWORD ? `vulcan:${encodeURIComponent(env.VULCAN_NATS_PASSWORD)}@` : ''
      return `nats://${user}${host}:${port}`
    } catch (error) {
      // A platform that starts beside this one may have taken the port between the look and the start.
      const lost = (await nextFreePort(natsHost, port)) !== port
      if (!lost || !(error instanceof NotReadyError)) throw error
      first = natsPort === 0 ? 0 : port + 1
    }
  }
}

/** Those of the accounts that nats.conf shows, as its parser reads them. */
function quotedPasswords(env: NodeJS.ProcessEnv): NodeJS.ProcessEnv {
  const names = ['VULCAN_NATS_PASSWORD', 'VULCAN_NATS_READER_PASSWORD']
  return Object.fromEntries(
    names.filter((name) => env[name]).map((name) => [name, JSON.stringify(env[name])]),
  )
}

/** An address on this machine for what listens on `host`, ready for a URL. */
function reachable(host: string): string {
  if (host === '0.0.0.0' || host === '::') return '127.0.0.1'
  return host.includes(':') ? `[${host}]` : host
}

/** Waits for a 200. */
async function answersOk(url: string, signal: AbortSignal): Promise<void> {
  for (;;) {
    const response = await fetch(url, { signal }).catch(() => undefined)
    await response?.body?.cancel()
    if (response?.status === 200) return
    await sleep(20, undefined, { signal })
  }
}

/** Waits for the gateway's own verdict on bus, database and runner. */
async function allReady(
  url: string,
  supervisor: Supervisor,
  parts: string[],
  timeoutMs: number,
  signal: AbortSignal | undefined,
): Promise<void> {
  const over = AbortSignal.any([AbortSignal.timeout(timeoutMs), ...(signal ? [signal] : [])])
  let answer = 'no answer'
  try {
    for (;;) {
      const response = await fetch(`${url}/readyz`, { signal: over }).catch(() => undefined)
      if (response) answer = (await response.text()).slice(0, 2_000)
      if (response?.status === 200) return
      await sleep(20, undefined, { signal: over })
    }
  } catch (cause) {
    signal?.throwIfAborted()
    const lines = parts.flatMap((name) => supervisor.lastLines(name).map((line) => `${name} | ${line}`))
    const problem = `not ready within ${timeoutMs} ms; GET ${url}/readyz answered: ${answer}`
    throw new NotReadyError([problem, ...lines].join('\n  '), { cause })
  }
}
