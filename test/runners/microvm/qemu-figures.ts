/** What machines cost under QEMU alone, with a shell for an agent: `node test/runners/microvm/qemu-figures.ts`. */
import { readFileSync } from 'node:fs'
import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { type Guest, noMachines, type QemuHost, startQemuHost } from './qemu-support.ts'

export interface QemuFigures {
  /** Medians, ms. */
  bootMs: number
  snapshotMs: number
  restoreMs: number
  /** From before the start of the process to what the guest answers. */
  firstByteMs: number
  killMs: number
  /** CPU of the VMM by then. */
  firstByteCpuMs: number
  /** Proportional share of memory of one of those that run together, MiB. */
  pssMb: number
  running: number
}

/** Takes some seconds; `running` machines are up at the same time at its end. */
export async function measureQemu(it: QemuHost, runs = 15, running = 8): Promise<QemuFigures> {
  const begun = performance.now()
  const guest = await it.boot()
  const bootMs = performance.now() - begun
  for (let n = 0; n < 5; n++) await guest.run('echo warm')
  await guest.machine.pause()
  const template = { shape: it.shape, dir: join(it.dir, 'figures') }
  await mkdir(template.dir)
  const [snapshotMs] = await timed(() => guest.machine.snapshot(template.dir))
  const restored: number[] = []
  const answered: number[] = []
  const killed: number[] = []
  const cpu: number[] = []
  for (let n = 0; n < runs; n++) {
    const place = await it.place()
    const from = performance.now()
    const next = await it.restore(template, place)
    restored.push(performance.now() - from)
    await next.run('echo hello')
    answered.push(performance.now() - from)
    cpu.push((await next.machine.usage()).cpuMs)
    killed.push((await timed(() => next.machine.kill()))[0])
  }
  const together: Guest[] = []
  try {
    for (let n = 0; n < running; n++) {
      const next = await it.restore(template)
      await next.run('echo hello')
      together.push(next)
    }
    return {
      ...{ bootMs, snapshotMs, running },
      restoreMs: median(restored),
      firstByteMs: median(answered),
      killMs: median(killed),
      firstByteCpuMs: median(cpu),
      pssMb: median(together.map(({ machine }) => pssMb(machine.pid))),
    }
  } finally {
    await Promise.all(together.map(({ machine }) => machine.kill()))
  }
}

async function timed<T>(work: () => Promise<T>): Promise<[ms: number, result: T]> {
  const begun = performance.now()
  const result = await work()
  return [performance.now() - begun, result]
}

const median = (values: number[]) => values.sort((a, b) => a - b)[values.length >> 1]!

const pssMb = (pid: number) =>
  Number(/^Pss:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/smaps_rollup`, 'latin1'))?.[1]) / 1024

if (import.meta.main) {
  const reason = await noMachines()
  if (reason !== undefined) throw new Error(reason)
  await using it = await startQemuHost()
  console.log(it.driver.version)
  const figures = Object.entries(await measureQemu(it))
  console.table(Object.fromEntries(figures.map(([name, value]) => [name, Math.round(value * 10) / 10])))
}
