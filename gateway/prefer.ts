/** The `Prefer` header (RFC 7240): `respond-async` and `wait=<seconds>`. */
import { Problem } from '../shared/errors.ts'

export interface Preference {
  /** Seconds the client is ready to wait for the end; undefined: as long as it takes. */
  waitS: number | undefined
  /** What to say in `Preference-Applied`. */
  applied: string | undefined
}

export function parsePrefer(header: string | undefined): Preference {
  if (header === undefined) return { waitS: undefined, applied: undefined }
  let waitS: number | undefined
  const applied: string[] = []
  for (const part of header.split(',')) {
    // What follows a semicolon are parameters, which these two preferences do not have.
    const [name = '', value] = part
      .replace(/;.*/, '')
      .trim()
      .toLowerCase()
      .split(/\s*=\s*/)
    if (name === 'respond-async') {
      waitS ??= 0
      applied.push('respond-async')
    } else if (name === 'wait') {
      const text = value?.replaceAll('"', '') ?? ''
      const seconds = Number(text)
      if (!/^\d+(\.\d+)?$/.test(text))
        throw new Problem('invalid_header', {
          detail: 'Prefer: wait must be a number of seconds',
          field: 'Prefer',
        })
      waitS = seconds
      applied.push(`wait=${seconds}`)
    }
  }
  return { waitS, applied: applied.length > 0 ? applied.join(', ') : undefined }
}
