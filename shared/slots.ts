/**
 * Who may ask for how much work: one number of slots, shared by a common queue and any number of lanes. Pure; it is
 * told what came and what ended, and answers with what to ask for.
 *
 * A queue that is known to have more is given slots in turn, and they are promised to it until they are filled. One
 * that seems empty keeps an open ask beyond the slots, so that what comes to it is heard of at once; where such an
 * ask is answered and no slot is free, the message is handed back for another runner, or for a better moment.
 */

/** Milliseconds for which a slot is kept for a queue that does not fill it: others may have been faster. */
const promiseMs = 150

export interface Queue {
  /** The one without lane. */
  readonly common: boolean
  /** How many more messages it may hold or ask for, beside what it holds now; at most `Infinity`. */
  room(): number
}

interface Place {
  held: number
  /** Messages that open asks may still bring. */
  asked: number
  /** Of those asked for, how many are sure to be there: slots are kept for them. */
  promised: number
  promisedAt: number
  /** Messages that waited in it when last heard of. */
  pending: number
  /** It stands in line for slots. */
  inLine: boolean
}

export class Slots<Q extends Queue> {
  readonly total: number
  readonly #ask: (queue: Q, count: number) => void
  readonly #now: () => number
  readonly #places = new Map<Q, Place>()
  /** Lanes in line, the longest waiting first; some may have left it. */
  #line: Q[] = []
  #common: Q | undefined
  #held = 0
  #heldCommon = 0
  #promised = 0
  #promisedCommon = 0
  readonly #promises = new Set<Q>()
  #open = true
  #serving = false

  constructor(total: number, ask: (queue: Q, count: number) => void, now: () => number = Date.now) {
    this.total = total
    this.#ask = ask
    this.#now = now
  }

  /** Messages in hand, of all queues. */
  get held(): number {
    return this.#held
  }

  heldOf(queue: Q): number {
    return this.#places.get(queue)?.held ?? 0
  }

  /** A queue takes part from now on. */
  add(queue: Q): void {
    if (queue.common) this.#common = queue
    this.#places.set(queue, { held: 0, asked: 0, promised: 0, promisedAt: 0, pending: 0, inLine: false })
    this.wake(queue)
  }

  /** It asks no more. What is held of it still counts until it is released. */
  remove(queue: Q): void {
    const place = this.#places.get(queue)
    if (place === undefined) return
    this.#promise(queue, place, 0)
    this.#places.delete(queue)
    if (queue === this.#common) this.#common = undefined
    this.#serve()
  }

  /** A message came, and `pending` more wait behind it. False: there is no slot, it must be handed back. */
  arrived(queue: Q, pending: number): boolean {
    const place = this.#places.get(queue)
    const taken = this.#open && place !== undefined && this.#held < this.total
    if (place !== undefined) {
      place.asked = Math.max(0, place.asked - 1)
      place.pending = taken ? pending : Math.max(1, pending)
      this.#promise(queue, place, Math.min(place.asked, pending))
    }
    if (taken) this.#hold(queue, place, 1)
    this.wake(queue)
    return taken
  }

  /** Work of a queue has ended, or was handed back. */
  released(queue: Q): void {
    this.#hold(queue, this.#places.get(queue), -1)
    this.wake(queue)
  }

  /** So many messages asked for will not come; at least all: what was asked is void. */
  lapsed(queue: Q, count: number): void {
    const place = this.#places.get(queue)
    if (place === undefined) return
    place.asked = Math.max(0, place.asked - count)
    place.pending = 0
    this.#promise(queue, place, 0)
    this.wake(queue)
  }

  /** Its room has changed. */
  wake(queue: Q): void {
    const place = this.#places.get(queue)
    if (place !== undefined && !place.inLine && (place.pending > 0 || place.asked === 0)) {
      place.inLine = true
      if (!queue.common) this.#line.push(queue)
    }
    this.#serve()
  }

  /** Nothing is asked while it is closed. Whatever was asked before is void. */
  close(): void {
    this.#open = false
  }

  reopen(): void {
    this.#open = true
    for (const [queue, place] of this.#places) {
      place.asked = 0
      this.#promise(queue, place, 0)
      place.inLine = true
    }
    this.#line = [...this.#places.keys()].filter((queue) => !queue.common)
    this.#serve()
  }

  /** To be called now and then: lets go of promises that were not kept, and forgets nobody. */
  tick(): void {
    const now = this.#now()
    for (const queue of this.#promises) {
      const place = this.#places.get(queue)!
      if (now - place.promisedAt >= promiseMs) this.#promise(queue, place, 0)
    }
    this.#serve()
  }

  #hold(queue: Q, place: Place | undefined, count: 1 | -1): void {
    this.#held += count
    if (queue.common) this.#heldCommon += count
    if (place !== undefined) place.held = Math.max(0, place.held + count)
  }

  #promise(queue: Q, place: Place, count: number): void {
    const change = count - place.promised
    this.#promised += change
    if (queue.common) this.#promisedCommon += change
    place.promised = count
    place.promisedAt = this.#now()
    if (count > 0) this.#promises.add(queue)
    else this.#promises.delete(queue)
  }

  get #free(): number {
    return this.total - this.#held - this.#promised
  }

  #serve(): void {
    // An ask may answer before it returns.
    if (this.#serving) return
    this.#serving = true
    while (this.#open && this.#free > 0 && this.#next());
    this.#serving = false
  }

  /** Gives the next in line its due; false: nobody is left who wants any. */
  #next(): boolean {
    const lane = this.#firstLane()
    const common = this.#common
    const place = common && this.#places.get(common)!
    if (common !== undefined && place !== undefined) {
      // Both have their half where both want it; among lanes it goes in turn.
      const used = this.#heldCommon + this.#promisedCommon
      const fair = lane === undefined || used <= this.#held + this.#promised - used
      // Its own open asks count against it. Alone it does not ask for little while other asks are open.
      const most = Math.min(this.#free - (place.asked - place.promised), common.room() - place.asked)
      const want = lane === undefined ? most : Math.min(most, Math.ceil(this.#free / 2))
      const worth = lane === undefined && place.asked > 0 ? Math.max(1, Math.floor(this.total / 4)) : 1
      if (fair && want >= worth) {
        this.#grant(common, place, want)
        return true
      }
    }
    if (lane === undefined) return false
    this.#line.shift()
    const mine = this.#places.get(lane)!
    mine.inLine = false
    const share = Math.max(1, Math.floor(this.#free / (this.#line.length + 1)))
    // No more than is there, and one to hear of what comes. Where it has no room it comes back when that changes.
    const most = Math.min(lane.room(), Math.max(1, mine.pending)) - mine.asked
    if (most > 0) this.#grant(lane, mine, Math.min(most, share))
    return true
  }

  #firstLane(): Q | undefined {
    for (;;) {
      const lane = this.#line[0]
      if (lane === undefined || this.#places.get(lane)?.inLine === true) return lane
      this.#line.shift()
    }
  }

  #grant(queue: Q, place: Place, count: number): void {
    place.asked += count
    place.inLine = false
    this.#promise(queue, place, Math.min(place.asked, place.pending))
    this.#ask(queue, count)
  }
}
