/** node:path, by path-browserify: that of POSIX. */
import made from 'path-browserify'

const path = made as any
export const exports = { ...path, posix: path, default: path }
