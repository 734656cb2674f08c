/**
 * Go source made into programs: once for each source, in a box of its own without network, with what is vendored and
 * the standard library. The compiler runs on hostile source; what it wrote is only ever run in boxes.
 */
import { createHash, randomBytes } from 'node:crypto'
import { chmod, copyFile, mkdir, open, readdir, rename, rm, stat, utimes } from 'node:fs/promises'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import type { Program } from '../runner.ts'
import type { Engine, Image } from './engine.ts'
import { LineSplitter } from './lines.ts'
import { type Phases, unmeasured } from './phases.ts'
import { codeFile, mebibyte } from './plan.ts'
import { inBox } from './protocol.ts'

/** The source cannot be built; the message is the compiler’s. */
export class BuildFailed extends Error {
  override name = 'BuildFailed'
}

/** What building takes of whoever makes boxes. */
export interface BuildTools {
  readonly engine: Engine
  readonly files: { makeDirectory(): Promise<{ path: string } & AsyncDisposable> }
  image(base: 'go', signal: AbortSignal): Promise<Image>
  user(image: Image, text: string): Promise<{ uid: number; gid: number; groups: number[] }>
  source(program: Program, held: AsyncDisposableStack): Promise<string | undefined>
}

/** The compiler and the linker want more than most programs do. */
const limits = {
  memoryMb: 3_072,
  cpu: Math.min(4, availableParallelism()),
  pids: 512,
  diskMb: 1_536,
  fileBytes: 512 * mebibyte,
}
const buildMs = 300_000
const maxErrorLines = 100
/** A program that was used so many ms ago is not evicted: somebody may be about to mount it. */
const recentMs = 10 * 60_000

const environment = {
  HOME: '/tmp',
  GOCACHE: '/tmp/go-build',
  GOPATH: '/tmp/go',
  GOPROXY: 'off',
  GOSUMDB: 'off',
  GOTOOLCHAIN: 'local',
  GOFLAGS: '-trimpath -buildvcs=false',
  CGO_ENABLED: '0',
}

export class GoBuilds implements AsyncDisposable {
  readonly #tools: BuildTools
  readonly #dir: string
  readonly #budgetBytes: number
  readonly #building = new Map<string, Promise<string>>()
  /** One at a time. */
  #last: Promise<unknown> = Promise.resolve()
  readonly #stop = new AbortController()

  constructor(tools: BuildTools, dir: string, budgetMb: number) {
    this.#tools = tools
    this.#dir = dir
    this.#budgetBytes = budgetMb * mebibyte
  }

  /**
   * The path of the program. Several that want the same share one build, which goes on where `signal` is aborted:
   * the next that asks has it. Throws `BuildFailed`, `ImageError`, `BoxError`.
   */
  async get(
    program: Program,
    entry: string | null,
    signal: AbortSignal,
    phases: Phases = unmeasured,
  ): Promise<string> {
    const image = await this.#tools.image('go', signal)
    const { source } = program
    const sha256 = source.kind === 'image' ? source.reference : source.sha256
    const key = createHash('sha256').update(`${sha256} ${entry} ${image.digest}`).digest('hex')
    const path = join(this.#dir, key)
    const now = new Date()
    if (
      await utimes(path, now, now).then(
        () => true,
        () => false,
      )
    ) {
      image[Symbol.dispose]()
      return path
    }
    let building = this.#building.get(key)
    if (building === undefined) {
      building = this.#last.then(() => this.#build(program, entry, image, path))
      this.#last = building.catch(() => {})
      this.#building.set(key, building)
      const forget = () => {
        this.#building.delete(key)
        image[Symbol.dispose]()
      }
      building.then(forget, forget)
    } else image[Symbol.dispose]()
    const built = building
    return await phases.measure('build program', () => built)
  }

  async #build(program: Program, entry: string | null, image: Image, path: string): Promise<string> {
    await using held = new AsyncDisposableStack()
    const source = await this.#tools.source(program, held)
    if (source === undefined) throw new BuildFailed('there is no source to build')
    const dir = held.use(await this.#tools.files.makeDirectory())
    const output = join(dir.path, 'program')
    {
      await using file = await open(output, 'wx')
      await file.chmod(0o666)
    }
    const what = entry ?? (program.source.kind === 'code' ? codeFile(program) : '.')
    const target = what === '.' || what.startsWith('/') ? what : `./${what}`
    const box = await this.#tools.engine.create({
      image,
      argv: ['go', 'build', '-o', inBox.program, target],
      env: { ...environment, ...image.config.env },
      cwd: inBox.workspace,
      user: await this.#tools.user(image, image.config.user),
      mounts: [
        { source, target: inBox.workspace, readonly: true },
        { source: output, target: inBox.program, readonly: false },
      ],
      limits,
      network: undefined,
    })
    held.defer(() => box.remove())
    const said: string[] = []
    const lines = new LineSplitter((text) => {
      if (said.length < maxErrorLines) said.push(text)
    })
    for (const stream of [box.stdout, box.stderr]) {
      stream.on('error', () => {})
      stream.on('data', (chunk: Buffer) => lines.push(chunk))
    }
    const signal = AbortSignal.any([AbortSignal.timeout(buildMs), this.#stop.signal])
    signal.addEventListener('abort', () => box.kill().catch(() => {}))
    await box.start()
    box.stdin.on('error', () => {})
    box.stdin.end()
    const { code, oom } = await box.exited
    lines.end()
    const text = said.join('\n').slice(0, 16_000)
    if (signal.aborted) throw new BuildFailed(`the build took longer than ${buildMs / 1000} s`)
    if (oom) throw new BuildFailed(`the build needs more than ${limits.memoryMb} MiB of memory: ${text}`)
    if (code !== 0) throw new BuildFailed(text === '' ? `the build failed with exit code ${code}` : text)
    await this.#keep(output, path)
    return path
  }

  async #keep(output: string, path: string): Promise<void> {
    await mkdir(this.#dir, { recursive: true, mode: 0o755 })
    const made = `${path}.${randomBytes(6).toString('hex')}.new`
    try {
      await copyFile(output, made)
      await chmod(made, 0o755)
      await rename(made, path)
    } finally {
      await rm(made, { force: true })
    }
    await this.#evict()
  }

  async #evict(): Promise<void> {
    const found = await Promise.all(
      (await readdir(this.#dir)).map(async (name) => {
        const path = join(this.#dir, name)
        const { size, mtimeMs } = await stat(path).catch(() => ({ size: 0, mtimeMs: Date.now() }))
        return { path, size, mtimeMs }
      }),
    )
    found.sort((a, b) => a.mtimeMs - b.mtimeMs)
    let total = found.reduce((sum, { size }) => sum + size, 0)
    for (const { path, size, mtimeMs } of found) {
      const isLeft = path.endsWith('.new')
      if (total <= this.#budgetBytes && !isLeft) continue
      if (Date.now() - mtimeMs < recentMs) continue
      await rm(path, { force: true })
      total -= size
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stop.abort()
    await this.#last
  }
}
