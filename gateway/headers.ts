/** Which headers pass between a caller and a function. */
import type { IncomingMessage } from 'node:http'
import type { HeaderList } from '../shared/workload.ts'

/** RFC 9110, section 7.6.1, and what belongs to one connection by custom. */
const hopByHop = new Set([
  'connection',
  'keep-alive',
  'proxy-connection',
  'te',
  'trailer',
  'transfer-encoding',
  'upgrade',
])
/** Set by the gateway itself, whatever came. */
const own = new Set(['traceparent'])
/** A request’s: answered by the gateway, or written anew by it. */
const ofRequests = new Set([
  'expect',
  'http2-settings',
  'x-forwarded-for',
  'x-forwarded-proto',
  'x-forwarded-host',
])
/** The platform’s own names. */
const prefix = 'x-vulcan-'

/** Those that are meant for the other end; names in lower case. */
export function endToEnd(headers: HeaderList, of: 'request' | 'response'): HeaderList {
  let named: Set<string> | undefined
  for (const [name, value] of headers)
    if (name === 'connection') {
      named ??= new Set()
      for (const part of value.split(',')) named.add(part.trim().toLowerCase())
    }
  return headers.filter(
    ([name]) =>
      !hopByHop.has(name) &&
      !own.has(name) &&
      !name.startsWith(prefix) &&
      !(of === 'request' && ofRequests.has(name)) &&
      named?.has(name) !== true,
  )
}

/**
 * The headers of a request as the function sees them. `x-forwarded-for` is added to, `-proto` and `-host` are the
 * caller’s own words where a proxy in front has set them.
 */
export function requestHeaders(incoming: IncomingMessage): HeaderList {
  const { rawHeaders, headers, socket } = incoming
  const all: HeaderList = []
  for (let i = 0; i < rawHeaders.length; i += 2) all.push([rawHeaders[i]!.toLowerCase(), rawHeaders[i + 1]!])
  const list = endToEnd(all, 'request')
  const before = headers['x-forwarded-for']
  const from = socket.remoteAddress ?? 'unknown'
  list.push(['x-forwarded-for', before === undefined ? from : `${before}, ${from}`])
  list.push(['x-forwarded-proto', one(headers['x-forwarded-proto']) ?? 'http'])
  const host = one(headers['x-forwarded-host']) ?? headers.host
  if (host !== undefined) list.push(['x-forwarded-host', host])
  return list
}

const one = (value: string | string[] | undefined) => (Array.isArray(value) ? value[0] : value)

/** A wish for another protocol on the connection that cannot be passed over, as h2c can. */
export const wantsUpgrade = ({ headers }: IncomingMessage): boolean =>
  headers.upgrade?.split(',').some((protocol) => protocol.trim().toLowerCase() === 'websocket') === true
