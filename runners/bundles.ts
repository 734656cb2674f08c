/** The code of deployed functions by its digest: from the object store once, then from memory. */
import type { Blobs } from '../shared/blobs.ts'
import type { Digest } from '../shared/workload.ts'

/** Bytes (as UTF-8) of code and source maps kept in memory. */
const keptBytes = 128 * 1_048_576

export class Bundles {
  readonly #blobs: Pick<Blobs, 'get'>
  readonly #maxBytes: number
  /** In order of use, the longest unused first. */
  readonly #kept = new Map<Digest, { text: string; size: number }>()
  readonly #coming = new Map<Digest, Promise<string>>()
  #bytes = 0

  constructor(blobs: Pick<Blobs, 'get'>, maxBytes: number = keptBytes) {
    this.#blobs = blobs
    this.#maxBytes = maxBytes
  }

  /**
   * The text; those who ask for one at the same time share one fetch. Throws `BusUnavailable` where trying again can
   * help, and an error that says so where it is gone or corrupt.
   */
  get(digest: Digest): string | Promise<string> {
    const known = this.#kept.get(digest)
    if (known !== undefined) {
      this.#kept.delete(digest)
      this.#kept.set(digest, known)
      return known.text
    }
    let coming = this.#coming.get(digest)
    if (coming === undefined) {
      coming = this.#fetch(digest).finally(() => this.#coming.delete(digest))
      this.#coming.set(digest, coming)
    }
    return coming
  }

  /** Bytes held. */
  get bytes(): number {
    return this.#bytes
  }

  async #fetch(digest: Digest): Promise<string> {
    const bytes = await this.#blobs.get(digest)
    if (bytes === undefined) throw new Error(`${digest} is no longer stored`)
    const text = Buffer.from(bytes).toString()
    const size = bytes.byteLength
    if (size > this.#maxBytes) return text
    this.#kept.set(digest, { text, size })
    this.#bytes += size
    for (const [oldest, { size: freed }] of this.#kept) {
      if (this.#bytes <= this.#maxBytes) break
      this.#kept.delete(oldest)
      this.#bytes -= freed
    }
    return text
  }
}
