/** What the job drive holds, bound where the workload looks for it. */

import * as os from 'quickjs:os'
import * as linux from 'vulcan:linux'
import type { MountSpec } from '../shared/machine.ts'
import { driveDevice } from './boot.ts'
import { jobPath } from './layout.ts'
import { bindAt } from './places.ts'
import { check, mountFlags, openFlags } from './system.ts'

const flags = mountFlags.readonly | mountFlags.noSuid | mountFlags.noDevices
const kindMask = 0o170000
const directoryKind = 0o040000

const done = new Set<string>()
let mounted = false

/** Those that were mounted before stay as they are. Throws `AgentError`. */
export function mountFromJobDrive(specs: readonly MountSpec[]): void {
  for (const { path, target } of specs) {
    const key = `${path}\0${target}`
    if (done.has(key)) continue
    mountDrive()
    const fd = check(linux.openIn(jobPath, path, openFlags.path), `job drive: ${path}`)
    try {
      const source = `/proc/self/fd/${fd}`
      const [found] = os.stat(source)
      const isDirectory = ((found?.mode ?? 0) & kindMask) === directoryKind
      bindAt(source, target, isDirectory ? 'directory' : 'file', true)
    } finally {
      os.close(fd)
    }
    done.add(key)
  }
}

/** Not before there is something on it: the host writes it while the machine stands still. */
function mountDrive(): void {
  if (mounted) return
  const device = driveDevice('job')
  check(linux.dropCache(device), device)
  check(linux.mount(device, jobPath, 'erofs', flags, null), `mount ${device}`)
  mounted = true
}
