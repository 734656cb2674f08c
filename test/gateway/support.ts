/** A gateway over real HTTP, with a runner of the test’s own behind it and a stand-in for the dispatcher. */
import { once } from 'node:events'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { serve } from '@hono/node-server'
import pino from 'pino'
import type { Gate } from '../../gateway/admission.ts'
import { gatewayFetch } from '../../gateway/app.ts'
import { Builder } from '../../gateway/build/build.ts'
import { LaneGate } from '../../gateway/lanes.ts'
import { readsFrom } from '../../gateway/reads.ts'
import { openRoster, type Roster } from '../../gateway/roster.ts'
import { Waits } from '../../gateway/waits.ts'
import { cacheDirectory } from '../../scripts/cache-directory.ts'
import type { Backend } from '../../shared/backends.ts'
import { Blobs } from '../../shared/blobs.ts'
import { Bus } from '../../shared/bus.ts'
import { GatewayExchanges } from '../../shared/exchange.ts'
import { newProcessId } from '../../shared/ids.ts'
import { Meters } from '../../shared/meters.ts'
import { Registry } from '../../shared/registry.ts'
import { Secrets } from '../../shared/secrets.ts'
import type { TraceLink } from '../../shared/trace.ts'
import type { Tracing } from '../../shared/tracing.ts'
import type { Isolation } from '../../shared/workload.ts'
import { type Code, completed, startWorker, testBox, type Worker } from '../runners/support.ts'
import { type Ground, ground, until } from '../shared/support.ts'

export type Answers = (request: IncomingMessage, response: ServerResponse) => void

/** Stands where the dispatcher will be. Nothing answers at port 9 of this host. */
const nobody = 'http://127.0.0.1:9'

export interface Gateway extends AsyncDisposable {
  url: string
  id: string
  bus: Bus
  roster: Roster
  registry: Registry
  secrets: Secrets
  waits: Waits
  exchanges: GatewayExchanges
}

export interface GatewayOptions {
  dispatcherUrl?: string
  maxBodyBytes?: number
  maxWaitS?: number
  gate?: Gate
  /** Another bubblewrap for builds. */
  bwrap?: string
  tracing?: Tracing
  traceUrl?: TraceLink
}

export async function startGateway(on: Ground, options: GatewayOptions = {}): Promise<Gateway> {
  const id = newProcessId('gateway')
  const bus = await Bus.connect({ url: on.nats.url, name: id })
  const roster = await openRoster(bus, 1)
  const waits = new Waits(bus)
  const box = await testBox()
  const registry = await Registry.open(bus, 1)
  const secrets = await Secrets.open(bus, 1, box)
  const meters = await Meters.open(bus, 1)
  const gate = new LaneGate({ bus, registry, meters })
  const exchanges = new GatewayExchanges(bus, id)
  const fetch = gatewayFetch({
    bus,
    blobs: await Blobs.open(bus, 1),
    roster,
    registry,
    secrets,
    box,
    gate: options.gate ?? gate,
    builder: new Builder({
      cacheDir: cacheDirectory(process.env),
      tempDir: tmpdir(),
      env: process.env,
      bwrap: options.bwrap,
    }),
    topology: on.topology,
    gatewayId: id,
    waits,
    exchanges,
    tracing: options.tracing,
    traceUrl: options.traceUrl,
    reads: readsFrom(options.dispatcherUrl ?? nobody),
    maxBodyBytes: options.maxBodyBytes ?? 64 * 1_048_576,
    maxBlobBytes: options.maxBodyBytes ?? 64 * 1_048_576,
    maxWaitS: options.maxWaitS ?? 60,
    log: pino({ level: process.env.VULCAN_TEST_LOG === undefined ? 'silent' : 'debug' }),
  })
  const server = serve({ fetch, hostname: '127.0.0.1', port: 0 })
  if (!server.listening) await once(server, 'listening')
  await bus.flush()
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    id,
    bus,
    roster,
    registry,
    secrets,
    waits,
    exchanges,
    async [Symbol.asyncDispose]() {
      waits.close()
      exchanges.close()
      gate.close()
      meters.close()
      await new Promise((resolve) => {
        server.close(resolve)
        if ('closeAllConnections' in server) server.closeAllConnections()
      })
      roster.close()
      registry.close()
      secrets.close()
      await bus[Symbol.asyncDispose]()
    },
  }
}

/** A plain HTTP server answering as `answers` does. */
export async function startDispatcher(answers: Answers): Promise<AsyncDisposable & { url: string }> {
  const server = createServer(answers)
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

export interface Site extends AsyncDisposable {
  on: Ground
  gateway: Gateway
  worker: Worker
}

/** Server, gateway and one runner; the gateway knows the runner. By default the code gives its input back. */
export async function site(
  options: GatewayOptions & { code?: Code; ackWaitMs?: number; slots?: number } = {},
): Promise<Site> {
  await using scope = new AsyncDisposableStack()
  const on = scope.use(await ground(options.ackWaitMs === undefined ? {} : { ackWaitMs: options.ackWaitMs }))
  const gateway = scope.use(await startGateway(on, options))
  const echo: Code = (job) => completed(job.input === undefined ? null : JSON.parse(job.input))
  const code = options.code ?? echo
  const worker = scope.use(
    await startWorker(on, code, options.slots === undefined ? {} : { slots: options.slots }),
  )
  await untilKnown(gateway)
  const resources = scope.move()
  return { on, gateway, worker, [Symbol.asyncDispose]: () => resources.disposeAsync() }
}

/** A backend as `/v1/backends` lists it. */
export const backendOf = ({ roster }: Gateway, isolation: Isolation): Backend =>
  roster.backends().find((backend) => backend.isolation === isolation)!

export const untilKnown = (gateway: Gateway, isolation: Isolation = 'isolate') =>
  until('a runner', () => backendOf(gateway, isolation).runners.length > 0 || undefined)

// biome-ignore lint/suspicious/noExplicitAny: answers are looked into field by field.
export type Json = any

export interface Answer {
  status: number
  headers: Headers
  body: Json
}

export async function call(
  gateway: { url: string },
  method: string,
  path: string,
  options: {
    body?: unknown
    raw?: string | Uint8Array<ArrayBuffer> | ReadableStream
    headers?: Record<string, string>
    signal?: AbortSignal
  } = {},
): Promise<Answer> {
  const body = options.raw ?? (options.body === undefined ? undefined : JSON.stringify(options.body))
  const answer = await fetch(`${gateway.url}${path}`, {
    method,
    headers: { ...(body === undefined ? {} : { 'content-type': 'application/json' }), ...options.headers },
    ...(body === undefined ? {} : { body, duplex: 'half' as const }),
    ...(options.signal === undefined ? {} : { signal: options.signal }),
  })
  const text = await answer.text()
  return {
    status: answer.status,
    headers: answer.headers,
    body: text.startsWith('{') || text.startsWith('[') ? JSON.parse(text) : text,
  }
}

export const post = (
  gateway: { url: string },
  body: unknown,
  headers: Record<string, string> = {},
  path = '/v1/workloads',
) => call(gateway, 'POST', path, { body, headers })
