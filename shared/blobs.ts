/** Content-addressed bytes in the object store: payloads too large for a message, bundles, archives. */
import { createHash } from 'node:crypto'
import { JetStreamApiError, type StoredMsg } from '@nats-io/jetstream'
import { type ObjectInfo, type ObjectStore, Objm } from '@nats-io/obj'
import { headers } from '@nats-io/transport-node'
import { type Bus, isNoRoom } from './bus.ts'
import { BusUnavailable, StreamFull } from './errors.ts'
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

/** A stored blob has lost a part or holds other bytes: reading it again will not help. */
export class BlobCorrupt extends Error {
  override name = 'BlobCorrupt'
}

export class Blobs {
  readonly #bus: Bus
  readonly #store: ObjectStore
  private constructor(bus: Bus, store: ObjectStore) {
    this.#bus = bus
    this.#store = store
  }

  static async open(bus: Bus, replicas: number): Promise<Blobs> {
    return new Blobs(bus, await new Objm(bus.js).create(BLOBS, { replicas, description: 'Bytes by sha256' }))
  }

  /**
   * Stores bytes once; putting them again renews their age, so that the sweep keeps off. Throws `StreamFull` where
   * there is no room, else `BusUnavailable`.
   */
  async put(bytes: Uint8Array): Promise<BlobRef> {
    const ref = { blob: digestOf(bytes), size: bytes.byteLength }
    return await this.putStream(ref, () => ReadableStream.from([bytes]))
  }

  /** The same for bytes whose digest and size are known; `bytes` is called where they are not stored yet. */
  async putStream(ref: BlobRef, bytes: () => ReadableStream<Uint8Array>): Promise<BlobRef> {
    const digest = ref.blob
    try {
      const known = await this.#info(digest)
      if (isFresh(known)) return ref
      // Of several that put the same bytes one wins; the others’ chunks are purged by the client.
      const previousRevision = known?.revision ?? 0
      await this.#store.put({ name: digest }, bytes(), { previousRevision }).catch(async (error) => {
        if (!isFresh(await this.#info(digest))) throw error
      })
    } catch (cause) {
      if (cause instanceof BusUnavailable) throw cause
      if (isNoRoom(cause)) throw new StreamFull(cause.message, { cause })
      throw new BusUnavailable('the blob could not be stored', { cause })
    }
    return ref
  }

