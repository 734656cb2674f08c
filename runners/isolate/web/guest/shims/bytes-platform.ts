/** What @exodus/bytes looks for in its platform: nothing of it is there. Long texts go to the host: see `encoding.ts`. */
export {
  decode2string,
  encodeCharcodes,
  isDeno,
  isHermes,
  isLE,
} from '@exodus/bytes/fallback/platform.native.js'

export const nativeBuffer = null
export const nativeEncoder = null
export const nativeDecoder = null
export const nativeDecoderLatin1 = null
