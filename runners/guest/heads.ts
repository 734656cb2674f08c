/** The heads of requests and responses as a child may say them: the same rules on both sides of its pipe. */
import { FrameError } from '../../shared/frames.ts'
import { type FetchHead, maxHeaderChars, type ResponseHead } from '../../shared/guest.ts'
import type { HeaderList } from '../../shared/workload.ts'

/** RFC 9110: a token; field values and methods without control characters other than tab. */
const isToken = (text: string) => /^[!#$%&'*+\-.^_`|~0-9A-Za-z]+$/.test(text)
const isValue = (text: string) => /^[\t\x20-\x7e\x80-\xff]*$/.test(text)

const fieldsOf = (value: unknown): Record<string, unknown> =>
  typeof value === 'object' && value !== null ? (value as Record<string, unknown>) : {}

function readHeaders(value: unknown): HeaderList {
  if (!Array.isArray(value)) throw new FrameError('headers that are no list')
  let chars = 0
  return value.map((pair) => {
    const [name, text] = Array.isArray(pair) && pair.length === 2 ? (pair as unknown[]) : []
    if (typeof name !== 'string' || typeof text !== 'string' || name !== name.toLowerCase())
      throw new FrameError('a header that is not a name and a value')
    if (!isToken(name) || !isValue(text))
      throw new FrameError(`a header that cannot be sent: ${JSON.stringify(name.slice(0, 100))}`)
    chars += name.length + text.length
    if (chars > maxHeaderChars) throw new FrameError(`headers of more than ${maxHeaderChars} characters`)
    return [name, text]
  })
}

/** Throws `FrameError`. */
export function readResponseHead(value: unknown): ResponseHead {
  const { status, headers } = fieldsOf(value)
  if (!Number.isInteger(status) || (status as number) < 200 || (status as number) > 599)
    throw new FrameError('a response whose status is not one of 200 to 599')
  return { status: status as number, headers: readHeaders(headers) }
}

const redirects: readonly unknown[] = ['follow', 'error', 'manual']
const bodies: readonly unknown[] = ['none', 'whole', 'stream']

/** Throws `FrameError`. */
export function readFetchHead(value: unknown): FetchHead {
  const { method, url, headers, redirect, body } = fieldsOf(value)
  if (typeof method !== 'string' || !isToken(method)) throw new FrameError('a fetch without a method')
  if (typeof url !== 'string' || !redirects.includes(redirect) || !bodies.includes(body))
    throw new FrameError('a fetch that makes no sense')
  return {
    method,
    url,
    headers: readHeaders(headers),
    redirect: redirect as FetchHead['redirect'],
    body: body as FetchHead['body'],
  }
}

/** The query of a URL as JSON text: what a JSON handler that is called by GET has for its input. */
export function queryOf(url: string): string {
  const query: Record<string, string | string[]> = Object.create(null)
  for (const [name, value] of new URL(url).searchParams) {
    const present = query[name]
    if (present === undefined) query[name] = value
    else if (typeof present === 'string') query[name] = [present, value]
    else present.push(value)
  }
  return JSON.stringify(query)
}
