/** V8’s flags in a sandbox child. Code that V8 compiled under other flags is of no use there: see `precompile.ts`. */

/** On the command line. */
export const nodeFlags = [
  // isolated-vm needs it.
  '--no-node-snapshot',
  // Without it V8 would go on with the user’s code on a thread of its own.
  '--no-wasm-async-compilation',
  // Room for callbacks from the depth of an isolate’s stack.
  '--stack-size=3900',
]
/** Set by the child itself: isolates overflow their stack long before the process does. */
export const isolateFlags = '--stack-size=984'
