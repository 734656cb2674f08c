/** What a client puts as a function, in every form it may have, as one spec and its files. */
import type { Context } from 'hono'
import { Problem } from '../shared/errors.ts'
import { FilePath, FunctionSpec } from '../shared/functions.ts'
import { type Runtime, runtimeOfFile } from '../shared/workload.ts'
import { parseWith } from './admission.ts'
import { parseJson } from './body.ts'
import { archiveKind, checkFolders, type Files } from './build/archive.ts'
import { readJson } from './build/manifest.ts'

export interface Upload {
  /** As JSON would say it; not checked yet. */
  spec: Record<string, unknown>
  /** The bytes of an archive that came along. */
  archive: Buffer | undefined
}

const archiveTypes =
  /^application\/(x-)?(gzip|zip|tar|gtar|tar\+gzip|tgz|zip-compressed|octet-stream)\s*(;|$)/i

/** Parameters that say what a spec would; of an archive only. */
const parameters = ['runtime', 'entrypoint', 'isolation'] as const

/** Reads a body by its declared type. Throws `unsupported_media_type` with what is taken. */
export async function readUpload(c: Context, body: Buffer): Promise<Upload> {
  const type = c.req.header('content-type') ?? ''
  if (/^application\/(?:[\w.+-]+\+)?json\b/i.test(type)) {
    noQuery(c)
    return { spec: object(parseJson(body), ''), archive: undefined }
  }
  if (archiveTypes.test(type)) {
    if (archiveKind(body) === undefined)
      throw new Problem('invalid_archive', {
        detail: 'the body is neither a tar, a gzipped tar nor a zip archive',
      })
    return { spec: specInQuery(c), archive: body }
  }
  if (/^multipart\/form-data\b/i.test(type)) {
    noQuery(c)
    return await readForm(body, type)
  }
  throw new Problem('unsupported_media_type', {
    detail: `content-type must be application/json, application/gzip (a tar), application/zip or multipart/form-data, not ${type || 'missing'}`,
  })
}

function object(value: unknown, field: string): Record<string, unknown> {
  if (typeof value === 'object' && value !== null && !Array.isArray(value))
    return value as Record<string, unknown>
  throw new Problem('invalid_field', { detail: `${field || 'the body'} must be a JSON object`, field })
}

function noQuery(c: Context): void {
  const [first] = Object.keys(c.req.query())
  if (first !== undefined)
    throw new Problem('invalid_query', {
      detail: `${first}: a spec is in the query only where the body is an archive`,
      field: first,
    })
}

/** `runtime`, `entrypoint`, `isolation`, `secrets=A,B` and `env.NAME=value`. */
function specInQuery(c: Context): Record<string, unknown> {
  const spec: Record<string, unknown> = {}
  const env: Record<string, string> = {}
  for (const [name, value] of Object.entries(c.req.query())) {
    if ((parameters as readonly string[]).includes(name)) spec[name] = value
    else if (name === 'secrets') spec.secrets = value.split(',').filter((secret) => secret !== '')
    else if (name.startsWith('env.')) env[name.slice('env.'.length)] = value
    else
      throw new Problem('invalid_query', {
        detail: `${name}: there are ${parameters.join(', ')}, secrets and env.NAME; all else goes into vulcan.json`,
        field: name,
      })
  }
  if (Object.keys(env).length > 0) spec.env = env
  return spec
}

async function readForm(body: Buffer, type: string): Promise<Upload> {
  let form: FormData
  try {
    const response = new Response(new Uint8Array(body), { headers: { 'content-type': type } })
    form = (await response.formData()) as FormData
  } catch (cause) {
    throw new Problem('invalid_field', {
      detail: `the form cannot be read: ${(cause as Error).message}`,
      cause,
    })
  }
  for (const name of form.keys())
    if (name !== 'spec' && name !== 'archive')
      throw new Problem('invalid_field', {
        detail: `${name}: there are the parts spec and archive`,
        field: name,
      })
  const part = async (name: string) => {
    const value = form.get(name)
    if (value === null) return undefined
    return typeof value === 'string' ? Buffer.from(value) : Buffer.from(await value.arrayBuffer())
  }
  const spec = await part('spec')
  const archive = await part('archive')
  if (archive === undefined)
    throw new Problem('invalid_field', { detail: 'archive: the form has no such part', field: 'archive' })
  return { spec: spec === undefined ? {} : object(parseJson(spec), 'spec'), archive }
}

