/**
 * Fetches on behalf of user code, made outside of its sandbox. Every hop is checked against the function’s policy by
 * name, and against what is public by address: after the name was resolved, and the connection goes to the address
 * that was checked. So neither redirects nor DNS that changes its answer lead anywhere else.
 */
import { lookup } from 'node:dns/promises'
import { BlockList, isIP } from 'node:net'
import { networkInterfaces } from 'node:os'
import { Agent, buildConnector, fetch, Headers } from 'undici'
import { isSpanId, newSpanId, spanIdOf, traceIdOf, withSpanId } from '../shared/trace.ts'
import { type Attributes, preciseNow } from '../shared/tracing.ts'
import type { HeaderList, Egress as Policy } from '../shared/workload.ts'
import type { RunnerMetrics } from './metrics.ts'
import type { Phase } from './runner.ts'

export interface EgressOptions {
  /** `host:port`s that may have addresses which are not public; a function’s own policy must still name them. */
  allowPrivate?: readonly string[]
  /** `host:port`s of the platform itself, refused also where their addresses are public. */
  platform?: readonly string[]
  /** All addresses of a host name; default: the system’s resolver. Rejects where there are none. */
  resolve?: (host: string) => Promise<string[]>
  metrics?: Pick<RunnerMetrics, 'egress'> | undefined
}

export interface OutgoingRequest {
  method: string
  url: string
  headers: HeaderList
  redirect: 'follow' | 'error' | 'manual'
  body: Uint8Array | AsyncIterable<Uint8Array> | null
  /** Aborts the connection, also while the body of the answer comes. */
  signal: AbortSignal
  /** Set as a header where the request has none. */
  traceparent: string | undefined
  /**
   * Told of every hop, a client span each, whose own traceparent goes out then. It stands under `traceparent`, or
   * under the span of the same trace that the request’s header names; a header of another trace stays what it is.
   */
  onPhase?: ((phase: Phase) => void) | undefined
}

export interface OutgoingResponse {
  status: number
  statusText: string
  /** After redirects. */
  url: string
  redirected: boolean
  headers: HeaderList
  /** Decoded: gzip, deflate, br and zstd are undone, and `content-encoding` is left out then. */
  body: AsyncIterable<Uint8Array> | null
}

/** The policy forbids it. `message` names host and policy. */
export class EgressDenied extends Error {
  override name = 'EgressDenied'
}

const maxRedirects = 20
const maxAgents = 64
const connectMs = 10_000
const idleMs = 4_000
const maxHeaderBytes = 32 * 1024
/** Addresses of the platform’s own names are looked up again after so many ms. */
const platformMs = 60_000

