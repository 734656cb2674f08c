/** `/v1/blobs`: bytes by their sha256, in and out as streams. */
import { Hono } from 'hono'
import type { Blobs } from '../shared/blobs.ts'
import { BusUnavailable, Problem } from '../shared/errors.ts'
import { Digest } from '../shared/workload.ts'
import { tooLarge } from './body.ts'
import { spool } from './spool.ts'

export interface BlobRoutes {
  blobs: Blobs
  /** Largest upload in bytes. */
  maxBlobBytes: number
}

/** Says what the bytes must be, as `?digest=` does. */
const digestHeader = 'x-vulcan-digest'

function parseDigest(text: string | undefined, field: string): Digest | undefined {
  if (text === undefined) return undefined
  const parsed = Digest.safeParse(text)
  if (parsed.success) return parsed.data
  const code = field === 'digest' ? 'invalid_query' : 'invalid_header'
  throw new Problem(code, { detail: 'must be sha256: and 64 hex digits', field })
}

export function blobRoutes({ blobs, maxBlobBytes }: BlobRoutes): Hono {
  const app = new Hono()

  app.post('/', async (c) => {
    const expected =
      parseDigest(c.req.query('digest'), 'digest') ??
      parseDigest(c.req.header(digestHeader), 'X-Vulcan-Digest')
    if (Number(c.req.header('content-length')) > maxBlobBytes) throw tooLarge(maxBlobBytes)
    await using body = await spool(c.req.raw.body, maxBlobBytes)
    const { ref } = body
    if (expected !== undefined && expected !== ref.blob)
      throw new Problem('digest_mismatch', { detail: `the bytes received are ${ref.blob}`, field: 'digest' })
    const known = (await blobs.size(ref.blob)) !== undefined
    await blobs.putStream(ref, () => body.stream())
    return c.json(ref, known ? 200 : 201, { Location: `/v1/blobs/${ref.blob}` })
  })

  // HEAD comes here too; its body is left out by Hono.
  app.get('/:digest', async (c) => {
    const digest = Digest.safeParse(c.req.param('digest'))
    const found = digest.success ? await blobs.open(digest.data) : undefined
    if (found === undefined)
      throw new Problem('blob_not_found', { detail: `there is no blob ${c.req.param('digest')}` })
    const headers = {
      'Content-Type': 'application/octet-stream',
      'Content-Length': String(found.size),
      'Cache-Control': 'private, max-age=31536000, immutable',
      ETag: `"${digest.data}"`,
      'X-Content-Type-Options': 'nosniff',
      'Content-Disposition': 'attachment',
    }
    if (c.req.method === 'HEAD') return c.body(null, 200, headers)
    const chunks = found.chunks[Symbol.asyncIterator]()
    // The first piece before the head: what cannot be read at all is answered as that.
    const first = await chunks.next().catch((error) => {
      if (error instanceof BusUnavailable) throw error
      throw new Problem('internal', { detail: (error as Error).message, cause: error })
    })
    return c.body(ReadableStream.from(startingWith(first, chunks)), 200, headers)
  })
  return app
}

async function* startingWith<T>(first: IteratorResult<T>, rest: AsyncGenerator<T>): AsyncGenerator<T> {
  if (first.done) return
  yield first.value
  yield* rest
}
