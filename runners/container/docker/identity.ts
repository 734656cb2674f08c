/** Whose a container is, written on it as labels: what the janitor goes by. */
import { startTime, thisBoot, thisPidNamespace } from '../../../shared/process-identity.ts'

export const ownerLabel = 'vulcan.owner'
export const processLabel = 'vulcan.process'
export const hostLabel = 'vulcan.host'
/** Begins the name of every container of ours. */
export const namePrefix = 'vulcan-'

/** Labels are text: of `pid:[4026531836]` the number. */
const namespace = () => thisPidNamespace().replace(/\D/g, '')

/** `<pid>.<start time>` of this process. */
export const ownProcess = (): string => `${process.pid}.${startTime(process.pid) ?? ''}`

export const ownLabels = (owner: string): Record<string, string> => ({
  [ownerLabel]: owner,
  [processLabel]: ownProcess(),
  [hostLabel]: `${thisBoot()}.${namespace()}`,
})

/** Whether a process `<pid>.<start time>` of this namespace has ended. */
export function isDead(identity: string): boolean {
  const [, pid, start] = /^(\d+)\.(\d+)$/.exec(identity) ?? []
  return pid !== undefined && startTime(Number(pid)) !== start
}

/** Whether a container has these labels because a vulcan process that has ended made it. When in doubt: no. */
export function isAbandoned(labels: Record<string, string>): boolean {
  const [, bootId, pids] = /^(.+)\.(\d+)$/.exec(labels[hostLabel] ?? '') ?? []
  const identity = labels[processLabel]
  if (bootId === undefined || identity === undefined || labels[ownerLabel] === undefined) return false
  if (bootId !== thisBoot()) return true
  return pids === namespace() && isDead(identity)
}
