/**
 * A private Docker Engine for tests: its own socket, data and containerd in a temporary directory, no bridge and no
 * rules in the host’s firewall. Debian: docker.io.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { accessSync, constants, globSync, readdirSync, readFileSync } from 'node:fs'
import { mkdtemp, readFile, rm, rmdir, writeFile } from 'node:fs/promises'
import { request } from 'node:http'
import { tmpdir } from 'node:os'
import { basename, delimiter, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { gone, signal, startTime } from '../scripts/process-identity.ts'

export interface TestDocker extends AsyncDisposable {
  /** `unix:///…`, as DOCKER_HOST has it. */
  host: string
  socketPath: string
  /** Holds all that is its own. */
  dir: string
  /** Of the daemon running now; changes at restart. */
  readonly pid: number
  /** Sends a signal and resolves when the daemon is gone. */
  kill(signal?: NodeJS.Signals): Promise<void>
  /** Starts it again on the same data, ending it first where it runs. Resolves when it answers. */
  restart(): Promise<void>
  /** Names of all containers, whoever’s. */
  containers(): Promise<string[]>
  /** Directories of its containers’ control groups, all controllers’. */
  cgroups(): string[]
  /** Any call of its API; resolves with what it answers, parsed where it is JSON. */
  api(method: string, path: string, body?: unknown): Promise<unknown>
}

const startMs = 30_000
const stopMs = 20_000

/** Why no Docker Engine can run here and what would help; undefined: one can, as far as can be seen. */
export function noDockerd(): string | undefined {
  if (process.platform !== 'linux') return 'a Docker Engine of our own needs Linux'
  if (process.getuid?.() !== 0) return 'a Docker Engine of our own needs root'
  for (const program of ['dockerd', 'containerd', 'runc', 'setpriv'])
    if (pathOf(program) === undefined) return `there is no ${program}: apt-get install docker.io util-linux`
  return undefined
}

const folders = () => [...(process.env.PATH ?? '').split(delimiter), '/usr/sbin', '/sbin', '/usr/bin']

function pathOf(program: string): string | undefined {
  for (const folder of folders()) {
    const path = join(folder, program)
    try {
      accessSync(path, constants.X_OK)
      return path
    } catch {
      // Not there.
    }
  }
  return undefined
}

/** Throws with the reason where it cannot run: ask `noDockerd` first. Disposing leaves nothing of it. */
export async function startDocker(options: { args?: string[] } = {}): Promise<TestDocker> {
  const reason = noDockerd()
  if (reason !== undefined) throw new Error(reason)
  await using scope = new AsyncDisposableStack()
  const dir = await mkdtemp(join(tmpdir(), 'vulcan-test-docker-'))
  scope.defer(() => rm(dir, { recursive: true, force: true }))
  scope.defer(() => leaveNothing(dir))
  const socketPath = join(dir, 'docker.sock')
  // An empty file, for /etc/docker/daemon.json is another’s.
  await writeFile(join(dir, 'daemon.json'), '{}')
  const args = [
    `--config-file=${join(dir, 'daemon.json')}`,
    `--host=unix://${socketPath}`,
    `--data-root=${join(dir, 'data')}`,
    `--exec-root=${join(dir, 'exec')}`,
    `--pidfile=${join(dir, 'pid')}`,
    `--cgroup-parent=/${basename(dir)}`,
    '--bridge=none',
    '--iptables=false',
    '--ip6tables=false',
    '--ip-forward=false',
    '--ip-masq=false',
    '--exec-opt=native.cgroupdriver=cgroupfs',
    '--log-level=warn',
    ...(options.args ?? []),
  ]

  let daemon: ChildProcess
  const containerdPid = join(dir, 'exec', 'containerd', 'containerd.pid')
  const start = async () => {
    // Of a killed daemon’s containerd only a zombie may be left, which the next daemon would take for alive.
    const containerd = Number(await readFile(containerdPid, 'utf8').catch(() => 0))
    if (containerd > 0 && (await gone(containerd, 10_000))) await rm(containerdPid, { force: true })
    let output = ''
    // It ends with this process, too, however that ends.
    daemon = spawn('setpriv', ['--pdeathsig', 'TERM', pathOf('dockerd')!, ...args], {
      env: { ...process.env, PATH: folders().join(delimiter) },
      stdio: ['ignore', 'ignore', 'pipe'],
    })
    daemon.stderr!.setEncoding('utf8').on('data', (text) => {
      output = (output + text).slice(-4_000)
    })
    const until = performance.now() + startMs
    for (;;) {
      if (await call(socketPath, 'GET', '/_ping').catch(() => undefined)) return
      if (daemon.exitCode !== null || daemon.signalCode !== null || performance.now() > until) break
      await sleep(50)
    }
    daemon.kill('SIGKILL')
    throw new Error(`dockerd did not start:\n${output}`)
  }
  const kill = async (signal: NodeJS.Signals = 'SIGTERM') => {
    if (daemon.exitCode !== null || daemon.signalCode !== null) return
    const exit = once(daemon, 'exit')
    daemon.kill('SIGCONT')
    daemon.kill(signal)
    const late = setTimeout(() => daemon.kill('SIGKILL'), stopMs)
    await exit
    clearTimeout(late)
  }
  await start()
  scope.defer(() => kill())
  const api = (method: string, path: string, body?: unknown) => call(socketPath, method, path, body)
  scope.defer(async () => {
    const all = (await api('GET', '/containers/json?all=1').catch(() => [])) as { Id: string }[]
    await Promise.all(all.map(({ Id }) => api('DELETE', `/containers/${Id}?force=1&v=1`).catch(() => {})))
  })
  const resources = scope.move()
  return {
    host: `unix://${socketPath}`,
    socketPath,
    dir,
    cgroups: () => cgroupsOf(basename(dir)),
    get pid() {
      return daemon.pid!
    },
    kill,
    restart: async () => {
      await kill()
      await start()
    },
    containers: async () =>
      ((await api('GET', '/containers/json?all=1')) as { Names: string[] }[]).flatMap(({ Names }) => Names),
    api,
    [Symbol.asyncDispose]: () => resources.disposeAsync(),
  }
}

