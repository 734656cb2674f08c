/** MessageChannel and MessagePort, between parts of one isolate. */
import { idl, needArguments } from '../idl.ts'

const { dispatchTrusted, handlerAttribute } = group('events')
const key = Symbol('constructor')

let entangle: (a: MessagePort, b: MessagePort) => void
let isPort: (value: object) => boolean
let moved: (port: MessagePort, refuse: (what: string) => never) => MessagePort

class MessagePort extends EventTarget {
  #other: MessagePort | undefined
  #queue: { data: unknown; ports: unknown[] }[] = []
  #started = false
  #detached = false
  #delivering = false
  constructor(given: unknown = undefined) {
    if (given !== key) throw new TypeError('Illegal constructor')
    super()
  }
  postMessage(message: unknown, options: unknown = undefined): void {
    needArguments(arguments.length, 1, 'MessagePort.postMessage')
    const { cloneWith, transferList } = group('clone')
    const given = options as { transfer?: unknown; [Symbol.iterator]?: unknown } | undefined
    const transfer = transferList(typeof given?.[Symbol.iterator] === 'function' ? given : given?.transfer)
    if (transfer.includes(this)) throw new DOMException('A port cannot transfer itself', 'DataCloneError')
    const { value, ports } = cloneWith(message, transfer)
    const target = this.#other
    if (target === undefined) return
    target.#queue.push({ data: value, ports })
    target.#deliver()
  }
  start(): void {
    this.#started = true
    this.#deliver()
  }
  close(): void {
    this.#detached = true
    const other = this.#other
    this.#other = undefined
    if (other !== undefined) other.#other = undefined
  }
  #deliver(): void {
    if (this.#delivering || !this.#started || this.#detached || this.#queue.length === 0) return
    this.#delivering = true
    host.setTimeout(() => {
      this.#delivering = false
      const message = this.#queue.shift()
      if (message !== undefined && !this.#detached)
        dispatchTrusted(this, new host.web.MessageEvent('message', message as never))
      this.#deliver()
    }, 0)
  }
  static {
    isPort = (value) => #queue in value
    entangle = (a, b) => {
      a.#other = b
      b.#other = a
    }
    moved = (port, refuse) => {
      if (port.#detached) return refuse('A detached MessagePort')
      const copy = new MessagePort(key)
      copy.#queue = port.#queue
      copy.#other = port.#other
      if (copy.#other !== undefined) copy.#other.#other = copy
      port.#other = undefined
      port.#queue = []
      port.#detached = true
      return copy
    }
  }
}
idl(MessagePort, 'MessagePort')
handlerAttribute(MessagePort.prototype, 'message', isPort)
handlerAttribute(MessagePort.prototype, 'messageerror', isPort)
{
  // A port with a handler is started by it.
  const { get, set } = Object.getOwnPropertyDescriptor(MessagePort.prototype, 'onmessage')!
  Object.defineProperty(MessagePort.prototype, 'onmessage', {
    enumerable: true,
    configurable: true,
    get: get!,
    set(this: MessagePort, value: unknown) {
      set!.call(this, value)
      this.start()
    },
  })
}

class MessageChannel {
  #port1 = new MessagePort(key)
  #port2 = new MessagePort(key)
  constructor() {
    entangle(this.#port1, this.#port2)
  }
  get port1() {
    return this.#port1
  }
  get port2() {
    return this.#port2
  }
}
idl(MessageChannel, 'MessageChannel')

export const detach = (port: MessagePort, refuse: (what: string) => never) => moved(port, refuse)
export const is = { MessagePort: isPort }
export { MessageChannel, MessagePort }
