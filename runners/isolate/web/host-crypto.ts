/**
 * SubtleCrypto for isolates, by Node’s own; runs in the sandbox child. It keeps nothing: every key comes with its
 * material and goes back with it.
 */
import { createPrivateKey, createPublicKey, createSecretKey, KeyObject, webcrypto } from 'node:crypto'

const { subtle } = webcrypto
type Key = webcrypto.CryptoKey

/** A key as the guest keeps it. */
interface KeyData {
  type: 'public' | 'private' | 'secret'
  extractable: boolean
  /** `publicExponent` as `{ bytes: number[] }`. */
  algorithm: Record<string, unknown>
  usages: webcrypto.KeyUsage[]
  /** Index of its bytes among the buffers: raw, PKCS #8 or SPKI. */
  data: number
}

/** How an operation ended, as `Answers.crypto` in `bridge.ts` has it. */
export type CryptoAnswer = [ok: boolean, a: string, ...rest: (string | ArrayBuffer)[]]

/** Bytes of a buffer that no key or signature needs, and that would keep a thread busy. */
const maxBytes = 64 * 1024 * 1024

function own(bytes: Uint8Array): ArrayBuffer {
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength) as ArrayBuffer
}

function plainAlgorithm(value: unknown): unknown {
  if (value instanceof Uint8Array) return { bytes: [...value] }
  if (typeof value !== 'object' || value === null) return value
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, plainAlgorithm(item)]))
}
function realAlgorithm(value: unknown): unknown {
  if (typeof value !== 'object' || value === null) return value
  const { bytes } = value as { bytes?: unknown }
  if (Array.isArray(bytes)) return Uint8Array.from(bytes as number[])
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, realAlgorithm(item)]))
}

function toKey(data: KeyData, buffers: readonly ArrayBuffer[]): Key {
  const bytes = Buffer.from(buffers[data.data]!)
  const object =
    data.type === 'secret'
      ? createSecretKey(bytes)
      : data.type === 'public'
        ? createPublicKey({ key: bytes, format: 'der', type: 'spki' })
        : createPrivateKey({ key: bytes, format: 'der', type: 'pkcs8' })
  return object.toCryptoKey(realAlgorithm(data.algorithm) as never, data.extractable, data.usages)
}

/** Keys of these are never extractable: their material is what they were imported from. */
const derivesOnly = /^(HKDF|PBKDF2|Argon2)/i
const isDerivesOnly = (algorithm: { name?: string } | undefined) => derivesOnly.test(algorithm?.name ?? '')

class Packed {
  readonly buffers: ArrayBuffer[] = []
  readonly #extractable: boolean | undefined
  readonly #material: ArrayBuffer | undefined

  /** `extractable`: what a key is to be that was made extractable for its material to be read here. */
  constructor(extractable: boolean | undefined, material: ArrayBuffer | undefined) {
    this.#extractable = extractable
    this.#material = material
  }

  pack(value: unknown): unknown {
    if (value instanceof ArrayBuffer) return { $bytes: this.buffers.push(value) - 1 }
    if (ArrayBuffer.isView(value)) return { $bytes: this.buffers.push(own(value as Uint8Array)) - 1 }
    if (value instanceof CryptoKey) return { $key: this.#key(value) }
    if (Array.isArray(value)) return value.map((item) => this.pack(item))
    if (typeof value !== 'object' || value === null) return value
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, this.pack(item)]))
  }
  pair(publicKey: Key, privateKey: Key): unknown {
    const secret = this.#key(privateKey)
    return {
      publicKey: { $key: this.#key(publicKey) },
      privateKey: { $key: { ...secret, extractable: false } },
    }
  }
  #key(key: Key): KeyData {
    return {
      type: key.type as KeyData['type'],
      extractable: this.#extractable ?? key.extractable,
      algorithm: plainAlgorithm(key.algorithm) as Record<string, unknown>,
      usages: [...key.usages],
      data: this.buffers.push(this.#bytes(key)) - 1,
    }
  }
  #bytes(key: Key): ArrayBuffer {
    if (this.#material !== undefined && isDerivesOnly(key.algorithm)) return this.#material
    const object = KeyObject.from(key)
    if (object.type === 'secret') return own(object.export())
    if (object.type === 'public') return own(object.export({ format: 'der', type: 'spki' }))
    return own(object.export({ format: 'der', type: 'pkcs8' }))
  }
}

