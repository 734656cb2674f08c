/** The part of undici’s core/util.js that its fetch classes use; the rest of it is for Node’s sockets. */
const token = /^[!#$%&'*+.^_`|~0-9A-Za-z-]+$/

export const kEnumerableProperty = { __proto__: null, enumerable: true }
export const isValidHTTPToken = (text: string) => token.test(text)

const methods = ['DELETE', 'GET', 'HEAD', 'OPTIONS', 'POST', 'PUT', 'QUERY']
export const normalizedMethodRecordsBase: Record<string, string> = Object.create(null)
for (const method of methods) {
  normalizedMethodRecordsBase[method] = method
  normalizedMethodRecordsBase[method.toLowerCase()] = method
}
export const normalizedMethodRecords: Record<string, string> = Object.assign(
  Object.create(null),
  normalizedMethodRecordsBase,
  { patch: 'patch', PATCH: 'PATCH' },
)

export const bufferToLowerCasedHeaderName = (bytes: { toString(encoding: string): string }) =>
  bytes.toString('latin1').toLowerCase()

export function setHeader(headers: Record<string, unknown>, name: string, value: unknown): void {
  Object.defineProperty(headers, name, { value, writable: true, enumerable: true, configurable: true })
}

export function addAbortListener(signal: AbortSignal, listener: () => void) {
  signal.addEventListener('abort', listener, { once: true })
  return () => signal.removeEventListener('abort', listener)
}

export const isDisturbed = (stream: ReadableStream) => group('streams').isDisturbed(stream)
