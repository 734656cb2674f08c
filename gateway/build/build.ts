/** From a project’s files to one ES module with its source map. */
import { mkdir, mkdtemp, readdir, rm, stat, writeFile } from 'node:fs/promises'
import { createRequire, isBuiltin } from 'node:module'
import { dirname, join } from 'node:path'
import { z } from 'zod'
import { Problem } from '../../shared/errors.ts'
import { BuildWarning } from '../../shared/functions.ts'
import type { Files, Folder } from './archive.ts'
import { offeredBuiltins } from './builtins.ts'
import { installOf } from './manifest.ts'
import { installed } from './npm.ts'
import { vendored } from './pip.ts'
import { requirementsFile, requirementsOf, vendorFolder } from './requirements.ts'
import { type Bind, inside, ours, runStep, type SandboxOptions } from './sandbox.ts'

const bundleMs = 60_000
/** Largest bundle, bytes. */
const bundleBytes = 32 * 1_048_576
const folderName = 'vulcan-build-'
/** A build's folder this old (ms) was left by a gateway that was killed. */
const abandonedMs = 3_600_000
/** Builds under way at once, and how many more may wait. */
const atOnce = 2
const mayWait = 64

export interface BuilderOptions extends SandboxOptions {
  /** Where installed dependencies are kept between builds. */
  cacheDir: string
  /** Where a build’s files stand while it goes on. */
  tempDir: string
  /** Of this process: npm is looked for in its PATH, and asked for registry, proxy and certificates. */
  env: NodeJS.ProcessEnv
}

/** What a project needs beside its own files to be run as it is. */
export interface Dependencies {
  folders: Folder[]
  warnings: BuildWarning[]
}

export interface Built {
  code: Buffer
  map: Buffer
  warnings: BuildWarning[]
}

const Answer = z.union([
  z.object({
    code: z.string(),
    map: z.string(),
    exports: z.array(z.string()),
    warnings: z.array(BuildWarning),
  }),
  z.object({ errors: z.array(BuildWarning), warnings: z.array(BuildWarning) }),
])

export class Builder {
  readonly #options: BuilderOptions
  #running = 0
  readonly #waiting: (() => void)[] = []
  constructor(options: BuilderOptions) {
    this.#options = options
    void removeAbandoned(options.tempDir).catch(() => {})
  }

