/** Counters of the kernel that are read again and again: kept open, as opening them takes most of the time. */
import { closeSync, openSync, readSync } from 'node:fs'

/** Longer ones are cut. */
const buffer = Buffer.allocUnsafe(16 * 1024)

export class KeptFiles implements Disposable {
  readonly #open = new Map<string, number>()

  /** What stands in it now. Throws where it cannot be read, or what it counted is gone. */
  read(path: string): string {
    let descriptor = this.#open.get(path)
    if (descriptor === undefined) {
      descriptor = openSync(path, 'r')
      this.#open.set(path, descriptor)
    }
    return buffer.toString('latin1', 0, readSync(descriptor, buffer, 0, buffer.length, 0))
  }

  /** Whoever reads afterwards opens again. */
  [Symbol.dispose](): void {
    for (const descriptor of this.#open.values()) closeSync(descriptor)
    this.#open.clear()
  }
}
