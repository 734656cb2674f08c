/** The agent’s own surroundings: file systems of the kernel’s, drivers, settings. It stays in the initramfs. */

import * as os from 'quickjs:os'
import * as linux from 'vulcan:linux'
import {
  groupPath,
  jobPath,
  lowerPath,
  ownPath,
  resultPath,
  rootPath,
  scratchPath,
  upperPath,
  workPath,
} from './layout.ts'
import { log, mount, mountFlags, namesIn, readText, trySet } from './system.ts'

const flags = mountFlags.noSuid | mountFlags.noDevices | mountFlags.noExecute
/** Below /proc/sys. */
const settings = {
  'kernel/sysrq': '0',
  'kernel/kptr_restrict': '2',
  'kernel/dmesg_restrict': '1',
  'kernel/unprivileged_bpf_disabled': '1',
  'user/max_user_namespaces': '0',
  'vm/panic_on_oom': '0',
}

/** Throws `AgentError` where the kernel lacks something that nothing works without. */
export function boot(): void {
  for (const path of ['/proc', '/sys', ownPath, rootPath]) os.mkdir(path, 0o755)
  mount('proc', '/proc', 'proc', flags)
  mount('sysfs', '/sys', 'sysfs', flags)
  mount('tmpfs', ownPath, 'tmpfs', flags & ~mountFlags.noExecute, 'mode=0700')
  for (const path of [groupPath, jobPath, lowerPath, resultPath, scratchPath, upperPath, workPath])
    os.mkdir(path, 0o755)
  mount('cgroup2', groupPath, 'cgroup2', flags)
  loadModules()
  for (const [key, value] of Object.entries(settings)) trySet(`/proc/sys/${key}`, value)
  trySet('/proc/self/oom_score_adj', '-1000')
  linux.interfaceUp('lo', null, null, null)
  linux.setHostname('vulcan')
}

/** Those of a kernel that does not have all in itself. */
function loadModules(): void {
  const names = readText('/modules/order').split('\n')
  for (const name of names.filter((found) => found !== '')) {
    const result = linux.loadModule(`/modules/${name}`)
    if (result < 0) log(`module ${name}: ${linux.errorText(-result)}`)
  }
}

/** The value of `name=value` on the kernel’s command line. */
export function bootOption(name: string): string | undefined {
  const words = readText('/proc/cmdline').split(/\s+/)
  return words.find((word) => word.startsWith(`${name}=`))?.slice(name.length + 1)
}

/** The device of the drive with this serial number; else the one that has that place. */
export function driveDevice(serial: 'root' | 'job'): string {
  const named = namesIn('/sys/block').find((name) => readText(`/sys/block/${name}/serial`) === serial)
  return `/dev/${named ?? (serial === 'root' ? 'vda' : 'vdb')}`
}
