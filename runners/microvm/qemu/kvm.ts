/**
 * Whether KVM runs guests here: found by booting one. A device that opens says little: there are hosts whose KVM takes
 * a machine and lets it hang.
 */

import { statSync } from 'node:fs'
import { mkdir, mkdtemp, readFile, rename, rm, truncate, writeFile } from 'node:fs/promises'
import { release } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { z } from 'zod'
import { thisBoot } from '../../../shared/process-identity.ts'
import { isOpenToOthers } from '../users.ts'
import { QemuMachine } from './machine.ts'
import type { Host } from './start.ts'

export const kvmDevice = '/dev/kvm'

/** A kernel without a root is at its end after 0.3 s where KVM works. */
const probeMs = 5_000
const probeMb = 192

const Verdict = z.object({ of: z.string(), works: z.boolean(), why: z.string() })
export type Verdict = z.infer<typeof Verdict>

/**
 * Boots `kernel` under KVM, which takes up to 5 s, and remembers in `file` what came of it. `host` is one with KVM;
 * `dir` is for a directory of its own.
 */
export async function probeKvm(host: Host, kernel: string, file: string, dir: string): Promise<Verdict> {
  const of = JSON.stringify([
    thisBoot(),
    release(),
    host.version.text,
    host.model,
    deviceOf(),
    kernel,
    probeMs,
  ])
  const known = await readVerdict(file)
  if (known?.of === of) return known
  const verdict = { of, ...(await tryKvm(host, kernel, dir)) }
  const fresh = `${file}.${process.pid}`
  await writeFile(fresh, JSON.stringify(verdict))
  await rename(fresh, file)
  return verdict
}

async function readVerdict(file: string): Promise<Verdict | undefined> {
  try {
    return Verdict.parse(JSON.parse(await readFile(file, 'utf8')))
  } catch {
    return undefined
  }
}

function deviceOf(): number[] {
  try {
    const { rdev, mode, uid, gid } = statSync(kvmDevice)
    return [rdev, mode, uid, gid]
  } catch {
    return []
  }
}

async function tryKvm(host: Host, kernel: string, parent: string): Promise<Omit<Verdict, 'of'>> {
  if (deviceOf().length === 0) return { works: false, why: `there is no ${kvmDevice}` }
  if (host.users.areOthers && !isOpenToOthers(kvmDevice))
    return {
      works: false,
      why: `${kvmDevice} is for root alone: chgrp kvm ${kvmDevice}; chmod 660 ${kvmDevice}`,
    }
  await mkdir(parent, { recursive: true })
  const dir = await mkdtemp(join(parent, 'kvm-'))
  try {
    // Neither drive is looked at, nor is there anything to unpack: a kernel that has come so far panics, and ends QEMU.
    const blank = join(dir, 'blank')
    await writeFile(blank, '', { mode: 0o644 })
    await truncate(blank, 2 ** 20)
    const initramfs = join(dir, 'nothing')
    await writeFile(initramfs, Buffer.alloc(512), { mode: 0o644 })
    const shape = { kernel, initramfs, root: blank, memoryMb: probeMb, vcpus: 1, network: false }
    const machine = await QemuMachine.boot(host, 'kvm', shape, { dir, jobDrive: blank, netns: undefined })
    const late = new AbortController()
    const ended = await Promise.race([
      machine.exited,
      sleep(probeMs, undefined, late).then(
        () => undefined,
        () => undefined,
      ),
    ])
    late.abort()
    await machine.kill()
    if (ended === undefined) return { works: false, why: `a machine hangs under ${kvmDevice}` }
    if (ended.code === 0 && machine.console().includes('Kernel panic'))
      return { works: true, why: 'a machine ran' }
    return { works: false, why: `a machine under ${kvmDevice} ends with ${ended.signal ?? ended.code}` }
  } catch (error) {
    return { works: false, why: (error as Error).message }
  } finally {
    await rm(dir, { recursive: true, force: true })
  }
}
