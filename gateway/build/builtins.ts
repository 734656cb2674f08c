/**
 * The `node:` modules that the isolate's runtime offers; others are a build error. Pure: the sandbox loads it. A test
 * holds it to what the runtime has.
 */
export const offeredBuiltins = [
  'assert',
  'assert/strict',
  'async_hooks',
  'buffer',
  'events',
  'path',
  'path/posix',
  'process',
  'string_decoder',
  'url',
  'util',
] as const
