/**
 * Counts what a platform holds of its host, so that what is left after it can be named. Everything is told apart from
 * what others do on the same host: by the platform’s own directories, and by having been seen below a runner of its.
 */
import { type Dirent, existsSync, lstatSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { startTime } from '../../../scripts/process-identity.ts'

/** What is going away may take this long (ms): an orphan of the isolate’s needs half a second to see that it is one. */
const graceMs = 10_000
const sampleMs = 250

/** Of a data directory: kept on purpose when the platform has stopped. */
const kept = /^(?:nats(?:\/|$)|vulcan\.db|secrets\.key$|microvm\/qemu\/kvm\.json$)/

const cgroupRoot = '/sys/fs/cgroup'

export class Census {
  /** Directories of this platform alone, and names with which its runners mark what they make. */
  readonly #marks: Set<string>
  readonly #directories: string[]
  /** `pid:start time` → command, of what was seen below a runner. */
  readonly #seen = new Map<string, string>()
  /** Below a controller’s mount, of what was seen. */
  readonly #cgroupPaths = new Set<string>()
  /** Further things to count. */
  readonly #others: (() => Promise<string[]>)[] = []
  #timer: NodeJS.Timeout | undefined

  constructor(directories: string[]) {
    this.#directories = directories
    this.#marks = new Set(directories)
  }

  /** Looks at the process trees of these from now on, also when they have been replaced by others. */
  follow(runners: () => Promise<number[]>): void {
    let looking = false
    this.#timer = setInterval(async () => {
      if (looking) return
      looking = true
      for (const pid of await runners().catch(() => [])) this.look(pid)
      looking = false
    }, sampleMs)
    this.#timer.unref()
  }

  /** Notes everything below a process, and the control groups it is in. */
  look(runner: number): void {
    for (const pid of [runner, ...descendants(runner)]) {
      const start = startTime(pid)
      if (start !== undefined) this.#seen.set(`${pid}:${start}`, commandOf(pid))
      for (const path of cgroupsOf(pid)) if (!ownCgroups.has(path)) this.#cgroupPaths.add(path)
    }
  }

  /** A name that only things of this platform carry. */
  mark(name: string): void {
    this.#marks.add(name)
  }

  /** Counts what this names too. */
  also(count: () => Promise<string[]>): void {
    this.#others.push(count)
  }

  stop(): void {
    clearInterval(this.#timer)
  }

  /** What there is now, as lines that name it. */
  async now(): Promise<string[]> {
    const others = await Promise.all(this.#others.map((count) => count()))
    return [
      ...this.#processes().map(({ line }) => line),
      ...this.#cgroups(),
      ...this.#mounts(),
      ...this.#sockets(),
      ...this.#namespaces(),
      ...this.#files(),
      ...others.flat(),
    ]
  }

  /** What is still there after a grace. */
  async left(): Promise<string[]> {
    this.stop()
    const deadline = Date.now() + graceMs
    for (;;) {
      const left = await this.now()
      if (left.length === 0 || Date.now() > deadline) return left
      await delay(200)
    }
  }

  /** What was seen below a runner that is gone by now, and outlived it. */
  async orphans(runner: number): Promise<string[]> {
    const deadline = Date.now() + graceMs
    for (;;) {
      const live = new Set([runner, ...descendants(runner)])
      const left = this.#processes().filter(({ pid }) => !live.has(pid) && this.#wasSeen(pid))
      if (left.length === 0 || Date.now() > deadline) return left.map(({ line }) => line)
      await delay(200)
    }
  }

  #wasSeen(pid: number): boolean {
    return this.#seen.has(`${pid}:${startTime(pid)}`)
  }

  #isMarked(text: string): boolean {
    for (const mark of this.#marks) if (text.includes(mark)) return true
    return false
  }

  #processes(): { pid: number; line: string }[] {
    return numbers('/proc').flatMap((pid) => {
      if (pid === process.pid || startTime(pid) === undefined) return []
      const ours =
        this.#wasSeen(pid) ||
        this.#isMarked(read(`/proc/${pid}/cmdline`)) ||
        this.#isMarked(read(`/proc/${pid}/environ`)) ||
        this.#isMarked(read(`/proc/${pid}/cgroup`))
      return ours ? [{ pid, line: `process ${pid}: ${commandOf(pid)}` }] : []
    })
  }

  #cgroups(): string[] {
    const controllers = ['', ...names(cgroupRoot)]
    const seen = [...this.#cgroupPaths].flatMap((path) =>
      controllers.map((controller) => join(cgroupRoot, controller, path)).filter(existsSync),
    )
    const marked = directories(cgroupRoot, 5).filter((path) => this.#isMarked(path))
    return [...new Set([...seen, ...marked])].map((path) => `cgroup ${path}`)
  }

  #mounts(): string[] {
    return this.#linesOf('/proc/self/mountinfo').map((line) => `mount ${line}`)
  }

  #sockets(): string[] {
    return this.#linesOf('/proc/net/unix').map((line) => `socket ${line.slice(line.indexOf(' ') + 1)}`)
  }

  #linesOf(path: string): string[] {
    return read(path)
      .split('\n')
      .filter((line) => this.#isMarked(line))
  }

  /** Network namespaces that are held by a name. */
  #namespaces(): string[] {
    return names('/run/netns')
      .filter((name) => this.#isMarked(name))
      .map((name) => `network namespace ${name}`)
  }

  /** Directories that hold nothing do not count. */
  #files(): string[] {
    return this.#directories.flatMap((directory) =>
      files(directory)
        .filter((path) => !kept.test(path))
        .map((path) => `file ${join(directory, path)}`),
    )
  }
}

/** Paths below the controllers’ mounts. */
function cgroupsOf(pid: number): string[] {
  const lines = read(`/proc/${pid}/cgroup`).split('\n').filter(Boolean)
  return lines.map((line) => line.slice(line.indexOf(':', line.indexOf(':') + 1) + 1))
}

function read(path: string): string {
  try {
    return readFileSync(path, 'latin1')
  } catch {
    return ''
  }
}

function names(path: string): string[] {
  try {
    return readdirSync(path)
  } catch {
    return []
  }
}

const numbers = (path: string): number[] => names(path).map(Number).filter(Number.isInteger)

function commandOf(pid: number): string {
  const words = read(`/proc/${pid}/cmdline`).replaceAll('\0', ' ').trim()
  return (words === '' ? (read(`/proc/${pid}/comm`).trim() ?? 'ended') : words).slice(0, 160)
}

/** Of this process, and so of a platform that it starts. */
const ownCgroups = new Set(['/', ...cgroupsOf(process.pid)])

/** Every process below this one. */
export function descendants(pid: number): number[] {
  return numbers(`/proc/${pid}/task`).flatMap((task) =>
    read(`/proc/${pid}/task/${task}/children`)
      .split(' ')
      .filter(Boolean)
      .flatMap((child) => [Number(child), ...descendants(Number(child))]),
  )
}

function directories(path: string, depth: number): string[] {
  if (depth === 0) return []
  let entries: Dirent[]
  try {
    entries = readdirSync(path, { withFileTypes: true })
  } catch {
    return []
  }
  return entries
    .filter((entry) => entry.isDirectory())
    .flatMap(({ name }) => [join(path, name), ...directories(join(path, name), depth - 1)])
}

/** Everything but directories, by its path below `root`. */
function files(root: string, below = ''): string[] {
  return names(join(root, below)).flatMap((name) => {
    const path = join(below, name)
    try {
      if (lstatSync(join(root, path)).isDirectory()) return files(root, path)
    } catch {
      // Gone meanwhile.
      return []
    }
    return [path]
  })
}
