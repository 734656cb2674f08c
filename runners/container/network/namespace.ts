/**
 * Network namespaces that are kept by nothing but a descriptor of this process: no name, no mount, no process of their
 * own. Whatever becomes of this process, the kernel takes them and all that is in them away.
 */
import { type ChildProcessByStdio, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, openSync, readlinkSync } from 'node:fs'
import type { Readable, Writable } from 'node:stream'

/** Where Debian has programs, and nothing else of our environment. */
export const toolEnv = { PATH: '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' }

type Tool = ChildProcessByStdio<Writable, Readable, Readable>

/** Where the network namespace of a process is entered. */
const namespaceOf = (pid: number | 'self') => `/proc/${pid}/ns/net`

/**
 * Runs a tool with `input` on its stdin and resolves to what it wrote. Throws an Error with its complaint.
 * It may not be stopped half-way; it takes some milliseconds.
 */
async function run(file: string, args: string[], input = ''): Promise<string> {
  return await outputOf(file, start(file, args), input)
}

/** The same, within a network namespace. */
export const runIn = (path: string, file: string, args: string[], input = '') =>
  run('nsenter', [`--net=${path}`, '--', file, ...args], input)

function start(file: string, args: string[]): Tool {
  const tool = spawn(file, args, { env: toolEnv, stdio: ['pipe', 'pipe', 'pipe'] })
  // A tool that has ended reads no more; how it ended is told by its exit.
  tool.stdin.on('error', () => {})
  return tool
}

async function outputOf(file: string, tool: Tool, input: string): Promise<string> {
  let output = ''
  let complaint = ''
  tool.stdout.setEncoding('utf8').on('data', (text: string) => {
    output += text
  })
  tool.stderr.setEncoding('utf8').on('data', (text: string) => {
    complaint = (complaint + text).slice(-4_000)
  })
  tool.stdin.end(input)
  const [code, signal] = (await once(tool, 'close')) as [number | null, NodeJS.Signals | null]
  if (code !== 0) throw new Error(`${file} failed (${signal ?? code}): ${complaint.trim()}`)
  return output
}

export class Namespace implements Disposable {
  #descriptor: number | undefined

  private constructor(descriptor: number) {
    this.#descriptor = descriptor
  }

  /** Where it can be entered. Throws once it is given up: the descriptor may be that of anything else then. */
  get path(): string {
    if (this.#descriptor === undefined) throw new Error('the network is closed')
    return `/proc/${process.pid}/fd/${this.#descriptor}`
  }

  /**
   * A new one. `configure` is called once it can be entered, and gives lines for `ip -batch` that are then carried out
   * within it. Throws where one of both fails; nothing is left then.
   */
  static async create(configure: (namespace: Namespace) => Promise<string>): Promise<Namespace> {
    const tool = start('unshare', ['--net', '--', 'ip', '-batch', '-'])
    await once(tool, 'spawn')
    // Its first answer shows that it is in its namespace, where it then waits for more.
    tool.stdin.write('link show dev lo\n')
    await once(tool.stdout, 'readable')
    let namespace: Namespace | undefined
    try {
      if (tool.stdout.readableLength > 0) namespace = Namespace.of(tool.pid!)
      const lines = namespace === undefined ? '' : await configure(namespace)
      await outputOf('ip', tool, lines)
      if (namespace === undefined) throw new Error('unshare made no network namespace')
      return namespace
    } catch (error) {
      tool.stdin.end()
      tool.stdout.resume()
      tool.stderr.resume()
      namespace?.[Symbol.dispose]()
      throw error
    }
  }

  /** The one of a process. Throws where that is gone, or shares the namespace of this process. */
  static of(pid: number): Namespace {
    const namespace = new Namespace(openSync(namespaceOf(pid), 'r'))
    if (readlinkSync(namespace.path) !== readlinkSync(namespaceOf('self'))) return namespace
    namespace[Symbol.dispose]()
    throw new Error(`process ${pid} has no network namespace of its own`)
  }

  [Symbol.dispose](): void {
    if (this.#descriptor !== undefined) closeSync(this.#descriptor)
    this.#descriptor = undefined
  }
}
