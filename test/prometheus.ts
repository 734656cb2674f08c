/** Prometheus and promtool for tests: from PATH, else Debian’s package, unpacked below the cache. */
import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { mkdir, mkdtemp, rename, rm } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { promisify } from 'node:util'
import { cacheDirectory } from '../scripts/cache-directory.ts'
import { openDebian, unpackPackage } from '../scripts/debian.ts'
import { which } from '../scripts/host-tools.ts'

const execute = promisify(execFile)

/** The first that has the package. */
const suites = ['bookworm', 'trixie']

export interface Prometheus {
  /** Absolute paths. */
  promtool: string
  prometheus: string
}

/** Rejects where it cannot be had; the message says why. */
export async function findPrometheus(): Promise<Prometheus> {
  const path = process.env.PATH ?? ''
  const [promtool, prometheus] = [which('promtool', path), which('prometheus', path)]
  if (promtool !== undefined && prometheus !== undefined) return { promtool, prometheus }
  const parent = join(cacheDirectory(process.env), 'tests')
  const home = join(parent, 'prometheus')
  const found = { promtool: join(home, 'usr/bin/promtool'), prometheus: join(home, 'usr/bin/prometheus') }
  if (!existsSync(found.promtool)) await unpackInto(parent, home)
  return found
}

/** A parallel test sees the whole folder or none. */
async function unpackInto(parent: string, home: string): Promise<void> {
  await mkdir(parent, { recursive: true })
  const work = await mkdtemp(join(parent, 'prometheus-'))
  try {
    const file = await firstOf(suites, async (suite) => {
      await using archive = await openDebian([suite], work)
      return (await archive.download(await archive.find(['prometheus']), work))[0]!
    })
    await mkdir(join(work, 'root'))
    await unpackPackage(file, join(work, 'root'), ['./usr/share', './etc', './lib', './var'])
    await rename(join(work, 'root'), home).catch((error) => {
      if (!existsSync(home)) throw error
    })
  } finally {
    await rm(work, { recursive: true, force: true })
  }
}

async function firstOf<T>(candidates: readonly string[], attempt: (one: string) => Promise<T>): Promise<T> {
  const reasons: string[] = []
  for (const one of candidates) {
    try {
      return await attempt(one)
    } catch (error) {
      reasons.push((error as Error).message)
    }
  }
  throw new Error(reasons.join('; '))
}

/** What promtool has to say about a text on its standard input; empty: nothing. */
export async function checkMetrics({ promtool }: Prometheus, page: string): Promise<string> {
  const checking = execute(promtool, ['check', 'metrics'], { timeout: 30_000 })
  checking.child.stdin!.end(page)
  return await said(checking)
}

/** The same of a file with rules. */
export const checkRules = ({ promtool }: Prometheus, file: string): Promise<string> =>
  said(execute(promtool, ['check', 'rules', file], { timeout: 30_000 }))

/** Standard error, or both streams where it exits with another code than 0. */
const said = (run: Promise<{ stdout: string; stderr: string }>): Promise<string> =>
  run.then(
    ({ stderr }) => stderr.trim(),
    ({ stdout, stderr, message }) => `${stdout ?? ''}${stderr ?? ''}`.trim() || message,
  )

/** The same of a file with tests of rules; they lie where it says. */
export const testRules = ({ promtool }: Prometheus, file: string): Promise<string> =>
  said(execute(promtool, ['test', 'rules', file], { timeout: 60_000, cwd: dirname(file) }))
