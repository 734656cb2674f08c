/** The host's programs that isolations and tests need: which they are, where they are looked for, how they come. */
import { execFile } from 'node:child_process'
import { accessSync, constants, globSync, statSync } from 'node:fs'
import { chmod, mkdtemp, open, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { delimiter, isAbsolute, join } from 'node:path'
import { promisify } from 'node:util'
import { failureOf, openDebian } from './debian.ts'

const execute = promisify(execFile)
const installTimeoutMs = 900_000

export type Log = (line: string) => void

type Tool = {
  /** Its name, or pattern of an absolute path where it is no program. */
  program: string
  /** Debian's package. */
  package: string
  /** What it is, or is for. */
  why: string
  /** Whether a program that was found will do; any does where this is left out. */
  accepts?(file: string): Promise<boolean>
  /** Taken from this suite: that of the machine may not have it, or not one that works. */
  suite?: string
  /** Where else it can be had. */
  elsewhere?: string
}

/** Builds of runsc before have no systrap, or one that is not fit for use. Its versions are dates. */
const oldestRunsc = 20240101

const runsc: Tool = {
  program: 'runsc',
  package: 'runsc',
  why: 'is gVisor',
  accepts: async (file) => ((await runscVersion(file)) ?? 0) >= oldestRunsc,
  suite: 'bookworm-backports',
  elsewhere: 'https://gvisor.dev/docs/user_guide/install/',
}
const bubblewrap: Tool = {
  program: 'bwrap',
  package: 'bubblewrap',
  why: 'puts a second wall around isolates, and is the jail in which images are unpacked',
}
const skopeo: Tool = { program: 'skopeo', package: 'skopeo', why: 'fetches and converts images' }
const busybox: Tool = {
  program: 'busybox',
  package: 'busybox-static',
  why: 'is what runs in the sandboxes that try out limits, if it is statically linked',
  accepts: isStatic,
}
const network: Tool[] = [
  { program: 'nft', package: 'nftables', why: "holds the rules of a sandbox's network" },
  { program: 'ip', package: 'iproute2', why: "makes a sandbox's network" },
  { program: 'slirp4netns', package: 'slirp4netns', why: "is the way out of a sandbox's network" },
  { program: 'nsenter', package: 'util-linux', why: "enters a sandbox's network" },
]

const compiler: Tool[] = [
  { program: 'gcc', package: 'gcc', why: 'compiles the agent of virtual machines' },
  {
    program: '/usr/lib/*/libc.a',
    package: 'libc6-dev',
    why: 'is the C library that the agent is linked with',
  },
]

const tools = {
  isolate: [bubblewrap],
  gvisor: [runsc, skopeo, bubblewrap, busybox, ...network],
  docker: [skopeo, bubblewrap, busybox, ...network],
  /** For a machine without an Engine; tests run one of their own. */
  engine: [
    { program: 'dockerd', package: 'docker.io', why: 'is the Docker Engine' },
    { program: 'containerd', package: 'containerd', why: 'is a part of the Docker Engine' },
    { program: 'runc', package: 'runc', why: 'is a part of the Docker Engine' },
  ],
  microvm: [
    { program: 'qemu-system-x86_64', package: 'qemu-system-x86', why: 'runs virtual machines' },
    { program: 'mke2fs', package: 'e2fsprogs', why: 'makes root drives for Firecracker' },
    skopeo,
    bubblewrap,
    ...compiler,
    ...network,
  ],
  /** What builds a kernel. */
  kernel: [
    ...compiler,
    { program: 'make', package: 'make', why: 'builds kernels' },
    { program: 'flex', package: 'flex', why: 'builds kernels' },
    { program: 'bison', package: 'bison', why: 'builds kernels' },
    { program: 'bc', package: 'bc', why: 'builds kernels' },
    { program: 'xz', package: 'xz-utils', why: 'unpacks the source of kernels' },
    { program: '/usr/include/gelf.h', package: 'libelf-dev', why: 'is a library that builds kernels' },
  ],
  tests: [
    { program: 'fsck.erofs', package: 'erofs-utils', why: 'checks file systems that were made here' },
    { program: 'docker-registry', package: 'docker-registry', why: 'is the registry of tests' },
    { program: 'pip3', package: 'python3-pip', why: 'installs requirements of Python projects' },
  ],
} satisfies Record<string, Tool[]>

export type ToolSet = keyof typeof tools

/** The folders in which the runners look for programs, as in PATH. */
export const systemPath = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'

/** The first executable file of this name in `path`. */
export function which(program: string, path: string): string | undefined {
  return path
    .split(delimiter)
    .filter(isAbsolute)
    .map((folder) => join(folder, program))
    .find((file) => {
      try {
        accessSync(file, constants.X_OK)
        return statSync(file).isFile()
      } catch {
        return false
      }
    })
}

export type ToolOptions = {
  log: Log
  /** Where they are looked for, as in PATH. Default: `systemPath`. */
  path?: string | undefined
}

/**
 * Installs what is missing of these sets, as root with apt-get. Quick when all is there. No service is started, and
 * the machine's package sources stay as they are.
 *
 * @returns for each program that is still missing, what to do; empty when all is there
 */
export async function ensureTools(sets: readonly ToolSet[], options: ToolOptions): Promise<string[]> {
  const { log, path = systemPath } = options
  const lacking = await lackingOf(sets, path)
  if (lacking.length === 0) return []
  let why = 'this is not root'
  const apt = which('apt-get', path)
  if (apt === undefined) why = 'this machine has no apt-get'
  else if (process.getuid?.() === 0)
    why = (await install(lacking, apt, log)) ?? 'it was installed, but is not found'
  return (await lackingOf(sets, path)).map((tool) => {
    const from = tool.suite === undefined ? '' : ` of Debian ${tool.suite}`
    const or = tool.elsewhere === undefined ? '' : ` (or see ${tool.elsewhere})`
    return `${tool.program}, which ${tool.why}, is missing: install the package ${tool.package}${from}${or}; ${why}`
  })
}

async function lackingOf(sets: readonly ToolSet[], path: string): Promise<Tool[]> {
  const wanted = new Set<Tool>(sets.flatMap((name) => tools[name] as Tool[]))
  const lacking: Tool[] = []
  for (const tool of wanted) {
    const file = isAbsolute(tool.program) ? globSync(tool.program)[0] : which(tool.program, path)
    if (file === undefined || !((await tool.accepts?.(file)) ?? true)) lacking.push(tool)
  }
  return lacking
}

/** Says why not all could be installed; undefined when all were. */
async function install(wanted: Tool[], apt: string, log: Log): Promise<string | undefined> {
  const began = performance.now()
  await using scope = new AsyncDisposableStack()
  const work = await mkdtemp(join(tmpdir(), 'vulcan-packages-'))
  scope.defer(() => rm(work, { recursive: true, force: true }))
  const packages = [...new Set(wanted.map((tool) => tool.package))].join(', ')
  log(`installing ${packages} (apt-get)`)
  const failures: string[] = []
  const targets = new Set<string>()
  for (const tool of wanted) {
    try {
      targets.add(tool.suite === undefined ? tool.package : await download(tool.package, tool.suite, work))
    } catch (error) {
      failures.push(`${tool.package}: ${(error as Error).message}`)
    }
  }
  try {
    if (targets.size > 0) await installTargets([...targets], apt, work, log)
  } catch (error) {
    failures.push(failureOf(error))
  }
  if (failures.length === 0) {
    log(`${packages}: installed in ${((performance.now() - began) / 1000).toFixed(1)} s`)
    return undefined
  }
  const why = failures.join('; ')
  log(`${packages} could not be installed: ${why}`)
  return why
}

/** The file of a package that the machine's own sources may not have. */
async function download(name: string, suite: string, folder: string): Promise<string> {
  await using archive = await openDebian([suite])
  const [file] = await archive.download(await archive.find([name]), folder)
  return file!
}

/** @throws what apt-get says */
async function installTargets(targets: string[], apt: string, work: string, log: Log): Promise<void> {
  // Scripts of packages start services through these two, which they find by the PATH that apt gives them.
  for (const program of ['invoke-rc.d', 'deb-systemd-invoke']) {
    await writeFile(join(work, program), '#!/bin/sh\nexit 0\n')
    await chmod(join(work, program), 0o755)
  }
  const options = ['DPkg::Lock::Timeout=300', `DPkg::Path=${work}:/usr/sbin:/usr/bin:/sbin:/bin`]
  const run = (...args: string[]) =>
    execute(apt, ['--quiet=2', ...options.flatMap((option) => ['-o', option]), ...args], {
      env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive', NEEDRESTART_SUSPEND: '1' },
      timeout: installTimeoutMs,
      maxBuffer: 16 << 20,
    })
  const command = ['install', '--yes', '--no-install-recommends', ...targets]
  await run(...command).catch(async () => {
    log('fetching the package lists (apt-get update), then once more')
    await run('update')
    await run(...command)
  })
}

/** Such as 20240729; undefined where it tells none. */
async function runscVersion(file: string): Promise<number | undefined> {
  try {
    const { stdout } = await execute(file, ['--version'], { timeout: 10_000 })
    return Number(/\b(20\d{6})\b/.exec(stdout)?.[1]) || undefined
  } catch {
    return undefined
  }
}

/** A program that needs a loader names it near its beginning (ELF: PT_INTERP). */
async function isStatic(file: string): Promise<boolean> {
  const handle = await open(file)
  await using _close = { [Symbol.asyncDispose]: () => handle.close() }
  const { buffer, bytesRead } = await handle.read(Buffer.alloc(4_096), 0, 4_096, 0)
  return !buffer.subarray(0, bytesRead).includes('/ld-')
}
