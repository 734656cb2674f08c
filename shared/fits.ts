/**
 * A quick yes to data that a schema takes as it is. Parsing with zod makes a copy of everything it is given, which
 * for an event costs more than reading its JSON; most of what is read was written by our own processes and needs
 * neither defaults nor error messages. A no means nothing: then the schema itself says what is right.
 */
import { z } from 'zod'

type Fits = (value: unknown) => boolean

const no: Fits = () => false
const all =
  (checks: readonly Fits[]): Fits =>
  (value) =>
    checks.every((check) => check(value))

/**
 * Made once from the schema, which stays the only place that says what is valid: true only for JSON that
 * `schema.parse` takes and gives back equal. What this does not know of in a schema fits nothing.
 *
 * Throws where an option of a union has a default: by `fits` alone nobody could say which of the options is meant.
 */
export function fits(schema: z.core.$ZodType, inUnion = false): Fits {
  const inner = (one: z.core.$ZodType) => fits(one, inUnion)
  if (schema instanceof z.ZodString || schema instanceof z.ZodStringFormat) return stringFits(schema)
  if (schema instanceof z.ZodNumber) return numberFits(schema)
  if (schema instanceof z.ZodArray) return arrayFits(schema, inner)
  if (checksOf(schema).length > 0) return no
  if (schema instanceof z.ZodObject) return objectFits(schema, inner)
  if (schema instanceof z.ZodEnum || schema instanceof z.ZodLiteral) {
    const values: ReadonlySet<unknown> = new Set(
      schema instanceof z.ZodEnum ? schema.options : schema.def.values,
    )
    return values.size === 1 ? isExactly([...values][0]) : (value) => values.has(value)
  }
  if (schema instanceof z.ZodNull) return (value) => value === null
  if (schema instanceof z.ZodBoolean) return (value) => typeof value === 'boolean'
  if (schema instanceof z.ZodUnknown) return (value) => value !== undefined
  if (schema instanceof z.ZodNullable) {
    const some = inner(schema.def.innerType)
    return (value) => value === null || some(value)
  }
  if (schema instanceof z.ZodOptional) {
    const some = inner(schema.def.innerType)
    return (value) => value === undefined || some(value)
  }
  if (schema instanceof z.ZodDefault) {
    if (inUnion) throw new Error('an option of a union has a default')
    return inner(schema.def.innerType)
  }
  if (schema instanceof z.ZodUnion) {
    const options = schema.options.map((option) => fits(option, true))
    return (value) => options.some((option) => option(value))
  }
  if (schema instanceof z.ZodTuple && schema.def.rest === null) {
    const items = schema.def.items.map(inner)
    return (value) =>
      Array.isArray(value) && value.length === items.length && items.every((item, i) => item(value[i]))
  }
  if (schema instanceof z.ZodRecord) return recordFits(schema, inner)
  return no
}

const isExactly =
  (wanted: unknown): Fits =>
  (value) =>
    value === wanted

/** An object without the one name that zod leaves out. */
const isPlain = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value) && !Object.hasOwn(value, '__proto__')

const checksOf = (schema: z.core.$ZodType) => (schema._zod.def.checks ?? []).map((check) => check._zod.def)

function arrayFits(schema: z.ZodArray, inner: (one: z.core.$ZodType) => Fits): Fits {
  const element = inner(schema.element)
  const length = all(checksOf(schema).map(lengthCheck))
  return (value) => {
    if (!Array.isArray(value) || !length(value)) return false
    for (const one of value) if (!element(one)) return false
    return true
  }
}

function objectFits(schema: z.ZodObject, inner: (one: z.core.$ZodType) => Fits): Fits {
  if (!(schema.def.catchall instanceof z.ZodUnknown)) return no
  const fields = Object.entries<z.core.$ZodType>(schema.shape)
  const names = fields.map(([name]) => name)
  const checks = fields.map(([, field]) => inner(field))
  return (value) => {
    if (!isPlain(value)) return false
    for (let i = 0; i < names.length; i++) if (!checks[i]!(value[names[i]!])) return false
    return true
  }
}

function recordFits({ def }: z.ZodRecord, inner: (one: z.core.$ZodType) => Fits): Fits {
  const key = inner(def.keyType)
  const field = inner(def.valueType)
  return (value) => {
    if (!isPlain(value)) return false
    for (const name in value) if (!key(name) || !field(value[name])) return false
    return true
  }
}

/** Formats that are nothing but their pattern. */
const patterned = new Set(['uuid', 'datetime', 'regex'])

function stringFits(schema: z.ZodString | z.ZodStringFormat): Fits {
  const own = schema instanceof z.ZodStringFormat ? [schema.def] : []
  const checks = [...own, ...checksOf(schema)].map(stringCheck)
  if (checks.length === 0) return (value) => typeof value === 'string'
  const [first, second] = checks
  if (second === undefined) return (value) => typeof value === 'string' && first!(value)
  const every = all(checks)
  return (value) => typeof value === 'string' && every(value)
}

function stringCheck(def: z.core.$ZodCheckDef): Fits {
  if (def.check !== 'string_format') return lengthCheck(def)
  const { format, pattern } = def as z.core.$ZodCheckStringFormatDef
  if (!patterned.has(format) || pattern === undefined || pattern.global || pattern.sticky) return no
  return (value) => pattern.test(value as string)
}

/** Of strings and arrays. */
function lengthCheck(def: z.core.$ZodCheckDef): Fits {
  if (def.check === 'min_length') {
    const { minimum } = def as z.core.$ZodCheckMinLengthDef
    return (value) => (value as { length: number }).length >= minimum
  }
  if (def.check === 'max_length') {
    const { maximum } = def as z.core.$ZodCheckMaxLengthDef
    return (value) => (value as { length: number }).length <= maximum
  }
  return no
}

function numberFits(schema: z.ZodNumber): Fits {
  const own = schema instanceof z.ZodNumberFormat ? [schema.def as z.core.$ZodNumberFormatDef] : []
  const checks = [...own, ...checksOf(schema)].map(numberCheck)
  if (checks.length === 0) return Number.isFinite
  const [first, second] = checks
  if (second === undefined) return (value) => Number.isFinite(value) && first!(value)
  const every = all(checks)
  return (value) => Number.isFinite(value) && every(value)
}

function numberCheck(def: z.core.$ZodCheckDef): Fits {
  if (def.check === 'number_format')
    return (def as z.core.$ZodCheckNumberFormatDef).format === 'safeint' ? Number.isSafeInteger : no
  const { value: bound, inclusive } = def as z.core.$ZodCheckLessThanDef
  if (typeof bound !== 'number') return no
  if (def.check === 'less_than')
    return (value) => (inclusive ? (value as number) <= bound : (value as number) < bound)
  if (def.check === 'greater_than')
    return (value) => (inclusive ? (value as number) >= bound : (value as number) > bound)
  return no
}
