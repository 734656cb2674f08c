/** What every process does alike: structured logs and one signal to stop by. */
import pino, { type Logger, type LoggerOptions } from 'pino'

export type { Logger }

export const logLevels = ['trace', 'debug', 'info', 'warn', 'error', 'silent'] as const
/** JSON lines; lines for people, with or without colours. */
export const logFormats = ['json', 'pretty', 'color'] as const

export interface LogOptions {
  level: (typeof logLevels)[number]
  /** Default: for people on a terminal, else JSON. */
  format?: (typeof logFormats)[number] | undefined
  /** On every line. */
  fields?: Record<string, string>
  /** Texts that no line may show. */
  secrets?: readonly string[]
}

/** Fields whose values are never written, at any depth. */
const credentials =
  /^(authorization|proxy-authorization|cookie|set-cookie|password|passwd|pass|secret|secrets|token|authtoken|api[-_]?key|x-api-key|secrets?key|private[-_]?key)$/i
const hidden = '[redacted]'
/** Nested deeper, longer lists and longer texts (characters) than these are cut. */
const deepest = 6
const longestList = 100
const longestText = 8_192

/** A logger on standard output, one line each. */
export async function makeLogger(service: string, options: LogOptions): Promise<Logger> {
  const format = options.format ?? (process.stdout.isTTY ? 'color' : 'json')
  const settings = loggerSettings(service, options)
  if (format === 'json') return pino(settings)
  const { default: pretty } = await import('pino-pretty')
  return pino(settings, pretty({ colorize: format === 'color', ignore: 'service,process', sync: true }))
}

/** What is the same wherever the lines go. */
export function loggerSettings(service: string, { level, fields, secrets }: LogOptions): LoggerOptions {
  const unshown = redactor(secrets ?? [])
  return {
    level,
    base: { service, ...fields },
    timestamp: pino.stdTimeFunctions.isoTime,
    // What `log` leaves of an error looks like one.
    serializers: { err: (error) => error },
    formatters: {
      level: (label) => ({ level: label }),
      log: (line) => plain(line, 0) as Record<string, unknown>,
    },
    hooks: { streamWrite: unshown },
  }
}

/** A line without credentials in URLs and headers, and without the texts that are secret. */
function redactor(secrets: readonly string[]): (line: string) => string {
  const texts = secrets
    .filter((text) => text.length >= 6)
    .flatMap((text) => [text, JSON.stringify(text).slice(1, -1), encodeURIComponent(text)])
  return (line) => {
    let shown = line
      .replace(/:\/\/[^\s/"'@\\]+@/g, `://${hidden}@`)
      .replace(/\b(Bearer|Basic) [\w~+/=.-]{6,}/gi, `$1 ${hidden}`)
    for (const text of texts) if (shown.includes(text)) shown = shown.replaceAll(text, hidden)
    return shown
  }
}

/** Errors as what is known of them, credentials left out, all of it bounded. */
function plain(value: unknown, depth: number): unknown {
  if (typeof value === 'string') return cut(value)
  if (typeof value === 'bigint') return String(value)
  if (typeof value !== 'object' || value === null) return value
  if (depth > deepest) return '…'
  if (value instanceof Error) return plainError(value, depth)
  if (value instanceof Date) return value
  if (ArrayBuffer.isView(value)) return `${value.byteLength} bytes`
  if (Array.isArray(value)) return value.slice(0, longestList).map((item) => plain(item, depth + 1))
  const shown: Record<string, unknown> = {}
  let fields = 0
  for (const [name, field] of Object.entries(value)) {
    if (++fields > longestList) break
    shown[name] = credentials.test(name) && field != null ? hidden : plain(field, depth + 1)
  }
  return shown
}

/** Of other properties only the code: they may hold requests with all their headers. */
function plainError(error: Error, depth: number): Record<string, unknown> {
  const { name, message, stack, cause } = error
  const code = (error as { code?: unknown }).code
  return {
    type: name,
    message: cut(message),
    ...(typeof code === 'string' || typeof code === 'number' ? { code } : {}),
    ...(stack === undefined ? {} : { stack: cut(stack) }),
    ...(cause === undefined ? {} : { cause: plain(cause, depth + 1) }),
    ...(error instanceof AggregateError ? { errors: plain(error.errors, depth + 1) } : {}),
  }
}

const cut = (text: string): string => (text.length > longestText ? `${text.slice(0, longestText)}…` : text)

/** Aborted by the first SIGINT or SIGTERM; a second one ends the process at once. */
export function stopSignal(): AbortSignal {
  const controller = new AbortController()
  const stop = () => {
    if (controller.signal.aborted) process.exit(130)
    controller.abort()
  }
  process.on('SIGINT', stop)
  process.on('SIGTERM', stop)
  return controller.signal
}

export const untilAborted = (signal: AbortSignal): Promise<void> =>
  signal.aborted
    ? Promise.resolve()
    : new Promise((resolve) => signal.addEventListener('abort', () => resolve(), { once: true }))
