/** A platform for the suite, and what its cases do with it: run programs by HTTP, read lines, find the runner. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type OfferedIsolation, runnerName } from '../../../scripts/isolations.ts'
import type { Platform } from '../../../scripts/platform.ts'
import { startTime } from '../../../scripts/process-identity.ts'
import type { Backend } from '../../../shared/backends.ts'
import type { Isolation, Workload } from '../../../shared/workload.ts'
import { tgzOf } from '../../gateway/archives.ts'
import { http, startTestPlatform } from '../../platform.ts'
import { until } from '../../shared/support.ts'
import { Census } from './census.ts'
import { openHost, type TestHost } from './host.ts'
import type { Language } from './languages.ts'

/** Workloads that run at once. */
export const slots = 10
/** A killed runner’s work goes to the next after so many ms. */
const ackWaitMs = 5_000

/** Fields of a spec beside program and language. */
export interface Fields {
  input?: unknown
  limits?: Record<string, number>
  [field: string]: unknown
}

export interface Line {
  text: string
  level: string
  stream: string
}

export class Ground implements AsyncDisposable {
  readonly platform: Platform
  readonly isolation: Isolation
  readonly census: Census
  readonly #host: TestHost
  readonly #tmpDir: string
  readonly #archives = new Map<string, Promise<string>>()

  private constructor(platform: Platform, host: TestHost, tmpDir: string) {
    this.platform = platform
    this.isolation = host.isolation
    this.#host = host
    this.#tmpDir = tmpDir
    this.census = new Census([platform.dataDir, tmpDir])
    this.census.also(() => host.held())
  }

