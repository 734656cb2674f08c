/** Percent-encoding of URLs, whose encoding is always UTF-8 where scripts make them. */
import { percentEncoder } from '@exodus/bytes/fallback/percent.js'

const encoder = new TextEncoder()
export const percentEncodeAfterEncoding = (_encoding: string, input: string, set: string): string =>
  percentEncoder(set)(encoder.encode(input))
