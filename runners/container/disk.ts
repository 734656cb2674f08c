/**
 * Bytes that went to and came from disks, as the kernel counts them: what was in its page cache already is no read.
 * Control groups of version 1 count them only where a limit is set on a disk: there it is their processes’ own counts.
 */
import { readFileSync } from 'node:fs'
import type { Bytes } from './engine.ts'
import type { KeptFiles } from './kept-files.ts'

/** Of processes that live; undefined: none of them can be looked at. */
export function diskOfProcesses(pids: Iterable<number>): Bytes | undefined {
  let total: Bytes | undefined
  for (const pid of pids)
    try {
      const one = readProcessIo(readFileSync(`/proc/${pid}/io`, 'latin1'))
      total = { in: (total?.in ?? 0) + one.in, out: (total?.out ?? 0) + one.out }
    } catch {
      // It has ended, or may not be looked at.
    }
  return total
}

/** Of a control group of version 2; undefined where it does not count them. */
export function diskOfGroup(directory: string): Bytes | undefined {
  try {
    return readIoStat(readFileSync(`${directory}/io.stat`, 'latin1'))
  } catch {
    return undefined
  }
}

/** Those of processes that live now, or of a group of version 2, again and again. */
export class DiskMeter {
  readonly #files: KeptFiles
  readonly #counted: { path: string; last: Bytes }[]
  readonly #parse: (text: string) => Bytes
  #isKnown = false

  private constructor(files: KeptFiles, paths: string[], parse: (text: string) => Bytes) {
    this.#files = files
    this.#counted = paths.map((path) => ({ path, last: { in: 0, out: 0 } }))
    this.#parse = parse
  }

  static ofProcesses(files: KeptFiles, pids: readonly number[]): DiskMeter {
    const paths = pids.map((pid) => `/proc/${pid}/io`)
    return new DiskMeter(files, paths, readProcessIo)
  }

  static ofGroup(files: KeptFiles, directory: string): DiskMeter {
    return new DiskMeter(files, [`${directory}/io.stat`], readIoStat)
  }

  /** So far; what has ended counts with what it had. Undefined: nothing was ever to be read. */
  read(): Bytes | undefined {
    const total = { in: 0, out: 0 }
    for (const one of this.#counted) {
      try {
        one.last = this.#parse(this.#files.read(one.path))
        this.#isKnown = true
      } catch {
        // It has ended, may not be looked at, or is not counted.
      }
      total.in += one.last.in
      total.out += one.last.out
    }
    return this.#isKnown ? total : undefined
  }
}

/** /proc/<pid>/io (proc(5)): `read_bytes: n`, `write_bytes: n`, among others. */
export function readProcessIo(text: string): Bytes {
  const of = (name: string) => Number(new RegExp(`^${name}: (\\d+)$`, 'm').exec(text)?.[1] ?? 0)
  return { in: of('read_bytes'), out: of('write_bytes') }
}

/** io.stat (cgroup-v2.rst): for each disk a line `8:0 rbytes=n wbytes=n rios=…`; those that did nothing are left out. */
export function readIoStat(text: string): Bytes {
  const sum = (name: string) =>
    [...text.matchAll(new RegExp(`\\b${name}=(\\d+)`, 'g'))].reduce((total, [, n]) => total + Number(n), 0)
  return { in: sum('rbytes'), out: sum('wbytes') }
}

/** The larger of two counts of the same: what ended meanwhile is not counted any more. */
export const atLeast = (one: Bytes | undefined, other: Bytes | undefined): Bytes | undefined =>
  one === undefined || other === undefined
    ? (one ?? other)
    : { in: Math.max(one.in, other.in), out: Math.max(one.out, other.out) }

/** What came since; undefined where it is not known. */
export const since = (before: Bytes | undefined, now: Bytes | undefined): Bytes | undefined =>
  now === undefined
    ? undefined
    : { in: Math.max(0, now.in - (before?.in ?? 0)), out: Math.max(0, now.out - (before?.out ?? 0)) }
