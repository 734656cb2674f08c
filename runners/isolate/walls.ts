/**
 * The command lines by which a sandbox child is started, from the strongest walls to the weakest. Which of them a
 * host can do is found by running a workload behind it, never by the presence of a file.
 */

import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { sharedLibraries } from '../../shared/shared-libraries.ts'
import { seccompProgram } from './seccomp.ts'
import { nodeFlags } from './web/flags.ts'

export interface Walls {
  file: string
  args: string[]
  /** What the child finds on descriptor 3, if anything; it is closed before any code runs. */
  extra?: Buffer
  /** Walls in force. */
  names: string[]
  /** Walls that are wanted and not in force. */
  missing: { wall: string; fix: string }[]
}

export interface WallOptions {
  /** Path of prlimit; `false` does without. */
  prlimit?: string | false
  /** False leaves system calls unfiltered. */
  seccomp?: boolean
  /** Path of bubblewrap; `false` does without. */
  bwrap?: string | false
  /** Path of setpriv, used where bubblewrap is not; `false` does without. */
  setpriv?: string | false
}

/** Among the arguments of every child of this checkout: see `orphans.ts`. */
export const childMarker = fileURLToPath(new URL('.', import.meta.url)).replace(/\/$/, '')

const root = fileURLToPath(new URL('../..', import.meta.url))
/** What a child reads, relative to the root. `package.json` says that our files are ES modules. */
const childFiles = [
  'package.json',
  'shared/frames.ts',
  'shared/guest.ts',
  'shared/trace.ts',
  'runners/guest/flows.ts',
  'runners/guest/heads.ts',
  'runners/isolate',
]
/** Where these stand inside bubblewrap. */
const inside = '/vulcan'
/** Nobody’s ids in every Linux distribution. */
const nobody = '65534'

/** The compiled addon for this very Node, as isolated-vm’s own loader finds it. */
function findAddon(): string {
  const require = createRequire(import.meta.url)
  const entry = require.resolve('isolated-vm')
  const nodeGypBuild = createRequire(entry)('node-gyp-build') as { resolve(dir: string): string }
  return nodeGypBuild.resolve(dirname(entry))
}

/** What a child is given beside its code, by path. */
interface Given {
  /** isolated-vm’s addon. */
  addon: string
  /** The bundle of web APIs. */
  web: string
}

function nodeArgs(at: string, { addon, web }: Given): string[] {
  const readable = [...childFiles.map((file) => join(at, file)), addon, web]
  return [
    ...nodeFlags,
    '--disable-warning=ExperimentalWarning',
    '--disable-warning=SecurityWarning',
    '--permission',
    '--allow-addons',
    ...readable.map((path) => `--allow-fs-read=${path}`),
    join(at, 'runners/isolate/child.ts'),
    addon,
    web,
  ]
}

function bubblewrap(bwrap: string, given: Given, program: Buffer | undefined): Walls {
  const bind = (path: string, at = path) => ['--ro-bind', path, at]
  const at: Given = { ...given, addon: join(inside, 'isolated-vm.node'), web: join(inside, 'web.json') }
  const args = [
    ...['--unshare-all', '--die-with-parent', '--new-session', '--clearenv', '--cap-drop', 'ALL'],
    ...['--uid', nobody, '--gid', nobody, '--hostname', 'isolate'],
    ...sharedLibraries().flatMap((path) => bind(path)),
    ...bind(process.execPath, join(inside, 'node')),
    ...childFiles.flatMap((file) => bind(join(root, file), join(inside, file))),
    ...bind(given.addon, at.addon),
    ...bind(given.web, at.web),
    ...['--dev', '/dev', '--proc', '/proc', '--remount-ro', '/dev', '--remount-ro', '/', '--chdir', '/'],
    ...(program === undefined ? [] : ['--seccomp', '3']),
    ...['--', join(inside, 'node'), ...nodeArgs(inside, at)],
  ]
  const names = ['bubblewrap', ...(program === undefined ? [] : ['seccomp']), 'node-permissions']
  return { file: bwrap, args, ...(program === undefined ? {} : { extra: program }), names, missing: [] }
}

/** Per process: no file is written, no core is dumped, few descriptors are open. */
const limits = ['--fsize=0', '--core=0', '--nofile=128', '--memlock=65536', '--msgqueue=0']

/** The same behind prlimit. */
const limited = (prlimit: string, walls: Walls): Walls => ({
  ...walls,
  file: prlimit,
  args: [...limits, '--', walls.file, ...walls.args],
  names: [...walls.names, 'rlimits'],
})

const noSeccomp = {
  wall: 'seccomp',
  fix: 'run on x86_64 or aarch64 with a kernel that has CONFIG_SECCOMP_FILTER, and a container that allows it',
}
const noLimits = { wall: 'rlimits', fix: 'install util-linux, which has prlimit' }
const installBubblewrap =
  'install bubblewrap (Debian: apt-get install bubblewrap) and let it create user namespaces (kernel.unprivileged_userns_clone=1, or run as root)'

/** In the order in which they should be tried. `web` is the path of the bundle of web APIs. */
export function wallCandidates(options: WallOptions, web: string): Walls[] {
  const given: Given = { addon: findAddon(), web }
  const candidates: Walls[] = []
  const find = (path: string | false | undefined, name: string) =>
    path === false
      ? undefined
      : path !== undefined
        ? path
        : ['/usr/bin', '/bin', '/usr/local/bin']
            .map((dir) => join(dir, name))
            .find((candidate) => existsSync(candidate))
  const bwrap = find(options.bwrap, 'bwrap')
  const program = options.seccomp === false ? undefined : seccompProgram()
  if (bwrap !== undefined) {
    if (program !== undefined) candidates.push(bubblewrap(bwrap, given, program))
    candidates.push({ ...bubblewrap(bwrap, given, undefined), missing: [noSeccomp] })
  }
  const bare = nodeArgs(root, given)
  const missing = [{ wall: 'bubblewrap', fix: installBubblewrap }, noSeccomp]
  const setpriv = find(options.setpriv, 'setpriv')
  // Without bubblewrap something else must take a child away when its runner is killed in the midst of a busy loop.
  if (setpriv !== undefined)
    candidates.push({
      file: setpriv,
      args: ['--pdeathsig', 'KILL', '--no-new-privs', '--', process.execPath, ...bare],
      names: ['node-permissions'],
      missing,
    })
  candidates.push({
    file: process.execPath,
    args: bare,
    names: ['node-permissions'],
    missing: [
      ...missing,
      {
        wall: 'dies-with-runner',
        fix: 'install util-linux, or start the runner under a supervisor that kills its process group',
      },
    ],
  })
  const prlimit = find(options.prlimit, 'prlimit')
  return candidates.flatMap((walls) => {
    const without = { ...walls, missing: [...walls.missing, noLimits] }
    return prlimit === undefined ? [without] : [limited(prlimit, walls), without]
  })
}
