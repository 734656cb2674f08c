/** The command line of a box, from the runner’s process to runsc. */
import type { Network } from '../engine.ts'
import { gateDescriptor } from './config.ts'

export type Platform = 'systrap' | 'ptrace'

export interface Launch {
  runsc: string
  platform: Platform
  /** Unique among those that share a directory. */
  id: string
  /** Of the box alone: its bundle, and what runsc keeps of it. */
  dir: string
  network: Network | undefined
  /** The image’s root, where it lacks directories that the box needs; they are laid over it. */
  lower: string | undefined
  /** Sockets may be made in mounted directories that can be written. */
  sockets: boolean
}

/** Where the root is when something is laid over the image’s. */
export const overlaidRoot = (dir: string) => `${dir}/over/root`

/**
 * Runs in a mount namespace of its own, which ends with the last process in it.
 *
 * Its memory is what runsc takes the memory of the machine to be, and tells the user’s processes. Where there is a
 * network, /proc/sys/net/core is hidden: runsc of 2024 fails on what newer kernels have there. At a line through the
 * gate this process is in the control groups of the box, and so is all that comes after: what is killed there is
 * everything.
 */
const script = `set -e
dir=$1 network=$2 lower=$3
shift 3
echo 1000 >/proc/self/oom_score_adj
mount -n --bind "$dir/meminfo" /proc/meminfo
[ -z "$network" ] || mount -n -t tmpfs -o size=4k none /proc/sys/net/core
if [ -n "$lower" ]; then
  mkdir "$dir/over"
  mount -n -t tmpfs none "$dir/over"
  cd "$dir/over"
  mkdir lower upper work root
  mount -n --bind "$lower" lower
  mount -n -t overlay -o lowerdir=lower,upperdir=upper,workdir=work none root
fi
cd "$dir"
echo $$ >pid
read -r _ <&${gateDescriptor}
exec "$@"`

/** Ends with the runner’s process, whatever ends that. */
export const launcher = 'setpriv'

/** Arguments of `launcher`. */
export function launchArgs({ runsc, platform, id, dir, network, lower, sockets }: Launch): string[] {
  return [
    ...['--pdeathsig', 'KILL', '--'],
    ...(network === undefined ? [] : ['nsenter', `--net=${network.path}`, '--']),
    ...['unshare', '--mount', '--propagation', 'slave', '--'],
    ...['/bin/sh', '-c', script, 'sh', dir, network === undefined ? '' : 'yes', lower ?? ''],
    runsc,
    // The directory of the box, by a path that is short enough for a socket in it (unix(7)), wherever that is.
    ...['--root', '/proc/self/cwd'],
    ...['--debug-log', logFile(dir), '--debug-command', 'run', '--panic-log', panicFile(dir)],
    ...['--platform', platform, '--network', network === undefined ? 'none' : 'sandbox'],
    // The box is in its control groups already; runsc would join those of each controller anew, which takes 20 ms.
    '--ignore-cgroups',
    // The root is read-only: nothing is laid over it, and no file is left behind.
    '--overlay2=none',
    // The sentry runs as nobody, and asks another process for files.
    '--directfs=false',
    ...(sockets ? ['--host-uds=create'] : []),
    ...['run', '--bundle', dir, id],
  ]
}

export const logFile = (dir: string) => `${dir}/log`
export const panicFile = (dir: string) => `${dir}/panic`
