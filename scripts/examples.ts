/** Deploys the folders of `examples/` to a platform that has just started. */
import { randomBytes } from 'node:crypto'
import { readdirSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { DeployError, deployFolder, knownFunctions, putSecretOnce, secretsOf } from './deploy.ts'

export const examplesFolder = resolve(import.meta.dirname, '../examples')

/** Programs that read the platform’s events; all other folders are functions. */
const noFunction = 'consumers'

/** In the order of their names. */
export const exampleNames = (): string[] =>
  readdirSync(examplesFolder, { withFileTypes: true })
    .filter((entry) => entry.isDirectory() && entry.name !== noFunction)
    .map(({ name }) => name)
    .sort()

/**
 * Deploys what was never deployed here: one that somebody changed or deleted stays as it is. One that fails is
 * reported and does not stop the others.
 */
export async function deployExamples(
  gateway: string,
  log: (line: string) => void,
  signal?: AbortSignal,
): Promise<void> {
  const known = await knownFunctions(gateway)
  const names = exampleNames().filter((name) => !known.has(name))
  for (const [i, name] of names.entries()) {
    signal?.throwIfAborted()
    const folder = join(examplesFolder, name)
    const count = `(${i + 1} of ${names.length})`
    try {
      for (const secret of await secretsOf(folder))
        if (await putSecretOnce(gateway, secret, randomBytes(24).toString('hex')))
          log(`example ${name}: secret ${secret} was set at random; PUT /v1/secrets/${secret} sets your own`)
      const { url } = await deployFolder(gateway, name, folder, signal)
      log(`example ${name} is deployed ${count}: ${url}`)
    } catch (error) {
      if (signal?.aborted) return
      const said = error instanceof DeployError ? error.lines.join('; ') : (error as Error).message
      log(`example ${name} could not be deployed ${count}; everything else works: ${said}`)
    }
  }
}
