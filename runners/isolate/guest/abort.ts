/**
 * `ctx.signal` inside the isolate: an AbortSignal with the part of EventTarget that matters. Runs there from its
 * own source text: it may use nothing but its parameters and globals.
 */
export interface Abortable {
  signal: object
  /** Fires once; a listener that throws is given to `onError` and does not keep the others from hearing. */
  abort(message: string): void
}
export type MakeAbortable = (onError: (error: unknown) => void) => Abortable

export function makeAbort(): MakeAbortable {
  const BaseError = Error
  const BaseTypeError = TypeError
  const { defineProperty } = Object
  const { apply } = Reflect
  const key = {}

  interface Listener {
    callback: unknown
    once: boolean
  }

  class AbortSignal {
    #aborted = false
    #reason: unknown = undefined
    #listeners: Listener[] = []
    #onabort: unknown = null

    constructor(given?: unknown) {
      if (given !== key) throw new BaseTypeError('Illegal constructor')
    }
    get aborted() {
      return this.#aborted
    }
    get reason() {
      return this.#reason
    }
    get onabort() {
      return this.#onabort
    }
    set onabort(callback: unknown) {
      this.#onabort = typeof callback === 'function' ? callback : null
    }
    throwIfAborted() {
      if (this.#aborted) throw this.#reason
    }
    addEventListener(type: unknown, callback: unknown, options?: unknown) {
      if (type !== 'abort' || this.#aborted || callback === null || callback === undefined) return
      const list = this.#listeners
      for (let i = 0; i < list.length; i++) if (list[i]!.callback === callback) return
      const once =
        typeof options === 'object' && options !== null && (options as { once?: unknown }).once === true
      list[list.length] = { callback, once }
    }
    removeEventListener(type: unknown, callback: unknown) {
      if (type !== 'abort') return
      const kept: Listener[] = []
      for (let i = 0; i < this.#listeners.length; i++)
        if (this.#listeners[i]!.callback !== callback) kept[kept.length] = this.#listeners[i]!
      this.#listeners = kept
    }
    static fire(signal: AbortSignal, message: string, onError: (error: unknown) => void) {
      if (signal.#aborted) return
      signal.#aborted = true
      const reason = new BaseError(message)
      defineProperty(reason, 'name', { value: 'AbortError', configurable: true, writable: true })
      signal.#reason = reason
      const event = { type: 'abort', target: signal, currentTarget: signal }
      const call = (callback: unknown) => {
        try {
          if (typeof callback === 'function') apply(callback, signal, [event])
          else (callback as { handleEvent(event: object): void }).handleEvent(event)
        } catch (error) {
          onError(error)
        }
      }
      const list = signal.#listeners
      signal.#listeners = []
      if (signal.#onabort !== null) call(signal.#onabort)
      for (let i = 0; i < list.length; i++) call(list[i]!.callback)
    }
  }
  const { fire } = AbortSignal
  delete (AbortSignal as { fire?: unknown }).fire

  return (onError) => {
    const signal = new AbortSignal(key)
    return { signal, abort: (message) => fire(signal, message, onError) }
  }
}
