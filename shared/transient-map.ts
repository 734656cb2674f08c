/**
 * A map whose keys come and go all the time.
 *
 * A `Map` copies itself whenever its dead entries have filled it, and each copy refers to the next: once one of them
 * has become old, V8 keeps all that follow, with whatever was in them, until its next full collection. A call that
 * went through such a map outlives itself by seconds, is copied by the collector, and takes everything that it refers
 * to along. Here nothing refers to a value any more once it was deleted.
 */
export class TransientMap<K, V> implements Iterable<[K, V]> {
  readonly #cells = new Map<K, Cell<V>>()

  get size(): number {
    return this.#cells.size
  }

  get(key: K): V | undefined {
    return this.#cells.get(key)?.value
  }

  has(key: K): boolean {
    return this.#cells.has(key)
  }

  set(key: K, value: V): void {
    const cell = this.#cells.get(key)
    if (cell === undefined) this.#cells.set(key, new Cell(value))
    else cell.value = value
  }

  /** What was there; undefined: nothing. */
  delete(key: K): V | undefined {
    const cell = this.#cells.get(key)
    if (cell === undefined) return undefined
    const { value } = cell
    cell.value = undefined
    this.#cells.delete(key)
    return value
  }

  clear(): void {
    for (const cell of this.#cells.values()) cell.value = undefined
    this.#cells.clear()
  }

  *values(): IterableIterator<V> {
    for (const { value } of this.#cells.values()) if (value !== undefined) yield value
  }

  *[Symbol.iterator](): IterableIterator<[K, V]> {
    for (const [key, { value }] of this.#cells) if (value !== undefined) yield [key, value]
  }
}

class Cell<V> {
  value: V | undefined
  constructor(value: V) {
    this.value = value
  }
}
