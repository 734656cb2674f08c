/** The control groups (cgroup v2): the workload’s, with its limits, and the agent’s, which goes before it. */

import * as os from 'quickjs:os'
import type { MachineUsage } from '../shared/machine.ts'
import { groupPath } from './layout.ts'
import { readText, trySet, writeText } from './system.ts'

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

export function limitJob({ memory_mb, pids }: GroupLimits): void {
  writeText(`${job}/memory.max`, String(memory_mb * mebibyte))
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
  const current = Number(readText(`${job}/memory.current`)) || 0
  seenPeak = Math.max(seenPeak, current, Number(readText(`${job}/memory.peak`)) || 0)
  return {
    cpu_ms: Math.round(field('cpu.stat', 'usage_usec') / 1000),
    memory_peak_mb: Math.round((seenPeak / mebibyte) * 10) / 10,
    oom_kills: field('memory.events', 'oom_kill'),
  }
}

/** A line `name number` of one of the group’s files; 0 where there is none. */
function field(file: string, name: string): number {
  const line = readText(`${job}/${file}`)
    .split('\n')
    .find((text) => text.startsWith(`${name} `))
  return Number(line?.slice(name.length + 1)) || 0
}

/** Whether the kernel keeps the peak, so that nobody has to look. */
export const keepsPeak = (): boolean => readText(`${job}/memory.peak`) !== ''
