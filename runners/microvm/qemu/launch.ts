/** The way from the runner’s process to QEMU: network, user. One process from the first to the last. */

import { findProgram } from '../../container/images/processes.ts'
import type { Identity } from '../users.ts'

export interface Launch {
  /** QEMU and its arguments. */
  command: string[]
  netns: string | undefined
  /** Undefined: that of the runner, who has no right to another. */
  identity: Identity | undefined
  /** In small pages, where that can be had: starting takes some per cent longer then. */
  isSmall: boolean
}

/** Runs as whoever the runner is: gives up core dumps, and is the first to be killed for memory. */
const script = `set -e
ulimit -c 0
echo 1000 >/proc/self/oom_score_adj
exec "$@"`

/**
 * QEMU asks for huge pages for the code that it translates and for tables of which it uses a few KiB; in small ones a
 * machine takes some 4 MB less. A process can be kept from them (prctl(2), PR_SET_THP_DISABLE), by no tool but an
 * interpreter; Debian’s essential packages have one. Where the kernel refuses, it goes on.
 */
const pr_set_thp_disable = 41
const prctl: Partial<Record<NodeJS.Architecture, number>> = { x64: 157, arm64: 167 }
const perl = findProgram('perl')

export const launcher = '/bin/sh'

/** Arguments of `launcher`. QEMU ends with the runner’s process, whatever ends that. */
export function launchArgs({ command, netns, identity, isSmall }: Launch): string[] {
  return [
    ...['-c', script, 'sh'],
    ...(isSmall ? inSmallPages() : []),
    ...(netns === undefined ? [] : ['nsenter', `--net=${netns}`, '--']),
    ...['setpriv', '--pdeathsig', 'KILL', '--no-new-privs'],
    ...(identity === undefined ? [] : become(identity)),
    '--',
    ...command,
  ]
}

function inSmallPages(): string[] {
  const number = prctl[process.arch]
  if (perl === undefined || number === undefined) return []
  return [
    perl,
    '-e',
    `syscall(${number}, ${pr_set_thp_disable}, 1, 0, 0, 0); exec { $ARGV[0] } @ARGV or die`,
    '--',
  ]
}

const become = ({ uid, gid, groups }: Identity) => [
  ...['--reuid', `${uid}`, '--regid', `${gid}`],
  ...(groups.length === 0 ? ['--clear-groups'] : ['--groups', groups.join(',')]),
  ...['--inh-caps=-all', '--bounding-set=-all'],
]
