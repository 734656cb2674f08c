/** User ids for machines: each runs as a user that nothing else on this host runs as. */
import { readFileSync, statSync } from 'node:fs'

/** A user that nothing else runs as. */
export interface Identity {
  uid: number
  gid: number
  /** Of devices that it must open. */
  groups: number[]
}

/** Ids from here on belong to nobody (systemd’s UIDS-GIDS.md leaves them free). */
const first = 2 ** 31
/** Machines of one process at a time that have an id of their own. */
const perProcess = 512
/** The largest pid that Linux gives (`PID_MAX_LIMIT`). */
const maxPid = 2 ** 22
/** Of those that there is no id for: they share it. */
const nobody = 65_534

export class Users {
  readonly #used = new Set<number>()
  readonly #groups: number[]
  readonly #isWhole: boolean

  /** `groups`: of devices that machines have to open. */
  constructor(groups: number[]) {
    this.#groups = groups
    this.#isWhole = mapsAll()
  }

  /** Machines run as others than this process. */
  get areOthers(): boolean {
    return process.getuid?.() === 0
  }

  /** Undefined where this process may not become another user. */
  take(): Identity | undefined {
    if (!this.areOthers) return undefined
    if (this.#isWhole)
      for (let slot = 0; slot < perProcess; slot++) {
        const id = first + (process.pid % maxPid) * perProcess + slot
        if (this.#used.has(id) || id > 2 ** 32 - 2) continue
        this.#used.add(id)
        return { uid: id, gid: id, groups: this.#groups }
      }
    return { uid: nobody, gid: nobody, groups: this.#groups }
  }

  giveBack(identity: Identity | undefined): void {
    if (identity !== undefined) this.#used.delete(identity.uid)
  }
}

/** Whether it can be that of a machine. */
export const isMachineUser = (uid: number) => uid >= first || uid === nobody

/** In a user namespace only some ids exist. */
function mapsAll(): boolean {
  try {
    const [inside, , length] = readFileSync('/proc/self/uid_map', 'latin1').trim().split(/\s+/).map(Number)
    return inside === 0 && length! >= 2 ** 32 - 1
  } catch {
    return false
  }
}

/** Whether a device can be opened by a user who is not root. */
export function isOpenToOthers(device: string): boolean {
  try {
    return groupsOf(device).length > 0 || (statSync(device).mode & 0o006) === 0o006
  } catch {
    return false
  }
}

/** The group whose members may open a device; none where there is no such group, or it is root’s. */
export function groupsOf(device: string): number[] {
  try {
    const { mode, gid } = statSync(device)
    return gid !== 0 && (mode & 0o060) === 0o060 ? [gid] : []
  } catch {
    return []
  }
}
