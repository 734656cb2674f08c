/** Versions of functions: named by their content. */
import { Problem } from '../shared/errors.ts'
import type { FunctionVersion } from '../shared/functions.ts'
import { sha256Hex } from '../shared/ids.ts'
import type { VersionId } from '../shared/workload.ts'

/** Largest record of a version, bytes: a message holds 1 MiB. */
const versionBytes = 512 * 1024

/** Everything of a version that its id is made from. */
export type Content = Omit<FunctionVersion, 'version' | 'created_at' | 'warnings'>

/** Like JSON, with the keys of objects in order and without what is undefined. */
export function canonical(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(canonical).join(',')}]`
  if (typeof value !== 'object' || value === null) return JSON.stringify(value)
  const entries = Object.entries(value).filter(([, field]) => field !== undefined)
  entries.sort(([a], [b]) => (a < b ? -1 : 1))
  return `{${entries.map(([key, field]) => `${JSON.stringify(key)}:${canonical(field)}`).join(',')}}`
}

const versionIdOf = (content: Content): VersionId => `v${sha256Hex(canonical(content)).slice(0, 16)}`

export const contentOf = ({
  version: _,
  created_at: __,
  warnings: ___,
  ...content
}: FunctionVersion): Content => content

/** Throws `invalid_field` where the spec is too large to be kept. */
export function versionOf(content: Content, warnings: FunctionVersion['warnings']): FunctionVersion {
  const version = {
    ...content,
    version: versionIdOf(content),
    created_at: new Date().toISOString(),
    warnings,
  }
  if (Buffer.byteLength(JSON.stringify(version)) <= versionBytes) return version
  if (warnings.length > 0) return versionOf(content, [])
  throw new Problem('invalid_field', {
    detail: `without its code a spec may have at most ${versionBytes / 1024} KiB`,
    field: 'env',
  })
}
