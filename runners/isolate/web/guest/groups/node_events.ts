/** node:events, by the events package. */
import EventEmitter from 'events/'

const Emitter = EventEmitter as any
const getEventListeners = (emitter: any, name: string) => emitter.listeners(name)
const setMaxListeners = (count: number, ...emitters: any[]) => {
  for (const emitter of emitters) emitter.setMaxListeners?.(count)
}
const addAbortListener = (signal: AbortSignal, listener: () => void) => {
  signal.addEventListener('abort', listener, { once: true })
  return { [Symbol.dispose]: () => signal.removeEventListener('abort', listener) }
}

/** Every event of a name as it comes, until the signal is aborted. */
async function* on(
  emitter: any,
  name: string,
  options: { signal?: AbortSignal } = {},
): AsyncGenerator<unknown[]> {
  const queue: unknown[][] = []
  let wake = () => {}
  let failure: { error: unknown } | undefined
  const hear = (...args: unknown[]) => {
    queue.push(args)
    wake()
  }
  const fail = (error: unknown) => {
    failure = { error }
    wake()
  }
  const { signal } = options
  const abort = () => fail(signal!.reason)
  if (signal?.aborted) abort()
  signal?.addEventListener('abort', abort, { once: true })
  emitter.on(name, hear)
  if (name !== 'error') emitter.on('error', fail)
  try {
    for (;;) {
      while (queue.length > 0) yield queue.shift()!
      if (failure !== undefined) throw failure.error
      await new Promise<void>((resolve) => {
        wake = resolve
      })
    }
  } finally {
    emitter.off(name, hear)
    emitter.off('error', fail)
    signal?.removeEventListener('abort', abort)
  }
}

Object.assign(Emitter, { EventEmitter: Emitter, addAbortListener, getEventListeners, on, setMaxListeners })
export const exports = {
  EventEmitter: Emitter,
  addAbortListener,
  captureRejectionSymbol: Symbol.for('nodejs.rejection'),
  defaultMaxListeners: Emitter.defaultMaxListeners,
  errorMonitor: Symbol('events.errorMonitor'),
  getEventListeners,
  listenerCount: Emitter.listenerCount,
  on,
  once: Emitter.once,
  setMaxListeners,
  default: Emitter,
}
