/**
 * structuredClone: serializing and deserializing in one pass, with the errors and the order of reads of the HTML
 * standard. https://html.spec.whatwg.org/multipage/structured-data.html
 */
import { dictionary, needArguments } from '../idl.ts'

const refuse = (what: string): never => {
  throw new DOMException(`${what} could not be cloned.`, 'DataCloneError')
}

/** Whether a built-in method accepts the value: what it is, whatever it claims to be. */
const brand =
  (method: (...args: any[]) => unknown, ...args: unknown[]) =>
  (value: object) => {
    try {
      Reflect.apply(method, value, args)
      return true
    } catch {
      return false
    }
  }
const getter = (prototype: object, key: PropertyKey) =>
  Object.getOwnPropertyDescriptor(prototype, key)!.get as (...args: any[]) => any

const isBoolean = brand(Boolean.prototype.valueOf)
const isNumber = brand(Number.prototype.valueOf)
const isBigInt = brand(BigInt.prototype.valueOf)
const isString = brand(String.prototype.valueOf)
const isSymbol = brand(Symbol.prototype.valueOf)
const isDate = brand(Date.prototype.getTime)
const sourceOf = getter(RegExp.prototype, 'source')
const isRegExp = (value: object) => value !== RegExp.prototype && brand(sourceOf)(value)
const isMap = brand(Map.prototype.has, 0)
const isSet = brand(Set.prototype.has, 0)
const byteLengthOf = getter(ArrayBuffer.prototype, 'byteLength')
const isBuffer = brand(byteLengthOf)
const isShared = brand(getter(SharedArrayBuffer.prototype, 'byteLength'))
const isWeak = [
  brand(WeakMap.prototype.has, {}),
  brand(WeakSet.prototype.has, {}),
  brand(WeakRef.prototype.deref),
]
const tagOf = getter(Object.getPrototypeOf(Uint8Array.prototype), Symbol.toStringTag)
const toString = (value: object) => Reflect.apply(Object.prototype.toString, value, []) as string
const opaqueTags = new Set([
  ...['[object Promise]', '[object Generator]', '[object AsyncGenerator]'],
  ...['[object WebAssembly.Memory]', '[object WebAssembly.Instance]', '[object WebAssembly.Table]'],
])
/** Interfaces of ours that cannot be cloned. */
const opaque = [
  ...['AbortSignal', 'EventTarget', 'FormData', 'Headers', 'ReadableStream', 'Request', 'Response'],
  ...['TransformStream', 'URL', 'URLSearchParams', 'WritableStream'],
].map((name) => [name, host.isA(name)] as const)
const isBlob = host.isA('Blob')
const isFile = host.isA('File')
const isDOMException = host.isA('DOMException')
const isCryptoKey = host.isA('CryptoKey')

const errorNames: Record<string, ErrorConstructor> = {
  EvalError,
  RangeError,
  ReferenceError,
  SyntaxError,
  TypeError,
  URIError,
}
const { isError } = Error as unknown as { isError(value: object): boolean }

type Memory = Map<object, unknown>

const define = (target: object, key: PropertyKey, value: unknown, enumerable = true) =>
  Object.defineProperty(target, key, { value, writable: true, enumerable, configurable: true })

function cloneBuffer(buffer: ArrayBuffer): ArrayBuffer {
  if (buffer.detached) refuse('An ArrayBuffer is detached and')
  const bytes = new Uint8Array(buffer)
  const copy = buffer.resizable
    ? new ArrayBuffer(buffer.byteLength, { maxByteLength: buffer.maxByteLength })
    : new ArrayBuffer(buffer.byteLength)
  new Uint8Array(copy).set(bytes)
  return copy
}

function cloneView(view: ArrayBufferView, memory: Memory): unknown {
  const name = (Reflect.apply(tagOf, view, []) as string | undefined) ?? 'DataView'
  if (isShared(view.buffer)) refuse('A SharedArrayBuffer')
  const buffer = view.buffer as ArrayBuffer
  const copy = clone(buffer, memory) as ArrayBuffer
  const Constructor = (globalThis as any)[name]
  let length: number | undefined
  if (name === 'DataView') {
    // Throws where it is out of bounds.
    try {
      length = view.byteLength
    } catch {
      refuse('A DataView that is out of bounds')
    }
  } else {
    length = (view as Uint8Array).length
    if (buffer.resizable && length === 0 && isOutOfBounds(view)) refuse('A view that is out of bounds')
  }
  if (buffer.resizable && tracksLength(view)) length = undefined
  return new Constructor(copy, view.byteOffset, length)
}