/** Of the connection and its framing, which are not the code’s to say; `host` follows from the URL. */
const ownHeaders = new Set([
  'connection',
  'content-length',
  'expect',
  'host',
  'http2-settings',
  'keep-alive',
  'proxy-authenticate',
  'proxy-authorization',
  'proxy-connection',
  'te',
  'trailer',
  'transfer-encoding',
  'upgrade',
])
/** Not carried to another origin by a redirect. */
const credentials = ['authorization', 'cookie']
const bodyHeaders = ['content-encoding', 'content-language', 'content-location', 'content-type']
/** RFC 9110: a token; and field values without control characters other than tab. */
const isToken = (text: string) => /^[!#$%&'*+\-.^_`|~0-9A-Za-z]+$/.test(text)
const isValue = (text: string) => /^[\t\x20-\x7e\x80-\xff]*$/.test(text)

/** IANA’s special-purpose IPv4 addresses, multicast, and what is reserved. */
export const specialRanges4: readonly string[] = [
  '0.0.0.0/8',
  '10.0.0.0/8',
  '100.64.0.0/10',
  '127.0.0.0/8',
  '169.254.0.0/16',
  '172.16.0.0/12',
  '192.0.0.0/24',
  '192.0.2.0/24',
  '192.31.196.0/24',
  '192.52.193.0/24',
  '192.88.99.0/24',
  '192.168.0.0/16',
  '192.175.48.0/24',
  '198.18.0.0/15',
  '198.51.100.0/24',
  '203.0.113.0/24',
  '224.0.0.0/4',
  '240.0.0.0/4',
]
const special4 = new BlockList()
for (const range of specialRanges4) {
  const [net, bits] = range.split('/')
  special4.addSubnet(net!, Number(bits), 'ipv4')
}
/** Global unicast; all else (mapped, NAT64, local, multicast) is not public. */
const global6 = new BlockList()
global6.addSubnet('2000::', 3, 'ipv6')
/** Within it: protocol assignments with Teredo, documentation, 6to4. */
const special6 = new BlockList()
special6.addSubnet('2001::', 23, 'ipv6')
special6.addSubnet('2001:db8::', 32, 'ipv6')
special6.addSubnet('2002::', 16, 'ipv6')
special6.addSubnet('2620:4f:8000::', 48, 'ipv6')
special6.addSubnet('3fff::', 20, 'ipv6')

/** Whether an address in text form is one of the public internet. */
export function isPublic(address: string): boolean {
  switch (isIP(address)) {
    case 4:
      return !special4.check(address, 'ipv4')
    case 6:
      return !address.includes('%') && global6.check(address, 'ipv6') && !special6.check(address, 'ipv6')
    default:
      return false
  }
}

const plainHost = (host: string) =>
  host
    .toLowerCase()
    .replace(/^\[|\]$/g, '')
    .replace(/\.$/, '')

/** `host:port` with the host in its plain form. */
export function plainEntry(entry: string): string {
  const at = entry.lastIndexOf(':')
  return `${plainHost(entry.slice(0, at))}:${Number(entry.slice(at + 1))}`
}

/** Whether `policy` names host and port. `*.example.com` stands for every name below `example.com`. */
export function permits(policy: Policy, host: string, port: number): boolean {
  if (policy === 'all') return true
  if (policy === 'none') return false
  return policy.some((entry) => {
    const at = entry.lastIndexOf(':')
    if (Number(entry.slice(at + 1)) !== port) return false
    const name = plainHost(entry.slice(0, at))
    return name.startsWith('*.') ? host.endsWith(name.slice(1)) && isIP(host) === 0 : name === host
  })
}

/** Names of spans: a method that is none of these is the code’s own invention. */
const methods = new Set([
  'GET',
  'HEAD',
  'POST',
  'PUT',
  'DELETE',
  'CONNECT',
  'OPTIONS',
  'TRACE',
  'PATCH',
  'QUERY',
])
/** Of longer URLs (characters) a span has the origin only. */
const maxSpanUrl = 2_048

const portOf = (url: URL) => (url.port === '' ? (url.protocol === 'https:' ? 443 : 80) : Number(url.port))
const nameOf = (policy: Policy) => (typeof policy === 'string' ? policy : JSON.stringify(policy))

/** All addresses of a host name, as the host itself sees it. */
export const systemResolve = async (host: string) =>
  (await lookup(host, { all: true, verbatim: true })).map(({ address }) => address)

export class EgressGate implements AsyncDisposable {
  readonly #allowPrivate: ReadonlySet<string>
  readonly #platform: readonly string[]
  readonly #resolve: (host: string) => Promise<string[]>
  readonly #metrics: Pick<RunnerMetrics, 'egress'> | undefined
  /** By function, the longest unused first: connections are kept, but never shared between functions. */
  readonly #agents = new Map<string, Agent>()
  #platformAt = Number.NEGATIVE_INFINITY
  #platformAddresses: Promise<ReadonlySet<string>> | undefined

  constructor({ allowPrivate = [], platform = [], resolve = systemResolve, metrics }: EgressOptions = {}) {
    this.#metrics = metrics
    this.#allowPrivate = new Set(allowPrivate.map(plainEntry))
    this.#platform = platform.map(plainEntry)
    this.#resolve = resolve
  }

  /**
   * Fetches as the Fetch standard has it, without a cookie jar, proxies or credentials of ours. `owner` is whose
   * connections may be used again. Throws `EgressDenied`, or `TypeError` where there is no answer.
   */
  async fetch(owner: string, policy: Policy, request: OutgoingRequest): Promise<OutgoingResponse> {
    try {
      const response = await this.#fetch(owner, policy, request)
      this.#metrics?.egress('sent')
      return response
    } catch (error) {
      this.#metrics?.egress(error instanceof EgressDenied ? 'denied' : 'failed')
      throw error
    }
  }

  async #fetch(owner: string, policy: Policy, request: OutgoingRequest): Promise<OutgoingResponse> {
    const { redirect, signal } = request
    let { method, body } = request
    const headers = headersOf(request)
    const place = placeOf(request, headers)
    let url = parseUrl(request.url)
    for (let hops = 0; ; hops++) {
      using span = place === undefined ? undefined : new HopSpan(place, method, url, hops, headers)
      const response = await this.#hop(owner, policy, url, { method, headers, body, signal }).catch(
        (error) => {
          span?.failed(error as Error)
          throw error
        },
      )
      span?.answered(response.status)
      const location = response.headers.get('location')
      const redirects = [301, 302, 303, 307, 308].includes(response.status) && location !== null
      if (!redirects || redirect === 'manual') return answer(response, url, hops > 0)
      await response.body?.cancel().catch(() => {})
      if (redirect === 'error') throw new TypeError(`fetch failed: ${url.origin} redirects`)
      if (hops >= maxRedirects) throw new TypeError(`fetch failed: more than ${maxRedirects} redirects`)
      const next = parseUrl(location, url)
      const { status } = response
      if ((status === 303 && method !== 'GET' && method !== 'HEAD') || (status < 303 && method === 'POST')) {
        method = 'GET'
        body = null
        for (const name of bodyHeaders) headers.delete(name)
      }
      if (body !== null && !(body instanceof Uint8Array))
        throw new TypeError('fetch failed: a redirect asks for a streamed body again')
      if (next.origin !== url.origin) for (const name of credentials) headers.delete(name)
      url = next
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const agents = [...this.#agents.values()]
    this.#agents.clear()
    await Promise.all(agents.map((agent) => agent.destroy()))
  }

  #check(policy: Policy, url: URL): void {
    const host = plainHost(url.hostname)
    if (permits(policy, host, portOf(url))) return
    throw new EgressDenied(
      `fetch to ${host}:${portOf(url)} is not allowed: network.egress is ${nameOf(policy)}`,
    )
  }

  async #hop(
    owner: string,
    policy: Policy,
    url: URL,
    init: { method: string; headers: Headers; body: OutgoingRequest['body']; signal: AbortSignal },
  ) {
    this.#check(policy, url)
    try {
      return await fetch(url, {
        ...init,
        redirect: 'manual',
        dispatcher: this.#agentOf(owner),
        ...(init.body === null || init.body instanceof Uint8Array ? {} : { duplex: 'half' as const }),
      })
    } catch (error) {
      const cause = (error as Error).cause
      if (cause instanceof EgressDenied) throw cause
      if (init.signal.aborted) throw new TypeError('fetch failed: it was aborted')
      const { message } = (cause instanceof Error ? cause : error) as Error
      throw new TypeError(`fetch failed: ${message}`)
    }
  }

  #agentOf(owner: string): Agent {
    let agent = this.#agents.get(owner)
    if (agent !== undefined) this.#agents.delete(owner)
    else agent = this.#newAgent()
    this.#agents.set(owner, agent)
    if (this.#agents.size > maxAgents) {
      const [oldest, unused] = this.#agents.entries().next().value!
      this.#agents.delete(oldest)
      // Lets what is under way end first.
      void unused.close()
    }
    return agent
  }

  #newAgent(): Agent {
    const connect = buildConnector({ timeout: connectMs, allowH2: false })
    return new Agent({
      maxHeaderSize: maxHeaderBytes,
      keepAliveTimeout: idleMs,
      keepAliveMaxTimeout: idleMs,
      // A call has a time limit of its own, and ends its fetches with it.
      headersTimeout: 0,
      bodyTimeout: 0,
      connect: (options, callback) => {
        const host = plainHost(options.hostname)
        const port = options.port === '' ? (options.protocol === 'https:' ? 443 : 80) : Number(options.port)
        this.#addressOf(host, port).then(
          (address) =>
            connect({ ...options, hostname: address, servername: isIP(host) === 0 ? host : '' }, callback),
          (error: Error) => callback(error, null),
        )
      },
    })
  }

  /** The address to connect to: the first of the host’s that may be reached. Throws `EgressDenied`. */
  async #addressOf(host: string, port: number): Promise<string> {
    const found = isIP(host) === 0 ? await this.#resolve(host) : [host]
    if (this.#allowPrivate.has(`${host}:${port}`)) return found[0]!
    const ours = await this.#ownAddresses()
    const address = found.find((one) => isPublic(one) && !ours.has(one) && !ours.has(`${one}:${port}`))
    if (address !== undefined) return address
    throw new EgressDenied(
      `fetch to ${host}:${port} is not allowed: its address is not public, or is the platform’s own`,
    )
  }

  /** Addresses of this host, and `address:port`s of the platform’s other names. */
  async #ownAddresses(): Promise<ReadonlySet<string>> {
    const now = performance.now()
    if (this.#platformAddresses === undefined || now - this.#platformAt > platformMs) {
      this.#platformAt = now
      this.#platformAddresses = this.#lookUpOwn()
    }
    return this.#platformAddresses
  }

  async #lookUpOwn(): Promise<ReadonlySet<string>> {
    const own = new Set<string>()
    for (const addresses of Object.values(networkInterfaces()))
      for (const { address } of addresses ?? []) own.add(address)
    for (const entry of this.#platform) {
      const at = entry.lastIndexOf(':')
      const host = entry.slice(0, at)
      const addresses = isIP(host) === 0 ? await this.#resolve(host).catch(() => []) : [host]
      for (const address of addresses) own.add(`${address}${entry.slice(at)}`)
    }
    return own
  }
}

