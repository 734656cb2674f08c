/** What a job means for a container: which image, and what is run in it. Decides; does nothing. */
import { createHash } from 'node:crypto'
import { parse } from 'es-module-lexer/minimal/js'
import type { Limits, Runtime } from '../../shared/workload.ts'
import type { Job, Program } from '../runner.ts'
import type { BoxLimits, BoxSpec, ImageConfig, ImageSource, User } from './engine.ts'
import { inBox } from './protocol.ts'

export type RuntimeName = 'node' | 'python' | 'go' | 'base'
/** A runtime image, or the user’s own. */
export type Base = RuntimeName | ImageSource

/** What is run, as far as it can be told without the image. */
export type Route =
  | { kind: 'handler'; language: 'node' | 'python'; base: Base; entry: string | null }
  /** `argv` is undefined where the image says it. */
  | { kind: 'command'; base: Base; argv: string[] | undefined }
  /** Built first; the program then runs as a command on the base image. */
  | { kind: 'go'; entry: string | null }

/** The workload can never run as it is; the message says why, and the way out. */
export class InvalidPlan extends Error {
  override name = 'InvalidPlan'
}

const languageOf = (runtime: Runtime): 'node' | 'python' | undefined => {
  switch (runtime) {
    case 'javascript':
    case 'typescript':
    case 'node':
      return 'node'
    case 'python':
      return 'python'
    case 'go':
    case 'oci':
      return undefined
    default:
      throw new Error(`unhandled ${runtime satisfies never}`)
  }
}

/** Throws `InvalidPlan`. */
export function routeOf({ runtime, source, entrypoint }: Program): Route {
  const image: ImageSource | undefined =
    source.kind === 'image'
      ? { kind: 'reference', reference: source.reference, auth: source.auth }
      : source.kind === 'image-archive'
        ? { kind: 'archive', digest: `sha256:${source.sha256}`, open: source.open }
        : undefined
  const language = languageOf(runtime)
  if (Array.isArray(entrypoint)) {
    const base = image ?? (runtime === 'go' ? 'go' : (language ?? 'base'))
    return { kind: 'command', base, argv: entrypoint }
  }
  if (image !== undefined) {
    if (language !== undefined && entrypoint !== undefined)
      return { kind: 'handler', language, base: image, entry: entrypoint }
    return { kind: 'command', base: image, argv: entrypoint === undefined ? undefined : [entrypoint] }
  }
  const entry =
    source.kind === 'code' && entrypoint !== undefined
      ? codeFile({ runtime, entrypoint, source })
      : (entrypoint ?? null)
  if (runtime === 'go') return { kind: 'go', entry }
  if (language === undefined)
    throw new InvalidPlan(
      'nothing says how to run it: name a runtime (node, python or go), or a command array as entrypoint',
    )
  return { kind: 'handler', language, base: language, entry }
}

const fileNames: Record<Runtime, string> = {
  javascript: 'index.js',
  typescript: 'index.ts',
  node: 'index.js',
  python: 'main.py',
  go: 'main.go',
  oci: 'code',
}

/** The name under which a source of code lies in the working directory. */
export function codeFile(program: Pick<Program, 'runtime' | 'entrypoint' | 'source'>): string {
  const { runtime, entrypoint, source } = program
  const plain = typeof entrypoint === 'string' && /^[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}$/.test(entrypoint)
  if (plain) return entrypoint
  const name = fileNames[runtime]
  const isNamedByNobody = entrypoint === undefined && name === 'index.js' && source.kind === 'code'
  return isNamedByNobody && isModule(source.text) ? 'index.mjs' : name
}

/** Of code that is looked at, UTF-16 units: anybody may send it, and everybody waits meanwhile. */
const maxLexed = 512 * 1024

/**
 * Whether it is an ES module beyond doubt. Node finds that out as well, but by compiling it as a CommonJS module first:
 * that is a tenth of a first run in an emulated machine.
 */
function isModule(text: string): boolean {
  if (text.length > maxLexed) return false
  try {
    const [imports, exports] = parse(text)
    // Of an import that is not dynamic `d` is negative.
    return exports.length > 0 || imports.some(({ d }) => d < 0)
  } catch {
    // Node says where it is wrong.
    return false
  }
}

