/** Web Crypto. The host does the work; a key’s material stays here, so that the host has nothing to keep. */
import { idl, needArguments } from '../idl.ts'

const key = Symbol('constructor')
const views = new Set([
  ...['Int8Array', 'Int16Array', 'Int32Array', 'BigInt64Array'],
  ...['Uint8Array', 'Uint8ClampedArray', 'Uint16Array', 'Uint32Array', 'BigUint64Array'],
])
const tagOf = Object.getOwnPropertyDescriptor(
  Object.getPrototypeOf(Uint8Array.prototype),
  Symbol.toStringTag,
)!.get as () => string | undefined

/** Random bytes in store, so that a UUID does not cost a call. */
let pool = new Uint8Array(0)
let poolAt = 0
function randomBytes(size: number): Uint8Array {
  if (poolAt + size > pool.length) {
    pool = new Uint8Array(host.random(1024))
    poolAt = 0
  }
  poolAt += size
  return pool.subarray(poolAt - size, poolAt)
}

class Crypto {
  constructor(given: unknown = undefined) {
    if (given !== key) throw new TypeError('Illegal constructor')
  }
  #brand = true
  get subtle() {
    void this.#brand
    return subtle
  }
  getRandomValues<T>(array: T): T {
    void this.#brand
    needArguments(arguments.length, 1, 'Crypto.getRandomValues')
    if (!ArrayBuffer.isView(array))
      throw new TypeError('Crypto.getRandomValues: the argument is not an array of integers')
    if (!views.has(tagOf.call(array) ?? ''))
      throw new DOMException('The array is not one of integers', 'TypeMismatchError')
    const { byteLength } = array
    if (byteLength > 65536) throw new host.web.QuotaExceededError(`${byteLength} bytes are more than 65536`)
    if (byteLength > 0)
      new Uint8Array(array.buffer, array.byteOffset, byteLength).set(
        byteLength <= 64 ? randomBytes(byteLength) : new Uint8Array(host.random(byteLength)),
      )
    return array
  }
  randomUUID(): string {
    void this.#brand
    const bytes = randomBytes(16)
    bytes[6] = (bytes[6]! & 0x0f) | 0x40
    bytes[8] = (bytes[8]! & 0x3f) | 0x80
    const hex = (bytes as Uint8Array & { toHex(): string }).toHex()
    bytes.fill(0)
    return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-${hex.slice(12, 16)}-${hex.slice(16, 20)}-${hex.slice(20)}`
  }
}
idl(Crypto, 'Crypto')

/** As `host-crypto.ts` has it. */
interface KeyData {
  type: 'public' | 'private' | 'secret'
  extractable: boolean
  algorithm: object
  usages: string[]
  /** Index of the material among the buffers. */
  data: number
}

let dataOf: (key: CryptoKey) => { meta: KeyData; material: ArrayBuffer }
let isKey: (value: unknown) => value is CryptoKey

class CryptoKey {
  #meta: KeyData
  #material: ArrayBuffer
  #algorithm: object | undefined
  #usages: string[] | undefined
  constructor(given: unknown = undefined, meta?: KeyData, material?: ArrayBuffer) {
    if (given !== key) throw new TypeError('Illegal constructor')
    this.#meta = meta!
    this.#material = material!
  }
  get type() {
    return this.#meta.type
  }
  get extractable() {
    return this.#meta.extractable
  }
  get algorithm() {
    this.#algorithm ??= copyAlgorithm(this.#meta.algorithm)
    return this.#algorithm
  }
  get usages() {
    this.#usages ??= [...this.#meta.usages]
    return this.#usages
  }
  static {
    dataOf = (key) => ({ meta: key.#meta, material: key.#material })
    isKey = (value): value is CryptoKey => typeof value === 'object' && value !== null && #material in value
  }
}
idl(CryptoKey, 'CryptoKey')

function copyAlgorithm(value: any): any {
  if (Array.isArray(value?.bytes) && Object.keys(value).length === 1) return new Uint8Array(value.bytes)
  if (typeof value !== 'object' || value === null) return value
  return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, copyAlgorithm(item)]))
}

export function cloneKey(given: CryptoKey): CryptoKey {
  const { meta, material } = dataOf(given)
  return new CryptoKey(key, meta, material)
}

/** Members of the dictionaries of algorithms; each is read once. */
const members = [
  ...[
    'additionalData',
    'context',
    'counter',
    'hash',
    'info',
    'iterations',
    'iv',
    'label',
    'length',
    'memory',
  ],
  ...[
    'modulusLength',
    'namedCurve',
    'parallelism',
    'passes',
    'public',
    'publicExponent',
    'salt',
    'saltLength',
  ],
  ...[
    'nonce',
    'secretValue',
    'associatedData',
    'tagLength',
    'version',
    'outputLength',
    'functionName',
    'customization',
  ],
]

/** Turns arguments into JSON and buffers: copies of bytes at the time of the call. */
class Packer {
  readonly buffers: ArrayBuffer[] = []
  bytes(value: unknown, what: string): { $bytes: number } {
    return { $bytes: this.#push(copyOf(value, what)) }
  }
  key(value: unknown): object {
    if (!isKey(value)) throw new TypeError('The key is not a CryptoKey')
    const { meta, material } = dataOf(value)
    return { $key: { ...meta, data: this.#push(material) } }
  }
  algorithm(value: unknown): unknown {
    if (typeof value !== 'object' || value === null) return { name: `${value}` }
    const given = value as Record<string, unknown>
    const { name } = given
    if (name === undefined) throw new TypeError('The algorithm has no name')
    const packed: Record<string, unknown> = { name: `${name}` }
    for (const member of members) {
      const item = given[member]
      if (item !== undefined) packed[member] = this.#member(item)
    }
    return packed
  }
  #member(item: unknown): unknown {
    if (isKey(item)) return this.key(item)
    if (isSource(item)) return this.bytes(item, 'A member of the algorithm')
    if (typeof item === 'object' && item !== null) return this.algorithm(item)
    return typeof item === 'bigint' || typeof item === 'symbol' ? `${String(item)}` : item
  }
  #push(buffer: ArrayBuffer): number {
    this.buffers.push(buffer)
    return this.buffers.length - 1
  }
}

const isBuffer = (value: unknown) => Object.prototype.toString.call(value) === '[object ArrayBuffer]'
const isSource = (value: unknown) => ArrayBuffer.isView(value) || isBuffer(value)
function copyOf(value: unknown, what: string): ArrayBuffer {
  if (ArrayBuffer.isView(value))
    return new Uint8Array(value.buffer, value.byteOffset, value.byteLength).slice().buffer as ArrayBuffer
  if (isBuffer(value)) return (value as ArrayBuffer).slice(0)
  throw new TypeError(`${what} is not a BufferSource`)
}

const formats = new Set([
  'raw',
  'spki',
  'pkcs8',
  'jwk',
  'raw-secret',
  'raw-public',
  'raw-seed',
  'raw-private',
])
function formatOf(value: unknown): string {
  const format = `${value}`
  if (!formats.has(format)) throw new TypeError(`'${format}' is not a key format`)
  return format
}
function usagesOf(value: unknown): string[] {
  if (typeof value !== 'object' || value === null) throw new TypeError('The key usages are not a sequence')
  return [...(value as Iterable<unknown>)].map((usage) => `${usage}`)
}

/** Answers: a value of JSON in which `$bytes` and `$key` stand for buffers and keys. */
function revive(value: any, buffers: ArrayBuffer[]): any {
  if (typeof value !== 'object' || value === null) return value
  if (value.$bytes !== undefined) return buffers[value.$bytes]
  if (value.$key !== undefined) return new CryptoKey(key, value.$key, buffers[value.$key.data])
  if (Array.isArray(value)) return value.map((item) => revive(item, buffers))
  return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, revive(item, buffers)]))
}

function ask(
  op: string,
  given: number,
  needed: number,
  pack: (packer: Packer) => Record<string, unknown>,
): Promise<any> {
  return new Promise((resolve, reject) => {
    needArguments(given, needed, `SubtleCrypto.${op}`)
    const packer = new Packer()
    const request = JSON.stringify({ op, ...pack(packer) })
    host.crypto(
      (ok, a, ...rest) => {
        if (ok) resolve(revive(JSON.parse(a as string), rest as ArrayBuffer[]))
        else if (a === 'TypeError') reject(new TypeError(rest[0] as string))
        else reject(new DOMException(rest[0] as string, a as string))
      },
      request,
      packer.buffers,
    )
  })
}

class SubtleCrypto {
  constructor(given: unknown = undefined) {
    if (given !== key) throw new TypeError('Illegal constructor')
  }
  async digest(algorithm: unknown, data: unknown) {
    return ask('digest', arguments.length, 2, (p) => ({
      algorithm: p.algorithm(algorithm),
      data: p.bytes(data, 'The data'),
    }))
  }
  async sign(algorithm: unknown, key: unknown, data: unknown) {
    return ask('sign', arguments.length, 3, (p) => ({
      algorithm: p.algorithm(algorithm),
      key: p.key(key),
      data: p.bytes(data, 'The data'),
    }))
  }
  async verify(algorithm: unknown, key: unknown, signature: unknown, data: unknown) {
    return ask('verify', arguments.length, 4, (p) => ({
      algorithm: p.algorithm(algorithm),
      key: p.key(key),
      signature: p.bytes(signature, 'The signature'),
      data: p.bytes(data, 'The data'),
    }))
  }
  async encrypt(algorithm: unknown, key: unknown, data: unknown) {
    return ask('encrypt', arguments.length, 3, (p) => ({
      algorithm: p.algorithm(algorithm),
      key: p.key(key),
      data: p.bytes(data, 'The data'),
    }))
  }
  async decrypt(algorithm: unknown, key: unknown, data: unknown) {
    return ask('decrypt', arguments.length, 3, (p) => ({
      algorithm: p.algorithm(algorithm),
      key: p.key(key),
      data: p.bytes(data, 'The data'),
    }))
  }
  async generateKey(algorithm: unknown, extractable: unknown, usages: unknown) {
    return ask('generateKey', arguments.length, 3, (p) => ({
      algorithm: p.algorithm(algorithm),
      extractable: Boolean(extractable),
      usages: usagesOf(usages),
    }))
  }
  async importKey(format: unknown, data: unknown, algorithm: unknown, extractable: unknown, usages: unknown) {
    return ask('importKey', arguments.length, 5, (p) => {
      const kind = formatOf(format)
      if (kind === 'jwk') {
        if (typeof data !== 'object' || data === null || isSource(data))
          throw new TypeError('The key data are not a JsonWebKey')
      } else if (!isSource(data)) throw new TypeError('The key data are not a BufferSource')
      return {
        format: kind,
        data: kind === 'jwk' ? { $jwk: { ...(data as object) } } : p.bytes(data, 'The key data'),
        algorithm: p.algorithm(algorithm),
        extractable: Boolean(extractable),
        usages: usagesOf(usages),
      }
    })
  }
  async exportKey(format: unknown, key: unknown) {
    return ask('exportKey', arguments.length, 2, (p) => ({ format: formatOf(format), key: p.key(key) }))
  }
  async deriveBits(algorithm: unknown, key: unknown, length: unknown = null) {
    return ask('deriveBits', arguments.length, 2, (p) => ({
      algorithm: p.algorithm(algorithm),
      key: p.key(key),
      length: length === null ? null : Number(length) >>> 0,
    }))
  }
  async deriveKey(algorithm: unknown, key: unknown, derived: unknown, extractable: unknown, usages: unknown) {
    return ask('deriveKey', arguments.length, 5, (p) => ({
      algorithm: p.algorithm(algorithm),
      key: p.key(key),
      derived: p.algorithm(derived),
      extractable: Boolean(extractable),
      usages: usagesOf(usages),
    }))
  }
  async wrapKey(format: unknown, key: unknown, wrappingKey: unknown, algorithm: unknown) {
    return ask('wrapKey', arguments.length, 4, (p) => ({
      format: formatOf(format),
      key: p.key(key),
      wrappingKey: p.key(wrappingKey),
      algorithm: p.algorithm(algorithm),
    }))
  }
  async unwrapKey(
    format: unknown,
    data: unknown,
    unwrappingKey: unknown,
    algorithm: unknown,
    keyAlgorithm: unknown,
    extractable: unknown,
    usages: unknown,
  ) {
    return ask('unwrapKey', arguments.length, 7, (p) => ({
      format: formatOf(format),
      data: p.bytes(data, 'The wrapped key'),
      unwrappingKey: p.key(unwrappingKey),
      algorithm: p.algorithm(algorithm),
      keyAlgorithm: p.algorithm(keyAlgorithm),
      extractable: Boolean(extractable),
      usages: usagesOf(usages),
    }))
  }
}
idl(SubtleCrypto, 'SubtleCrypto')

const subtle = new SubtleCrypto(key)
const crypto = new Crypto(key)
export const is = { CryptoKey: isKey }
export { Crypto, CryptoKey, crypto, SubtleCrypto }
