/** How the benchmarks print: medians of rounds, side by side. */
import type { LoadResult } from './load.ts'

export const medianOf = (values: number[]): number =>
  values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? Number.NaN

type Field = 'rate' | 'p50' | 'p99' | 'cpu'

/** Results by name, one for each round. */
export class Taken {
  readonly #all = new Map<string, LoadResult[]>()

  keep(name: string, result: LoadResult): void {
    const all = this.#all.get(name)
    if (all === undefined) this.#all.set(name, [result])
    else all.push(result)
    if (result.errors > 0)
      console.log(
        `! ${name}: ${result.errors} requests were not answered as expected: ${JSON.stringify(result.statuses)}`,
      )
  }

  /** One for each round, in their order; NaN where it was not measured. */
  all(name: string, field: Field): number[] {
    return (this.#all.get(name) ?? []).map((result) => result[field] ?? Number.NaN)
  }

  /** The median of the rounds. */
  of(name: string, field: Field): number {
    return medianOf(this.all(name, field))
  }

  /** The ratio of the medians. */
  times(field: 'rate' | 'p50', ours: string, theirs: string): string {
    return `${(this.of(ours, field) / this.of(theirs, field)).toFixed(2)}×`
  }
}

export const ms = (value: number) => `${value.toFixed(2)} ms`
export const perSecond = (value: number) => `${Math.round(value).toLocaleString('en-US')}/s`
