/** Loaded before a test file (`node --import`): gives it uvu-counting.ts where it imports `uvu`. */
import { registerHooks } from 'node:module'

const counting = new URL('./uvu-counting.ts', import.meta.url).href

registerHooks({
  resolve: (specifier, context, next) =>
    specifier === 'uvu' && context.parentURL !== counting
      ? { url: counting, shortCircuit: true }
      : next(specifier, context),
})