function revive(value: unknown, buffers: readonly ArrayBuffer[]): unknown {
  if (typeof value !== 'object' || value === null) return value
  const given = value as { $bytes?: number; $key?: KeyData; $jwk?: object }
  if (given.$bytes !== undefined) return buffers[given.$bytes]
  if (given.$key !== undefined) return toKey(given.$key, buffers)
  if (given.$jwk !== undefined) return given.$jwk
  if (Array.isArray(value)) return value.map((item) => revive(item, buffers))
  const revived = Object.fromEntries(
    Object.entries(value).map(([name, item]) => [name, revive(item, buffers)]),
  )
  if (revived.publicExponent instanceof ArrayBuffer)
    revived.publicExponent = new Uint8Array(revived.publicExponent)
  return revived
}

/** What would hold a thread of this process for minutes, long after the call is over. */
function refuseEndless(algorithm: any): void {
  if (algorithm?.iterations > 10_000_000 || algorithm?.modulusLength > 8192)
    throw new DOMException('The algorithm would take too long', 'OperationError')
}

function perform(op: unknown, r: any): Promise<unknown> {
  switch (op) {
    case 'digest':
      return subtle.digest(r.algorithm, r.data)
    case 'sign':
      return subtle.sign(r.algorithm, r.key, r.data)
    case 'verify':
      return subtle.verify(r.algorithm, r.key, r.signature, r.data)
    case 'encrypt':
      return subtle.encrypt(r.algorithm, r.key, r.data)
    case 'decrypt':
      return subtle.decrypt(r.algorithm, r.key, r.data)
    case 'generateKey':
      return subtle.generateKey(r.algorithm, r.extractable, r.usages)
    case 'importKey':
      return subtle.importKey(r.format, r.data, r.algorithm, r.extractable, r.usages)
    case 'exportKey':
      return subtle.exportKey(r.format, r.key)
    case 'deriveBits':
      return subtle.deriveBits(r.algorithm, r.key, r.length)
    case 'deriveKey':
      return subtle.deriveKey(r.algorithm, r.key, r.derived, r.extractable, r.usages)
    case 'wrapKey':
      return subtle.wrapKey(r.format, r.key, r.wrappingKey, r.algorithm)
    case 'unwrapKey':
      return subtle.unwrapKey(
        r.format,
        r.data,
        r.unwrappingKey,
        r.algorithm,
        r.keyAlgorithm,
        r.extractable,
        r.usages,
      )
    default:
      throw new TypeError('no such operation')
  }
}

/** Carries out what `Bridge.crypto` was called with. Never rejects; all arguments may be hostile. */
export async function cryptoOperation(request: unknown, buffers: readonly unknown[]): Promise<CryptoAnswer> {
  try {
    const bytes = buffers.map((buffer) => {
      if (!(buffer instanceof ArrayBuffer) || buffer.byteLength > maxBytes)
        throw new DOMException('The data are too large', 'OperationError')
      return buffer
    })
    const { op, ...rest } = JSON.parse(String(request))
    refuseEndless(rest.algorithm)
    const revived = revive(rest, bytes) as Record<string, any>
    const made = revived.derived ?? revived.keyAlgorithm ?? revived.algorithm
    const extractable = revived.extractable as boolean | undefined
    if (extractable === false && !isDerivesOnly(made)) {
      revived.extractable = true
      // It would contradict.
      if (revived.format === 'jwk' && op === 'importKey') delete revived.data.ext
      if (revived.format === 'jwk' && op === 'unwrapKey') revived.extractable = false
    }
    const result = await perform(op, revived)
    if (op === 'generateKey' && extractable === false) {
      // The public one of a pair always is extractable.
      const { publicKey, privateKey } = result as { publicKey?: Key; privateKey?: Key }
      if (publicKey !== undefined && privateKey !== undefined) {
        const packed = new Packed(undefined, undefined)
        const value = packed.pair(publicKey, privateKey)
        return [true, JSON.stringify(value), ...packed.buffers]
      }
    }
    const packed = new Packed(
      op === 'generateKey' && extractable ? undefined : extractable,
      revived.data instanceof ArrayBuffer ? revived.data : undefined,
    )
    return [true, JSON.stringify(packed.pack(result) ?? null), ...packed.buffers]
  } catch (error) {
    const { name, message } = error as Error
    return [
      false,
      error instanceof DOMException || name === 'TypeError' ? name : 'OperationError',
      String(message),
    ]
  }
}
