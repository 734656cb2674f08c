/** The way from the runner’s process to QEMU: network, user. One process from the first to the last. */

import type { Identity } from '../users.ts'

export interface Launch {
  /** QEMU and its arguments. */
  command: string[]
  netns: string | undefined
  /** Undefined: that of the runner, who has no right to another. */
  identity: Identity | undefined
}

/** Runs as whoever the runner is: gives up core dumps, and is the first to be killed for memory. */
const script = `set -e
ulimit -c 0
echo 1000 >/proc/self/oom_score_adj
exec "$@"`

export const launcher = '/bin/sh'

/** Arguments of `launcher`. QEMU ends with the runner’s process, whatever ends that. */
export function launchArgs({ command, netns, identity }: Launch): string[] {
  return [
    ...['-c', script, 'sh'],
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
