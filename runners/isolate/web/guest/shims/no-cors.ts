/** Headers of a request in mode no-cors, which undici leaves out. https://fetch.spec.whatwg.org/#no-cors-safelisted-request-header */
import { parseMIMEType } from 'undici/lib/web/fetch/data-url.js'

const essences = new Set(['application/x-www-form-urlencoded', 'multipart/form-data', 'text/plain'])
const unsafeByte = /["():<>?@[\\\]{}\x7f\x00-\x08\x0a-\x1f]/

/** Whether a header may be there with this value. */
export function allows(name: string, value: string): boolean {
  if (value.length > 128) return false
  switch (name.toLowerCase()) {
    case 'accept':
      return !unsafeByte.test(value)
    case 'accept-language':
    case 'content-language':
      return !/[^0-9A-Za-z *,\-.;=]/.test(value)
    case 'content-type': {
      if (unsafeByte.test(value)) return false
      const type = parseMIMEType(value)
      return type !== 'failure' && essences.has(type.essence)
    }
    default:
      return false
  }
}
export const set = allows
const names = new Set(['accept', 'accept-language', 'content-language', 'content-type', 'range'])
const remove = (name: string) => names.has(name.toLowerCase())

export { remove as delete }
