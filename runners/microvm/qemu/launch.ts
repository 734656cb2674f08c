/** The way from the runner’s process to QEMU: network, user. One process from the first to the last. */

import { findProgram } from '../../container/images/processes.ts'
import type { Identity } from '../users.ts'

export interface Launch {
  /** QEMU and its arguments. */
  command: string[]
  netns: string | undefined
  /** Undefined: that of the runner, who has no right to another. */
  identity: Identity | undefined
  /** Words that go before all others: of `inSmallPages`, or none. */
  prefix: readonly string[]
}

/** Runs as whoever the runner is: gives up core dumps, and is the first to be killed for memory. */
const script = `set -e
ulimit -c 0
echo 1000 >/proc/self/oom_score_adj
exec "$@"`

const prSetThpDisable = 41
/** Numbers of the system call. */
const prctl: Partial<Record<NodeJS.Architecture, number>> = { x64: 157, arm64: 167 }

/**
 * Words before a command that keep it from huge pages; none where that cannot be had. QEMU asks for them for the code
 * that it translates and for tables of which it uses a few KiB: without, a machine takes some 4 MB less, and some per
 * cent longer to start. It is prctl(2) that says so of a process, and no tool but an interpreter calls it: perl, which
 * is among Debian’s essential packages. Where the kernel refuses, the command runs all the same.
 */
export function inSmallPages(): string[] {
  const perl = findProgram('perl')
  const number = prctl[process.arch]
  if (perl === undefined || number === undefined) return []
  return [
    perl,
    '-e',
    `syscall(${number}, ${prSetThpDisable}, 1, 0, 0, 0); exec { $ARGV[0] } @ARGV or die`,
    '--',
  ]
}

export const launcher = '/bin/sh'

/** Arguments of `launcher`. QEMU ends with the runner’s process, whatever ends that. */
export function launchArgs({ command, netns, identity, prefix }: Launch): string[] {
  return [
    ...['-c', script, 'sh'],
    ...prefix,
    ...(netns === undefined ? [] : ['nsenter', `--net=${netns}`, '--']),
    ...['setpriv', '--pdeathsig', 'KILL', '--no-new-privs'],
    ...(identity === undefined ? [] : become(identity)),
    '--',
    ...command,
  ]
}

const become = ({ uid, gid, groups }: Identity) => [
  ...['--reuid', `${uid}`, '--regid', `${gid}`],
  ...(groups.length === 0 ? ['--clear-groups'] : ['--groups', groups.join(',')]),
  ...['--inh-caps=-all', '--bounding-set=-all'],
]