/** Where the spans of a fetch stand: below the run, or a span of the code that its own header names. */
interface Place {
  onPhase: (phase: Phase) => void
  parentSpanId: string | undefined
  /** What the header is made of; undefined where the code has set one of another trace. */
  traceparent: string | undefined
}

function placeOf({ traceparent, onPhase }: OutgoingRequest, headers: Headers): Place | undefined {
  if (onPhase === undefined || traceparent === undefined) return undefined
  const given = headers.get('traceparent')!
  const isOurs = given.length === traceparent.length && traceIdOf(given) === traceIdOf(traceparent)
  const parent = isOurs ? spanIdOf(given) : undefined
  return {
    onPhase,
    parentSpanId: isSpanId(parent) && parent !== spanIdOf(traceparent) ? parent : undefined,
    traceparent: isOurs ? traceparent : undefined,
  }
}

/** One request to one place, from when it is made to the head of its answer. Sets its traceparent. */
class HopSpan implements Disposable {
  readonly #place: Place
  readonly #name: string
  readonly #start = preciseNow()
  readonly #spanId = newSpanId()
  readonly #attributes: Attributes
  #error: string | undefined

  constructor(place: Place, method: string, url: URL, hops: number, headers: Headers) {
    const isKnown = methods.has(method)
    const plain = `${url.origin}${url.pathname}`
    this.#place = place
    this.#name = isKnown ? method : 'HTTP'
    this.#attributes = {
      'http.request.method': isKnown ? method : '_OTHER',
      'server.address': plainHost(url.hostname),
      'server.port': portOf(url),
      'url.full': plain.length > maxSpanUrl ? url.origin : plain,
      'http.request.resend_count': hops > 0 ? hops : undefined,
    }
    if (place.traceparent !== undefined)
      headers.set('traceparent', withSpanId(place.traceparent, this.#spanId))
  }

  answered(status: number): void {
    this.#attributes['http.response.status_code'] = status
    if (status < 400) return
    this.#attributes['error.type'] = String(status)
    this.#error = `answered ${status}`
  }

  failed(error: Error): void {
    this.#attributes['error.type'] = error instanceof EgressDenied ? 'egress_denied' : error.name
    this.#error = error.message
  }

  [Symbol.dispose](): void {
    const { onPhase, parentSpanId } = this.#place
    onPhase({
      name: this.#name,
      kind: 'client',
      start: this.#start,
      end: preciseNow(),
      attributes: this.#attributes,
      spanId: this.#spanId,
      ...(parentSpanId === undefined ? {} : { parentSpanId }),
      ...(this.#error === undefined ? {} : { error: this.#error }),
    })
  }
}

function parseUrl(text: string, base?: URL): URL {
  let url: URL
  try {
    url = new URL(text, base)
  } catch {
    throw new TypeError(`fetch failed: ${text.slice(0, 200)} is not a URL`)
  }
  if (url.protocol !== 'http:' && url.protocol !== 'https:')
    throw new TypeError(`fetch failed: ${url.protocol} is not fetched, only http: and https:`)
  if (url.username !== '' || url.password !== '')
    throw new TypeError('fetch failed: a URL must not hold a user name or password')
  url.hash = ''
  return url
}

function headersOf({ headers: list, traceparent }: OutgoingRequest): Headers {
  const headers = new Headers()
  for (const [name, value] of list) {
    if (!isToken(name) || !isValue(value))
      throw new TypeError(`fetch failed: header ${JSON.stringify(name.slice(0, 100))} is not valid`)
    if (!ownHeaders.has(name.toLowerCase())) headers.append(name, value)
  }
  if (traceparent !== undefined && !headers.has('traceparent')) headers.set('traceparent', traceparent)
  if (!headers.has('user-agent')) headers.set('user-agent', 'vulcan')
  return headers
}

function answer(
  response: Awaited<ReturnType<typeof fetch>>,
  url: URL,
  redirected: boolean,
): OutgoingResponse {
  const decoded = response.headers.has('content-encoding')
  const headers: HeaderList = []
  for (const [name, value] of response.headers)
    if (!decoded || (name !== 'content-encoding' && name !== 'content-length')) headers.push([name, value])
  const { status, statusText, body } = response
  return { status, statusText, url: url.href, redirected, headers, body }
}
