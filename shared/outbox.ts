/**
 * Messages to be published, in the bytes of the NATS protocol (`PUB` and `HPUB`), one behind the other in one piece
 * of memory. The client’s own way makes arrays of the parts of each message, and copies them together later: that
 * costs a call more than encoding its events does.
 */

/** Memory that is taken at once. */
const slabBytes = 64 * 1024

/** Blanks and line breaks would begin something else in the protocol. */
const unfit = /[\s\0]/

export class Outbox {
  #slab = Buffer.allocUnsafeSlow(slabBytes)
  /** Where what was not taken yet begins and ends. */
  #from = 0
  #to = 0
  #messages = 0

  get isEmpty(): boolean {
    return this.#from === this.#to
  }

  /**
   * @param headers as `headerBlock` makes them; empty: none
   * Throws for a subject, or a subject for replies, that is none.
   */
  add(subject: string, reply: string | undefined, headers: string, payload: string | Uint8Array): void {
    if (subject === '' || unfit.test(subject) || (reply !== undefined && unfit.test(reply)))
      throw new TypeError(`${JSON.stringify([subject, reply])}: no subject to publish on`)
    const size = typeof payload === 'string' ? Buffer.byteLength(payload) : payload.byteLength
    const subjects = reply === undefined ? subject : `${subject} ${reply}`
    const head =
      headers === ''
        ? `PUB ${subjects} ${size}\r\n`
        : `HPUB ${subjects} ${headers.length} ${headers.length + size}\r\n${headers}`
    this.#reserve(head.length * 3 + size + 2)
    const slab = this.#slab
    let at = this.#to
    at += slab.write(head, at)
    const from = at
    if (typeof payload === 'string') at += slab.write(payload, at)
    else {
      slab.set(payload, at)
      at += size
    }
    // Of another length it would be read as something else.
    if (at - from !== size) throw new Error(`${at - from} bytes were written where ${size} were announced`)
    slab[at] = 0x0d
    slab[at + 1] = 0x0a
    this.#to = at + 2
    this.#messages++
  }

  /** All that was added since the last time. These bytes stay as they are. */
  take(): { bytes: Uint8Array; messages: number } {
    const taken = { bytes: this.#slab.subarray(this.#from, this.#to), messages: this.#messages }
    this.#from = this.#to
    this.#messages = 0
    return taken
  }

  #reserve(bytes: number): void {
    if (this.#to + bytes <= this.#slab.byteLength) return
    const waiting = this.#slab.subarray(this.#from, this.#to)
    this.#slab = Buffer.allocUnsafeSlow(Math.max(slabBytes, waiting.byteLength + bytes))
    this.#slab.set(waiting)
    this.#from = 0
    this.#to = waiting.byteLength
  }
}

/** Names and values in turn, in their wire form. What is undefined, or not fit for a header, is left out. */
export function headerBlock(...fields: (string | undefined)[]): string {
  let text = 'NATS/1.0\r\n'
  for (let i = 0; i < fields.length; i += 2) {
    const value = fields[i + 1]
    if (value !== undefined && printable.test(value)) text += `${fields[i]}: ${value}\r\n`
  }
  return `${text}\r\n`
}

/** A line break would begin a header of its own, and a character must be one byte. */
const printable = /^[\x20-\x7e]*$/
