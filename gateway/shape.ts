/** What of a spec fits together, beyond each field by itself. Pure. */
import { Problem } from '../shared/errors.ts'
import { runtimeOf, type WorkloadSpec } from '../shared/workload.ts'

export type Shaped = Pick<
  WorkloadSpec,
  'runtime' | 'code' | 'archive' | 'image' | 'image_auth' | 'entrypoint'
>

const refuse = (field: string, detail: string) =>
  new Problem('invalid_field', { detail: `${field}: ${detail}`, field })

/** Throws `invalid_field` for what no isolation could make sense of. */
export function checkShape(spec: Shaped): void {
  const { runtime, image, image_auth, entrypoint } = spec
  const command = Array.isArray(entrypoint)
  if (image_auth !== undefined && typeof image !== 'string')
    throw refuse('image_auth', 'is for an image that is named by its reference')
  if (image !== undefined) {
    if (runtime !== undefined && !['oci', 'node', 'python'].includes(runtime))
      throw refuse('runtime', 'an image runs what it has (oci), or a handler by its own node or python')
    if (typeof entrypoint === 'string' && (runtime === undefined || runtime === 'oci'))
      throw refuse('entrypoint', 'a file of an image is run by runtime node or python; a command is an array')
    return
  }
  if (runtime === 'oci' && !command)
    throw refuse('entrypoint', 'runtime oci is for images, and for commands, which are arrays')
  if (runtimeOf(spec) === undefined)
    throw refuse(
      'runtime',
      'say what the archive is run by: a runtime, an entrypoint such as main.py, or a command array',
    )
}
