/**
 * The walls around a build: bubblewrap with namespaces of its own, a read-only root that holds little more than
 * Node, and limits on memory and time. There is no way to build without them.
 */

import { spawn } from 'node:child_process'
import type { Readable } from 'node:stream'
import { fileURLToPath } from 'node:url'
import { Problem } from '../../shared/errors.ts'
import { sharedLibraries } from '../../shared/shared-libraries.ts'

const root = fileURLToPath(new URL('../..', import.meta.url))
/** Where our own files stand in the sandbox. */
export const inside = '/vulcan'
/** Nobody’s ids in every Linux distribution. */
const nobody = '65534'
/** Largest file a process in the sandbox writes, and largest private memory of each (bytes). */
const fileBytes = 512 * 1_048_576
const memoryBytes = 2 * 1_073_741_824
const scratchBytes = 1_073_741_824
/** Where bubblewrap says which process it made. */
const infoFd = 3
/** Bytes of what a step prints that are kept. */
const outputBytes = 256 * 1_048_576

/** A path on the host and where it stands in the sandbox. */
export type Bind = readonly [host: string, at: string]

export interface Step {
  /** Arguments of Node: its flags, the script in the sandbox and what that takes. */
  args: string[]
  /** Read-only. */
  binds: Bind[]
  writable: Bind[]
  /** Sized file systems in memory. */
  scratch: string[]
  env: Record<string, string>
  /** Shares the host’s network. */
  network: boolean
  cwd: string
  stdin: string
  timeoutMs: number
}

export type StepEnd = { stdout: string; stderr: string; code: number | null; timedOut: boolean }

export interface SandboxOptions {
  /** Name or path of bubblewrap. */
  bwrap?: string | undefined
}

/** What the resolver of the C library reads. */
const networkFiles = ['/etc/resolv.conf', '/etc/hosts', '/etc/nsswitch.conf', '/etc/host.conf']

export const unavailable = (detail: string, cause?: unknown) =>
  new Problem('build_unavailable', { detail, cause })

/** A file of ours and where it stands in the sandbox. */
export const ours = (path: string): Bind => [`${root}${path}`, `${inside}/${path}`]

function commandLine(step: Step, { bwrap = 'bwrap' }: SandboxOptions): string[] {
  const readOnly = ([host, at]: Bind) => ['--ro-bind', host, at]
  return [
    ...[`--data=${memoryBytes}`, `--fsize=${fileBytes}`, '--core=0', '--', bwrap],
    ...['--info-fd', String(infoFd), '--unshare-all', ...(step.network ? ['--share-net'] : [])],
    ...['--die-with-parent', '--new-session', '--clearenv', '--cap-drop', 'ALL'],
    ...['--uid', nobody, '--gid', nobody, '--hostname', 'build'],
    ...Object.entries(step.env).flatMap(([name, value]) => ['--setenv', name, value]),
    ...sharedLibraries().flatMap((path) => readOnly([path, path])),
    ...readOnly([process.execPath, `${inside}/node`]),
    ...(step.network ? networkFiles.flatMap((path) => ['--ro-bind-try', path, path]) : []),
    ...[ours('package.json'), ...step.binds].flatMap(readOnly),
    ...step.writable.flatMap(([host, at]) => ['--bind', host, at]),
    ...step.scratch.flatMap((at) => ['--size', String(scratchBytes), '--tmpfs', at]),
    ...['--dev', '/dev', '--remount-ro', '/dev', '--remount-ro', '/', '--chdir', step.cwd],
    ...['--', `${inside}/node`, ...step.args],
  ]
}

/**
 * Runs one step to its end; at its time limit everything in it is killed. Throws `build_unavailable` where the host
 * lacks the walls, with what to install.
 */
export async function runStep(step: Step, options: SandboxOptions, signal?: AbortSignal): Promise<StepEnd> {
  signal?.throwIfAborted()
  const child = spawn('prlimit', commandLine(step, options), {
    stdio: ['pipe', 'pipe', 'pipe', 'pipe'],
    detached: true,
  })
  let timedOut = false
  let killed = false
  let info = ''
  // The first process of the sandbox’s own namespace takes all others with it. It is not told of bubblewrap’s death
  // until it has asked for that; bubblewrap names it before it lets it run, and until then both are of one group.
  const kill = () => {
    killed = true
    if (child.pid !== undefined) killQuietly(-child.pid)
    const first = /"child-pid": (\d+)/.exec(info)?.[1]
    if (first !== undefined) killQuietly(Number(first))
  }
  const told = child.stdio[infoFd] as Readable
  told.setEncoding('utf8').on('data', (text: string) => {
    info += text
    if (killed) kill()
  })
  const timer = setTimeout(() => {
    timedOut = true
    kill()
  }, step.timeoutMs)
  signal?.addEventListener('abort', kill)
  const stdout: Buffer[] = []
  let size = 0
  let stderr = ''
  child.stdout.on('data', (part: Buffer) => {
    size += part.byteLength
    if (size > outputBytes) kill()
    else stdout.push(part)
  })
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    stderr = (stderr + text).slice(-65_536)
  })
  // A step that is killed does not read to the end.
  child.stdin.on('error', () => {})
  child.stdin.end(step.stdin)
  try {
    const code = await new Promise<number | null>((resolve, reject) => {
      child.once('error', reject)
      child.once('close', resolve)
    })
    signal?.throwIfAborted()
    if (code !== 0 && !timedOut && /^(prlimit|bwrap): /m.test(stderr)) throw missing(stderr)
    return { stdout: Buffer.concat(stdout).toString('utf8'), stderr, code, timedOut }
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code === 'ENOENT') throw missing('prlimit was not found', cause)
    throw cause
  } finally {
    clearTimeout(timer)
    signal?.removeEventListener('abort', kill)
  }
}

function killQuietly(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL')
  } catch {
    // It is gone.
  }
}

const missing = (said: string, cause?: unknown) =>
  unavailable(
    `the sandbox for builds could not be started on the gateway’s host (${said.trim().split('\n').pop()}); install bubblewrap and util-linux (Debian: apt-get install bubblewrap util-linux) and let it create user namespaces (kernel.unprivileged_userns_clone=1, or run as root)`,
    cause,
  )
