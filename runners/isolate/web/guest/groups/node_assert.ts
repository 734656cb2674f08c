/** node:assert, by the assert package. */
import assert from 'assert/'
import { isDeepStrictEqual } from 'assert/build/internal/util/comparisons.js'

const made = assert as any
const named = (value: any) => ({ ...value, strict: made.strict, default: value })

export { isDeepStrictEqual }
export const exports = named(made)
export const strictExports = named(made.strict)
