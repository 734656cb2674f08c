/**
 * What npm is given of a project: its dependencies, and nothing else of its package.json, lock or .npmrc. Only
 * versions from the registry are installed: anything else could reach what the gateway’s host can.
 */
import { z } from 'zod'
import { fieldPath, Problem } from '../../shared/errors.ts'
import { sha256Hex } from '../../shared/ids.ts'
import type { Files } from './archive.ts'

/** What an install works on. */
export interface Install {
  packageJson: string
  /** Null: npm chooses the newest that the ranges allow. */
  lock: string | null
  /** Of both: the same key gives the same modules, where there is a lock. */
  key: string
  warnings: string[]
}

const name = /^(@[a-z0-9~-][\w.~-]*\/)?[a-z0-9~-][\w.~-]*$/i
/** A range, a tag, or another name for a package of the registry. */
const registrySpecifier = /^(npm:(@[a-z0-9~-][\w.~-]*\/)?[a-z0-9~-][\w.~-]*(@[^:/\\]*)?|[^:/\\]*)$/i
const packageFile = /\.(tgz|tar|tar\.gz)$/i

const Dependencies = z.record(z.string(), z.string()).default({})
/** Of the many fields of a package.json those that an install depends on. */
const Manifest = z.object({
  dependencies: Dependencies,
  optionalDependencies: Dependencies,
  overrides: z.record(z.string(), z.unknown()).default({}),
  workspaces: z.unknown().optional(),
})
const Lock = z.object({
  lockfileVersion: z.int(),
  packages: z.record(z.string(), z.looseObject({})).optional(),
})

const failed = (detail: string, file: string, field?: string, cause?: unknown) =>
  new Problem('build_failed', {
    detail: `${file}: ${field === undefined ? '' : `${field}: `}${detail}`,
    field,
    errors: [{ detail, file, line: null, column: null }],
    cause,
  })

export function readJson(files: Files, file: string): unknown {
  const bytes = files.get(file)
  if (bytes === undefined) return undefined
  try {
    return JSON.parse(
      Buffer.from(bytes)
        .toString('utf8')
        .replace(/^\uFEFF/, ''),
    )
  } catch (cause) {
    throw failed(`is not JSON: ${(cause as Error).message}`, file, undefined, cause)
  }
}

function parsed<S extends z.ZodType>(schema: S, value: unknown, file: string): z.infer<S> {
  const result = schema.safeParse(value)
  if (result.success) return result.data
  const [issue] = result.error.issues
  throw failed(issue!.message, file, fieldPath(issue!.path) || undefined)
}

function checkSpecifier(field: string, specifier: string): void {
  if (registrySpecifier.test(specifier) && !packageFile.test(specifier) && !/^[.~]{1,2}$/.test(specifier))
    return
  throw failed(
    `${JSON.stringify(specifier)} is not installed: only versions from the npm registry are; put the package’s files in the archive under node_modules instead`,
    'package.json',
    field,
  )
}

function checkOverrides(field: string, overrides: Record<string, unknown>, depth = 0): void {
  for (const [key, value] of Object.entries(overrides)) {
    if (typeof value === 'string') checkSpecifier(`${field}.${key}`, value)
    else if (typeof value === 'object' && value !== null && depth < 16)
      checkOverrides(`${field}.${key}`, value as Record<string, unknown>, depth + 1)
    else throw failed('must be a version or an object of versions', 'package.json', `${field}.${key}`)
  }
}

/** What is to be installed; undefined: nothing, or the archive has it. Throws `build_failed`. */
export function installOf(files: Files): Install | undefined {
  const json = readJson(files, 'package.json')
  if (json === undefined) return undefined
  for (const path of files.keys()) if (path.startsWith('node_modules/')) return undefined
  const { dependencies, optionalDependencies, overrides, workspaces } = parsed(Manifest, json, 'package.json')
  if (workspaces !== undefined)
    throw failed('workspaces are not installed; deploy one package', 'package.json', 'workspaces')
  const fields = { dependencies, optionalDependencies }
  for (const [field, of] of Object.entries(fields))
    for (const [dependency, specifier] of Object.entries(of)) {
      if (!name.test(dependency))
        throw failed('is no name of a package', 'package.json', `${field}.${dependency}`)
      checkSpecifier(`${field}.${dependency}`, specifier)
    }
  checkOverrides('overrides', overrides)
  if (Object.keys({ ...dependencies, ...optionalDependencies }).length === 0) return undefined

  const warnings: string[] = []
  const lock = readLock(files, warnings)
  const packageJson = JSON.stringify({ name: 'project', version: '0.0.0', ...fields, overrides })
  const text =
    lock === undefined
      ? null
      : JSON.stringify({
          name: 'project',
          version: '0.0.0',
          lockfileVersion: 3,
          requires: true,
          packages: { '': { name: 'project', version: '0.0.0', ...fields }, ...lock },
        })
  return { packageJson, lock: text, key: sha256Hex(`${packageJson}\0${text ?? ''}`), warnings }
}

/** The packages of a package-lock.json, without the root and without where they were downloaded from. */
function readLock(files: Files, warnings: string[]): Record<string, object> | undefined {
  const json = readJson(files, 'package-lock.json')
  if (json === undefined) {
    const other = ['npm-shrinkwrap.json', 'yarn.lock', 'pnpm-lock.yaml', 'bun.lock'].find((f) => files.has(f))
    warnings.push(
      `there is no package-lock.json${other === undefined ? '' : ` (${other} is not read)`}: each deploy may install newer versions`,
    )
    return undefined
  }
  const { lockfileVersion, packages } = parsed(Lock, json, 'package-lock.json')
  if (packages === undefined) {
    warnings.push(`package-lock.json has version ${lockfileVersion} and is not read; npm 7 and newer write 3`)
    return undefined
  }
  const cleaned: Record<string, object> = {}
  for (const [path, entry] of Object.entries(packages)) {
    if (path === '' || entry.dev === true) continue
    const field = `packages[${JSON.stringify(path)}]`
    const { resolved: _, link, version, ...rest } = entry
    if (link === true || !/^(node_modules\/(@[^/\\]+\/)?[^/\\]+\/)+$/.test(`${path}/`) || path.includes('..'))
      throw failed('is outside of node_modules', 'package-lock.json', field)
    if (typeof version !== 'string' || !/^\d+\.\d+\.\d+[\w.+-]*$/.test(version))
      throw failed('is not a version from the registry', 'package-lock.json', field)
    cleaned[path] = { version, ...rest }
  }
  return cleaned
}
