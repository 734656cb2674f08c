/**
 * The workload’s root: the root drive, and what a workload may have of the kernel. The image is a stranger’s: where
 * its links lead is looked up below the root only.
 */

import * as os from 'quickjs:os'
import * as linux from 'vulcan:linux'
import { bootOption, driveDevice } from './boot.ts'
import { lowerPath, resultPath, rootPath, scratchPath, upperPath, workPath } from './layout.ts'
import { bindAt, makeDirectory, within } from './places.ts'
import { AgentError, check, mount, mountFlags, namesIn, openFlags } from './system.ts'

const hidden = mountFlags.noSuid | mountFlags.noDevices
/** Before the first `configure`: of the scratch file system, MiB. */
const firstScratchMb = 16
const resultSlackBytes = 64 * 1024
const writable = ['/tmp', '/run', '/var/tmp', '/dev/shm']
/** Name, major, minor (Linux’s admin-guide/devices.txt). */
const devices = [
  ['null', 1, 3],
  ['zero', 1, 5],
  ['full', 1, 7],
  ['random', 1, 8],
  ['urandom', 1, 9],
] as const
const characterDevice = 0o020666
const links = { fd: '', stdin: '/0', stdout: '/1', stderr: '/2' }
/** Below /proc: what nobody needs to see. */
const masked = ['kcore', 'kmsg', 'keys', 'timer_list', 'kpagecount', 'kpageflags', 'kpagecgroup', 'iomem']
/** Processes of others are seen by a group: group 0 unless it is told, so a group that no process is in. */
const nobodysGroup = 2 ** 32 - 2
const kinds = { mask: 0o170000, directory: 0o040000, file: 0o100000 }

/**
 * The drive, read-only, below what the agent adds to it in memory; the workload sees both, read-only. What is mounted
 * below `rootPath` later is seen by a workload that runs already. Throws `AgentError`.
 */
export function mountRoot(): void {
  mountDrive()
  const data = `lowerdir=${lowerPath},upperdir=${upperPath},workdir=${workPath}`
  mount('overlay', rootPath, 'overlay', hidden, data)
  check(linux.mount(null, rootPath, null, mountFlags.shared, null), 'share the root')
  const procFlags = hidden | mountFlags.noExecute
  mountAt('/proc', (own) => mount('proc', own, 'proc', procFlags, `hidepid=2,gid=${nobodysGroup}`))
  mountDevices()
  mountScratch()
  within('/proc', (proc) => within('/dev/null', (nothing) => sealProc(proc, nothing)))
}

/** Of the scratch file system, MiB. */
let scratchMb = firstScratchMb

/** What /tmp, /run and the like may hold together, MiB. */
export function resizeScratch(mb: number): void {
  if (mb === scratchMb) return
  const data = `size=${Math.max(1, mb)}m`
  check(linux.mount(null, scratchPath, null, mountFlags.remount | hidden, data), 'resize /tmp')
  scratchMb = mb
}

/** Bytes that the result’s file system takes, and where its file is bound in the workload’s root. */
let resultBytes: number | undefined
let resultPlace: string | undefined

/**
 * A file for the result, empty and writable for everybody, with room of its own, whatever the workload fills. Of what
 * was made before nothing is made again.
 *
 * @param place in the workload’s root
 * @param bytes that it takes at least, and not many more
 * @returns its path, of the agent’s
 */
export function makeResult(place: string, bytes: number): string {
  const flags = hidden | mountFlags.noExecute
  const data = `mode=0755,size=${bytes + resultSlackBytes}`
  const file = `${resultPath}/result`
  if (resultBytes === undefined) {
    mount('tmpfs', resultPath, 'tmpfs', flags, data)
    const created = openFlags.writeOnly | openFlags.create | openFlags.closeOnExec
    os.close(check(os.open(file, created, 0o666), 'result'))
  } else if (bytes !== resultBytes)
    check(linux.mount(null, resultPath, null, mountFlags.remount | flags, data), 'resize the result')
  resultBytes = bytes
  if (place !== resultPlace) bindAt(file, place, 'file', false)
  resultPlace = place
  return file
}

function mountDrive(): void {
  const device = driveDevice('root')
  const option = bootOption('rootfstype')
  const types = option === undefined ? ['erofs', 'ext4'] : [option]
  const mounted = types.some((type) => {
    const data = type === 'ext4' ? 'noload' : null
    return linux.mount(device, lowerPath, type, hidden | mountFlags.readonly, data) === 0
  })
  if (!mounted) throw new AgentError(`${device} could not be mounted as ${types.join(' or ')}`)
}

/** `path` in the workload’s root, which is made where it is missing. */
function mountAt(path: string, use: (own: string) => void): void {
  makeDirectory(path)
  within(path, use)
}

function mountDevices(): void {
  const flags = mountFlags.noSuid | mountFlags.noExecute
  mountAt('/dev', (own) => mount('tmpfs', own, 'tmpfs', flags, 'mode=0755,size=64k'))
  within('/dev', (own) => {
    for (const [name, major, minor] of devices)
      check(linux.mknod(`${own}/${name}`, characterDevice, major, minor), name)
    for (const [name, fd] of Object.entries(links)) os.symlink(`/proc/self/fd${fd}`, `${own}/${name}`)
    os.mkdir(`${own}/shm`, 0o755)
    const seal = mountFlags.remount | mountFlags.bind | mountFlags.readonly | flags
    check(linux.mount(null, own, null, seal, null), 'seal /dev')
  })
}

/** One file system behind all writable places, so that they have one limit. */
function mountScratch(): void {
  mount('tmpfs', scratchPath, 'tmpfs', hidden, `mode=0755,size=${firstScratchMb}m`)
  for (const place of writable) {
    const source = `${scratchPath}/${place.slice(1).replace('/', '-')}`
    os.mkdir(source, 0o1777)
    bindAt(source, place, 'directory', false)
  }
}

/** What is no process’s can be written by a user 0 even without capabilities: it may only be read. */
function sealProc(proc: string, nothing: string): void {
  const readonly = mountFlags.remount | mountFlags.bind | mountFlags.readonly | hidden | mountFlags.noExecute
  for (const name of namesIn(proc).filter((found) => !/^\d+$/.test(found))) {
    const path = `${proc}/${name}`
    const mode = os.lstat(path)[0]?.mode ?? 0
    const kind = mode & kinds.mask
    if (kind === kinds.directory) {
      check(linux.mount(path, path, null, mountFlags.bind, null), `bind ${name}`)
      check(linux.mount(null, path, null, readonly, null), `seal ${name}`)
    } else if (kind === kinds.file && (masked.includes(name) || (mode & 0o222) !== 0)) {
      check(linux.mount(nothing, path, null, mountFlags.bind, null), `mask ${name}`)
    }
  }
}
