/** node:buffer, by the buffer package. */
// The slash names the package rather than Node’s own module.
import * as made from 'buffer/'

const { Buffer, INSPECT_MAX_BYTES, kMaxLength } = made as unknown as typeof import('node:buffer') & {
  kMaxLength: number
}
const constants = { MAX_LENGTH: kMaxLength, MAX_STRING_LENGTH: 536870888 }

const names = {
  Buffer,
  INSPECT_MAX_BYTES,
  kMaxLength,
  kStringMaxLength: constants.MAX_STRING_LENGTH,
  constants,
  get Blob() {
    return host.web.Blob
  },
  get File() {
    return host.web.File
  },
  atob: (data: string) => host.web.atob(data),
  btoa: (data: string) => host.web.btoa(data),
  isUtf8: (data: Uint8Array) => {
    try {
      new TextDecoder('utf-8', { fatal: true }).decode(data)
      return true
    } catch {
      return false
    }
  },
  isAscii: (data: Uint8Array) => data.every((byte) => byte < 128),
}
export const exports = { ...names, default: names }
export { Buffer }
