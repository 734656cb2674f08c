/** node:string_decoder, by the package of that name. */
import made from 'string_decoder/'

const { StringDecoder } = made as any
export const exports = { StringDecoder, default: { StringDecoder } }