/** A view that follows its buffer’s length says so only when the buffer is resized. */
function tracksLength(view: ArrayBufferView): boolean {
  const buffer = view.buffer as ArrayBuffer
  const before = buffer.byteLength
  const size = view.byteLength
  const step = (view as Uint8Array).BYTES_PER_ELEMENT ?? 1
  try {
    if (before + step <= buffer.maxByteLength) {
      buffer.resize(before + step)
      return view.byteLength !== size
    }
    if (size === 0) return false
    const saved = new Uint8Array(buffer).slice()
    buffer.resize(before - 1)
    let follows = false
    try {
      follows = view.byteLength !== 0 && view.byteLength < size
    } catch {
      follows = false
    }
    buffer.resize(before)
    new Uint8Array(buffer).set(saved)
    return follows
  } finally {
    if (buffer.byteLength !== before) buffer.resize(before)
  }
}

function isOutOfBounds(view: ArrayBufferView): boolean {
  try {
    // Of a view that is out of bounds these throw.
    Reflect.apply(Uint8Array.prototype.values, view, [])
    return false
  } catch {
    return true
  }
}

function cloneError(error: Error, memory: Memory): Error {
  const name = error.name === undefined ? 'Error' : `${error.name}`
  const Constructor = Object.hasOwn(errorNames, name) ? errorNames[name]! : Error
  const descriptor = Object.getOwnPropertyDescriptor(error, 'message')
  const message = descriptor !== undefined && 'value' in descriptor ? `${descriptor.value}` : undefined
  const made = message === undefined ? new Constructor() : new Constructor(message)
  memory.set(error, made)
  const { stack } = error
  if (typeof stack === 'string') define(made, 'stack', stack, false)
  if (Object.hasOwn(error, 'cause')) define(made, 'cause', clone(error.cause, memory), false)
  return made
}

export function clone(value: unknown, memory: Memory): unknown {
  if (typeof value === 'symbol') refuse(String(value))
  if (typeof value === 'function') refuse(`${Object.hasOwn(value, 'name') ? value.name : ''} function`)
  if (typeof value !== 'object' || value === null) return value
  const known = memory.get(value)
  if (known !== undefined) return known
  const keep = <T>(copy: T): T => {
    memory.set(value, copy)
    return copy
  }
  const isArray = Array.isArray(value)
  const prototype = isArray ? undefined : Object.getPrototypeOf(value)
  // A plain object needs no more questions; anything with another prototype may be anything.
  if (!isArray && (prototype !== Object.prototype || toString(value) !== '[object Object]')) {
    if (isBoolean(value)) return keep(Object(Boolean.prototype.valueOf.call(value)))
    if (isNumber(value)) return keep(Object(Number.prototype.valueOf.call(value)))
    if (isBigInt(value)) return keep(Object(BigInt.prototype.valueOf.call(value)))
    if (isString(value)) return keep(Object(String.prototype.valueOf.call(value)))
    if (isSymbol(value)) refuse('A Symbol object')
    if (isDate(value)) return keep(new Date(Date.prototype.getTime.call(value)))
    if (isRegExp(value)) {
      const regexp = value as RegExp
      return keep(new RegExp(sourceOf.call(regexp), regexp.flags))
    }
    if (isBuffer(value)) return keep(cloneBuffer(value as ArrayBuffer))
    if (isShared(value)) refuse('A SharedArrayBuffer')
    if (ArrayBuffer.isView(value)) return keep(cloneView(value, memory))
    if (isMap(value)) {
      const copy = keep(new Map())
      const entries: [unknown, unknown][] = []
      Map.prototype.forEach.call(value, (item, key) => entries.push([key, item]))
      for (const [key, item] of entries) copy.set(clone(key, memory), clone(item, memory))
      return copy
    }
    if (isSet(value)) {
      const copy = keep(new Set())
      const items: unknown[] = []
      Set.prototype.forEach.call(value, (item) => items.push(item))
      for (const item of items) copy.add(clone(item, memory))
      return copy
    }
    if (isDOMException(value)) {
      const { name, message, stack } = value as DOMException
      const copy = keep(new DOMException(message, name))
      if (typeof stack === 'string') define(copy, 'stack', stack, false)
      return copy
    }
    if (isError(value)) return cloneError(value as Error, memory)
    if (isBlob(value)) {
      const blob = value as File
      const { bytesOf, makeBlob } = group('blob')
      if (!isFile(value)) return keep(makeBlob(bytesOf(blob), blob.type))
      return keep(new File([blob], blob.name, { type: blob.type, lastModified: blob.lastModified }))
    }
    if (isCryptoKey(value)) return keep(group('crypto').cloneKey(value))
    for (const is of isWeak) if (is(value)) refuse(`${toString(value)}`)
    for (const [name, is] of opaque) if (is(value)) refuse(`A ${name}`)
    if (opaqueTags.has(toString(value))) refuse(toString(value))
    if (group('events').isEvent(value)) refuse('An Event')
  }
  const copy = keep(isArray ? new Array((value as unknown[]).length) : {})
  for (const key of Object.keys(value))
    if (Object.hasOwn(value, key)) define(copy, key, clone((value as Record<string, unknown>)[key], memory))
  return copy
}

