/** atob, btoa, performance, navigator and reportError. */
import { idl, needArguments } from '../idl.ts'

const alphabet = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'
const sextets = new Uint8Array(128).fill(255)
for (let i = 0; i < 64; i++) sextets[alphabet.charCodeAt(i)] = i

const invalid = (message: string) => new DOMException(message, 'InvalidCharacterError')

export function btoa(data: unknown): string {
  needArguments(arguments.length, 1, 'btoa')
  const text = `${data}`
  let out = ''
  for (let i = 0; i < text.length; i += 3) {
    const a = text.charCodeAt(i)
    const b = text.charCodeAt(i + 1)
    const c = text.charCodeAt(i + 2)
    if (a > 255 || b > 255 || c > 255) throw invalid('btoa: a character is outside of the Latin1 range')
    const left = text.length - i
    out += alphabet[a >> 2]! + alphabet[((a & 3) << 4) | (b >> 4)]!
    out += left > 1 ? alphabet[((b & 15) << 2) | (c >> 6)]! : '='
    out += left > 2 ? alphabet[c & 63]! : '='
  }
  return out
}

export function atob(data: unknown): string {
  needArguments(arguments.length, 1, 'atob')
  let text = `${data}`.replace(/[\t\n\f\r ]/g, '')
  if (text.length % 4 === 0) text = text.replace(/==?$/, '')
  if (text.length % 4 === 1) throw invalid('atob: the text is not correctly encoded')
  let out = ''
  let bits = 0
  let held = 0
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i)
    const value = code < 128 ? sextets[code]! : 255
    if (value === 255) throw invalid('atob: the text is not correctly encoded')
    held = ((held << 6) | value) & 0xffffff
    bits += 6
    if (bits >= 8) {
      bits -= 8
      out += String.fromCharCode((held >> bits) & 255)
    }
  }
  return out
}

export function reportError(error: unknown): void {
  needArguments(arguments.length, 1, 'reportError')
  host.uncaught(error)
}

const key = Symbol('constructor')
const { timeOrigin } = host

class Performance extends EventTarget {
  constructor(given: unknown = undefined) {
    if (given !== key) throw new TypeError('Illegal constructor')
    super()
  }
  #brand = true
  get timeOrigin() {
    void this.#brand
    return timeOrigin
  }
  now(): number {
    void this.#brand
    return host.now() - timeOrigin
  }
  toJSON() {
    void this.#brand
    return { timeOrigin }
  }
}
idl(Performance, 'Performance')

class Navigator {
  constructor(given: unknown = undefined) {
    if (given !== key) throw new TypeError('Illegal constructor')
  }
  get userAgent() {
    return 'vulcan'
  }
  get hardwareConcurrency() {
    return 1
  }
  get language() {
    return 'en-US'
  }
  get languages() {
    return Object.freeze(['en-US'])
  }
}
idl(Navigator, 'Navigator')

const navigator = new Navigator(key)
const performance = new Performance(key)

export { Navigator, navigator, Performance, performance }
