/**
 * What pip is given of a Python project: the lines of its requirements.txt, where each is a version of a package from
 * the index. Anything else could reach what the gateway’s host can.
 */
import { Problem } from '../../shared/errors.ts'
import { sha256Hex } from '../../shared/ids.ts'
import type { Files } from './archive.ts'

export const requirementsFile = 'requirements.txt'
/** Where installed packages stand beside a project’s files. */
export const vendorFolder = 'vendor'

export interface Requirements {
  /** For pip, one requirement a line. */
  text: string
  /** Every version is fixed: the same text gives the same packages. */
  locked: boolean
  key: string
  warnings: string[]
}

/** Name, extras, versions, marker (PEP 508 without URLs), and hashes. */
const requirement =
  /^[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?\s*(?:\[[A-Za-z0-9._,\s-]*\])?\s*\(?\s*(?:(?:===|==|~=|!=|<=|>=|<|>)\s*[\w.*+!-]+\s*,?\s*)*\)?\s*(?:;[\w\s.'"=<>!~()-]+)?(?:\s+--hash=[a-z0-9]+:[0-9a-f]+)*$/
/** Longest requirement with its hashes (characters). */
const lineLength = 8_000
const fixed = /^[^;]*?===?\s*[\w.+!-]+\s*(?:[;)]|--hash|$)/

const failed = (detail: string, line: number | null) =>
  new Problem('build_failed', {
    detail: `${requirementsFile}${line === null ? '' : `:${line}`}: ${detail}`,
    field: requirementsFile,
    errors: [{ detail, file: requirementsFile, line, column: null }],
  })

/** What is to be installed; undefined: nothing, or the archive has it in `vendor`. Throws `build_failed`. */
export function requirementsOf(files: Files): Requirements | undefined {
  const bytes = files.get(requirementsFile)
  if (bytes === undefined) return undefined
  for (const path of files.keys()) if (path.startsWith(`${vendorFolder}/`)) return undefined
  const lines: string[] = []
  let joined = ''
  const all = Buffer.from(bytes)
    .toString('utf8')
    .replace(/^\uFEFF/, '')
    .split(/\r?\n/)
  for (const [i, raw] of all.entries()) {
    joined += raw.replace(/(^|\s)#.*$/, '')
    if (joined.endsWith('\\') && i < all.length - 1) {
      joined = joined.slice(0, -1)
      continue
    }
    const line = joined.replaceAll(/\s+/g, ' ').trim()
    joined = ''
    if (line === '') continue
    if (line.length > lineLength || !requirement.test(line))
      throw failed(
        `${JSON.stringify(line.slice(0, 200))} is not installed: only versions from the package index are; put other packages in the archive under ${vendorFolder} instead`,
        i + 1,
      )
    lines.push(line)
  }
  if (lines.length === 0) return undefined
  const loose = lines.find((line) => !fixed.test(line))
  const text = `${lines.join('\n')}\n`
  return {
    text,
    locked: loose === undefined,
    key: sha256Hex(text),
    warnings:
      loose === undefined ? [] : [`${loose} has no fixed version (==): each deploy may install a newer one`],
  }
}
