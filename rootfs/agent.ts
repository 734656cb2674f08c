/**
 * The guest agent as one static program: guest-agent/ bundled by esbuild, and compiled together with its linux.c
 * against the QuickJS library of Debian, which is fetched without touching the system.
 */
import { execFile } from 'node:child_process'
import { createHash, randomUUID } from 'node:crypto'
import { globSync } from 'node:fs'
import { mkdir, mkdtemp, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { build } from 'esbuild'
import { openDebian, unpackPackage } from '../scripts/debian.ts'

const execute = promisify(execFile)
const sources = join(import.meta.dirname, '..', 'guest-agent')
/** The first with a QuickJS that has private fields and class blocks; its library is made for any static link. */
const suite = 'trixie'
const libraryPackage = 'libquickjs'
const flags = ['-static', '-s', '-O2', '-Wall', '-Wl,--build-id=none']
const libraries = ['-lm', '-lpthread', '-ldl']
const compileTimeoutMs = 120_000

export interface AgentOptions {
  /** Absolute. */
  cacheDir: string
  log(line: string): void
}

/** The agent could not be built; the message says what to install. */
export class AgentBuildError extends Error {
  override name = 'AgentBuildError'
}

/**
 * The agent for this machine’s architecture; quick where these sources were built before.
 *
 * @returns the program, and the sha256 of its bytes in hex
 * @throws AgentBuildError
 */
export async function buildAgent({ cacheDir, log }: AgentOptions): Promise<{ path: string; sha256: string }> {
  const tools = join(cacheDir, 'microvm', 'tools')
  const bundle = await bundleAgent()
  const native = await readFile(join(sources, 'linux.c'))
  const compiler = await compilerVersion()
  const quickjs = await quickjsIn(tools, log)
  const key = createHash('sha256')
  for (const part of [bundle, native, compiler, flags.join(), await readFile(quickjs.library)])
    key.update(part).update('\0')
  const path = join(tools, `agent-${key.digest('hex').slice(0, 24)}`)
  const known = await readFile(path).catch(() => undefined)
  if (known !== undefined) return { path, sha256: hashOf(known) }

  log('compiling the guest agent')
  await using scope = new AsyncDisposableStack()
  const work = await mkdtemp(join(tmpdir(), 'vulcan-agent-'))
  scope.defer(() => rm(work, { recursive: true, force: true }))
  await writeFile(join(work, 'agent.js'), bundle)
  await writeFile(join(work, 'linux.c'), native)
  // The path of the work folder must not be in the program: the same sources make the same bytes.
  const places = [`-I${quickjs.headers}`, `-ffile-prefix-map=${work}=.`]
  await compile([...flags, ...places, '-o', 'agent', 'linux.c', quickjs.library, ...libraries], work)
  const program = await readFile(join(work, 'agent'))
  const beside = `${path}.${randomUUID()}`
  await writeFile(beside, program, { mode: 0o755 })
  await rename(beside, path)
  return { path, sha256: hashOf(program) }
}

const hashOf = (bytes: Uint8Array) => createHash('sha256').update(bytes).digest('hex')

/** One file that names no path of this machine. */
async function bundleAgent(): Promise<Uint8Array> {
  const { outputFiles } = await build({
    entryPoints: [join(sources, 'agent.ts')],
    absWorkingDir: sources,
    bundle: true,
    write: false,
    format: 'esm',
    target: 'es2023',
    minifySyntax: true,
    minifyWhitespace: true,
    external: ['quickjs:*', 'vulcan:*'],
    logLevel: 'silent',
  })
  return outputFiles[0]!.contents
}

async function compilerVersion(): Promise<string> {
  try {
    return (await execute('gcc', ['--version'], { timeout: 10_000 })).stdout.split('\n')[0]!
  } catch (cause) {
    throw new AgentBuildError(
      'gcc, which compiles the guest agent, is missing: install the packages gcc and libc6-dev',
      {
        cause,
      },
    )
  }
}

async function compile(args: string[], cwd: string): Promise<void> {
  try {
    await execute('gcc', args, { cwd, timeout: compileTimeoutMs })
  } catch (cause) {
    const said = (cause as { stderr?: string }).stderr
      ?.split('\n')
      .filter((line) => /error|cannot find/.test(line))
    const hint = 'it needs the packages gcc, libc6-dev and linux-libc-dev'
    throw new AgentBuildError(
      `the guest agent could not be compiled: ${said?.[0] ?? (cause as Error).message} (${hint})`,
      {
        cause,
      },
    )
  }
}

interface QuickJs {
  /** Directory with `quickjs/quickjs.h`. */
  headers: string
  /** `libquickjs.a`. */
  library: string
}

/** Fetched once. */
async function quickjsIn(tools: string, log: AgentOptions['log']): Promise<QuickJs> {
  const place = join(tools, `quickjs-${suite}-${process.arch}`)
  const found = () => {
    const [library] = globSync('usr/lib/*/quickjs/libquickjs.a', { cwd: place })
    return library && { headers: join(place, 'usr/include'), library: join(place, library) }
  }
  const there = found()
  if (there) return there
  log(`fetching QuickJS (${libraryPackage} of Debian ${suite})`)
  const beside = `${place}.${randomUUID()}`
  await using scope = new AsyncDisposableStack()
  scope.defer(() => rm(beside, { recursive: true, force: true }))
  try {
    await mkdir(beside, { recursive: true })
    await using archive = await openDebian([suite])
    const [file] = await archive.download(await archive.find([libraryPackage]), beside)
    await unpackPackage(file!, beside, ['./usr/share'])
    await rm(file!)
  } catch (cause) {
    const why = (cause as Error).message
    throw new AgentBuildError(`QuickJS, on which the guest agent runs, cannot be fetched: ${why}`, { cause })
  }
  // Whoever was faster has the same.
  await rename(beside, place).catch(() => {})
  const fetched = found()
  if (!fetched) throw new AgentBuildError(`Debian’s ${libraryPackage} has no libquickjs.a`)
  return fetched
}