  /** Waits for its turn: builds need memory and processors. Throws `overloaded`. */
  async inTurn<T>(run: () => Promise<T>): Promise<T> {
    if (this.#running >= atOnce) {
      if (this.#waiting.length >= mayWait)
        throw new Problem('overloaded', { detail: 'too many builds are waiting', retryAfterS: 10 })
      // Whoever ends passes its place on.
      await new Promise<void>((resolve) => this.#waiting.push(resolve))
    } else this.#running++
    try {
      return await run()
    } finally {
      const next = this.#waiting.shift()
      if (next === undefined) this.#running--
      else next()
    }
  }

  /**
   * Bundles what `entry` imports; to be called `inTurn`. Throws `build_failed` with file, line and column, and
   * `build_unavailable` where this host has no sandbox. The same files give the same bytes.
   */
  async build(files: Files, entry: string, signal?: AbortSignal): Promise<Built> {
    const install = installOf(files)
    const modules = install && (await installed(install, this.#into('npm'), signal))
    const dir = await mkdtemp(join(this.#options.tempDir, folderName))
    try {
      await write(dir, files)
      if (modules !== undefined) await mkdir(join(dir, 'node_modules'), { recursive: true })
      const built = await this.#bundle(dir, modules, entry, signal)
      return { ...built, warnings: [...saidOf('package.json', install), ...built.warnings] }
    } finally {
      await rm(dir, { recursive: true, force: true })
    }
  }

  /**
   * The packages that a project for Node or Python names and does not have with it; to be called `inTurn`. Throws
   * `build_failed`, and `build_unavailable` where this host cannot install them.
   */
  async dependencies(files: Files, language: 'node' | 'python', signal?: AbortSignal): Promise<Dependencies> {
    if (language === 'node') {
      const install = installOf(files)
      if (install === undefined) return { folders: [], warnings: [] }
      const dir = await installed(install, this.#into('npm'), signal)
      return { folders: [{ at: 'node_modules', dir }], warnings: saidOf('package.json', install) }
    }
    const requirements = requirementsOf(files)
    if (requirements === undefined) return { folders: [], warnings: [] }
    const dir = await vendored(requirements, this.#into('pip'), signal)
    return { folders: [{ at: vendorFolder, dir }], warnings: saidOf(requirementsFile, requirements) }
  }

  #into(kind: 'npm' | 'pip') {
    return { ...this.#options, dir: join(this.#options.cacheDir, kind) }
  }

  async #bundle(
    dir: string,
    modules: string | undefined,
    entry: string,
    signal?: AbortSignal,
  ): Promise<Built> {
    const { stdout, stderr, code, timedOut } = await runStep(
      {
        args: [...nodeFlags, `${inside}/gateway/build/bundle-child.ts`],
        binds: [
          ours('gateway/build/bundle-child.ts'),
          ours('gateway/build/builtins.ts'),
          ...esbuildFiles(),
          [dir, '/project'],
          ...(modules === undefined ? [] : [[modules, '/project/node_modules'] as const]),
        ],
        writable: [],
        scratch: [],
        env: { ESBUILD_BINARY_PATH: esbuildInside, GOMEMLIMIT: '1GiB' },
        network: false,
        cwd: '/project',
        stdin: JSON.stringify({ entry }),
        timeoutMs: bundleMs,
      },
      this.#options,
      signal,
    )
    if (timedOut) throw failed([place(`bundling took longer than ${bundleMs / 1_000} s`)])
    const answer = parseAnswer(stdout)
    if (code !== 0 || answer === undefined)
      throw failed([place(`the bundler ended with exit code ${code}: ${lastWords(stderr)}`)])
    if ('errors' in answer) throw failed(answer.errors.map(explained))
    if (!answer.exports.includes('default'))
      throw failed([{ ...place('there is no default export, which is what is called'), file: entry }])
    const bytes = Buffer.from(answer.code)
    if (bytes.byteLength > bundleBytes)
      throw failed([
        { ...place(`the bundle has ${bytes.byteLength} bytes; ${bundleBytes} are taken`), file: entry },
      ])
    return { code: bytes, map: Buffer.from(answer.map), warnings: answer.warnings }
  }
}

const saidOf = (file: string, from: { warnings: string[] } | undefined): BuildWarning[] =>
  (from?.warnings ?? []).map((message) => ({ message, file, line: null, column: null }))

const place = (message: string): BuildWarning => ({ message, file: null, line: null, column: null })

/** Where the bundler stands in the sandbox: its JavaScript is found as a package, its program by a variable. */
const esbuildInside = `${inside}/esbuild`
function esbuildFiles(): Bind[] {
  const entry = createRequire(import.meta.url).resolve('esbuild')
  const program = createRequire(entry).resolve(`@esbuild/${process.platform}-${process.arch}/bin/esbuild`)
  return [
    [dirname(dirname(entry)), `${inside}/node_modules/esbuild`],
    [program, esbuildInside],
  ]
}

const nodeFlags = [
  '--permission',
  `--allow-fs-read=${inside}`,
  '--allow-fs-read=/project',
  // The bundler’s program. It is behind bubblewrap alone.
  '--allow-child-process',
  '--max-old-space-size=1024',
  '--disable-warning=ExperimentalWarning',
  '--disable-warning=SecurityWarning',
]

async function removeAbandoned(dir: string): Promise<void> {
  for (const name of await readdir(dir)) {
    if (!name.startsWith(folderName)) continue
    const path = join(dir, name)
    const { mtimeMs, uid } = await stat(path)
    if (uid === process.getuid?.() && Date.now() - mtimeMs > abandonedMs)
      await rm(path, { recursive: true, force: true })
  }
}

async function write(dir: string, files: Files): Promise<void> {
  const folders = new Set<string>()
  for (const [path, bytes] of files) {
    const at = join(dir, path)
    const folder = dirname(at)
    if (!folders.has(folder)) {
      await mkdir(folder, { recursive: true })
      folders.add(folder)
    }
    await writeFile(at, bytes, { flag: 'wx' })
  }
}

function parseAnswer(text: string) {
  try {
    return Answer.parse(JSON.parse(text))
  } catch {
    return undefined
  }
}

const lastWords = (stderr: string) => stderr.trim().split('\n').slice(-3).join(' ').slice(0, 500)

const unresolved = /^Could not resolve "([^"]+)"/

/** Says of what cannot be imported what can. */
function explained(error: BuildWarning): BuildWarning {
  const path = unresolved.exec(error.message)?.[1]
  if (path === undefined) return error
  if (isBuiltin(path)) {
    const offered = offeredBuiltins.map((name) => `node:${name}`).join(', ')
    return {
      ...error,
      message: `${path} is not offered in an isolate; there are ${offered}. With runtime node a project is run as it is, in a container`,
    }
  }
  const isPackage = !/^[./]/.test(path) && !path.includes(':')
  const hint = isPackage ? ': name it under dependencies in package.json, or put it in node_modules' : ''
  return { ...error, message: `Could not resolve "${path}"${hint}` }
}

function failed(errors: BuildWarning[]): Problem {
  const parts = errors.map(({ message, ...at }) => ({ detail: message, ...at }))
  const [first] = parts
  const at = first?.file
    ? `${[first.file, first.line, first.column].filter((part) => part !== null).join(':')}: `
    : ''
  const more = parts.length > 1 ? ` (and ${parts.length - 1} more)` : ''
  return new Problem('build_failed', { detail: `${at}${first?.detail}${more}`, errors: parts })
}
