/**
 * Load from this process: `connections` requests in flight over keep-alive HTTP, latencies kept one by one. The
 * client is a socket and a byte count: on two cores, whatever a client library spends is taken from the server.
 */
import { createConnection, type Socket } from 'node:net'

export interface LoadResult {
  /** Requests per second. */
  rate: number
  /** Milliseconds. */
  p50: number
  p99: number
  /** Microseconds of CPU for one request, where somebody has counted. */
  cpu?: number
  requests: number
  errors: number
  /** Of what was not answered as expected: by status, 0 for a broken connection. */
  statuses?: Record<number, number>
}

export interface LoadOptions {
  origin: string
  /** The same for every request, or made for each; so is the body. */
  path: string | (() => string)
  body: string | (() => string)
  connections: number
  seconds: number
  /** Status that counts as success. */
  expect: number
}

export const percentile = (sorted: readonly number[], p: number): number =>
  sorted[Math.min(sorted.length - 1, Math.floor((sorted.length * p) / 100))] ?? Number.NaN

export function summarise(latencies: number[], seconds: number, errors: number): LoadResult {
  latencies.sort((a, b) => a - b)
  return {
    rate: latencies.length / seconds,
    p50: percentile(latencies, 50),
    p99: percentile(latencies, 99),
    requests: latencies.length,
    errors,
  }
}

/** Calls `one` over and over, `inFlight` at a time; it says whether it went well. */
export async function repeat(
  one: (client: number) => Promise<boolean>,
  inFlight: number,
  seconds: number,
): Promise<LoadResult> {
  const latencies: number[] = []
  let errors = 0
  const start = performance.now()
  const client = async (_: unknown, number: number) => {
    while (performance.now() < start + seconds * 1_000) {
      const before = performance.now()
      if (await one(number)) latencies.push(performance.now() - before)
      else errors++
    }
  }
  await Promise.all(Array.from({ length: inFlight }, client))
  return summarise(latencies, (performance.now() - start) / 1_000, errors)
}

export async function load(options: LoadOptions): Promise<LoadResult> {
  const { origin, path, body, connections, seconds, expect } = options
  const { hostname, port, host } = new URL(origin)
  const made = (value: string | (() => string)) => (typeof value === 'string' ? value : value())
  const request = () => {
    const text = made(body)
    return Buffer.from(
      `POST ${made(path)} HTTP/1.1\r\nHost: ${host}\r\nContent-Type: application/json\r\n` +
        `Content-Length: ${Buffer.byteLength(text)}\r\n\r\n${text}`,
    )
  }
  const fixed = typeof body === 'string' && typeof path === 'string' ? request() : undefined
  const clients = await Promise.all(
    Array.from({ length: connections }, () => Client.open(hostname, Number(port))),
  )
  const statuses: Record<number, number> = {}
  const one = async (n: number) => {
    const status = await clients[n]!.exchange(fixed ?? request())
    if (status !== expect) statuses[status] = (statuses[status] ?? 0) + 1
    return status === expect
  }
  const result = await repeat(one, connections, seconds)
  for (const client of clients) client.close()
  return { ...result, statuses }
}

const endOfHead = Buffer.from('\r\n\r\n')

/** One connection with one request on it at a time. */
class Client {
  readonly #socket: Socket
  #received: Buffer = Buffer.alloc(0)
  #resolve: ((status: number) => void) | undefined

  private constructor(socket: Socket) {
    this.#socket = socket
    socket.setNoDelay(true)
    socket.on('data', (chunk: Buffer) => this.#take(chunk))
    socket.on('close', () => this.#settle(0))
    socket.on('error', () => this.#settle(0))
  }

  static open(host: string, port: number): Promise<Client> {
    return new Promise((resolve, reject) => {
      const socket = createConnection({ host, port }, () => resolve(new Client(socket)))
      socket.once('error', reject)
    })
  }

  /** Sends a request; resolves with the status once the whole answer is there, with 0 where the connection broke. */
  exchange(request: Buffer): Promise<number> {
    return new Promise((resolve) => {
      this.#resolve = resolve
      this.#socket.write(request)
    })
  }

  close(): void {
    this.#socket.destroy()
  }

  #take(chunk: Buffer): void {
    this.#received = this.#received.length === 0 ? chunk : Buffer.concat([this.#received, chunk])
    const head = this.#received.indexOf(endOfHead)
    if (head < 0) return
    const text = this.#received.toString('latin1', 0, head)
    const length = /\r\ncontent-length: (\d+)/i.exec(text)
    if (length === null || this.#received.length < head + 4 + Number(length[1])) return
    this.#received = Buffer.alloc(0)
    this.#settle(Number(text.slice(9, 12)))
  }

  #settle(status: number): void {
    const resolve = this.#resolve
    this.#resolve = undefined
    resolve?.(status)
  }
}