export const mebibyte = 1_048_576
export const outputBytes = ({ output_mb }: Limits) => Math.floor(output_mb * mebibyte)

/** A command’s result is a file on the host’s disk, of which more than this is not to be had even for a moment. */
const maxResultBytes = 1024 * mebibyte

/** Of a box. */
export function boxLimits(limits: Limits, kind: 'handler' | 'command'): BoxLimits {
  const disk = limits.disk_mb * mebibyte
  return {
    memoryMb: limits.memory_mb,
    cpu: limits.cpu,
    pids: limits.pids,
    diskMb: limits.disk_mb,
    // One byte over the output’s limit shows that it is too large.
    fileBytes: kind === 'handler' ? disk : Math.max(Math.min(disk, maxResultBytes), outputBytes(limits) + 1),
  }
}

/** Where an image has no PATH, as Docker has it. */
const defaultPath = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'

/** Descriptor 3 becomes standard output, 4 standard input; what is written to 1 and 2 goes to standard error. */
const rewire = 'exec "$@" 3>&1 4<&0 1>&2 </dev/null'

/**
 * V8’s heap gets what the limit leaves beside Node itself (MiB), so that code which fills it is told so by V8, rather
 * than killed by the kernel.
 */
export const heapMb = (memoryMb: number) => Math.max(16, Math.floor(Math.max(memoryMb * 0.5, memoryMb - 96)))

/**
 * V8’s baseline compiler (Sparkplug) is of no use in machines that end with a run: what it makes is new code, which an
 * emulator has to translate, and its own translation takes some MB of each machine that stands ready.
 */
const forOneRun = ['--no-sparkplug']

/** `isForOne`: the box ends with its first run. */
export function shimArgv(language: 'node' | 'python', memoryMb: number, isForOne = false): string[] {
  const argv =
    language === 'node'
      ? ['node', ...(isForOne ? forOneRun : []), `--max-old-space-size=${heapMb(memoryMb)}`, inBox.nodeShim]
      : ['python3', inBox.pythonShim]
  return ['/bin/sh', '-c', rewire, 'sh', ...argv]
}

/** Of a shim’s process: what is the user’s comes with the run, in messages. */
export function handlerEnv(config: ImageConfig, home: string): Record<string, string> {
  return { PATH: defaultPath, HOME: home, ...config.env }
}

export function commandEnv(
  config: ImageConfig,
  home: string,
  job: Pick<Job, 'id' | 'attempt' | 'runtime' | 'source' | 'traceparent' | 'env'>,
): Record<string, string> {
  return {
    PATH: defaultPath,
    HOME: home,
    ...config.env,
    // Where requirements are installed at deploy.
    ...(job.runtime === 'python' && job.source.kind === 'archive'
      ? { PYTHONPATH: `${inBox.workspace}/vendor` }
      : {}),
    VULCAN_ID: job.id,
    VULCAN_ATTEMPT: String(job.attempt),
    // As OpenTelemetry’s SDKs look for it.
    ...(job.traceparent === undefined ? {} : { TRACEPARENT: job.traceparent }),
    ...job.env,
    VULCAN_RESULT: inBox.result,
  }
}

/** Throws `InvalidPlan` where neither workload nor image says what to run. */
export function commandArgv(argv: string[] | undefined, config: ImageConfig): string[] {
  const found = argv ?? [...config.entrypoint, ...config.cmd]
  if (found.length === 0 || found[0] === '')
    throw new InvalidPlan('the image has neither an entrypoint nor a command: name one as entrypoint')
  return found
}

/** The working directory: as asked, else that of the files, else the image’s. */
export const workingDirectory = (
  job: Pick<Job, 'workingDir' | 'source'>,
  config: ImageConfig,
): BoxSpec['cwd'] => {
  const hasFiles = job.source.kind === 'code' || job.source.kind === 'archive'
  return job.workingDir ?? (hasFiles ? inBox.workspace : config.workingDir || '/')
}

// ------------------------------------------------------------------------------------------------ users

export interface FoundUser extends User {
  home: string
}

const root: FoundUser = { uid: 0, gid: 0, groups: [], home: '/root' }
const maxId = 2 ** 31 - 1

