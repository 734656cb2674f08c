/**
 * Which process something in the store belongs to. What a dead one has left may be taken away; what belongs to a live
 * one is not touched. All processes on one store see each other’s pids.
 */
import { startTime, thisBoot } from '../../../shared/process-identity.ts'

/**
 * `<pid>-<start>-<boot>`: a pid alone may have been given to another process by now (proc(5), field 22), and ticks
 * are counted from a boot.
 */
export type Owner = string

const boot = thisBoot().slice(0, 8)

export const thisOwner: Owner = `${process.pid}-${startTime(process.pid)}-${boot}`

/** Whatever stands behind a dot is a name the owner gave. */
export function isAlive(owner: string): boolean {
  const [, pid, start, when] = /^(\d+)-(\d+)-([0-9a-f]{8})(?:\.|$)/.exec(owner) ?? []
  return pid !== undefined && when === boot && startTime(Number(pid)) === start
}