  /**
   * The bytes, checked against their digest; undefined when there are none. Throws `BlobCorrupt`, or
   * `BusUnavailable` where trying again can help.
   */
  async get(digest: Digest): Promise<Uint8Array | undefined> {
    const info = await this.#info(digest)
    if (info === null || info.deleted) return undefined
    const parts: Uint8Array[] = []
    for await (const part of this.#read(digest, info)) parts.push(part)
    return Buffer.concat(parts)
  }

  /**
   * The bytes piece by piece; undefined when there are none. Bytes that are all gone are `BlobCorrupt` at once: whoever
   * hands them on has not answered yet. Reading throws `BlobCorrupt` at the end where they were
   * others than the digest says, and `BusUnavailable` where trying again can help.
   */
  async open(digest: Digest): Promise<{ size: number; chunks: AsyncGenerator<Uint8Array> } | undefined> {
    const info = await this.#info(digest)
    if (info === null || info.deleted) return undefined
    const chunks =
      info.size === 0 ? 1 : await this.#bus.lastSequence(`OBJ_${BLOBS}`, `$O.${BLOBS}.C.${info.nuid}`)
    if (chunks === 0) throw new BlobCorrupt(`blob ${digest} has lost its bytes`)
    return { size: info.size, chunks: this.#read(digest, info) }
  }

  /**
   * One chunk at a time, as fast as they are taken. The client’s own reading makes a consumer for each object, which
   * the server keeps for five minutes, and it has 1,000 at most.
   */
  async *#read(digest: Digest, { nuid, chunks }: ObjectInfo): AsyncGenerator<Uint8Array> {
    const hash = createHash('sha256')
    const next_by_subj = `$O.${BLOBS}.C.${nuid}`
    let seq = 0
    for (let n = 0; n < chunks; n++) {
      const message = await this.#chunk({ seq: seq + 1, next_by_subj })
      if (message === null) {
        // Put anew under the reader, it stands elsewhere now.
        if ((await this.#info(digest))?.nuid !== nuid)
          throw new BusUnavailable(`blob ${digest} was replaced while it was read`)
        throw new BlobCorrupt(`blob ${digest} has lost a part: ${n} of its ${chunks} chunks are there`)
      }
      seq = message.seq
      hash.update(message.data)
      yield message.data
    }
    if (`sha256:${hash.digest('hex')}` !== digest) throw new BlobCorrupt(`blob ${digest} holds other bytes`)
  }

  /** From whichever server has it; where one has nothing, the stream’s leader has the last word. */
  async #chunk(place: { seq: number; next_by_subj: string }): Promise<StoredMsg | null> {
    const stream = `OBJ_${BLOBS}`
    try {
      return (
        (await this.#bus.jsm.direct.getMessage(stream, place)) ??
        (await this.#bus.jsm.streams.getMessage(stream, place))
      )
    } catch (cause) {
      if (cause instanceof JetStreamApiError && cause.code === 10037) return null
      throw new BusUnavailable('a chunk of a blob could not be read', { cause })
    }
  }

  /** Size in bytes; undefined when there is no such blob. */
  async size(digest: Digest): Promise<number | undefined> {
    const info = await this.#info(digest)
    return info === null || info.deleted ? undefined : info.size
  }

  async list(): Promise<StoredBlob[]> {
    const infos = await this.#store.list()
    return infos.map((info) => ({ digest: info.name as Digest, size: info.size, at: Date.parse(info.mtime) }))
  }

  async remove(digest: Digest): Promise<void> {
    await this.#store.delete(digest)
  }

  /**
   * Removes a blob that was last put before `before` (ms since the epoch); says whether it did. A put at the same
   * moment wins: the mark of deletion is only stored upon the revision that was found too old.
   */
  async removeStale(digest: Digest, before: number): Promise<boolean> {
    const info = await this.#info(digest)
    if (info === null || info.deleted || Date.parse(info.mtime) >= before) return false
    if (!(await this.#restate(info, { deleted: true, size: 0, chunks: 0, digest: '' }))) return false
    await this.#bus.jsm.streams.purge(`OBJ_${BLOBS}`, { filter: `$O.${BLOBS}.C.${info.nuid}` })
    return true
  }

  /**
   * Renews the age of a stored blob, so that the sweep keeps off, and says its size; undefined when there is none.
   * Throws `BusUnavailable` where trying again can help.
   */
  async renew(digest: Digest): Promise<BlobRef | undefined> {
    for (;;) {
      const info = await this.#info(digest)
      if (info === null || info.deleted) return undefined
      if (isFresh(info) || (await this.#restate(info, { mtime: new Date().toISOString() })))
        return { blob: digest, size: info.size }
    }
  }

  /** Changes what stands of an object upon the revision that was read; says whether nobody came before. */
  async #restate(info: ObjectInfo, over: Partial<ObjectInfo>): Promise<boolean> {
    // The object store’s own format: https://github.com/nats-io/nats-architecture-and-design, ADR-20.
    const { name, description, options, metadata, bucket, nuid, size, chunks, digest, mtime, deleted } = info
    const before = {
      name,
      description,
      options,
      metadata,
      bucket,
      nuid,
      size,
      chunks,
      digest,
      mtime,
      deleted,
    }
    const key = Buffer.from(name).toString('base64').replaceAll('+', '-').replaceAll('/', '_')
    const rollup = headers()
    rollup.set('Nats-Rollup', 'sub')
    try {
      await this.#bus.js.publish(`$O.${BLOBS}.M.${key}`, JSON.stringify({ ...before, ...over }), {
        headers: rollup,
        expect: { lastSubjectSequence: info.revision },
      })
      return true
    } catch (cause) {
      if (cause instanceof JetStreamApiError && cause.code === 10071) return false
      throw new BusUnavailable('what stands of a blob could not be changed', { cause })
    }
  }

  async #info(digest: Digest): Promise<ObjectInfo | null> {
    if (!this.#bus.connected) throw new BusUnavailable('not connected')
    return await this.#store.info(digest).catch((cause) => {
      throw new BusUnavailable('the blob store cannot be read', { cause })
    })
  }
}

const isFresh = (info: ObjectInfo | null): boolean =>
  info !== null && !info.deleted && Date.now() - Date.parse(info.mtime) < blobGraceMs / 2