/** A file in an archive that holds its spec. */
export const specFile = 'vulcan.json'

/** The spec of a project: what stands beside the archive wins over what stands in it, field by field. */
export function specWith(files: Files, given: Record<string, unknown>): FunctionSpec {
  const own = readJson(files, specFile)
  if (own === undefined) return parseWith(FunctionSpec, given)
  const fields = object(own, specFile)
  for (const field of ['code', 'files', 'archive', 'image'])
    if (field in fields)
      throw new Problem('invalid_field', { detail: `${specFile}: ${field} has no meaning there`, field })
  return parseWith(FunctionSpec, { ...fields, ...given })
}

const codeNames: Partial<Record<Runtime, string>> = {
  typescript: 'index.ts',
  python: 'main.py',
  go: 'main.go',
}

/** The files of a spec that carries them itself. Throws `invalid_field`. */
export function filesIn(spec: FunctionSpec): Files | undefined {
  if (spec.code !== undefined) {
    const name =
      typeof spec.entrypoint === 'string' && FilePath.safeParse(spec.entrypoint).success
        ? spec.entrypoint
        : (codeNames[spec.runtime ?? 'javascript'] ?? 'index.js')
    return new Map([[name, Buffer.from(spec.code)]])
  }
  if (spec.files === undefined) return undefined
  const files: Files = new Map(Object.entries(spec.files).map(([path, text]) => [path, Buffer.from(text)]))
  checkFolders(files)
  return files
}

const pythonPlaces = ['main', 'handler', 'app', 'index', 'src/main', 'src/handler', 'src/app', 'src/index']

/** Where a Python project begins: as its spec says, else where one would look. Throws `invalid_field`. */
export function pythonEntryOf(files: Files, entrypoint: string | undefined): string {
  if (entrypoint !== undefined) return named(files, entrypoint)
  for (const place of pythonPlaces) if (files.has(`${place}.py`)) return `${place}.py`
  const only = [...files.keys()].filter((path) => !path.includes('/') && path.endsWith('.py'))
  if (only.length === 1) return only[0]!
  throw new Problem('invalid_field', {
    detail: 'entrypoint: say which file the project begins with; there is no main.py',
    field: 'entrypoint',
  })
}

function named(files: Files, entrypoint: string): string {
  const path = entrypoint.replace(/^\.\//, '')
  if (files.has(path)) return path
  throw new Problem('invalid_field', {
    detail: `entrypoint: there is no file ${entrypoint} in the project`,
    field: 'entrypoint',
  })
}

const scripts = ['ts', 'tsx', 'mts', 'js', 'jsx', 'mjs', 'cjs']
const places = ['index', 'src/index', 'main', 'src/main', 'worker', 'src/worker']

/** Where a project begins: as its spec or package.json says, else where one would look. Throws `invalid_field`. */
export function entryOf(files: Files, entrypoint: string | undefined): string {
  if (entrypoint !== undefined) return named(files, entrypoint)
  const json = readJson(files, 'package.json')
  if (typeof json === 'object' && json !== null)
    for (const field of ['module', 'main'] as const) {
      const path = (json as Record<string, unknown>)[field]
      const clean = typeof path === 'string' ? path.replace(/^\.\//, '') : undefined
      if (clean !== undefined && files.has(clean) && isScriptFile(clean)) return clean
    }
  for (const place of places)
    for (const script of scripts) if (files.has(`${place}.${script}`)) return `${place}.${script}`
  const only = [...files.keys()].filter((path) => !path.includes('/') && isScriptFile(path))
  if (only.length === 1) return only[0]!
  throw new Problem('invalid_field', {
    detail: 'entrypoint: say which file the project begins with; there is no index.ts or index.js',
    field: 'entrypoint',
  })
}

const isScriptFile = (path: string) => ['javascript', 'typescript'].includes(runtimeOfFile(path) ?? '')
