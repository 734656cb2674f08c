/** node:util, by the util package, with what Node has added since. */
import * as made from 'util/'

const stripVTControlCharacters = (text: string) => `${text}`.replace(/\u001b\[[0-9;?]*[ -/]*[@-~]/g, '')

const names: Record<string, unknown> = {
  ...(made as object),
  TextDecoder,
  TextEncoder,
  aborted: (signal: AbortSignal) =>
    signal.aborted
      ? Promise.resolve()
      : new Promise<void>((resolve) => signal.addEventListener('abort', () => resolve(), { once: true })),
  isDeepStrictEqual: (a: unknown, b: unknown) => group('node_assert').isDeepStrictEqual(a, b) as boolean,
  stripVTControlCharacters,
  styleText: (_format: unknown, text: string) => text,
  toUSVString: (text: unknown) => `${text}`.toWellFormed(),
}
delete names.default
export const exports = { ...names, default: names }
