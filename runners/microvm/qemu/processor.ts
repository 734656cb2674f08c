/** What of the host’s processor shows in a machine. */
import { existsSync, readFileSync } from 'node:fs'

export interface Processor {
  /** Changes where a snapshot made here would find another processor. */
  name: string
  /**
   * kHz of the time stamp counter, which an emulated one follows. /proc/cpuinfo has it where the clock of the cores is
   * not scaled; undefined elsewhere.
   */
  tscKhz: number | undefined
}

export function readProcessor(): Processor {
  const info = readFileSync('/proc/cpuinfo', 'latin1')
  const field = (name: string) => new RegExp(`^${name}\\s*: (.*)$`, 'm').exec(info)?.[1] ?? ''
  const mhz = Number(field('cpu MHz'))
  const isSteady =
    /\bconstant_tsc\b/.test(field('flags')) && !existsSync('/sys/devices/system/cpu/cpu0/cpufreq')
  return {
    name: `${field('model name')} ${field('microcode')} ${field('flags')}`,
    tscKhz: isSteady && mhz > 0 ? Math.round(mhz * 1_000) : undefined,
  }
}
