/** HTTP bodies and headers as events carry them. Pure but for the box that seals credentials. */
import { isUtf8 } from 'node:buffer'
import type { HttpBody } from './events.ts'
import { credentialHeaders, type SecretBox } from './secrets.ts'
import type { Digest, HeaderList } from './workload.ts'

/** Bodies up to this (bytes) stand in the event itself; a message holds 1 MiB. */
export const inlineBodyBytes = 256 * 1024
/** Text that takes more than this (bytes) as JSON is carried in base64: a control character takes six. */
const inlineTextBytes = 512 * 1024

/** As text where the bytes are UTF-8, else in base64; null where there are none. */
export function inlineBody(bytes: Uint8Array): HttpBody {
  if (bytes.byteLength === 0) return null
  const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  if (isUtf8(buffer)) {
    const text = buffer.toString()
    if (bytes.byteLength * 6 <= inlineTextBytes || Buffer.byteLength(JSON.stringify(text)) <= inlineTextBytes)
      return { text }
  }
  return { base64: buffer.toString('base64') }
}

/** The bytes of a body that was kept. `blob` gives those in the object store. */
export function bodyBytes<T>(
  body: Exclude<HttpBody, 'live'>,
  blob: (digest: Digest) => T,
): Uint8Array | T | null {
  if (body === null) return null
  if ('text' in body) return Buffer.from(body.text as string)
  if ('base64' in body) return Buffer.from(body.base64 as string, 'base64')
  return blob(body.blob)
}

/** Takes the headers that carry credentials out and seals them. The context is the workload’s id. */
export function sealHeaders(
  headers: HeaderList,
  box: SecretBox,
  id: string,
): { headers: HeaderList; sealed: string | null } {
  if (!headers.some(([name]) => credentialHeaders.has(name))) return { headers, sealed: null }
  const open = headers.filter(([name]) => !credentialHeaders.has(name))
  const secret = headers.filter(([name]) => credentialHeaders.has(name))
  return { headers: open, sealed: box.seal(JSON.stringify(secret), id) }
}

/** All headers, those that were sealed last. Throws where they were sealed with another key. */
export function unsealHeaders(
  { headers, sealed }: { headers: HeaderList; sealed: string | null },
  box: SecretBox,
  id: string,
): HeaderList {
  return sealed === null ? headers : [...headers, ...(JSON.parse(box.unseal(sealed, id)) as HeaderList)]
}
