/**
 * node:async_hooks: AsyncLocalStorage over a patched Promise.prototype.then, the timers and queueMicrotask. An `await`
 * does not go through `then`; code that imports this module is compiled so that it does.
 */
import { needArguments } from '../idl.ts'

/** What every storage holds at a time; never changed, only replaced. */
type Frame = ReadonlyMap<object, unknown>
let frame: Frame | undefined

/** The function, run with what the storages hold now. */
function bound<F extends (...args: any[]) => unknown>(fn: F): F {
  const held = frame
  return function (this: unknown, ...args: any[]) {
    const before = frame
    frame = held
    try {
      return Reflect.apply(fn, this, args)
    } finally {
      frame = before
    }
  } as F
}

const wrap = (value: unknown) => (typeof value === 'function' ? bound(value as () => unknown) : value)
const { then } = Promise.prototype
Object.defineProperty(Promise.prototype, 'then', {
  configurable: true,
  writable: true,
  value: {
    then(this: Promise<unknown>, onFulfilled: unknown, onRejected: unknown) {
      return Reflect.apply(then, this, [wrap(onFulfilled), wrap(onRejected)])
    },
  }.then,
})
for (const name of ['setTimeout', 'setInterval', 'setImmediate', 'queueMicrotask'] as const) {
  const scheduled = (globalThis as any)[name]
  if (typeof scheduled === 'function')
    Object.defineProperty(globalThis, name, {
      configurable: true,
      writable: true,
      value: {
        [name]: (callback: unknown, ...args: unknown[]) => scheduled(wrap(callback), ...args),
      }[name],
    })
}

/** Between calls: what one entered is not for the next. */
export function reset(): void {
  frame = undefined
}

function runIn<T>(next: Frame | undefined, fn: (...args: any[]) => T, args: unknown[]): T {
  const before = frame
  frame = next
  try {
    return fn(...args)
  } finally {
    frame = before
  }
}

class AsyncLocalStorage<T> {
  readonly #default: T | undefined
  readonly name: string
  constructor(options: { defaultValue?: T; name?: string } = {}) {
    this.#default = options.defaultValue
    this.name = options.name ?? ''
  }
  static bind<F extends (...args: any[]) => unknown>(fn: F): F {
    needArguments(arguments.length, 1, 'AsyncLocalStorage.bind')
    return bound(fn)
  }
  static snapshot() {
    return bound((fn: (...args: unknown[]) => unknown, ...args: unknown[]) => fn(...args))
  }
  run<R>(store: T, fn: (...args: any[]) => R, ...args: unknown[]): R {
    return runIn(new Map(frame).set(this, store), fn, args)
  }
  exit<R>(fn: (...args: any[]) => R, ...args: unknown[]): R {
    const next = new Map(frame)
    next.delete(this)
    return runIn(next, fn, args)
  }
  enterWith(store: T): void {
    frame = new Map(frame).set(this, store)
  }
  disable(): void {
    const next = new Map(frame)
    next.delete(this)
    frame = next
  }
  getStore(): T | undefined {
    return frame?.has(this) ? (frame.get(this) as T) : this.#default
  }
}

let last = 1
class AsyncResource {
  readonly #frame = frame
  readonly #id = ++last
  readonly type: string
  constructor(type: string) {
    this.type = type
  }
  static bind<F extends (...args: any[]) => unknown>(fn: F): F {
    return bound(fn)
  }
  bind<F extends (...args: any[]) => unknown>(fn: F): F {
    return runIn(this.#frame, () => bound(fn), [])
  }
  runInAsyncScope<R>(fn: (...args: any[]) => R, thisArg?: unknown, ...args: unknown[]): R {
    return runIn(this.#frame, () => Reflect.apply(fn, thisArg, args) as R, [])
  }
  emitDestroy() {
    return this
  }
  asyncId() {
    return this.#id
  }
  triggerAsyncId() {
    return 0
  }
}

const hook = { enable: () => hook, disable: () => hook }
const names = {
  AsyncLocalStorage,
  AsyncResource,
  createHook: () => hook,
  executionAsyncId: () => 0,
  executionAsyncResource: () => ({}),
  triggerAsyncId: () => 0,
}
export const exports = { ...names, default: names }
