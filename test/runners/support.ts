/** A runner that does what a test says, in this process, behind a real consume loop. */
import pino from 'pino'
import { nothingRan } from '../../runners/guest/report.ts'
import type { Capabilities, Job, Outcome, Prepared, RunEvents, Runner } from '../../runners/runner.ts'
import { runWorker, type WorkerOptions } from '../../runners/worker.ts'
import { Blobs } from '../../shared/blobs.ts'
import { Bus } from '../../shared/bus.ts'
import { newProcessId } from '../../shared/ids.ts'
import { Meters } from '../../shared/meters.ts'
import { Registry } from '../../shared/registry.ts'
import { SecretBox, Secrets } from '../../shared/secrets.ts'
import type { Cause, Isolation, LogLine } from '../../shared/workload.ts'
import type { Ground } from '../shared/support.ts'

const ran = { ...nothingRan, start: 'warm' as const }

export const completed = (value: unknown = null): Outcome => ({
  status: 'completed',
  output: JSON.stringify(value),
  exitCode: null,
  ...ran,
})
export const failed = (cause: Cause, message = 'it broke'): Outcome => ({
  status: 'failed',
  cause,
  error: { message, stack: null },
  exitCode: null,
  ...ran,
})
/** What stands for the user’s code, of a job that has code. */
export const codeOf = ({ source }: Pick<Job, 'source'>): string => {
  if (source.kind === 'code') return source.text
  throw new Error(`the job has no code but ${source.kind}`)
}

export const stopped: Outcome = { status: 'stopped', ...ran }

export const line = (text: string): LogLine => ({
  time: new Date().toISOString(),
  level: 'info',
  stream: 'console',
  text,
})

/** Settles when the attempt is told to stop, as a runner whose code never ends by itself. */
export const untilStopped = (signal: AbortSignal): Promise<Outcome> =>
  new Promise((resolve) => {
    if (signal.aborted) resolve(stopped)
    signal.addEventListener('abort', () => resolve(stopped), { once: true })
  })

/** What stands for the user's code. It is only called where the attempt was not stopped before. */
export type Code = (
  job: Job,
  signal: AbortSignal,
  log: (line: LogLine) => void,
  respond: RunEvents['respond'],
  onPhase: RunEvents['onPhase'],
) => Outcome | Promise<Outcome>

export const capabilities: Capabilities = {
  runtimes: ['javascript', 'typescript'],
  egress: ['none', 'all', 'allowlist'],
  walls: ['none'],
  missing: [],
  version: 'fake 1',
}

export interface FakeRunner extends Runner {
  /** Jobs whose code was begun. */
  ran: Job[]
  prepared: number
  released: number
  /** Stops the code without telling the consume loop why. */
  quit(): void
}

/** As those of containers. */
const containers: Capabilities = {
  ...capabilities,
  runtimes: ['oci', 'node', 'python', 'go', 'javascript', 'typescript'],
}

export function fakeRunner(code: Code, isolation: Isolation = 'isolate'): FakeRunner {
  const quitting = new AbortController()
  const runner: FakeRunner = {
    isolation,
    capabilities: isolation === 'isolate' ? capabilities : containers,
    ran: [],
    prepared: 0,
    released: 0,
    prepare(job): Prepared {
      runner.prepared++
      return {
        async run(signal, events) {
          if (signal.aborted) return stopped
          runner.ran.push(job)
          const both = AbortSignal.any([signal, quitting.signal])
          return await code(job, both, events.onLog, events.respond, events.onPhase)
        },
        release() {
          runner.released++
        },
      }
    },
    prewarm() {},
    quit: () => quitting.abort(),
    pids: () => [],
    [Symbol.asyncDispose]: async () => {},
  }
  return runner
}

export interface Worker extends AsyncDisposable {
  id: string
  runner: FakeRunner
  bus: Bus
  /** Tells it to stop, and waits until it has. */
  stop(): Promise<void>
  /** It is gone without a word, as after SIGKILL: its connection closes and nothing it holds is acknowledged. */
  die(): Promise<void>
}

/** The key that gateways and runners of a test share. */
export const testBox = (): Promise<SecretBox> =>
  SecretBox.open({ key: Buffer.alloc(32, 7).toString('base64'), file: '' })

/** A consume loop with a connection of its own. */
export async function startWorker(
  on: Pick<Ground, 'topology'> & { nats: Pick<Ground['nats'], 'url'> },
  code: Code,
  { isolation = 'isolate', ...over }: Partial<WorkerOptions> & { isolation?: Isolation } = {},
): Promise<Worker> {
  const id = newProcessId(isolation)
  const bus = await Bus.connect({ url: on.nats.url, name: id })
  const runner = fakeRunner(code, isolation)
  const stop = new AbortController()
  const box = await testBox()
  const secrets = await Secrets.open(bus, 1, box)
  const registry = await Registry.open(bus, 1)
  const meters = await Meters.open(bus, 1)
  const done = runWorker(
    {
      bus,
      blobs: await Blobs.open(bus, 1),
      secrets,
      box,
      registry,
      meters,
      runner,
      runnerId: id,
      slots: 8,
      ackWaitMs: on.topology.ackWaitMs,
      replicas: 1,
      logLimits: { lines: 10_000, bytes: 5 * 1_048_576 },
      log: pino({ level: process.env.VULCAN_TEST_LOG === undefined ? 'silent' : 'debug' }),
      ...over,
    },
    stop.signal,
  )
  const worker: Worker = {
    id,
    runner,
    bus,
    async stop() {
      stop.abort()
      await done
    },
    async die() {
      await bus.nc.close()
      await bus[Symbol.asyncDispose]()
    },
    async [Symbol.asyncDispose]() {
      stop.abort()
      // A test that is over does not wait for what it left running.
      runner.quit()
      await done
      secrets.close()
      registry.close()
      meters.close()
      await bus[Symbol.asyncDispose]()
    },
  }
  return worker
}
