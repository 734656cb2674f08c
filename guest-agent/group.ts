/** The control groups (cgroup v2): the workload’s, with its limits, and the agent’s, which goes before it. */

import * as os from 'quickjs:os'
import * as linux from 'vulcan:linux'
import type { MachineUsage } from '../shared/machine.ts'
import { groupPath } from './layout.ts'
import { openFlags, readText, trySet, writeText } from './system.ts'

const mebibyte = 2 ** 20
const job = `${groupPath}/job`
const agent = `${groupPath}/agent`
const sigkill = 9
const maxProcessesBytes = 256 * 1024

export interface GroupLimits {
  memory_mb: number
  pids: number
}

/** Of this process: it gets its share of the processor whatever the workload does. */
export function enterAgentGroup(): void {
  writeText(`${groupPath}/cgroup.subtree_control`, '+memory +pids')
  os.mkdir(agent, 0o755)
  os.mkdir(job, 0o755)
  writeText(`${agent}/cgroup.procs`, '0')
  trySet(`${groupPath}/cgroup.subtree_control`, '+cpu')
  trySet(`${agent}/cpu.weight`, '1000')
  trySet(`${job}/cpu.weight`, '100')
}

/** The directory of the workload’s group. */
export const jobGroup = job

let maxBytes = 0

export function limitJob({ memory_mb, pids }: GroupLimits): void {
  maxBytes = memory_mb * mebibyte
  writeText(`${job}/memory.max`, String(maxBytes))
  writeText(`${job}/memory.oom.group`, '1')
  writeText(`${job}/pids.max`, String(pids))
}

/** To every process of the workload. One that forks meanwhile can be missed, unless the signal is SIGKILL. */
export function signalJob(signal: number): void {
  if (signal === sigkill) {
    killJob()
    return
  }
  const pids = readText(`${job}/cgroup.procs`, maxProcessesBytes).split('\n').map(Number)
  for (const pid of pids) if (pid > 1) os.kill(pid, signal)
}

export const killJob = (): void => writeText(`${job}/cgroup.kill`, '1')

/** The largest memory use that was seen, where the kernel keeps none itself; bytes. */
let seenPeak = 0

export function jobUsage(): MachineUsage {
  const found = read('memory.peak') || read('memory.current')
  seenPeak = Math.max(seenPeak, Number(found) || 0)
  return {
    cpu_ms: Math.round(field('cpu.stat', 'usage_usec') / 1000),
    memory_peak_mb: Math.round((seenPeak / mebibyte) * 10) / 10,
    oom_kills: field('memory.events', 'oom_kill'),
  }
}

/** Pages that the workload has read again after the kernel had taken them, where nearly all it may have is spent. */
let rereadBefore: number | undefined
/** Of the limit: below it the kernel has not had to take anything. */
const fullShare = 0.9
/** Of the limit: what the kernel could still take, at which memory counts as spent. */
const spentShare = 0.1
/** Pages read again between two looks that are more than a workload needs which still gets anywhere. */
const rereadPages = 200

/**
 * Whether the workload only gets on by having the pages of its own programs taken and reading them again, as it is
 * without memory of its own left: the kernel finds something to take for ever, and calls nothing out of memory.
 */
export function isThrashing(): boolean {
  // Machines that stand idle are asked again and again, and the rest is long.
  if (Number(read('memory.current')) < maxBytes * fullShare) {
    rereadBefore = undefined
    return false
  }
  const stat = lines('memory.stat')
  const takeable = (stat.get('inactive_file') ?? 0) + (stat.get('active_file') ?? 0)
  const reread = stat.get('workingset_refault_file') ?? stat.get('workingset_refault') ?? 0
  const since = reread - (rereadBefore ?? reread)
  rereadBefore = reread
  return takeable < maxBytes * spentShare && since > rereadPages
}

/** A line `name number` of one of the group’s files; 0 where there is none. */
function field(file: string, name: string): number {
  const line = read(file)
    .split('\n')
    .find((one) => one.startsWith(`${name} `))
  return Number(line?.slice(name.length)) || 0
}

function lines(file: string): Map<string, number> {
  const pairs = read(file).split('\n')
  return new Map(
    pairs.map((line) => {
      const [name = '', number] = line.split(' ')
      return [name, Number(number) || 0]
    }),
  )
}

/** The group’s files that were read, by name: to look one up costs an emulated machine more than to read it. */
const opened = new Map<string, number>()
const text = new ArrayBuffer(8192)

/** One of the group’s files; '' where there is none. */
function read(file: string): string {
  let fd = opened.get(file)
  if (fd === undefined) {
    fd = os.open(`${job}/${file}`, openFlags.readonly | openFlags.closeOnExec)
    opened.set(file, fd)
  }
  const length = fd < 0 ? 0 : linux.readFirst(fd, text)
  return length <= 0 ? '' : linux.text(text, 0, length).trim()
}

/** Whether the kernel keeps the peak, so that nobody has to look. */
export const keepsPeak = (): boolean => read('memory.peak') !== ''
