/** Collects what comes while one act is under way, and does it all in the next: for acts that cost the same for many. */
export class Together {
  readonly #act: (names: string[]) => Promise<void>
  #waiting: string[] = []
  #last: Promise<void> = Promise.resolve()

  constructor(act: (names: string[]) => Promise<void>) {
    this.#act = act
  }

  /** Settles as the act does that `name` was part of. */
  async add(name: string): Promise<void> {
    this.#waiting.push(name)
    const act = this.#waiting.length === 1 ? this.#next() : this.#last
    this.#last = act
    await act
  }

  async #next(): Promise<void> {
    await this.#last.catch(() => {})
    const names = this.#waiting
    this.#waiting = []
    await this.#act(names)
  }
}
