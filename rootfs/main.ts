// npm run rootfs
//
// Makes all that machines are made of ahead of time: runtime images, the agent, both kernels, the root drives in both
// formats. Needs what `npm run setup -- microvm` installs, and a compiler. A second run changes nothing.
import { join } from 'node:path'
import { openImageStore } from '../runners/container/images/store.ts'
import { findRuntime, type RuntimeName, runtimesDirectory } from '../runners/container/runtimes/index.ts'
import { cacheDirectory } from '../scripts/cache-directory.ts'
import { ensureTools } from '../scripts/host-tools.ts'
import { buildRuntimes } from '../scripts/runtimes.ts'
import { ensureMachineParts } from './ensure.ts'
import { driveOf, type RootFormat } from './index.ts'
import { ensureOwnKernel } from './own-kernel.ts'

const runtimes: readonly RuntimeName[] = ['base', 'node', 'python']
/** The first is that of the machine which tries out a kernel. */
const formats: readonly RootFormat[] = ['erofs', 'ext4']
/** Nothing is to be evicted here. */
const budgetMb = 2 ** 30

const cacheDir = cacheDirectory(process.env)
const began = performance.now()
const log = (line: string) => console.log(line)

/** The root drives of the runtime images. Returns the path of one, an erofs. */
async function makeDrives(): Promise<string> {
  await using images = await openImageStore({
    dir: join(cacheDir, 'images'),
    insecureRegistries: [],
    imageDirectories: [runtimesDirectory(cacheDir)],
    budgetMb,
  })
  const drives: string[] = []
  for (const name of runtimes) {
    const runtime = await findRuntime(name, cacheDir)
    if (runtime === undefined) throw new Error(`the runtime image ${name} is not here`)
    const source = { kind: 'reference', reference: `oci:${runtime.layout}` } as const
    using image = await images.get(source, AbortSignal.timeout(600_000))
    for (const format of formats) drives.push(await driveOf(image, format, cacheDir))
  }
  log(`root drives: ${runtimes.join(', ')} as ${formats.join(' and ')}`)
  return drives[0]!
}

try {
  const missing = await ensureTools(['microvm', 'kernel'], { log })
  if (missing.length > 0) throw new Error(missing.join('\n'))
  await buildRuntimes(runtimes, { cacheDir, log })
  await ensureMachineParts({ cacheDir, log })
  const root = await makeDrives()
  const kernel = await ensureOwnKernel({ cacheDir, log })
  await ensureMachineParts({ cacheDir, log, own: { kernel, root } })
  log(
    `rootfs: ready in ${((performance.now() - began) / 1_000).toFixed(1)} s; machines start with ${kernel.label}`,
  )
} catch (error) {
  console.error((error as Error).message)
  process.exitCode = 1
}
