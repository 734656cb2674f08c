import { URLPattern } from 'urlpattern-polyfill/urlpattern'

Object.defineProperty(URLPattern.prototype, Symbol.toStringTag, { value: 'URLPattern', configurable: true })

export { URLPattern }
