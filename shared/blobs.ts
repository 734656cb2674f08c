/** Content-addressed bytes in the object store: payloads too large for a message, bundles, archives. */
import { Objm, type ObjectStore } from '@nats-io/obj'
import type { Bus } from './bus.ts'
import { BusUnavailable } from './errors.ts'
import { digestOf } from './ids.ts'
import { BLOBS } from './topology.ts'
import type { BlobRef, Digest } from './workload.ts'

export interface StoredBlob {
  digest: Digest
  /** Bytes. */
  size: number
  /** Last put, ms since the epoch. */
  at: number
}

/** An unreferenced blob younger than this may belong to a request on its way; it is put again rather than trusted. */
export const blobGraceMs = 24 * 3_600_000

export class Blobs {
  readonly #store: ObjectStore
  private constructor(store: ObjectStore) {
    this.#store = store
  }

  static async open(bus: Bus, replicas: number): Promise<Blobs> {
    return new Blobs(await new Objm(bus.js).create(BLOBS, { replicas, description: 'Bytes by sha256' }))
  }

  /** Stores bytes once; putting them again renews their age, so that the sweep keeps off. */
  async put(bytes: Uint8Array): Promise<BlobRef> {
    const digest = digestOf(bytes)
    try {
      const known = await this.#store.info(digest)
      const fresh = known !== null && !known.deleted && Date.now() - Date.parse(known.mtime) < blobGraceMs / 2
      if (!fresh) await this.#store.putBlob({ name: digest }, bytes)
    } catch (cause) {
      throw new BusUnavailable('the blob could not be stored', { cause })
    }
    return { blob: digest, size: bytes.byteLength }
  }

  /** The bytes, checked against their digest; undefined when there are none. */
  async get(digest: Digest): Promise<Uint8Array | undefined> {
    let bytes: Uint8Array | null
    try {
      bytes = await this.#store.getBlob(digest)
    } catch (cause) {
      throw new BusUnavailable(`blob ${digest} could not be read`, { cause })
    }
    if (bytes === null) return undefined
    if (digestOf(bytes) !== digest) throw new Error(`blob ${digest} holds other bytes`)
    return bytes
  }

  /** Size in bytes; undefined when there is no such blob. */
  async size(digest: Digest): Promise<number | undefined> {
    const info = await this.#store.info(digest).catch((cause) => {
      throw new BusUnavailable('the blob store cannot be read', { cause })
    })
    return info === null || info.deleted ? undefined : info.size
  }

  async list(): Promise<StoredBlob[]> {
    const infos = await this.#store.list()
    return infos.map((info) => ({ digest: info.name as Digest, size: info.size, at: Date.parse(info.mtime) }))
  }

  async remove(digest: Digest): Promise<void> {
    await this.#store.delete(digest)
  }
}
