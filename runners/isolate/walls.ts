/**
 * The command lines by which a sandbox child is started, from the strongest walls to the weakest. Which of them a
 * host can do is found by running a workload behind it, never by the presence of a file.
 */
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

export interface Walls {
  file: string
  args: string[]
  /** Walls in force. */
  names: string[]
  /** Walls that are wanted and not in force. */
  missing: { wall: string; fix: string }[]
}

export interface WallOptions {
  /** Path of bubblewrap; `false` does without. */
  bwrap?: string | false
  /** Path of setpriv, used where bubblewrap is not; `false` does without. */
  setpriv?: string | false
}

/** Among the arguments of every child of this checkout: see `orphans.ts`. */
export const childMarker = fileURLToPath(new URL('.', import.meta.url)).replace(/\/$/, '')

const root = fileURLToPath(new URL('../..', import.meta.url))
/** What a child reads, relative to the root. `package.json` says that our files are ES modules. */
const childFiles = ['package.json', 'shared/frames.ts', 'runners/isolate']
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

function nodeArgs(at: string, addon: string): string[] {
  const readable = [...childFiles.map((file) => join(at, file)), addon]
  return [
    // isolated-vm needs it.
    '--no-node-snapshot',
    // Without it V8 would go on with the user’s code on a thread of its own.
    '--no-wasm-async-compilation',
    // Room for callbacks from the depth of an isolate’s stack: see `child.ts`.
    '--stack-size=3900',
    '--disable-warning=ExperimentalWarning',
    '--disable-warning=SecurityWarning',
    '--permission',
    '--allow-addons',
    ...readable.map((path) => `--allow-fs-read=${path}`),
    join(at, 'runners/isolate/child.ts'),
    addon,
  ]
}

/** The shared libraries that this Node has loaded: what the same Node in a child needs, and no more. */
function sharedLibraries(): string[] {
  // A look at every network interface would make the report slow. The types do not know the property yet.
  Object.assign(process.report, { excludeNetwork: true })
  const report = process.report.getReport() as { sharedObjects?: string[] }
  return (report.sharedObjects ?? []).filter(
    (path) => path.startsWith('/') && !path.endsWith('.node') && existsSync(path),
  )
}

function bubblewrap(bwrap: string, addon: string): Walls {
  const bind = (path: string, at = path) => ['--ro-bind', path, at]
  const addonInside = join(inside, 'isolated-vm.node')
  const args = [
    ...['--unshare-all', '--die-with-parent', '--new-session', '--clearenv', '--cap-drop', 'ALL'],
    ...['--uid', nobody, '--gid', nobody, '--hostname', 'isolate'],
    ...sharedLibraries().flatMap((path) => bind(path)),
    ...bind(process.execPath, join(inside, 'node')),
    ...childFiles.flatMap((file) => bind(join(root, file), join(inside, file))),
    ...bind(addon, addonInside),
    ...['--dev', '/dev', '--proc', '/proc', '--remount-ro', '/dev', '--remount-ro', '/', '--chdir', '/'],
    ...['--', join(inside, 'node'), ...nodeArgs(inside, addonInside)],
  ]
  return { file: bwrap, args, names: ['bubblewrap', 'node-permissions'], missing: [] }
}

const installBubblewrap =
  'install bubblewrap (Debian: apt-get install bubblewrap) and let it create user namespaces (kernel.unprivileged_userns_clone=1, or run as root)'

/** In the order in which they should be tried. */
export function wallCandidates(options: WallOptions): Walls[] {
  const addon = findAddon()
  const candidates: Walls[] = []
  const find = (given: string | false | undefined, name: string) =>
    given === false
      ? undefined
      : given !== undefined
        ? given
        : ['/usr/bin', '/bin', '/usr/local/bin']
            .map((dir) => join(dir, name))
            .find((path) => existsSync(path))
  const bwrap = find(options.bwrap, 'bwrap')
  if (bwrap !== undefined) candidates.push(bubblewrap(bwrap, addon))
  const bare = nodeArgs(root, addon)
  const missing = [{ wall: 'bubblewrap', fix: installBubblewrap }]
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
  return candidates
}
