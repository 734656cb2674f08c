/** The command line of a box, from the runner’s process to runsc. */
import { join } from 'node:path'
import type { Network } from '../engine.ts'
import { gateDescriptor } from './config.ts'

export type Platform = 'systrap' | 'ptrace'

/** What a launcher is told. */
export interface Launch {
  network: Network | undefined
  /** The image’s root, where it lacks directories that the box needs; they are laid over it. */
  lower: string | undefined
  /** Sockets may be made in mounted directories that can be written. */
  sockets: boolean
}

/** What does not depend on the box. */
export interface Launched {
  runsc: string
  platform: Platform
  /** Unique among those that share a directory. */
  id: string
  /** Of the box alone: its bundle, and what runsc keeps of it. */
  dir: string
}

/** Where the root is when something is laid over the image’s. */
export const overlaidRoot = (dir: string) => `${dir}/over/root`
/** What the box is told of its memory: it is there, empty, when the launcher begins. */
export const memoryFile = (dir: string) => join(dir, 'meminfo')

/**
 * Runs in a mount namespace of its own, which ends with the last process in it.
 *
 * Its memory is what runsc takes the memory of the machine to be, and tells the user’s processes. Where there is a
 * network, /proc/sys/net/core is hidden: runsc of 2024 fails on what newer kernels have there. Three lines through
 * the gate say what to run; by then this process is in the control groups of the box, and so is all that comes
 * after: what is killed there is everything.
 */
const script = `set -e
dir=$1 id=$2
shift 2
echo 1000 >/proc/self/oom_score_adj
mount -n --bind "$dir/meminfo" /proc/meminfo
cd "$dir"
echo $$ >pid
IFS= read -r network <&${gateDescriptor}
IFS= read -r lower <&${gateDescriptor}
IFS= read -r sockets <&${gateDescriptor}
if [ -n "$lower" ]; then
  mkdir over
  mount -n -t tmpfs none over
  cd over
  mkdir lower upper work root
  mount -n --bind "$lower" lower
  mount -n -t overlay -o lowerdir=lower,upperdir=upper,workdir=work none root
  cd "$dir"
fi
[ -z "$sockets" ] || set -- "$@" --host-uds=create
if [ -z "$network" ]; then
  exec "$@" --network none run --bundle "$dir" "$id"
fi
nsenter --net="$network" -- mount -n -t tmpfs -o size=4k none /proc/sys/net/core
exec nsenter --net="$network" -- "$@" --network sandbox run --bundle "$dir" "$id"`

/** Ends with the runner’s process, whatever ends that. */
export const program = 'setpriv'

/** Arguments of `program`. */
export function programArgs({ runsc, platform, id, dir }: Launched): string[] {
  return [
    ...['--pdeathsig', 'KILL', '--'],
    ...['unshare', '--mount', '--propagation', 'slave', '--'],
    ...['/bin/sh', '-c', script, 'sh', dir, id],
    runsc,
    // The directory of the box, by a path that is short enough for a socket in it (unix(7)), wherever that is.
    ...['--root', '/proc/self/cwd'],
    ...['--debug-log', logFile(dir), '--debug-command', 'run', '--panic-log', panicFile(dir)],
    ...['--platform', platform],
    // The box is in its control groups already; runsc would join those of each controller anew, which takes 20 ms.
    '--ignore-cgroups',
    // The root is read-only: nothing is laid over it, and no file is left behind.
    '--overlay2=none',
    // The sentry runs as nobody, and asks another process for files.
    '--directfs=false',
  ]
}

/** What is written to the gate. Throws for paths that no line can hold. */
export function launchLines({ network, lower, sockets }: Launch): string {
  const lines = [network?.path ?? '', lower ?? '', sockets ? 'yes' : '']
  const broken = lines.find((line) => line.includes('\n'))
  if (broken !== undefined) throw new Error(`a path with a line break: ${JSON.stringify(broken)}`)
  return lines.map((line) => `${line}\n`).join('')
}

export const logFile = (dir: string) => `${dir}/log`
export const panicFile = (dir: string) => `${dir}/panic`