/** Ends what a killed daemon left running below `dir` (containerd, shims and what they guard), and unmounts. */
async function leaveNothing(dir: string): Promise<void> {
  for (const pid of readdirSync('/proc').map(Number).filter(Number.isInteger)) {
    let args: string
    try {
      args = readFileSync(`/proc/${pid}/cmdline`, 'utf8')
    } catch {
      continue
    }
    if (!args.split('\0').some((arg) => arg.startsWith(`${dir}/`))) continue
    const children = await readFile(`/proc/${pid}/task/${pid}/children`, 'utf8').catch(() => '')
    for (const one of [...children.split(' ').filter(Boolean).map(Number), pid]) {
      if (startTime(one) === undefined) continue
      signal(one, 'SIGKILL')
      await gone(one, 5_000)
    }
  }
  for (const path of [...cgroupsOf(basename(dir)), ...cgroupTrees(basename(dir))])
    await rmdir(path).catch(() => {})
  const mounts = readFileSync('/proc/self/mounts', 'utf8').split('\n')
  const ours = mounts.map((line) => line.split(' ')[1] ?? '').filter((path) => path.startsWith(`${dir}/`))
  for (const path of ours.reverse()) {
    const umount = spawn('umount', ['--lazy', path], { stdio: 'ignore' })
    await once(umount, 'exit')
  }
}

const cgroupTrees = (parent: string) => globSync([`/sys/fs/cgroup/${parent}`, `/sys/fs/cgroup/*/${parent}`])

/** Below `parent`, the deepest first. Version 1: one tree for each controller; version 2: one. */
function cgroupsOf(parent: string): string[] {
  return cgroupTrees(parent)
    .flatMap((tree) => globSync('**/', { cwd: tree }).map((path) => join(tree, path)))
    .sort((a, b) => b.length - a.length)
}

function call(socketPath: string, method: string, path: string, body?: unknown): Promise<unknown> {
  const { promise, resolve, reject } = Promise.withResolvers<unknown>()
  const bytes = body === undefined ? undefined : body instanceof Uint8Array ? body : JSON.stringify(body)
  const type = body instanceof Uint8Array ? 'application/x-tar' : 'application/json'
  const sent = request({
    socketPath,
    method,
    path,
    headers: { connection: 'close', ...(bytes === undefined ? {} : { 'content-type': type }) },
    timeout: 60_000,
  })
  sent.once('error', reject)
  sent.once('timeout', () => sent.destroy(new Error(`${method} ${path}: no answer`)))
  sent.once('response', async (response) => {
    try {
      const text = (await response.setEncoding('utf8').toArray()).join('')
      if (response.statusCode! >= 400) throw new Error(`${method} ${path}: ${response.statusCode} ${text}`)
      const isJson = response.headers['content-type']?.startsWith('application/json') && text !== ''
      resolve(isJson ? JSON.parse(text) : text || true)
    } catch (error) {
      reject(error)
    }
  })
  sent.end(bytes)
  return promise
}
