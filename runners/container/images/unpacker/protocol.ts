/** What the process in the jail is told on its standard input, and answers on its standard output: one JSON text each. */

export interface LayersJob {
  kind: 'layers'
  /** Lowest first. `file` may be plain or compressed; `diffId` is of its plain bytes, in hex. */
  layers: { file: string; diffId: string }[]
  /** An empty directory. */
  root: string
  owners: boolean
  maxBytes: number
  maxEntries: number
}

/** Takes an archive apart into numbered files, whatever the names in it. */
export interface SplitJob {
  kind: 'split'
  archive: string
  /** An empty directory. */
  into: string
  maxBytes: number
  maxEntries: number
}

/** One entry of an archive that was taken apart. */
export type Part =
  /** `file` is its name in `into`, `digest` hex. */
  | { path: string; file: string; size: number; digest: string }
  /** Another name of one; as its text stands in the archive, from where the link is. */
  | { path: string; link: string }

export type Answer =
  | { kind: 'unpacked'; bytes: number; entries: number }
  | { kind: 'parts'; parts: Part[] }
  /** The content is to blame. `layer` counts from 1; `mismatch`: its bytes are not those of its digest. */
  | { kind: 'refused'; why: string; layer?: number; mismatch?: true }
  | { kind: 'full' }
  | { kind: 'failed'; why: string }
