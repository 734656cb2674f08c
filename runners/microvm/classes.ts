/** How large machines are: in few sizes, so that jobs with different limits can begin from the same template. */

/** What kernel, agent and the files of the root take beside the job’s own memory, MiB. */
const roomMb = 64
/** Below this no kernel comes up with room to spare, MiB. */
const leastMb = 128

/** Memory of the machine for a job that may use so much (MiB): a power of two, or one and a half of one. */
export function machineMemoryMb(limitMb: number): number {
  const wanted = Math.max(leastMb, limitMb + roomMb)
  const power = 2 ** Math.ceil(Math.log2(wanted))
  return power * 0.75 >= wanted ? power * 0.75 : power
}

/** Virtual cores for a job’s share of them: the share itself is held by the host. */
export const machineVcpus = (cpu: number, hostCores: number): number =>
  Math.max(1, Math.min(Math.ceil(cpu), hostCores))
