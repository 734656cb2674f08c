/** Paths inside a directory whose links were made by somebody else. */
import { constants } from 'node:fs'
import { lstat, open, readlink } from 'node:fs/promises'
import { dirname, join } from 'node:path'

/** As Linux has it for one lookup. */
const maxLinks = 40
/** Of one path, where nothing else is said. */
const maxLookups = 20_000

/** Steps that may still be taken; shared by all paths of one origin. */
export interface Lookups {
  left: number
}

export interface Resolved {
  /** On the host, without links in it. */
  path: string
  /** A link or `..` led above the root on the way, and was kept inside. */
  climbed: boolean
}

/**
 * Follows `path` from `root` as a process would whose root that is: absolute links begin at `root`, and `..` does
 * not lead above it. The last part may be missing. Undefined where it leads nowhere, round in circles, or too far.
 */
export async function resolveInRoot(
  root: string,
  path: string,
  from = '/',
  lookups: Lookups = { left: maxLookups },
): Promise<Resolved | undefined> {
  let links = 0
  let climbed = false
  let at = path.startsWith('/') ? [] : stepsOf(from)
  const rest = stepsOf(path)
  while (rest.length > 0) {
    const step = rest.shift()!
    if (step === '..') {
      if (at.length === 0) climbed = true
      at.pop()
      continue
    }
    if (lookups.left-- <= 0) return undefined
    const here = join(root, ...at, step)
    const stat = await lstat(here).catch(() => undefined)
    if (stat === undefined) {
      if (rest.length > 0) return undefined
      at.push(step)
      break
    }
    if (!stat.isSymbolicLink()) {
      at.push(step)
      continue
    }
    if (++links > maxLinks) return undefined
    const target = await readlink(here)
    if (target.startsWith('/')) at = []
    rest.unshift(...stepsOf(target))
  }
  return { path: join(root, ...at), climbed }
}

const stepsOf = (path: string) => path.split('/').filter((step) => step !== '' && step !== '.')

/** The text of a regular file below `root`, at most `maxBytes` of it; undefined where there is none. */
export async function readInRoot(root: string, path: string, maxBytes: number): Promise<string | undefined> {
  const resolved = await resolveInRoot(root, path)
  if (resolved === undefined) return undefined
  try {
    await using file = await open(
      resolved.path,
      constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK,
    )
    const stat = await file.stat()
    if (!stat.isFile()) return undefined
    const buffer = Buffer.alloc(Math.min(stat.size, maxBytes))
    const { bytesRead } = await file.read(buffer, 0, buffer.length, 0)
    return buffer.toString('utf8', 0, bytesRead)
  } catch {
    return undefined
  }
}

/** Whether a link at `path` (relative to `root`) with this target stays inside, whatever links there are on its way. */
export async function staysInside(
  root: string,
  path: string,
  target: string,
  lookups?: Lookups,
): Promise<boolean> {
  if (target.startsWith('/')) return false
  const resolved = await resolveInRoot(root, target, dirname(`/${path}`), lookups)
  return resolved !== undefined && !resolved.climbed
}
