import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { cacheDirectory } from '../scripts/cache-directory.ts'
import { findNatsServer, natsAnswers, natsCommand } from '../scripts/nats-server.ts'
import { tryPort } from '../scripts/ports.ts'

const host = '127.0.0.1'
let found: Promise<string> | undefined
const binary = () => (found ??= findNatsServer({ cacheDir: cacheDirectory(process.env), log: console.error }))

export type TestNats = AsyncDisposable & {
  url: string
  port: number
  /** JetStream's store; survives kill and restart. */
  dir: string
  /** Of the server running now; changes at restart. */
  readonly pid: number
  /** Sends a signal, SIGKILL unless told, and resolves when the server is gone. */
  kill(signal?: NodeJS.Signals): Promise<void>
  /** Starts it again, killing it first if it runs, at the same port and store. Resolves when it answers. */
  restart(): Promise<void>
}

export type TestNatsOptions = {
  port?: number
  dir?: string
  /** Another configuration file. */
  config?: string
  /** Variables that it reads. */
  env?: Record<string, string>
}

/**
 * A real nats-server with the project's nats.conf, on a free loopback port. Disposing ends it and removes its store,
 * except one that was passed in.
 */
export async function startNats(options: TestNatsOptions = {}): Promise<TestNats> {
  await using scope = new AsyncDisposableStack()
  const port = options.port ?? (await tryPort(host, 0))
  const dir = options.dir ?? (await mkdtemp(join(tmpdir(), 'vulcan-test-nats-')))
  if (!options.dir) scope.defer(() => rm(dir, { recursive: true, force: true }))

  let server: ChildProcess
  const start = async () => {
    const name = `test-${process.pid}-${port}`
    const { command, args, env } = natsCommand(await binary(), { host, port, storeDir: dir, name })
    let output = ''
    if (options.config !== undefined) args[args.indexOf('--config') + 1] = options.config
    server = spawn(command, args, {
      env: { ...process.env, ...options.env, ...env },
      stdio: ['ignore', 'ignore', 'pipe'],
    })
    server.stderr!.setEncoding('utf8').on('data', (text) => {
      output = (output + text).slice(-4_000)
    })
    const ended = new AbortController()
    server.once('exit', () => ended.abort(new Error('it ended')))
    try {
      await natsAnswers(host, port, name, AbortSignal.any([ended.signal, AbortSignal.timeout(10_000)]))
    } catch (cause) {
      server.kill('SIGKILL')
      throw new Error(`nats-server did not start on port ${port}:\n${output}`, { cause })
    }
  }
  const kill = async (signal: NodeJS.Signals = 'SIGKILL') => {
    if (server.exitCode !== null || server.signalCode !== null) return
    const exit = once(server, 'exit')
    server.kill(signal)
    await exit
  }
  await start()
  scope.defer(() => kill())
  const resources = scope.move()
  return {
    url: `nats://${host}:${port}`,
    port,
    dir,
    get pid() {
      return server.pid!
    },
    kill,
    restart: async () => {
      await kill()
      await start()
    },
    [Symbol.asyncDispose]: () => resources.disposeAsync(),
  }
}
