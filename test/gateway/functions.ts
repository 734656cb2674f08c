/** Functions put straight into the registry, and raw HTTP to call them by. */
import { once } from 'node:events'
import { type IncomingMessage, type OutgoingHttpHeaders, request } from 'node:http'
import type { Outcome } from '../../runners/runner.ts'
import { Blobs } from '../../shared/blobs.ts'
import { FunctionRecord, FunctionSpec, FunctionVersion } from '../../shared/functions.ts'
import type { HeaderList } from '../../shared/workload.ts'
import { completed } from '../runners/support.ts'
import { until } from '../shared/support.ts'
import type { Gateway } from './support.ts'

export const versionId = (n: number) => `v${n.toString(16).padStart(16, '0')}`

/** A version of a function, known to the gateway when this settles. */
export async function deploy(
  gateway: Gateway,
  name: string,
  options: {
    version?: number
    code?: string
    map?: string
    spec?: Partial<Record<keyof FunctionSpec, unknown>>
    aliases?: FunctionRecord['aliases']
  } = {},
): Promise<FunctionVersion> {
  const { registry } = gateway
  const blobs = await Blobs.open(gateway.bus, 1)
  const bundle = await blobs.put(Buffer.from(options.code ?? `export default { fetch() {} } // ${name}`))
  const map = options.map === undefined ? null : (await blobs.put(Buffer.from(options.map))).blob
  const { code: _, ...spec } = FunctionSpec.parse({ code: 'x', ...options.spec })
  const now = new Date().toISOString()
  const version = FunctionVersion.parse({
    name,
    version: versionId(options.version ?? 1),
    created_at: now,
    isolation: 'isolate',
    routing_reason: 'test',
    runtime: 'javascript',
    bundle: { ...bundle, map },
    source: null,
    spec,
    warnings: [],
  })
  await registry.putVersion(version)
  const known = registry.get(name)
  const record = FunctionRecord.parse({
    name,
    created_at: now,
    updated_at: now,
    deleted_at: null,
    latest: version.version,
    versions: [
      { version: version.version, deployed_at: now },
      ...(known?.record.versions ?? []).filter((one) => one.version !== version.version),
    ],
    aliases: options.aliases ?? known?.record.aliases ?? {},
  })
  await registry.put(record, known?.revision ?? 0)
  await until('the version', () => registry.version(name, version.version))
  return version
}

/** A response that is there at once. */
export const responded = (
  status: number,
  body: string | Uint8Array = '',
  headers: HeaderList = [],
): Outcome => ({
  ...(completed(null) as Extract<Outcome, { status: 'completed' }>),
  response: { status, headers, body: typeof body === 'string' ? Buffer.from(body) : body },
})

export interface Raw {
  status: number
  headers: IncomingMessage['headers']
  rawHeaders: string[]
  body: Buffer
}

export interface RawOptions {
  method?: string
  headers?: OutgoingHttpHeaders
  body?: string | Uint8Array | AsyncIterable<Uint8Array>
}

/** Sends a request and gives its response as soon as its head is there. */
export async function open(
  { url }: { url: string },
  path: string,
  options: RawOptions = {},
): Promise<IncomingMessage> {
  const sent = request(`${url}${path}`, {
    method: options.method ?? 'GET',
    headers: options.headers,
    agent: false,
  })
  const answered = once(sent, 'response')
  answered.catch(() => {})
  if (options.body === undefined) sent.end()
  else if (typeof options.body === 'string' || options.body instanceof Uint8Array) sent.end(options.body)
  else {
    const body = options.body
    void (async () => {
      for await (const part of body) if (!sent.write(part)) await once(sent, 'drain')
      sent.end()
    })().catch(() => sent.destroy())
  }
  const [response] = await answered
  return response as IncomingMessage
}

/** Rejects where the response does not come to its end. */
export async function read(response: IncomingMessage): Promise<Raw> {
  const parts: Buffer[] = []
  for await (const part of response) parts.push(part)
  return {
    status: response.statusCode!,
    headers: response.headers,
    rawHeaders: response.rawHeaders,
    body: Buffer.concat(parts),
  }
}

export const fetchRaw = async (
  gateway: { url: string },
  path: string,
  options: RawOptions = {},
): Promise<Raw> => read(await open(gateway, path, options))

/** The whole of a body. */
export async function drain(body: AsyncIterable<Uint8Array> | Uint8Array | null): Promise<Buffer> {
  if (body === null) return Buffer.alloc(0)
  if (body instanceof Uint8Array) return Buffer.from(body)
  const parts: Uint8Array[] = []
  for await (const part of body) parts.push(part)
  return Buffer.concat(parts)
}
