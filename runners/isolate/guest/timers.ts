/**
 * Timers inside the isolate, kept by the host’s clock. Runs there from its own source text: it may use nothing but
 * its parameters and globals.
 */
export interface Timers {
  globals: Record<string, unknown>
  fire(id: number): void
  clear(): void
}

/** `isLive` says whether a call is under way: outside of one nothing is scheduled. */
export function makeTimers(
  setTimer: (id: number, ms: number, repeat: boolean) => void,
  clearTimer: (id: number) => void,
  isLive: () => boolean,
  onError: (error: unknown) => void,
): Timers {
  interface Entry {
    callback: (...args: unknown[]) => unknown
    args: unknown[]
    repeat: boolean
  }
  const uncurry = Function.prototype.bind.bind(Function.prototype.call) as (
    fn: (...args: never[]) => unknown,
  ) => (...args: unknown[]) => unknown
  const pending = new Map<number, Entry>()
  const get = uncurry(Map.prototype.get) as (map: typeof pending, id: number) => Entry | undefined
  const set = uncurry(Map.prototype.set) as (map: typeof pending, id: number, entry: Entry) => void
  const remove = uncurry(Map.prototype.delete) as (map: typeof pending, id: number) => boolean
  const removeAll = uncurry(Map.prototype.clear) as (map: typeof pending) => void
  const then = uncurry(Promise.prototype.then) as (promise: Promise<unknown>, fn: () => void) => void
  const resolved = Promise.resolve()
  const { apply } = Reflect
  const BaseTypeError = TypeError
  /** As browsers and Node have it: the largest 32-bit delay. */
  const maxDelay = 2_147_483_647
  let last = 0

  const add = (callback: unknown, delay: unknown, args: unknown[], repeat: boolean): number => {
    if (typeof callback !== 'function') throw new BaseTypeError('The callback of a timer must be a function')
    const ms = +(delay as number)
    const id = ++last
    if (!isLive()) return id
    set(pending, id, { callback: callback as Entry['callback'], args, repeat })
    setTimer(id, ms >= 1 && ms <= maxDelay ? ms : 1, repeat)
    return id
  }
  const drop = (id?: unknown) => {
    if (typeof id === 'number' && remove(pending, id)) clearTimer(id)
  }

  return {
    globals: {
      setTimeout: (callback: unknown, delay?: unknown, ...args: unknown[]) =>
        add(callback, delay, args, false),
      setInterval: (callback: unknown, delay?: unknown, ...args: unknown[]) =>
        add(callback, delay, args, true),
      clearTimeout: drop,
      clearInterval: drop,
      queueMicrotask: (callback: unknown) => {
        if (typeof callback !== 'function') throw new BaseTypeError('queueMicrotask takes a function')
        then(resolved, () => {
          try {
            callback()
          } catch (error) {
            onError(error)
          }
        })
      },
    },
    fire(id) {
      const entry = get(pending, id)
      if (entry === undefined) return
      if (!entry.repeat) remove(pending, id)
      try {
        apply(entry.callback, undefined, entry.args)
      } catch (error) {
        onError(error)
      }
    },
    clear: () => removeAll(pending),
  }
}
