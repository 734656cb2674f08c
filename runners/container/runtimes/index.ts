/**
 * The images that vulcan builds itself, for code that comes without one. The set-up builds them
 * (`npm run setup -- gvisor`); a runner only looks for what is there.
 */
import { readFile, realpath } from 'node:fs/promises'
import { join } from 'node:path'
import type { Digest } from '../../../shared/workload.ts'

export const runtimeNames = ['base', 'node', 'python', 'go'] as const
export type RuntimeName = (typeof runtimeNames)[number]

/** `<cacheDir>/runtimes`: a directory `<name>-<key>` for each build, and a link `<name>` to the one in use. */
export const runtimesDirectory = (cacheDir: string): string => join(cacheDir, 'runtimes')

/** An OCI layout with one manifest, for this machine's platform. */
export type Runtime = {
  /** Absolute. Its content never changes. */
  layout: string
  /** Of the manifest. */
  digest: Digest
}

/** The runtime image of this name; undefined where it was not built yet. */
export async function findRuntime(name: RuntimeName, cacheDir: string): Promise<Runtime | undefined> {
  try {
    const layout = await realpath(join(runtimesDirectory(cacheDir), name))
    const index = JSON.parse(await readFile(join(layout, 'index.json'), 'utf8')) as {
      manifests: { digest: Digest }[]
    }
    return { layout, digest: index.manifests[0]!.digest }
  } catch {
    return undefined
  }
}