interface Account {
  name: string
  uid: number
  gid: number
  home: string
}
interface Group {
  name: string
  gid: number
  members: string[]
}

const isId = (text: string | undefined): text is string => text !== undefined && /^\d{1,10}$/.test(text)

/** Of /etc/passwd (passwd(5)); lines that make no sense are passed over. */
export function readPasswd(text: string): Account[] {
  return text.split('\n').flatMap((line) => {
    const [name, , uid, gid, , home] = line.split(':')
    if (!name || !isId(uid) || !isId(gid)) return []
    return [{ name, uid: Number(uid), gid: Number(gid), home: home?.startsWith('/') ? home : '/' }]
  })
}

/** Of /etc/group (group(5)). */
export function readGroup(text: string): Group[] {
  return text.split('\n').flatMap((line) => {
    const [name, , gid, members = ''] = line.split(':')
    if (!name || !isId(gid)) return []
    return [{ name, gid: Number(gid), members: members.split(',').filter(Boolean) }]
  })
}

/** Whether the image’s own files have to be asked for this user. */
export const needsFiles = (user: string): boolean => user !== '' && user !== '0' && user !== 'root'

/**
 * The user that `text` means in an image, as Docker has it: names and the group of a bare id are looked up, and
 * further groups are those that list the user, unless a group is named. Throws `InvalidPlan`.
 */
export function findUser(text: string, passwd: string, group: string): FoundUser {
  if (!needsFiles(text)) return root
  const [name = '', groupName] = text.split(':')
  const account = readPasswd(passwd).find((one) =>
    isId(name) ? one.uid === Number(name) : one.name === name,
  )
  if (account === undefined && !isId(name))
    throw new InvalidPlan(`the image has no user ${name}: name one that is in its /etc/passwd, or an id`)
  const found: FoundUser = {
    uid: account?.uid ?? Number(name),
    gid: account?.gid ?? 0,
    groups: [],
    home: account?.home ?? '/',
  }
  const groups = readGroup(group)
  if (groupName !== undefined && groupName !== '') {
    const named = groups.find((one) => one.name === groupName)
    if (named === undefined && !isId(groupName))
      throw new InvalidPlan(
        `the image has no group ${groupName}: name one that is in its /etc/group, or an id`,
      )
    found.gid = named?.gid ?? Number(groupName)
  } else if (account !== undefined)
    found.groups = groups
      .filter((one) => one.members.includes(account.name) && one.gid !== found.gid)
      .map((one) => one.gid)
  if (found.uid > maxId || found.gid > maxId) throw new InvalidPlan(`the ids of user ${text} are too large`)
  return found
}

// ------------------------------------------------------------------------------------------------- keys

const hash = (value: unknown) => createHash('sha256').update(JSON.stringify(value)).digest('hex')

const sourceKey = (source: Program['source']) =>
  source.kind === 'image' ? `image ${source.reference}` : `${source.kind} ${source.sha256}`

/** Limits that a box is made with and keeps. */
const boxKey = ({ memory_mb, cpu, pids, disk_mb }: Limits) => [memory_mb, cpu, pids, disk_mb]

/** Boxes with the same are made alike, before anything of a user’s is in them. */
export const blankKey = (language: 'node' | 'python', limits: Limits): string =>
  [language, ...boxKey(limits)].join(' ')

/** The same for a program and for every job that runs it. */
export function programKey(program: Program): string {
  const { runtime, source, entrypoint = null, limits, egress, user = null, workingDir = null } = program
  return hash([sourceKey(source), runtime, entrypoint, boxKey(limits), egress, user, workingDir])
}

/** Jobs with the same may use a box one after the other. `image` is the digest of the image that the job names. */
export function warmKey(job: Job, image: string | undefined): string {
  const sorted = Object.entries(job.env).sort(([a], [b]) => (a < b ? -1 : 1))
  return hash([programKey(job), image ?? null, sorted])
}

/** Whether a job can run in a box that was made before anybody knew of it. */
export const fitsBlank = ({ user, workingDir, egress }: Job): boolean =>
  user === undefined && workingDir === undefined && egress === 'none'
