/**
 * `console` inside the isolate. Runs there from its own source text: it may use nothing but its parameters and
 * globals. Every call becomes one line of log, cut at a length of its own so that no call is endless.
 */
import type { Inspect } from './inspect.ts'

/** Level by number: debug, info, warn, error. */
export type Write = (level: number, text: string) => void

export interface Logger {
  write(level: number, args: unknown[]): void
  console: object
}

export function makeConsole(inspect: Inspect, write: Write): Logger {
  const uncurry = Function.prototype.bind.bind(Function.prototype.call) as (
    fn: (...args: never[]) => unknown,
  ) => (...args: unknown[]) => unknown
  const slice = uncurry(String.prototype.slice) as (text: string, from: number, to?: number) => string
  const indexOf = uncurry(String.prototype.indexOf) as (text: string, part: string, from?: number) => number
  const { String: toText, Number: toNumber, Error: BaseError } = globalThis
  const { trunc } = Math
  const { stringify } = JSON
  const now = Date.now
  /** Longer than a line may be in bytes, so that the host is the one who cuts and says so. */
  const maxText = 80_000
  let group = ''
  let counts: Record<string, number> = Object.create(null)
  let timers: Record<string, number> = Object.create(null)
  const nothing = Object.create

  const plain = (value: unknown) => (typeof value === 'string' ? value : inspect(value))

  const specifier = (letter: string, value: unknown): string | undefined => {
    switch (letter) {
      case 's':
        return typeof value === 'object' && value !== null ? inspect(value, 0) : plain(value)
      case 'd':
      case 'i':
      case 'f': {
        if (typeof value === 'bigint') return `${value}n`
        if (typeof value === 'object' || typeof value === 'symbol' || typeof value === 'function')
          return 'NaN'
        const number = toNumber(value)
        return toText(letter === 'i' ? trunc(number) : number)
      }
      case 'j':
        try {
          return toText(stringify(value))
        } catch {
          return '[Circular]'
        }
      case 'o':
      case 'O':
        return inspect(value, 4)
      case 'c':
        return ''
      default:
        return undefined
    }
  }

  const format = (args: unknown[]): string => {
    let text = ''
    let next = 0
    const first = args[0]
    if (typeof first === 'string') {
      next = 1
      let from = 0
      for (;;) {
        const at = args.length > 1 ? indexOf(first, '%', from) : -1
        if (at < 0 || at + 1 >= first.length || text.length > maxText) break
        const letter = first[at + 1]!
        text += slice(first, from, at)
        const filled = letter === '%' ? '%' : next < args.length ? specifier(letter, args[next]) : undefined
        if (filled === undefined) text += `%${letter}`
        else {
          text += filled
          if (letter !== '%') next++
        }
        from = at + 2
      }
      text += from === 0 ? first : slice(first, from)
    }
    for (; next < args.length && text.length <= maxText; next++)
      text += (next > 0 ? ' ' : '') + plain(args[next])
    return text
  }

  const emit = (level: number, args: unknown[]) => {
    let text = format(args)
    if (group !== '') text = group + text
    const over = text.length - maxText
    write(level, over > 0 ? `${slice(text, 0, maxText)} ... ${over} more characters` : text)
  }

  const label = (value: unknown) => (value === undefined ? 'default' : toText(value))
  const elapsed = (name: string) => `${name}: ${now() - timers[name]!}ms`

  const console = {
    log: (...args: unknown[]) => emit(1, args),
    debug: (...args: unknown[]) => emit(0, args),
    info: (...args: unknown[]) => emit(1, args),
    warn: (...args: unknown[]) => emit(2, args),
    error: (...args: unknown[]) => emit(3, args),
    trace: (...args: unknown[]) => {
      const at = new BaseError()
      emit(3, [`Trace${args.length > 0 ? `: ${format(args)}` : ''}`, `\n${at.stack}`])
    },
    assert: (ok?: unknown, ...args: unknown[]) => {
      if (!ok) emit(3, [args.length > 0 ? `Assertion failed: ${format(args)}` : 'Assertion failed'])
    },
    table: (value?: unknown) => emit(1, [value]),
    dir: (value?: unknown) => emit(1, [inspect(value, 4)]),
    dirxml: (...args: unknown[]) => emit(1, args),
    count: (name?: unknown) => {
      const key = label(name)
      counts[key] = (counts[key] ?? 0) + 1
      emit(1, [`${key}: ${counts[key]}`])
    },
    countReset: (name?: unknown) => {
      delete counts[label(name)]
    },
    time: (name?: unknown) => {
      timers[label(name)] = now()
    },
    timeLog: (name?: unknown, ...args: unknown[]) => {
      const key = label(name)
      if (timers[key] === undefined) emit(2, [`no timer ${key}`])
      else emit(1, [args.length > 0 ? `${elapsed(key)} ${format(args)}` : elapsed(key)])
    },
    timeEnd: (name?: unknown) => {
      const key = label(name)
      if (timers[key] === undefined) return emit(2, [`no timer ${key}`])
      emit(1, [elapsed(key)])
      delete timers[key]
    },
    group: (...args: unknown[]) => {
      if (args.length > 0) emit(1, args)
      if (group.length < 100) group += '  '
    },
    groupCollapsed: (...args: unknown[]) => console.group(...args),
    groupEnd: () => {
      group = slice(group, 2)
    },
    clear: () => {
      group = ''
      counts = nothing(null)
      timers = nothing(null)
    },
  }
  return { write: emit, console }
}
