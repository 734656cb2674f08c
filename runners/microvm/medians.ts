/** Medians of what was measured last, by name. */
const kept = 100

export class Medians {
  readonly #values = new Map<string, number[]>()

  add(name: string, value: number): void {
    const values = this.#values.get(name) ?? []
    this.#values.set(name, values)
    values.push(value)
    if (values.length > kept) values.shift()
  }

  /** As `<name>_p50`, with one digit behind the point; what was never measured is left out. */
  all(): Record<string, number> {
    return Object.fromEntries(
      [...this.#values].map(([name, values]) => {
        const sorted = [...values].sort((a, b) => a - b)
        return [`${name}_p50`, Math.round(sorted[Math.floor(sorted.length / 2)]! * 10) / 10]
      }),
    )
  }
}
