/** Deploying a folder to a gateway: what `npm start`, `npm run dev` and the tests do alike. */
import { existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { basename, join, resolve } from 'node:path'
import { create } from 'tar'

export type Deployed = {
  name: string
  version: string
  /** Where it is called by HTTP. */
  url: string
  /** False where this content had been deployed before. */
  created: boolean
  /** Each on one line, with its place. */
  warnings: string[]
}

/** The gateway's refusal; `lines` say what is wrong and where, one thing each. */
export class DeployError extends Error {
  override name = 'DeployError'
  readonly code: string
  readonly lines: string[]
  constructor(code: string, lines: string[]) {
    super(lines.join('\n'))
    this.code = code
    this.lines = lines
  }
}

type Place = { file?: string | null; line?: number | null; column?: number | null }
type Problem = { code: string; detail: string; errors?: (Place & { field?: string; detail: string })[] }

const at = ({ file, line, column }: Place, text: string): string => {
  const place = [file, line, column].filter((part) => part !== undefined && part !== null).join(':')
  return place === '' ? text : `${place}: ${text}`
}

/** The name of a function for a folder: its own, in the letters that a name may have. */
export function functionName(folder: string): string {
  const name = basename(resolve(folder))
    .toLowerCase()
    .replaceAll(/[^a-z0-9-]+/g, '-')
    .slice(0, 63)
    .replaceAll(/^-+|-+$/g, '')
  if (name === '') throw new Error(`${folder} gives no name for a function; say one with --name`)
  return name
}

/** Not part of a project, or made anew from it. */
const leftOut = /(^|\/)(\.git|node_modules|\.DS_Store|\.env(\.[^/]*)?)$/

/** The folder as a gzipped tar. Its `node_modules` goes along only where there is no package.json to install from. */
export async function pack(folder: string): Promise<Uint8Array<ArrayBuffer>> {
  const vendored = existsSync(join(folder, 'node_modules')) && !existsSync(join(folder, 'package.json'))
  const filter = (path: string) =>
    !leftOut.test(path.replace(/\/$/, '')) || (vendored && /(^|\/)node_modules$/.test(path))
  const parts: Uint8Array[] = []
  for await (const part of create({ cwd: folder, gzip: true, portable: true, follow: true, filter }, ['.']))
    parts.push(part)
  return new Uint8Array(Buffer.concat(parts))
}

/** @throws DeployError with what the gateway refused; an Error where it cannot be reached */
export async function deployFolder(
  gateway: string,
  name: string,
  folder: string,
  signal?: AbortSignal,
): Promise<Deployed> {
  let answer: Response
  const body = await pack(folder)
  try {
    answer = await fetch(`${gateway}/v1/functions/${name}`, {
      method: 'PUT',
      headers: { 'content-type': 'application/gzip' },
      body,
      ...(signal === undefined ? {} : { signal }),
    })
  } catch (cause) {
    signal?.throwIfAborted()
    throw new Error(`the gateway at ${gateway} cannot be reached: is \`npm start\` running?`, { cause })
  }
  const text = await answer.text()
  if (!answer.ok) {
    const { code, detail, errors } = problemIn(text, answer.status)
    const lines = (errors ?? []).filter(({ file }) => file).map((error) => at(error, error.detail))
    throw new DeployError(code, lines.length > 0 ? lines : [detail])
  }
  const { version, url, created, warnings } = JSON.parse(text) as Omit<Deployed, 'warnings'> & {
    warnings: (Place & { message: string })[]
  }
  return {
    name,
    version,
    url,
    created,
    warnings: warnings.map((warning) => at(warning, warning.message)),
  }
}

function problemIn(text: string, status: number): Problem {
  try {
    return JSON.parse(text) as Problem
  } catch {
    return { code: 'internal', detail: `the gateway answered ${status}` }
  }
}

/** Sets a secret, where there is none of that name yet; says whether it did. */
export async function putSecretOnce(gateway: string, name: string, value: string): Promise<boolean> {
  const { secrets } = (await (await fetch(`${gateway}/v1/secrets`)).json()) as { secrets: { name: string }[] }
  if (secrets.some((secret) => secret.name === name)) return false
  const answer = await fetch(`${gateway}/v1/secrets/${name}`, {
    method: 'PUT',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ value }),
  })
  if (!answer.ok) throw new Error(`secret ${name} could not be set: ${answer.status}`)
  return true
}

/** Names of all functions there are or were. */
export async function knownFunctions(gateway: string): Promise<Set<string>> {
  const answer = await fetch(`${gateway}/v1/functions?deleted=true`)
  const { functions } = (await answer.json()) as { functions: { name: string }[] }
  return new Set(functions.map(({ name }) => name))
}

/** The secrets that a folder's vulcan.json asks for. */
export async function secretsOf(folder: string): Promise<string[]> {
  const text = await readFile(join(folder, 'vulcan.json'), 'utf8').catch(() => '{}')
  return ((JSON.parse(text) as { secrets?: string[] }).secrets ?? []).filter(
    (name) => typeof name === 'string',
  )
}
