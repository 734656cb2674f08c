export { multibyteEncoder } from '@exodus/bytes/fallback/multi-byte.js'
export { createMultibyteDecoder } from '@exodus/bytes/multi-byte.js'