  /** `env` goes to every process of the platform. Throws where the platform does not start. */
  static async open(isolation: Isolation, env: Record<string, string> = {}): Promise<Ground> {
    await using scope = new AsyncDisposableStack()
    const host = scope.use(await openHost(isolation))
    const tmpDir = await mkdtemp(join(tmpdir(), `suite-${isolation}-`))
    scope.defer(() => rm(tmpDir, { recursive: true, force: true }))
    const platform = scope.use(
      await startTestPlatform({
        // Isolates are there in any case: without a single runner a platform is not ready.
        VULCAN_ISOLATIONS: [
          ...new Set(['isolate', ...(host.missing === undefined ? [isolation] : [])]),
        ].join(),
        VULCAN_SLOTS: String(slots),
        VULCAN_CONTAINER_SLOTS: String(slots),
        VULCAN_MICROVM_SLOTS: String(slots),
        VULCAN_ACK_WAIT_MS: String(ackWaitMs),
        TMPDIR: tmpDir,
        ...host.env,
        ...env,
      }),
    )
    const ground = new Ground(platform, host, tmpDir)
    if (host.missing === undefined)
      await until('a word of the runner', async () => (await ground.#hasSpoken()) || undefined, 120_000)
    ground.census.follow(async () => (await ground.backend()).runners.map(({ pid }) => pid))
    scope.move()
    return ground
  }

  /** Why nothing can be run here; undefined where it can. */
  async obstacle(): Promise<string | undefined> {
    const { available, reason, fix } = await this.backend()
    if (available) return undefined
    return `${this.isolation} is not available here: ${this.#host.missing ?? `${reason}; ${fix}`}`
  }

  get url(): string {
    return this.platform.url
  }

  async #hasSpoken(): Promise<boolean> {
    const { available, reason } = await this.backend()
    return available || reason !== `no ${this.isolation} runner has been seen`
  }

  async backend(): Promise<Backend> {
    const { body } = await http<{ backends: Backend[] }>(`${this.url}/v1/backends`)
    return body.backends.find(({ isolation }) => isolation === this.isolation)!
  }

  /** Of the runner of this isolation that lives and offers itself; waits for one that is not `other`. */
  runnerPid(other?: number): Promise<number> {
    // The last word of one that was killed stands for a while.
    const lives = ({ pid }: { pid: number }) => pid !== other && startTime(pid) !== undefined
    return until('a live runner', async () => (await this.backend()).runners.find(lives)?.pid, 60_000)
  }

  /** The last lines of the runner, over all its lives. */
  lastWords(): readonly string[] {
    return this.platform.supervisor.lastLines(runnerName(this.isolation as OfferedIsolation))
  }

  /** The spec that runs a program. */
  async spec(language: Language, program: string, fields: Fields = {}): Promise<object> {
    const { runtime, command } = language
    const source =
      command === undefined
        ? { code: program, runtime }
        : { archive: { blob: await this.archive({ [command.file]: program }) }, entrypoint: command.argv }
    return { isolation: this.isolation, ...source, ...fields }
  }

  /** Runs to the end. */
  async run(language: Language, program: string, fields?: Fields): Promise<Workload> {
    return await this.finish(await this.spec(language, program, fields))
  }

  async finish(spec: object): Promise<Workload> {
    const { status, body } = await http<Workload>(`${this.url}/v1/workloads`, { body: spec })
    if (status !== 200) throw new Error(`answered ${status}: ${JSON.stringify(body)}`)
    return body
  }

  /** Accepts it and gives its id. */
  async begin(language: Language, program: string, fields?: Fields): Promise<string> {
    return await this.accept(await this.spec(language, program, fields))
  }

  async accept(spec: object): Promise<string> {
    const { status, body } = await http<Workload>(`${this.url}/v1/workloads/async`, { body: spec })
    if (status !== 202) throw new Error(`answered ${status}: ${JSON.stringify(body)}`)
    return body.id
  }

  async read(id: string): Promise<Workload> {
    return (await http<Workload>(`${this.url}/v1/workloads/${id}`)).body
  }

  async kill(id: string): Promise<Workload> {
    return (await http<Workload>(`${this.url}/v1/workloads/${id}/kill`, { method: 'POST' })).body
  }

  ended(id: string, timeoutMs = 60_000): Promise<Workload> {
    return until(
      `the end of ${id}`,
      async () => {
        const workload = await this.read(id)
        return workload.ended_at === null ? undefined : workload
      },
      timeoutMs,
    )
  }

  /** What it has written so far. */
  async lines(id: string): Promise<Line[]> {
    const { body } = await http<{ lines: Line[] }>(`${this.url}/v1/workloads/${id}/logs`)
    return body.lines
  }

  /** The first line that begins so, once it is written; throws where the workload ends before. */
  said(id: string, beginning: string, timeoutMs = 60_000): Promise<string> {
    return until(
      `a line ${beginning} of ${id}`,
      async () => {
        const { ended_at, cause, error } = await this.read(id)
        const line = (await this.lines(id)).find(({ text }) => text.startsWith(beginning))
        if (line === undefined && ended_at !== null)
          throw new Error(`it ended as ${cause}: ${error?.message}`)
        return line?.text
      },
      timeoutMs,
    )
  }

  /** All its lines up to its end, and how many it is said to have lost. */
  async log(id: string): Promise<{ lines: Line[]; lost: number }> {
    const stream = await fetch(`${this.url}/v1/workloads/${id}/logs`, {
      headers: { accept: 'text/event-stream' },
    })
    const lines: Line[] = []
    let lost = 0
    for (const event of (await stream.text()).split('\n\n')) {
      const field = (name: string) => new RegExp(`^${name}: (.*)$`, 'm').exec(event)?.[1]
      const data = JSON.parse(field('data') ?? 'null')
      if (field('event') === 'log') lines.push(data)
      if (field('event') === 'gap') lost += data.count
    }
    return { lines, lost }
  }

  /** Stores the files as an archive; gives its digest. */
  archive(files: Record<string, string>): Promise<string> {
    const key = JSON.stringify(files)
    let stored = this.#archives.get(key)
    if (stored === undefined) {
      stored = this.blob(tgzOf(files))
      this.#archives.set(key, stored)
    }
    return stored
  }

  async blob(bytes: Uint8Array): Promise<string> {
    const answer = await fetch(`${this.url}/v1/blobs`, { method: 'POST', body: Buffer.from(bytes) })
    const { blob } = (await answer.json()) as { blob: string }
    return blob
  }

  /** Stops the platform and says what is left of it. */
  async leftovers(): Promise<string[]> {
    await this.platform.stop()
    return await this.census.left()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.census.stop()
    await this.platform[Symbol.asyncDispose]()
    await this.#host[Symbol.asyncDispose]()
    await rm(this.#tmpDir, { recursive: true, force: true })
  }
}
