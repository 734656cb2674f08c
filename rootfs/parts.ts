/** Which kernel and initramfs machines are started with. */
import { existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join, relative } from 'node:path'
import { z } from 'zod'
import { replaceFile, storeOf } from './store.ts'

export type KernelFormat = 'vmlinux' | 'bzImage' | 'either'

/** A kernel on disk; every path is absolute. */
export interface Kernel {
  /** Such as `Linux 6.1.192-2 (Debian)`. */
  label: string
  vmlinux: string
  /** Compressed, which boots more slowly. */
  bzImage: string | undefined
  /** Directory of modules with their `order`; undefined where it needs none. */
  modules: string | undefined
}

export interface MachineParts {
  kernel: string
  initramfs: string
  /** Of the kernel. */
  label: string
}

/** Our own kernel is preferred to Debian's. */
export const partsKinds = ['own', 'packaged'] as const
export type PartsKind = (typeof partsKinds)[number]

/** `parts/<kind>.json`; paths begin at the store. */
const Parts = z.strictObject({
  label: z.string(),
  vmlinux: z.string(),
  bzImage: z.string().nullable(),
  modules: z.string().nullable(),
  initramfs: z.string(),
  /** The agent's hash. */
  agent: z.string(),
})
type Parts = z.infer<typeof Parts>

export const partsPlace = (kind: PartsKind) => `parts/${kind}.json`

/** What is there of this kind; undefined where it, or a file of it, is not. */
export async function readParts(
  cacheDir: string,
  kind: PartsKind,
): Promise<{ kernel: Kernel; initramfs: string; agent: string } | undefined> {
  const path = (place: string) => join(storeOf(cacheDir), place)
  const text = await readFile(path(partsPlace(kind)), 'utf8').catch(() => undefined)
  if (text === undefined) return undefined
  const parts = Parts.safeParse(JSON.parse(text)).data
  if (parts === undefined || ![parts.vmlinux, parts.initramfs].every((place) => existsSync(path(place))))
    return undefined
  const { label, vmlinux, bzImage, modules } = parts
  return {
    kernel: {
      label,
      vmlinux: path(vmlinux),
      bzImage: bzImage === null ? undefined : path(bzImage),
      modules: modules === null ? undefined : path(modules),
    },
    initramfs: path(parts.initramfs),
    agent: parts.agent,
  }
}

export async function writeParts(
  cacheDir: string,
  kind: PartsKind,
  { kernel, initramfs, agent }: { kernel: Kernel; initramfs: string; agent: string },
): Promise<void> {
  const place = (path: string) => relative(storeOf(cacheDir), path)
  const parts: Parts = {
    label: kernel.label,
    vmlinux: place(kernel.vmlinux),
    bzImage: kernel.bzImage === undefined ? null : place(kernel.bzImage),
    modules: kernel.modules === undefined ? null : place(kernel.modules),
    initramfs: place(initramfs),
    agent,
  }
  await replaceFile(cacheDir, partsPlace(kind), `${JSON.stringify(parts, null, 2)}\n`)
}

/**
 * The kernel and the initramfs that are there, our own kernel before Debian's; `either` prefers the uncompressed
 * form, which starts faster. Undefined where there are none: `npm run setup -- microvm` makes them.
 */
export async function findMachineParts(
  cacheDir: string,
  { kernelFormat }: { kernelFormat: KernelFormat },
): Promise<MachineParts | undefined> {
  for (const kind of partsKinds) {
    const parts = await readParts(cacheDir, kind)
    const kernel = kernelFormat === 'bzImage' ? parts?.kernel.bzImage : parts?.kernel.vmlinux
    if (parts && kernel) return { kernel, initramfs: parts.initramfs, label: parts.kernel.label }
  }
  return undefined
}
