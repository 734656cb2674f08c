/** Stacks that point at the lines the user wrote, where the code that ran was bundled from them. */
import { originalPositionFor, TraceMap } from '@jridgewell/trace-mapping'
import type { Digest, LogLine } from '../shared/workload.ts'
import type { Bundles } from './bundles.ts'

/** Parsed source maps kept: those of functions that fail now. */
const keptMaps = 8
/** Log lines of one attempt that are looked at for a stack, and how long (UTF-16 units) they may be. */
const mappedLines = 100
const mappedLength = 16 * 1024
/** A place in the bundle, as V8 writes it. */
const place = /\bindex\.(?:m?js|ts):(\d+):(\d+)/g

export class Stacks {
  readonly #bundles: Bundles
  readonly #maps = new Map<Digest, TraceMap>()

  constructor(bundles: Bundles) {
    this.#bundles = bundles
  }

  /**
   * Writes log lines on, in order, those that show a stack with the user’s own files in it. Only the first lines of
   * an attempt and no long ones are looked at: a flood of stacks costs no more than any other.
   */
  lines(
    map: Digest,
    write: (line: LogLine) => void,
  ): { write(line: LogLine): void; settled(): Promise<void> } {
    let looked = 0
    let last: Promise<void> | undefined
    return {
      write: (line) => {
        const shows =
          line.text.length <= mappedLength && looked < mappedLines && line.text.includes('\n    at ')
        if (shows) looked++
        else if (last === undefined) return write(line)
        const before = last
        const mapped = shows ? this.toSource(line.text, map) : Promise.resolve(line.text)
        const mine = Promise.all([mapped, before]).then(([text]) => {
          write({ ...line, text })
          if (last === mine) last = undefined
        })
        last = mine
      },
      settled: async () => {
        await last
      },
    }
  }

  /** The stack with the user’s own files, lines and columns; as it is where the source map cannot be had. */
  async toSource(stack: string, map: Digest): Promise<string> {
    let trace = this.#maps.get(map)
    if (trace === undefined) {
      try {
        trace = new TraceMap(await this.#bundles.get(map))
      } catch {
        return stack
      }
      this.#maps.set(map, trace)
      if (this.#maps.size > keptMaps) this.#maps.delete(this.#maps.keys().next().value!)
    }
    return mapPlaces(stack, trace)
  }
}

/** Only lines that name a place are changed: a message may contain anything. */
export function mapPlaces(stack: string, trace: TraceMap): string {
  const mapLine = (line: string) =>
    line.replace(place, (whole, row, column) => {
      // Code can write such a line itself; both count from 1.
      if (Number(row) < 1 || Number(column) < 1) return whole
      const {
        source,
        line,
        column: at,
      } = originalPositionFor(trace, { line: Number(row), column: column - 1 })
      return source === null ? whole : `${source}:${line}:${at + 1}`
    })
  return stack
    .split('\n')
    .map((line) => (/^\s+at /.test(line) ? mapLine(line) : line))
    .join('\n')
}
