/** Makes classes look as Web IDL has them. */

/** Members of the prototype and statics become enumerable, and instances get their tag. */
export function idl<T extends abstract new (...args: never[]) => object>(interfaceClass: T, tag: string): T {
  // The bundler renames classes that name themselves.
  Object.defineProperty(interfaceClass, 'name', { value: tag, configurable: true })
  for (const target of [interfaceClass, interfaceClass.prototype] as object[])
    for (const key of Object.getOwnPropertyNames(target)) {
      if (target === interfaceClass ? ['length', 'name', 'prototype'].includes(key) : key === 'constructor')
        continue
      Object.defineProperty(target, key, { enumerable: true })
    }
  Object.defineProperty(interfaceClass.prototype, Symbol.toStringTag, { value: tag, configurable: true })
  return interfaceClass
}

export function constants(interfaceClass: { prototype: object }, values: Record<string, number>): void {
  for (const [key, value] of Object.entries(values))
    for (const target of [interfaceClass, interfaceClass.prototype])
      Object.defineProperty(target, key, { value, enumerable: true })
}

export function needArguments(given: number, needed: number, what: string): void {
  if (given < needed)
    throw new TypeError(
      `${what}: ${needed} argument${needed > 1 ? 's' : ''} required, but only ${given} present`,
    )
}

/** A dictionary argument: an object, or nothing. */
export function dictionary(value: unknown, what: string): Record<string, unknown> {
  if (value === undefined || value === null) return Object.create(null)
  if (typeof value !== 'object' && typeof value !== 'function')
    throw new TypeError(`${what}: the options are not an object`)
  return value as Record<string, unknown>
}

/** An unsigned integer up to 2^53 - 1, with [EnforceRange]. */
export function enforceRange(value: unknown, max: number, what: string): number {
  const number = Number(value)
  if (!Number.isFinite(number)) throw new TypeError(`${what} is not a finite number`)
  const whole = Math.trunc(number) + 0
  if (whole < 0 || whole > max) throw new TypeError(`${what} is out of range`)
  return whole
}