/** A stream on this side that gives what the given one gives, which is locked from then on. */
function moveReadable(stream: ReadableStream): ReadableStream {
  const reader = stream.getReader()
  return new ReadableStream(
    {
      async pull(controller) {
        const { done, value } = await reader.read()
        if (done) controller.close()
        else {
          try {
            controller.enqueue(clone(value, new Map()))
          } catch (error) {
            reader.cancel(error).catch(() => {})
            throw error
          }
        }
      },
      cancel: (reason) => reader.cancel(reason),
    },
    { highWaterMark: 0 },
  )
}
function moveWritable(stream: WritableStream): WritableStream {
  const writer = stream.getWriter()
  return new WritableStream({
    write: (chunk) => writer.write(clone(chunk, new Map())),
    close: () => writer.close(),
    abort: (reason) => writer.abort(reason),
  })
}

/** Clones with a list of what changes hands. For structuredClone and MessagePort.postMessage. */
export function cloneWith(
  value: unknown,
  transfer: readonly unknown[],
): { value: unknown; ports: unknown[] } {
  const memory: Memory = new Map()
  const ports: unknown[] = []
  const isStream = host.isA('ReadableStream')
  const isWritable = host.isA('WritableStream')
  const isTransform = host.isA('TransformStream')
  const isPort = host.isA('MessagePort')
  for (const item of transfer) {
    if (typeof item !== 'object' || item === null) refuse('A value in the transfer list')
    const object = item as object
    if (memory.has(object)) refuse('An object that is twice in the transfer list')
    if (isBuffer(object)) {
      if ((object as ArrayBuffer).detached) refuse('A detached ArrayBuffer')
      memory.set(object, undefined)
    } else if (isPort(object)) {
      const port = group('messaging').detach(object, refuse)
      memory.set(object, port)
      ports.push(port)
    } else if (isStream(object)) {
      if ((object as ReadableStream).locked) refuse('A locked ReadableStream')
      memory.set(object, moveReadable(object as ReadableStream))
    } else if (isWritable(object)) {
      if ((object as WritableStream).locked) refuse('A locked WritableStream')
      memory.set(object, moveWritable(object as WritableStream))
    } else if (isTransform(object)) {
      const { readable, writable } = object as TransformStream
      if (readable.locked || writable.locked) refuse('A locked TransformStream')
      const copy = Object.create(TransformStream.prototype)
      Object.assign(copy, {
        _transformStreamController: undefined,
        _readable: moveReadable(readable),
        _writable: moveWritable(writable),
      })
      memory.set(object, copy)
    } else refuse(toString(object))
  }
  const buffers = (transfer as object[]).filter((item) => isBuffer(item)) as ArrayBuffer[]
  if (buffers.length === 0) return { value: clone(value, memory), ports }
  // What refers to a transferred buffer gets a buffer with its bytes; the original is detached at the end.
  for (const buffer of buffers) memory.set(buffer, cloneBuffer(buffer))
  const result = clone(value, memory)
  for (const buffer of buffers) {
    try {
      buffer.transfer()
    } catch {
      refuse('An ArrayBuffer that cannot be detached')
    }
  }
  return { value: result, ports }
}

export function structuredClone(value: unknown, options: unknown = undefined): unknown {
  needArguments(arguments.length, 1, 'structuredClone')
  return cloneWith(value, transferList(dictionary(options, 'structuredClone').transfer)).value
}

/** The `transfer` member of an options object. */
export function transferList(given: unknown): readonly unknown[] {
  if (given === undefined) return []
  if (typeof given !== 'object' || given === null || typeof (given as any)[Symbol.iterator] !== 'function')
    throw new TypeError('The transfer list is not iterable')
  const list = [...(given as Iterable<unknown>)]
  for (const item of list)
    if ((typeof item !== 'object' && typeof item !== 'function') || item === null)
      throw new TypeError('The transfer list has a value that is not an object')
  return list
}
