/** What undici’s fetch classes take from `node:` modules, apart from assert. */
const bufferLength = Object.getOwnPropertyDescriptor(ArrayBuffer.prototype, 'byteLength')!.get!
const sharedLength = Object.getOwnPropertyDescriptor(SharedArrayBuffer.prototype, 'byteLength')!.get!
const tagOf = Object.getOwnPropertyDescriptor(
  Object.getPrototypeOf(Uint8Array.prototype),
  Symbol.toStringTag,
)!.get!

const has = (get: () => unknown) => (value: unknown) => {
  try {
    Reflect.apply(get, value, [])
    return true
  } catch {
    return false
  }
}
const isArrayBuffer = (value: unknown) =>
  typeof value === 'object' && value !== null && !ArrayBuffer.isView(value) && has(bufferLength)(value)
const isSharedArrayBuffer = (value: unknown) =>
  typeof value === 'object' && value !== null && !ArrayBuffer.isView(value) && has(sharedLength)(value)

export const isUint8Array = (value: unknown) =>
  ArrayBuffer.isView(value) && Reflect.apply(tagOf, value, []) === 'Uint8Array'

export const types = {
  isArrayBuffer,
  isSharedArrayBuffer,
  isAnyArrayBuffer: (value: unknown) => isArrayBuffer(value) || isSharedArrayBuffer(value),
  isTypedArray: (value: unknown) =>
    ArrayBuffer.isView(value) && Reflect.apply(tagOf, value, []) !== undefined,
  isDataView: (value: unknown) => ArrayBuffer.isView(value) && Reflect.apply(tagOf, value, []) === undefined,
  isUint8Array,
  // It cannot be told from within.
  isProxy: () => false,
}

export const inspect = Object.assign((value: unknown, depth?: number) => host.inspect(value, depth), {
  custom: Symbol.for('nodejs.util.inspect.custom'),
})
export const formatWithOptions = (_options: unknown, value: unknown) => host.inspect(value)

/** Of node:stream and node:zlib: named where fetch undoes a content encoding, which the host does here. */
export class Transform {}
export const constants = {}
/** Of node:perf_hooks. */
export const performance = { now: () => host.now() }
/** Of node:worker_threads. */
export const markAsUncloneable = () => {}
/** Of undici’s runtime-features.js and node:crypto. */
export const runtimeFeatures = { has: (feature: string) => feature === 'crypto' }
export function randomInt(max: number): number {
  return new Uint32Array(host.random(4))[0]! % max
}
