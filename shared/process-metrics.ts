/** What every process tells of itself: processor, memory, event loop, since when it runs. */
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { Reading, type Registry } from './metrics.ts'

/** @param restarts how often the supervisor has started this process again */
export function countProcess(registry: Registry, restarts: number): void {
  const started = Date.now() / 1_000 - process.uptime()
  const cpu = new Reading({
    name: 'vulcan_process_cpu_seconds_total',
    help: 'CPU seconds of the process, without its children.',
    labels: ['mode'],
    registry,
  })
  cpu.from(() => process.cpuUsage().user / 1e6, 'user')
  cpu.from(() => process.cpuUsage().system / 1e6, 'system')
  const memory = new Reading({
    name: 'vulcan_process_memory_bytes',
    help: 'Bytes of memory of the process: resident, its JavaScript heap, and what buffers hold outside of it.',
    labels: ['kind'],
    registry,
  })
  memory.from(() => process.memoryUsage.rss(), 'resident')
  memory.from(() => process.memoryUsage().heapUsed, 'heap')
  memory.from(() => process.memoryUsage().external, 'external')
  new Reading({
    name: 'vulcan_process_loop_busy_seconds_total',
    help: 'Seconds that the event loop was busy.',
    labels: [],
    registry,
  }).from(() => performance.eventLoopUtilization().active / 1_000)
  new Reading({
    name: 'vulcan_process_start_time_seconds',
    help: 'When the process started, in seconds since the epoch.',
    labels: [],
    registry,
  }).from(() => started)
  new Reading({
    name: 'vulcan_process_restarts_total',
    help: 'How often this part was started again by the supervisor since that was started.',
    labels: [],
    registry,
  }).from(() => restarts)
  const group = new Reading({
    name: 'vulcan_process_cgroup_memory_bytes',
    help: 'Bytes of memory of the control group that the process is in, where it has one: used, and its limit.',
    labels: ['kind'],
    registry,
  })
  const files = memoryFiles()
  group.from(() => readNumber(files?.used), 'used')
  group.from(() => readNumber(files?.limit), 'limit')
}

/** Of the control group of this process, in either version; undefined where it has none of its own or it is hidden. */
function memoryFiles(): { used: string; limit: string } | undefined {
  const mount = '/sys/fs/cgroup'
  try {
    const groups = readFileSync('/proc/self/cgroup', 'latin1')
    const second = /^0::(\/.+)$/m.exec(groups)?.[1]
    const first = /^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:(\/.+)$/m.exec(groups)?.[1]
    const found = [
      ...(second === undefined ? [] : [{ dir: mount + second, used: 'memory.current', limit: 'memory.max' }]),
      ...(first === undefined
        ? []
        : [
            {
              dir: `${mount}/memory${first}`,
              used: 'memory.usage_in_bytes',
              limit: 'memory.limit_in_bytes',
            },
          ]),
    ]
    const { dir, used, limit } = found.find(({ dir, used }) => existsSync(join(dir, used)))!
    return { used: join(dir, used), limit: join(dir, limit) }
  } catch {
    return undefined
  }
}

/** Version 1 says of a group without a limit that it has one of nearly 2^63 bytes, version 2 `max`. */
const noLimitBytes = 2 ** 60

function readNumber(file: string | undefined): number | undefined {
  if (file === undefined) return undefined
  try {
    const value = Number(readFileSync(file, 'latin1'))
    return value < noLimitBytes ? value : undefined
  } catch {
    return undefined
  }
}
