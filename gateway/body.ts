/** Reading a request body within a limit, before anything is stored. */
import type { Context } from 'hono'
import { Problem } from '../shared/errors.ts'

/** Bodies above this size (bytes) are counted against the process’s budget. */
const largeBytes = 1_048_576
/** Bytes of large bodies held at once; more is answered 503 rather than with an out-of-memory crash. */
const budgetBytes = 512 * 1_048_576
let held = 0

export const tooLarge = (limit: number) =>
  new Problem('payload_too_large', {
    detail: `the body may have at most ${limit < 1_048_576 ? `${Math.floor(limit / 1_024)} KiB` : `${Math.floor(limit / 1_048_576)} MiB`}`,
  })

/**
 * Reads the whole body and hands it to `use`; it counts against the budget until `use` settles.
 * Throws `payload_too_large` as soon as the limit (bytes) is known to be passed.
 */
export const withBody = <T>(c: Context, limit: number, use: (body: Buffer) => Promise<T>): Promise<T> =>
  withRequestBody(c.req.raw, limit, use)

/** As `withBody`, for a request that no router has in hand. */
export async function withRequestBody<T>(
  request: Request,
  limit: number,
  use: (body: Buffer) => Promise<T>,
): Promise<T> {
  const declared = Number(request.headers.get('content-length') ?? Number.NaN)
  if (declared > limit) throw tooLarge(limit)
  if (declared <= largeBytes) return await use(Buffer.from(await request.arrayBuffer()))

  let reserved = 0
  const reserve = (bytes: number) => {
    if (held + bytes > budgetBytes)
      throw new Problem('overloaded', { detail: 'too many large bodies are being received', retryAfterS: 1 })
    held += bytes
    reserved += bytes
  }
  try {
    if (declared > 0) reserve(declared)
    const chunks: Uint8Array[] = []
    let size = 0
    for await (const chunk of request.body ?? []) {
      size += chunk.byteLength
      if (size > limit) throw tooLarge(limit)
      if (size > reserved) reserve(chunk.byteLength)
      chunks.push(chunk)
    }
    return await use(Buffer.concat(chunks))
  } finally {
    held -= reserved
  }
}

/** Refuses what is not declared as JSON: browsers send anything else across origins without asking. */
export function requireJson(c: Context): void {
  const type = c.req.header('content-type')
  if (type === undefined || !/^application\/(?:[\w.+-]+\+)?json\b/i.test(type))
    throw new Problem('unsupported_media_type', {
      detail: `content-type must be application/json, not ${type ?? 'missing'}`,
    })
}

export function parseJson(body: Buffer): unknown {
  try {
    return JSON.parse(body.toString('utf8'))
  } catch (cause) {
    throw new Problem('malformed_json', { detail: (cause as Error).message, cause })
  }
}
