/** Machines of a test’s own: a driver in a directory that the test removes. */
import { randomBytes } from 'node:crypto'
import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { findProgram } from '../../../runners/container/images/processes.ts'
import type { Driver, DriverOptions } from '../../../runners/microvm/driver.ts'
import { createQemu } from '../../../runners/microvm/qemu/index.ts'

export const noQemu = (): string | undefined =>
  findProgram('qemu-system-x86_64') === undefined ? 'QEMU is not installed' : undefined

/** A driver with its state below `dir`; the caller disposes of it. */
export async function openTestDriver(dir: string): Promise<DriverOptions & { driver: Driver }> {
  const stateDir = join(dir, 'state')
  await mkdir(stateDir, { recursive: true, mode: 0o700 })
  const options = { owner: `microvm-${randomBytes(8).toString('hex')}`, stateDir }
  return { ...options, driver: await createQemu(options) }
}
