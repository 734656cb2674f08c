/**
 * Turns any value into text for a log line, in the spirit of Node’s `util.inspect`. Runs inside the isolate, from
 * its own source text: it may use nothing but its parameters and globals, and takes the globals it needs before
 * the user’s code can replace them. Getters are shown, not called; where a Proxy’s traps throw, so it says.
 */
export type Inspect = (value: unknown, depth?: number) => string

export function makeInspect(): Inspect {
  const uncurry = Function.prototype.bind.bind(Function.prototype.call) as (
    fn: (...args: never[]) => unknown,
  ) => (...args: unknown[]) => unknown
  const getter = (object: object, key: PropertyKey) =>
    uncurry(Object.getOwnPropertyDescriptor(object, key)!.get as () => unknown)
  const { ownKeys, getOwnPropertyDescriptor, getPrototypeOf } = Reflect
  const { isArray } = Array
  const isInvalid = Number.isNaN
  const { stringify } = JSON
  const { String: toText, Error: BaseError } = globalThis
  const isError = (BaseError as unknown as { isError(value: unknown): boolean }).isError
  const objectPrototype = Object.prototype
  const tagOf = uncurry(Object.prototype.toString)
  const mapSize = getter(Map.prototype, 'size')
  const setSize = getter(Set.prototype, 'size')
  const mapEach = uncurry(Map.prototype.forEach)
  const setEach = uncurry(Set.prototype.forEach)
  const dateText = uncurry(Date.prototype.toISOString)
  const dateTime = uncurry(Date.prototype.getTime)
  const regexpText = uncurry(RegExp.prototype.toString)
  const symbolText = uncurry(Symbol.prototype.toString)
  const sourceOf = uncurry(Function.prototype.toString)
  const bufferLength = getter(ArrayBuffer.prototype, 'byteLength')
  const typedPrototype = getPrototypeOf(Uint8Array.prototype) as object
  const typedTag = getter(typedPrototype, Symbol.toStringTag)
  const typedLength = getter(typedPrototype, 'length')
  const slice = uncurry(String.prototype.slice) as (text: string, from: number, to?: number) => string
  const indexOf = uncurry(String.prototype.indexOf) as (text: string, part: string) => number
  const test = uncurry(RegExp.prototype.test) as (pattern: RegExp, text: string) => boolean
  const plainKey = /^[A-Za-z_$][\w$]*$/

  const maxItems = 100
  const maxText = 10_000
  const wide = 72

  interface State {
    /** Characters that may still be written; a value that is larger is cut, so that no log call runs away. */
    left: number
    stack: object[]
    depth: number
  }

  const quote = (text: string) => {
    const cut = text.length > maxText
    const body = stringify(cut ? slice(text, 0, maxText) : text)
    const inner = slice(body, 1, -1)
    const quoted = indexOf(text, "'") < 0 && indexOf(inner, '\\"') < 0 ? `'${inner}'` : body
    return cut ? `${quoted}... ${text.length - maxText} more characters` : quoted
  }

  const primitive = (value: unknown): string => {
    if (typeof value === 'string') return quote(value)
    if (typeof value === 'bigint') return `${value}n`
    if (typeof value === 'symbol') return symbolText(value) as string
    if (typeof value === 'number' && value === 0 && 1 / value < 0) return '-0'
    return toText(value)
  }

  const keyText = (key: PropertyKey) =>
    typeof key === 'symbol'
      ? `[${symbolText(key)}]`
      : test(plainKey, key as string)
        ? (key as string)
        : quote(key as string)

  const indent = (depth: number) => {
    let text = ''
    for (let i = 0; i < depth; i++) text += '  '
    return text
  }

  const wrap = (items: string[], open: string, close: string, level: number): string => {
    if (items.length === 0) return open + close
    let width = 0
    let broken = false
    for (let i = 0; i < items.length; i++) {
      width += items[i]!.length + 2
      if (indexOf(items[i]!, '\n') >= 0) broken = true
    }
    const multi = broken || width > wide
    const gap = multi ? `\n${indent(level + 1)}` : ' '
    let text = open
    for (let i = 0; i < items.length; i++) text += (i > 0 ? ',' : '') + gap + items[i]
    return `${text}${multi ? `\n${indent(level)}` : ' '}${close}`
  }

  /** The class a value belongs to, without calling anything of the user’s. */
  const className = (value: object): string | null => {
    let at: object | null = value
    for (let hops = 0; at !== null && hops < 8; hops++) {
      const own = getOwnPropertyDescriptor(at, 'constructor')
      if (own !== undefined) {
        const fn = own.value
        if (typeof fn !== 'function') return 'Object'
        const name = getOwnPropertyDescriptor(fn, 'name')?.value
        return typeof name === 'string' && name !== '' ? name : 'Object'
      }
      at = getPrototypeOf(at)
    }
    return null
  }

  const property = (value: object, key: PropertyKey, level: number, state: State): string | undefined => {
    const own = getOwnPropertyDescriptor(value, key)
    if (own === undefined || !own.enumerable) return undefined
    if (own.get) return own.set ? '[Getter/Setter]' : '[Getter]'
    if (own.set) return '[Setter]'
    return render(own.value, level + 1, state)
  }

  const properties = (value: object, level: number, state: State, items: string[], isList: boolean) => {
    const keys = ownKeys(value)
    let shown = 0
    for (let i = 0; i < keys.length; i++) {
      const key = keys[i]!
      if (isList && typeof key === 'string' && key >= '0' && key < ':') continue
      if (shown >= maxItems || state.left <= 0) {
        items[items.length] = '...'
        return
      }
      const text = property(value, key, level, state)
      if (text === undefined) continue
      shown++
      items[items.length] = `${keyText(key)}: ${text}`
    }
  }

  const list = (value: ArrayLike<unknown>, length: number, level: number, state: State, items: string[]) => {
    for (let i = 0; i < length; i++) {
      if (i >= maxItems || state.left <= 0) {
        items[items.length] = `... ${length - i} more item${length - i > 1 ? 's' : ''}`
        return
      }
      const own = getOwnPropertyDescriptor(value, i)
      items[items.length] = own === undefined ? '<empty>' : (property(value, i, level, state) ?? '<hidden>')
    }
  }

  const error = (value: object, level: number, state: State): string => {
    const read = (key: string) => {
      try {
        return (value as Record<string, unknown>)[key]
      } catch {
        return undefined
      }
    }
    const stack = read('stack')
    const name = read('name')
    const message = read('message')
    let head =
      typeof stack === 'string' && stack !== ''
        ? slice(stack, 0, maxText)
        : `[${typeof name === 'string' ? name : 'Error'}${typeof message === 'string' && message !== '' ? `: ${slice(message, 0, maxText)}` : ''}]`
    const items: string[] = []
    properties(value, level, state, items, false)
    const cause = getOwnPropertyDescriptor(value, 'cause')
    if (cause !== undefined && !cause.enumerable && 'value' in cause)
      items[items.length] = `[cause]: ${render(cause.value, level + 1, state)}`
    if (items.length > 0) head = `${head} ${wrap(items, '{', '}', level)}`
    return head
  }

  const object = (value: object, level: number, state: State): string => {
    const items: string[] = []
    if (isArray(value)) {
      const length = value.length
      list(value, length, level, state, items)
      // The keys of a long list would be a list of their own.
      if (length <= maxItems) properties(value, level, state, items, true)
      const name = className(value)
      return wrap(items, name === 'Array' ? '[' : `${name}(${length}) [`, ']', level)
    }
    if (isError(value)) return error(value, level, state)
    const tag = tagOf(value) as string
    const name = className(value)
    let label = name === null ? '[Object: null prototype] ' : name === 'Object' ? '' : `${name} `
    try {
      if (tag === '[object Map]') {
        label = `${name}(${mapSize(value)}) `
        mapEach(value, (item: unknown, key: unknown) => {
          if (items.length < maxItems && state.left > 0)
            items[items.length] = `${render(key, level + 1, state)} => ${render(item, level + 1, state)}`
        })
      } else if (tag === '[object Set]') {
        label = `${name}(${setSize(value)}) `
        setEach(value, (item: unknown) => {
          if (items.length < maxItems && state.left > 0) items[items.length] = render(item, level + 1, state)
        })
      } else if (tag === '[object Date]') {
        const time = dateTime(value) as number
        return isInvalid(time) ? 'Invalid Date' : (dateText(value) as string)
      } else if (tag === '[object RegExp]') return regexpText(value) as string
      else if (tag === '[object ArrayBuffer]') items[0] = `byteLength: ${bufferLength(value)}`
      else if (typedTag(value) !== undefined) {
        const length = typedLength(value) as number
        list(value as ArrayLike<unknown>, length, level, state, items)
        return wrap(items, `${typedTag(value)}(${length}) [`, ']', level)
      }
    } catch {
      // It only says that it is one of these.
    }
    if (objectPrototype === value) label = '[Object: null prototype] '
    properties(value, level, state, items, false)
    return wrap(items, `${label}{`, '}', level)
  }

  const functionText = (value: object): string => {
    const name = getOwnPropertyDescriptor(value, 'name')?.value
    let source = ''
    try {
      source = slice(sourceOf(value) as string, 0, 6)
    } catch {
      // A Proxy of a function has no source.
    }
    const kind = source === 'class ' || source === 'class{' ? 'class' : 'Function'
    const shown = typeof name === 'string' && name !== '' ? slice(name, 0, 200) : '(anonymous)'
    return kind === 'class' ? `[class ${shown}]` : `[Function: ${shown}]`
  }

  function render(value: unknown, level: number, state: State): string {
    let text: string
    if (value === null || (typeof value !== 'object' && typeof value !== 'function')) text = primitive(value)
    else {
      try {
        for (let i = 0; i < state.stack.length; i++) if (state.stack[i] === value) return '[Circular]'
        if (typeof value === 'function') text = functionText(value)
        else if (level > state.depth && !isError(value)) {
          const name = className(value)
          text = isArray(value) ? '[Array]' : `[${name ?? 'Object: null prototype'}]`
        } else {
          state.stack[state.stack.length] = value
          text = object(value, level, state)
          state.stack.length--
        }
      } catch {
        text = '[value that cannot be shown]'
      }
    }
    state.left -= text.length
    return text
  }

  return (value, depth = 2) => render(value, 0, { left: 64 * 1024, stack: [], depth })
}
