/** The start of a QEMU process: its groups, its user, its descriptors. */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { chownSync, closeSync, fchownSync, ftruncateSync, openSync, statSync } from 'node:fs'
import { copyFile, mkdir } from 'node:fs/promises'
import type { Socket } from 'node:net'
import { join } from 'node:path'
import type { Readable } from 'node:stream'
import type { Cgroup } from '../../container/gvisor/cgroups.ts'
import { programsEnv } from '../../container/gvisor/programs.ts'
import type { Namespace } from '../../container/network/namespace.ts'
import type { MachineOptions, MachineShape } from '../driver.ts'
import { nameOf } from '../owners.ts'
import type { Identity, Users } from '../users.ts'
import {
  type Accelerator,
  descriptors,
  overheadMb,
  type QemuVersion,
  qemuArguments,
  type TemplateMemory,
  takesReadOnlyMemory,
  threadsOf,
} from './arguments.ts'
import { launchArgs, launcher } from './launch.ts'
import { memoryFile, stateFile } from './template.ts'

/** What machines of one process share. */
export interface Host {
  /** Path of qemu-system-x86_64. */
  qemu: string
  version: QemuVersion
  accelerator: Accelerator
  /** What templates made here go with. */
  model: string
  owner: string
  /** Groups of machines are made in it; undefined: none can be made. */
  cgroup: Cgroup | undefined
  users: Users
  /** A network namespace with nothing in it; undefined: none can be made. */
  nowhere: Namespace | undefined
  /** What the host’s time stamp counter runs at, where it is known. */
  tscKhz: number | undefined
  /** Words of launch.ts; none where there is no use in them. */
  inSmallPages: readonly string[]
}

export type Beginning = { kind: 'boot' } | { kind: 'restore'; memory: TemplateMemory; template: string }

/** A process of QEMU, or what there was of it. */
export interface Started {
  child: ChildProcess
  cgroup: Cgroup | undefined
  /** It is in its control group. Rejects where that cannot be. */
  admitted: Promise<void>
  identity: Identity | undefined
  ours: { complaint: Readable; qmp: Socket; agent: Socket; console: Socket }
}

export const mebibyte = 2 ** 20

/** Of a machine that boots: where the stream of its snapshot is taken. */
export const streamDir = (dir: string) => join(dir, 'snapshot')

/** Throws where it cannot be started; nothing is left then. */
export async function startQemu(
  host: Host,
  id: string,
  shape: MachineShape,
  options: MachineOptions,
  beginning: Beginning,
): Promise<Started> {
  const identity = host.users.take()
  const cgroup = host.cgroup?.child(id)
  const opened: number[] = []
  const open = (path: string, flags: 'r' | 'r+' | 'wx+' = 'r') => {
    const fd = openSync(path, flags, 0o600)
    opened.push(fd)
    return fd
  }
  try {
    const files =
      beginning.kind === 'boot'
        ? await bootFiles(open, shape, options, identity)
        : restoreFiles(open, host.version, beginning)
    // Only as root can a namespace be entered; the network leads nowhere elsewhere.
    const netns = shape.network && process.getuid?.() === 0 ? options.netns : undefined
    const command = [
      host.qemu,
      ...qemuArguments({
        ...{ name: nameOf(host.owner, id), shape, version: host.version, accelerator: host.accelerator },
        start: beginning.kind === 'boot' ? { kind: 'boot', tscKhz: host.tscKhz } : beginning,
        isNetworkOpen: netns !== undefined,
        diskBytesPerSecond: options.diskBytesPerSecond,
      }),
    ]
    const stdio: (number | 'ignore' | 'pipe')[] = ['ignore', 'ignore', 'pipe', 'pipe', 'pipe', 'pipe']
    stdio[descriptors.root] = open(shape.root)
    stdio[descriptors.job] = open(options.jobDrive)
    for (const [fd, file] of files) stdio[fd] = file
    const prefix = options.ahead === true ? host.inSmallPages : []
    const launch = { command, netns: netns ?? host.nowhere?.path, identity, prefix }
    const child = spawn(launcher, launchArgs(launch), {
      // Its own session: a terminal’s Ctrl-C is for the runner.
      ...{ detached: true, cwd: '/', env: programsEnv },
      stdio: Array.from(stdio, (entry) => entry ?? 'ignore'),
    })
    if (child.pid === undefined) {
      const [error] = await once(child, 'error')
      for (const stream of child.stdio ?? []) stream?.destroy()
      throw error
    }
    const [, , complaint, qmp, agent, console] = child.stdio as unknown as [
      ...[null, null],
      Readable,
      Socket,
      Socket,
      Socket,
    ]
    const admitted = admit(cgroup, child.pid, shape, options.cpu)
    admitted.catch(() => {})
    return { child, cgroup, admitted, identity, ours: { complaint, qmp, agent, console } }
  } catch (error) {
    host.users.giveBack(identity)
    throw error
  } finally {
    for (const fd of opened) closeSync(fd)
  }
}

/** While QEMU loads its libraries: the kernel takes some ms for it, which it spends waiting. */
async function admit(
  cgroup: Cgroup | undefined,
  pid: number,
  shape: MachineShape,
  cpu: number | undefined,
): Promise<void> {
  if (cgroup === undefined) return
  await cgroup.make()
  const memoryBytes = (shape.memoryMb + overheadMb) * mebibyte
  await cgroup.limit({ memoryBytes, cpu, tasks: threadsOf(shape) })
  await cgroup.join(pid).catch((error) => {
    // One that has ended says why itself.
    if (error.code !== 'ESRCH') throw error
  })
}

type Open = (path: string, flags?: 'r' | 'r+' | 'wx+') => number
type Files = [descriptor: number, file: number][]

/** Memory of its own, and what is read by path: `/proc/self/fd`, which asks for the right to the file once more. */
async function bootFiles(
  open: Open,
  shape: MachineShape,
  { dir }: MachineOptions,
  identity: Identity | undefined,
): Promise<Files> {
  await mkdir(streamDir(dir), { mode: 0o700 })
  const memory = open(memoryFile(dir), 'wx+')
  ftruncateSync(memory, shape.memoryMb * mebibyte)
  if (identity !== undefined) {
    fchownSync(memory, identity.uid, identity.gid)
    chownSync(streamDir(dir), identity.uid, identity.gid)
  }
  return [
    [descriptors.memory, memory],
    [descriptors.dir, open(streamDir(dir))],
    [descriptors.kernel, open(await readable(shape.kernel, join(dir, 'kernel'), identity))],
    [descriptors.initramfs, open(await readable(shape.initramfs, join(dir, 'initramfs'), identity))],
  ]
}

function restoreFiles(open: Open, version: QemuVersion, beginning: Beginning & { kind: 'restore' }): Files {
  const { template, memory } = beginning
  const state: Files = [[descriptors.state, open(stateFile(template))]]
  if (memory === 'stream') return state
  return [
    ...state,
    [descriptors.memory, open(memoryFile(template), takesReadOnlyMemory(version) ? 'r' : 'r+')],
  ]
}

/** The file, or a copy that this user can read. */
async function readable(file: string, copy: string, identity: Identity | undefined): Promise<string> {
  if (identity === undefined || (statSync(file).mode & 0o004) !== 0) return file
  await copyFile(file, copy)
  chownSync(copy, identity.uid, identity.gid)
  return copy
}
