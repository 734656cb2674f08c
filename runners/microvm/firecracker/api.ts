/**
 * Firecracker’s API: requests as plain values, and what sends them over its Unix socket. Names and types are those of
 * its OpenAPI document, src/firecracker/swagger/firecracker.yaml of v1.16.1; only what the driver sends is here.
 */
import { Agent, request as httpRequest } from 'node:http'
import { MachineError } from '../driver.ts'

/** Tokens are bytes or operations; `size` of them come back in `refill_time` ms. */
export interface TokenBucket {
  size: number
  refill_time: number
  one_time_burst?: number
}

export interface RateLimiter {
  bandwidth?: TokenBucket
  ops?: TokenBucket
}

export interface BootSource {
  kernel_image_path: string
  initrd_path?: string
  boot_args?: string
}

export interface Drive {
  drive_id: string
  path_on_host: string
  is_root_device: boolean
  is_read_only: boolean
  rate_limiter?: RateLimiter
}

export interface PartialDrive {
  drive_id: string
  rate_limiter: RateLimiter
}

export interface NetworkInterface {
  iface_id: string
  host_dev_name: string
  guest_mac?: string
  rx_rate_limiter?: RateLimiter
  tx_rate_limiter?: RateLimiter
}

export interface MachineConfiguration {
  vcpu_count: number
  mem_size_mib: number
  smt?: boolean
  track_dirty_pages?: boolean
}

export interface Logger {
  log_path: string
  level: 'Error' | 'Warning' | 'Info' | 'Debug' | 'Trace' | 'Off'
  show_level?: boolean
  show_log_origin?: boolean
}

export interface SnapshotLoad {
  snapshot_path: string
  mem_backend: { backend_type: 'File'; backend_path: string }
  resume_vm: boolean
  network_overrides?: { iface_id: string; host_dev_name: string }[]
}

export interface Request {
  method: 'GET' | 'PUT' | 'PATCH'
  path: string
  body?: object
}

const put = (path: string, body: object): Request => ({ method: 'PUT', path, body })
const patch = (path: string, body: object): Request => ({ method: 'PATCH', path, body })

/**
 * What the driver asks for, each resource once. There is no balloon and no metadata service (MMDS): a guest has
 * neither, because neither is ever configured.
 */
export const resources = {
  instance: (): Request => ({ method: 'GET', path: '/' }),
  logger: (body: Logger) => put('/logger', body),
  metrics: (body: { metrics_path: string }) => put('/metrics', body),
  machine: (body: MachineConfiguration) => put('/machine-config', body),
  bootSource: (body: BootSource) => put('/boot-source', body),
  drive: (body: Drive) => put(`/drives/${body.drive_id}`, body),
  limitDrive: (body: PartialDrive) => patch(`/drives/${body.drive_id}`, body),
  network: (body: NetworkInterface) => put(`/network-interfaces/${body.iface_id}`, body),
  vsock: (body: { guest_cid: number; uds_path: string }) => put('/vsock', body),
  entropy: () => put('/entropy', {}),
  action: (action_type: 'InstanceStart' | 'FlushMetrics') => put('/actions', { action_type }),
  state: (state: 'Paused' | 'Resumed') => patch('/vm', { state }),
  createSnapshot: (body: { snapshot_type: 'Full'; snapshot_path: string; mem_file_path: string }) =>
    put('/snapshot/create', body),
  loadSnapshot: (body: SnapshotLoad) => put('/snapshot/load', body),
} satisfies Record<string, (...args: never[]) => Request>

/** Firecracker has refused a request, or has not answered it. */
export class FirecrackerError extends MachineError {
  override name = 'FirecrackerError'
  /** Undefined where no answer came. */
  readonly status: number | undefined

  constructor(message: string, { status, cause }: { status?: number; cause?: unknown } = {}) {
    super(message, cause === undefined ? undefined : { cause })
    this.status = status
  }
}

/** No answer of the API is longer than a few KiB. */
const maxAnswerBytes = 256 * 1024

export class Api implements Disposable {
  readonly #socketPath: string
  /** Firecracker answers one request after the other. */
  readonly #agent = new Agent({ keepAlive: true, maxSockets: 1 })

  constructor(socketPath: string) {
    this.#socketPath = socketPath
  }

  /**
   * Resolves to the answer, undefined where it has no content. Rejects with `FirecrackerError` where the request is
   * refused (the message has Firecracker’s `fault_message`) or not answered within `deadlineMs`.
   */
  async send({ method, path, body }: Request, deadlineMs = 10_000): Promise<unknown> {
    const what = `${method} ${path}`
    const signal = AbortSignal.timeout(deadlineMs)
    const { status, text } = await this.#exchange(method, path, body, signal).catch((cause) => {
      const why = signal.aborted ? `no answer within ${deadlineMs} ms` : (cause as Error).message
      throw new FirecrackerError(`Firecracker, ${what}: ${why}`, { cause })
    })
    if (status >= 200 && status < 300) return text === '' ? undefined : parse(text)
    const fault = (parse(text) as { fault_message?: unknown } | undefined)?.fault_message
    const why = typeof fault === 'string' ? fault : `status ${status}`
    throw new FirecrackerError(`Firecracker, ${what}: ${why}`, { status })
  }

  #exchange(method: string, path: string, body: object | undefined, signal: AbortSignal) {
    return new Promise<{ status: number; text: string }>((resolve, reject) => {
      const payload = body === undefined ? undefined : Buffer.from(JSON.stringify(body))
      const headers = {
        accept: 'application/json',
        ...(payload && { 'content-type': 'application/json', 'content-length': payload.length }),
      }
      const options = { socketPath: this.#socketPath, agent: this.#agent, method, path, headers, signal }
      const sent = httpRequest(options, (answer) => {
        const pieces: Buffer[] = []
        let size = 0
        answer.on('data', (piece: Buffer) => {
          size += piece.length
          if (size > maxAnswerBytes)
            answer.destroy(new Error(`an answer of more than ${maxAnswerBytes} bytes`))
          else pieces.push(piece)
        })
        answer.once('error', reject)
        answer.once('end', () =>
          resolve({ status: answer.statusCode!, text: Buffer.concat(pieces).toString() }),
        )
      })
      sent.once('error', reject)
      sent.end(payload)
    })
  }

  [Symbol.dispose](): void {
    this.#agent.destroy()
  }
}

/** Undefined where it is no JSON. */
function parse(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}
