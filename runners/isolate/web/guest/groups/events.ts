/** DOMException, events and abort signals. */
import { constants, dictionary, enforceRange, idl, needArguments } from '../idl.ts'

const domCodes: Record<string, number> = {
  IndexSizeError: 1,
  HierarchyRequestError: 3,
  WrongDocumentError: 4,
  InvalidCharacterError: 5,
  NoModificationAllowedError: 7,
  NotFoundError: 8,
  NotSupportedError: 9,
  InUseAttributeError: 10,
  InvalidStateError: 11,
  SyntaxError: 12,
  InvalidModificationError: 13,
  NamespaceError: 14,
  InvalidAccessError: 15,
  TypeMismatchError: 17,
  SecurityError: 18,
  NetworkError: 19,
  AbortError: 20,
  URLMismatchError: 21,
  QuotaExceededError: 22,
  TimeoutError: 23,
  InvalidNodeTypeError: 24,
  DataCloneError: 25,
}
/** Names of the constants where they do not follow from the name of the error. */
const constantNames: Record<string, string> = {
  DOMSTRING_SIZE_ERR: '2',
  NO_DATA_ALLOWED_ERR: '6',
  VALIDATION_ERR: '16',
}

interface Stamped {
  name: string
  message: string
}
/** Gives back what it is called with: what extends it puts private fields on an object that exists. */
class Given {
  constructor(target: object) {
    // biome-ignore lint/correctness/noConstructorReturn: it is what the class is for
    return target
  }
}

/** Name and message of a DOMException, which is a true error of the language besides. */
class Stamp extends Given {
  #stamped: Stamped
  constructor(target: object, stamped: Stamped) {
    super(target)
    this.#stamped = stamped
  }
  static is(target: object): boolean {
    return #stamped in target
  }
  static of(target: object): Stamped {
    return (target as Stamp).#stamped
  }
}

class DOMException {
  constructor(message: unknown = '', nameOrOptions: unknown = undefined) {
    const text = `${message}`
    const error = Reflect.construct(Error, [text], new.target) as DOMException
    // The message is read from the prototype; with one of its own the stack begins with it.
    Reflect.deleteProperty(error, 'message')
    let name = 'Error'
    if (typeof nameOrOptions === 'object' && nameOrOptions !== null) {
      const options = nameOrOptions as { name?: unknown; cause?: unknown }
      if (options.name !== undefined) name = `${options.name}`
      if ('cause' in options)
        Object.defineProperty(error, 'cause', {
          value: options.cause,
          writable: true,
          enumerable: false,
          configurable: true,
        })
    } else if (nameOrOptions !== undefined) name = `${nameOrOptions}`
    new Stamp(error, { name, message: text })
    // biome-ignore lint/correctness/noConstructorReturn: see Stamp
    return error
  }
  get name(): string {
    return Stamp.of(this).name
  }
  get message(): string {
    return Stamp.of(this).message
  }
  get code(): number {
    const name = Stamp.of(this).name
    return Object.hasOwn(domCodes, name) ? domCodes[name]! : 0
  }
}
const isDOMException = (value: object): value is DOMException => Stamp.is(value)
Object.setPrototypeOf(DOMException.prototype, Error.prototype)
idl(DOMException, 'DOMException')
{
  const values: Record<string, number> = {}
  for (const [name, code] of Object.entries(domCodes)) {
    const constant = `${name
      .replace(/Error$/, '')
      .replace(/^URL/, 'Url')
      .replace(/(?!^)[A-Z]/g, '_$&')
      .toUpperCase()}_ERR`
    values[constant] = code
  }
  values.INUSE_ATTRIBUTE_ERR = values.IN_USE_ATTRIBUTE_ERR!
  delete values.IN_USE_ATTRIBUTE_ERR
  for (const [name, code] of Object.entries(constantNames)) values[name] = Number(code)
  constants(DOMException, Object.fromEntries(Object.entries(values).sort(([, a], [, b]) => a - b)))
}

