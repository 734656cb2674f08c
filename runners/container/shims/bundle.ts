/** Makes the shims into files that can be mounted into a container: one each, without anything beside it. */
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { build } from 'esbuild'

/** The oldest Node whose images can have handlers. */
const target = 'node18'

/** The text of each shim. */
export async function makeShims(): Promise<{ node: string; python: string }> {
  const [bundle, python] = await Promise.all([
    build({
      entryPoints: [join(import.meta.dirname, 'node.ts')],
      bundle: true,
      write: false,
      platform: 'node',
      format: 'esm',
      target,
      logLevel: 'silent',
    }),
    readFile(join(import.meta.dirname, 'python.py'), 'utf8'),
  ])
  return { node: bundle.outputFiles[0]!.text, python }
}