const { timeOrigin } = host
class QuotaExceededError extends DOMException {
  #quota: number | null
  #requested: number | null
  constructor(message: unknown = '', options: unknown = undefined) {
    super(message, 'QuotaExceededError')
    const { quota, requested } = dictionary(options, 'QuotaExceededError constructor')
    const amount = (value: unknown, what: string) => {
      if (value === undefined) return null
      const number = Number(value)
      if (!Number.isFinite(number)) throw new TypeError(`${what} is not a finite number`)
      if (number < 0) throw new RangeError(`${what} is negative`)
      return number
    }
    this.#quota = amount(quota, 'quota')
    this.#requested = amount(requested, 'requested')
    if (this.#quota !== null && this.#requested !== null && this.#requested < this.#quota)
      throw new RangeError('requested is less than quota')
  }
  get quota() {
    return this.#quota
  }
  get requested() {
    return this.#requested
  }
}
idl(QuotaExceededError, 'QuotaExceededError')

/** Set by the static block: what is not for the user. */
let dispatchTrusted: (target: EventTarget, event: Event) => boolean
let dispatchEvent: (target: EventTarget, event: Event) => boolean
let isEvent: (value: object) => boolean
let isEventTarget: (value: object) => boolean
let listenersOf: (target: EventTarget) => Listener[]

/** `isTrusted` cannot be forged: it is a property of each event itself. */
const trusted = {
  get isTrusted() {
    return getTrusted(this as unknown as Event)
  },
}
let getTrusted: (event: Event) => boolean
const isTrusted = {
  ...Object.getOwnPropertyDescriptor(trusted, 'isTrusted')!,
  enumerable: true,
  configurable: false,
}

class Event {
  #type: string
  #bubbles = false
  #cancelable = false
  #composed = false
  #target: EventTarget | null = null
  #currentTarget: EventTarget | null = null
  #phase = 0
  #stopped = false
  #stoppedNow = false
  #canceled = false
  #dispatching = false
  #passive = false
  #trusted = false
  #initialized = true
  #timeStamp: number | undefined
  constructor(type: unknown, init: unknown = undefined) {
    needArguments(arguments.length, 1, 'Event constructor')
    this.#type = `${type}`
    const { bubbles, cancelable, composed } = dictionary(init, 'Event constructor')
    this.#bubbles = Boolean(bubbles)
    this.#cancelable = Boolean(cancelable)
    this.#composed = Boolean(composed)
    this.#timeStamp = host.now() - timeOrigin
    Object.defineProperty(this, 'isTrusted', isTrusted)
  }
  get type() {
    return this.#type
  }
  get target() {
    return this.#target
  }
  get srcElement() {
    return this.#target
  }
  get currentTarget() {
    return this.#currentTarget
  }
  composedPath() {
    return this.#currentTarget === null ? [] : [this.#currentTarget]
  }
  get eventPhase() {
    return this.#phase
  }
  stopPropagation() {
    this.#stopped = true
  }
  get cancelBubble() {
    return this.#stopped
  }
  set cancelBubble(value: unknown) {
    if (value) this.#stopped = true
  }
  stopImmediatePropagation() {
    this.#stopped = true
    this.#stoppedNow = true
  }
  get bubbles() {
    return this.#bubbles
  }
  get cancelable() {
    return this.#cancelable
  }
  get returnValue() {
    return !this.#canceled
  }
  set returnValue(value: unknown) {
    if (!value) this.#cancel()
  }
  preventDefault() {
    this.#cancel()
  }
  get defaultPrevented() {
    return this.#canceled
  }
  get composed() {
    return this.#composed
  }
  get timeStamp() {
    return this.#timeStamp
  }
  initEvent(type: unknown, bubbles: unknown = false, cancelable: unknown = false) {
    needArguments(arguments.length, 1, 'Event.initEvent')
    const text = `${type}`
    if (this.#dispatching) return
    this.#initialized = true
    this.#stopped = false
    this.#stoppedNow = false
    this.#canceled = false
    this.#trusted = false
    this.#target = null
    this.#type = text
    this.#bubbles = Boolean(bubbles)
    this.#cancelable = Boolean(cancelable)
  }
  #cancel() {
    if (this.#cancelable && !this.#passive) this.#canceled = true
  }
  static {
    isEvent = (value) => #type in value
    getTrusted = (event) => event.#trusted
    dispatchTrusted = (target, event) => {
      event.#trusted = true
      return Event.#dispatch(target, event)
    }
    dispatchEvent = (target, event) => {
      if (event.#dispatching || !event.#initialized)
        throw new DOMException('The event is already being dispatched', 'InvalidStateError')
      event.#trusted = false
      return Event.#dispatch(target, event)
    }
  }
  static #dispatch(target: EventTarget, event: Event): boolean {
    event.#dispatching = true
    event.#target = target
    event.#currentTarget = target
    event.#phase = 2
    const live = listenersOf(target)
    if (live.length > 0 && !event.#stopped) {
      const list = live.slice()
      // At the target, those that capture hear first.
      for (const capture of [true, false]) {
        if (event.#stopped && !capture) break
        for (const listener of list) {
          if (listener.removed || listener.capture !== capture || listener.type !== event.#type) continue
          if (listener.once) removeListener(live, listener)
          event.#passive = listener.passive
          try {
            callListener(listener.callback as Callback, target, event)
          } catch (error) {
            host.uncaught(error)
          }
          event.#passive = false
          if (event.#stoppedNow) break
        }
      }
    }
    event.#phase = 0
    event.#currentTarget = null
    event.#dispatching = false
    event.#stopped = false
    event.#stoppedNow = false
    return !event.#canceled
  }
}
constants(Event, { NONE: 0, CAPTURING_PHASE: 1, AT_TARGET: 2, BUBBLING_PHASE: 3 })
idl(Event, 'Event')

type Callback = ((event: Event) => unknown) | { handleEvent?: unknown }
interface Listener {
  type: string
  callback: Callback | null
  capture: boolean
  once: boolean
  passive: boolean
  removed: boolean
}

function callListener(callback: Callback, target: EventTarget, event: Event): void {
  if (typeof callback === 'function') {
    Reflect.apply(callback, target, [event])
    return
  }
  const { handleEvent } = callback
  if (typeof handleEvent !== 'function') throw new TypeError('The listener’s handleEvent is not a function')
  Reflect.apply(handleEvent, callback, [event])
}

function removeListener(list: Listener[], listener: Listener): void {
  listener.removed = true
  const at = list.indexOf(listener)
  if (at >= 0) list.splice(at, 1)
}

const flatten = (options: unknown): boolean =>
  typeof options === 'object' && options !== null
    ? Boolean((options as { capture?: unknown }).capture)
    : typeof options === 'function'
      ? Boolean((options as { capture?: unknown }).capture)
      : Boolean(options)

const isCallback = (value: unknown): value is Callback | null => {
  if (value === null || value === undefined) return true
  if (typeof value !== 'object' && typeof value !== 'function')
    throw new TypeError('The listener is neither a function nor an object')
  return true
}

class EventTarget {
  #listeners: Listener[] = []
  addEventListener(type: unknown, callback: unknown, options: unknown = undefined): void {
    needArguments(arguments.length, 2, 'EventTarget.addEventListener')
    const target = targetOf(this)
    const list = target.#listeners
    const name = `${type}`
    isCallback(callback)
    const capture = flatten(options)
    let once = false
    let passive = false
    let signal: AbortSignal | undefined
    if ((typeof options === 'object' && options !== null) || typeof options === 'function') {
      const given = options as { once?: unknown; passive?: unknown; signal?: unknown }
      once = Boolean(given.once)
      passive = Boolean(given.passive)
      if (given.signal !== undefined) {
        if (!isSignal(given.signal)) throw new TypeError('The signal of a listener is not an AbortSignal')
        signal = given.signal
      }
    }
    if (signal?.aborted || callback === null || callback === undefined) return
    for (const listener of list)
      if (listener.type === name && listener.callback === callback && listener.capture === capture) return
    const listener: Listener = {
      type: name,
      callback: callback as Callback,
      capture,
      once,
      passive,
      removed: false,
    }
    list.push(listener)
    if (signal !== undefined) addAlgorithm(signal, () => removeListener(list, listener))
  }
  removeEventListener(type: unknown, callback: unknown, options: unknown = undefined): void {
    needArguments(arguments.length, 2, 'EventTarget.removeEventListener')
    const list = targetOf(this).#listeners
    const name = `${type}`
    isCallback(callback)
    const capture = flatten(options)
    for (const listener of list)
      if (listener.type === name && listener.callback === callback && listener.capture === capture) {
        removeListener(list, listener)
        return
      }
  }
  dispatchEvent(event: unknown): boolean {
    needArguments(arguments.length, 1, 'EventTarget.dispatchEvent')
    const target = targetOf(this)
    if (typeof event !== 'object' || event === null || !isEvent(event))
      throw new TypeError('EventTarget.dispatchEvent: the argument is not an Event')
    return dispatchEvent(target, event as Event)
  }
  static {
    isEventTarget = (value) => #listeners in value
    listenersOf = (target) => target.#listeners
  }
}
idl(EventTarget, 'EventTarget')

/** Called without an object, a method of EventTarget means the global one, which hears no events here. */
let globalTarget: EventTarget | undefined
function targetOf(value: unknown): EventTarget {
  if (value === undefined || value === null || value === globalThis) {
    globalTarget ??= new EventTarget()
    return globalTarget
  }
  if (typeof value !== 'object' || !isEventTarget(value)) throw new TypeError('Illegal invocation')
  return value as EventTarget
}

/** `on…` attributes: one handler, which keeps its place among the listeners. */
export function handlerAttribute(prototype: object, type: string, check: (value: unknown) => boolean): void {
  const handlers = new WeakMap<object, { callback: unknown }>()
  Object.defineProperty(prototype, `on${type}`, {
    enumerable: true,
    configurable: true,
    get(this: object) {
      if (!check(this)) throw new TypeError('Illegal invocation')
      return handlers.get(this)?.callback ?? null
    },
    set(this: EventTarget, value: unknown) {
      if (!check(this)) throw new TypeError('Illegal invocation')
      const callback =
        (typeof value === 'object' && value !== null) || typeof value === 'function' ? value : null
      const present = handlers.get(this)
      if (present !== undefined) {
        present.callback = callback
        return
      }
      if (callback === null) return
      const handler = { callback: callback as unknown }
      handlers.set(this, handler)
      EventTarget.prototype.addEventListener.call(this, type, function (this: unknown, event: Event) {
        if (typeof handler.callback !== 'function') return
        if (Reflect.apply(handler.callback, this, [event]) === false) event.preventDefault()
      })
    },
  })
}

class CustomEvent extends Event {
  #detail: unknown
  constructor(type: unknown, init: unknown = undefined) {
    needArguments(arguments.length, 1, 'CustomEvent constructor')
    super(type, init)
    const { detail } = dictionary(init, 'CustomEvent constructor')
    this.#detail = detail === undefined ? null : detail
  }
  get detail() {
    return this.#detail
  }
  initCustomEvent(
    type: unknown,
    bubbles: unknown = false,
    cancelable: unknown = false,
    detail: unknown = null,
  ) {
    needArguments(arguments.length, 1, 'CustomEvent.initCustomEvent')
    this.initEvent(type, bubbles, cancelable)
    this.#detail = detail
  }
}
idl(CustomEvent, 'CustomEvent')

class ErrorEvent extends Event {
  #message: string
  #filename: string
  #lineno: number
  #colno: number
  #error: unknown
  constructor(type: unknown, init: unknown = undefined) {
    needArguments(arguments.length, 1, 'ErrorEvent constructor')
    super(type, init)
    const given = dictionary(init, 'ErrorEvent constructor')
    this.#message = given.message === undefined ? '' : `${given.message}`
    this.#filename = given.filename === undefined ? '' : `${given.filename}`
    this.#lineno = Number(given.lineno ?? 0) >>> 0
    this.#colno = Number(given.colno ?? 0) >>> 0
    this.#error = given.error
  }
  get message() {
    return this.#message
  }
  get filename() {
    return this.#filename
  }
  get lineno() {
    return this.#lineno
  }
  get colno() {
    return this.#colno
  }
  get error() {
    return this.#error
  }
}
idl(ErrorEvent, 'ErrorEvent')

class MessageEvent extends Event {
  #data: unknown
  #origin: string
  #lastEventId: string
  #source: unknown
  #ports: readonly unknown[]
  constructor(type: unknown, init: unknown = undefined) {
    needArguments(arguments.length, 1, 'MessageEvent constructor')
    super(type, init)
    const given = dictionary(init, 'MessageEvent constructor')
    this.#data = given.data === undefined ? null : given.data
    this.#origin = given.origin === undefined ? '' : `${given.origin}`
    this.#lastEventId = given.lastEventId === undefined ? '' : `${given.lastEventId}`
    this.#source = given.source ?? null
    this.#ports = Object.freeze(given.ports === undefined ? [] : [...(given.ports as Iterable<unknown>)])
  }
  get data() {
    return this.#data
  }
  get origin() {
    return this.#origin
  }
  get lastEventId() {
    return this.#lastEventId
  }
  get source() {
    return this.#source
  }
  get ports() {
    return this.#ports
  }
}
idl(MessageEvent, 'MessageEvent')

class PromiseRejectionEvent extends Event {
  #promise: unknown
  #reason: unknown
  constructor(type: unknown, init: unknown = undefined) {
    needArguments(arguments.length, 2, 'PromiseRejectionEvent constructor')
    super(type, init)
    const given = dictionary(init, 'PromiseRejectionEvent constructor')
    if (given.promise === undefined) throw new TypeError('PromiseRejectionEvent constructor: no promise')
    this.#promise = given.promise
    this.#reason = given.reason
  }
  get promise() {
    return this.#promise
  }
  get reason() {
    return this.#reason
  }
}
idl(PromiseRejectionEvent, 'PromiseRejectionEvent')

const key = Symbol('constructor')
let newSignal: () => AbortSignal
let fireAbort: (signal: AbortSignal, reason: unknown) => void
let addAlgorithm: (signal: AbortSignal, algorithm: () => void) => void
let isSignal: (value: unknown) => value is AbortSignal

const abortReason = (reason: unknown) =>
  reason === undefined ? new DOMException('This operation was aborted', 'AbortError') : reason

class AbortSignal extends EventTarget {
  #aborted = false
  #reason: unknown = undefined
  #algorithms: (() => void)[] | null = null
  /** Signals made by `any` that follow this one. */
  #dependents: AbortSignal[] | null = null
  /** What this one follows; null where it was not made by `any`. */
  #sources: AbortSignal[] | null = null
  constructor(given: unknown = undefined) {
    if (given !== key) throw new TypeError('Illegal constructor')
    super()
  }
  static abort(reason: unknown = undefined): AbortSignal {
    const signal = newSignal()
    signal.#aborted = true
    signal.#reason = abortReason(reason)
    return signal
  }
  static timeout(milliseconds: unknown): AbortSignal {
    needArguments(arguments.length, 1, 'AbortSignal.timeout')
    const ms = enforceRange(milliseconds, Number.MAX_SAFE_INTEGER, 'AbortSignal.timeout: the delay')
    const signal = newSignal()
    host.setTimeout(
      () => fireAbort(signal, new DOMException('The operation was aborted due to timeout', 'TimeoutError')),
      ms,
    )
    return signal
  }
  static any(signals: unknown): AbortSignal {
    needArguments(arguments.length, 1, 'AbortSignal.any')
    if (typeof signals !== 'object' || signals === null)
      throw new TypeError('AbortSignal.any: the argument is not iterable')
    const list = [...(signals as Iterable<unknown>)]
    for (const signal of list)
      if (!isSignal(signal)) throw new TypeError('AbortSignal.any: not an AbortSignal')
    const result = newSignal()
    for (const signal of list as AbortSignal[])
      if (signal.#aborted) {
        result.#aborted = true
        result.#reason = signal.#reason
        return result
      }
    result.#sources = []
    const follow = (source: AbortSignal) => {
      if (result.#sources!.includes(source)) return
      result.#sources!.push(source)
      source.#dependents ??= []
      source.#dependents.push(result)
    }
    for (const signal of list as AbortSignal[]) {
      if (signal.#sources === null) follow(signal)
      else for (const source of signal.#sources) follow(source)
    }
    return result
  }
  get aborted() {
    return this.#aborted
  }
  get reason() {
    return this.#reason
  }
  throwIfAborted(): void {
    if (this.#aborted) throw this.#reason
  }
  static {
    newSignal = () => new AbortSignal(key)
    isSignal = (value): value is AbortSignal =>
      typeof value === 'object' && value !== null && #aborted in value
    addAlgorithm = (signal, algorithm) => {
      if (signal.#aborted) return
      signal.#algorithms ??= []
      signal.#algorithms.push(algorithm)
    }
    const run = (signal: AbortSignal) => {
      const algorithms = signal.#algorithms
      signal.#algorithms = null
      if (algorithms !== null)
        for (const algorithm of algorithms) {
          try {
            algorithm()
          } catch (error) {
            host.uncaught(error)
          }
        }
      if (listenersOf(signal).length > 0) dispatchTrusted(signal, new Event('abort'))
    }
    fireAbort = (signal, reason) => {
      if (signal.#aborted) return
      signal.#aborted = true
      signal.#reason = abortReason(reason)
      const fired: AbortSignal[] = []
      const dependents = signal.#dependents
      signal.#dependents = null
      if (dependents !== null)
        for (const dependent of dependents)
          if (!dependent.#aborted) {
            dependent.#aborted = true
            dependent.#reason = signal.#reason
            fired.push(dependent)
          }
      run(signal)
      for (const dependent of fired) run(dependent)
    }
  }
}
idl(AbortSignal, 'AbortSignal')
handlerAttribute(AbortSignal.prototype, 'abort', (value) => isSignal(value))

class AbortController {
  #signal = newSignal()
  get signal() {
    return this.#signal
  }
  abort(reason: unknown = undefined): void {
    fireAbort(this.#signal, reason)
  }
}
idl(AbortController, 'AbortController')

/** For the host’s side: see `WebGuest`. */
export function makeAbort() {
  const signal = newSignal()
  return { signal, abort: (reason?: unknown) => fireAbort(signal, reason) }
}

/** Runs once when the signal is aborted; unlike a listener it cannot be seen or stopped. */
export const onAbort = (signal: AbortSignal, run: () => void) => addAlgorithm(signal, run)
export { dispatchTrusted, isEvent }

export const is = {
  AbortSignal: isSignal,
  DOMException: isDOMException,
  EventTarget: isEventTarget,
}
export {
  AbortController,
  AbortSignal,
  CustomEvent,
  DOMException,
  ErrorEvent,
  Event,
  EventTarget,
  MessageEvent,
  PromiseRejectionEvent,
  QuotaExceededError,
}
