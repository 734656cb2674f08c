/**
 * Collects one attempt’s log lines and publishes them in numbered batches, within the workload’s limit. Batches
 * are stored in order; the end names the last number, so that a reader knows of a gap.
 */
import type { LogCount } from '../shared/events.ts'
import type { LogLine } from '../shared/workload.ts'

/** Milliseconds a line waits for others before its batch goes out. */
const lingerMs = 25
/** A batch goes out at once at this size. As JSON a byte may take six, and a message holds 1 MiB. */
const batchBytes = 96 * 1024
const batchLines = 1_000

/** Longest line (UTF-16 units); what is longer is cut. */
const lineLength = 64 * 1024

export interface LogLimits {
  lines: number
  bytes: number
}

/**
 * Called for one batch at a time, in order; where it rejects, that batch is a gap that readers are told of. It must
 * put the batch on the wire before it returns its promise.
 */
type Publish = (n: number, lines: LogLine[], dropped: number) => Promise<unknown>

/** One for each attempt: a class, as an object with a getter of its own would outlive its call by far in V8’s heap. */
export class Logbook {
  readonly #limits: LogLimits
  readonly #publish: Publish
  #pending: LogLine[] = []
  #pendingBytes = 0
  #last = 0
  #lines = 0
  #bytes = 0
  #dropped = 0
  #timer: NodeJS.Timeout | undefined
  #inFlight = 0
  #chain: Promise<unknown> | undefined

  constructor(limits: LogLimits, publish: Publish) {
    this.#limits = limits
    this.#publish = publish
  }

  write = (line: LogLine): void => {
    if (line.text.length > lineLength) line = { ...line, text: `${line.text.slice(0, lineLength)}…` }
    const size = Buffer.byteLength(line.text) + 64
    if (this.#lines >= this.#limits.lines || this.#bytes + size > this.#limits.bytes) {
      this.#dropped++
      return
    }
    this.#lines++
    this.#bytes += size
    this.#pendingBytes += size
    this.#pending.push(line)
    if (this.#pending.length >= batchLines || this.#pendingBytes >= batchBytes) this.#send()
    else this.#timer ??= setTimeout(() => this.#send(), lingerMs)
  }

  /** Hands out what is left; the count is final. The last batch may still be on its way to the stream. */
  close(): LogCount {
    if (this.#pending.length > 0 || this.#dropped > 0) this.#send()
    return { last: this.#last, lines: this.#lines, dropped: this.#dropped }
  }

  /** True when all batches but the last have been stored, so that an end published now comes behind them. */
  get settled(): boolean {
    return this.#inFlight <= 1
  }

  /** Settles when every batch has been stored or given up. Never rejects. */
  async flushed(): Promise<void> {
    await this.#chain
  }

  #send(): void {
    clearTimeout(this.#timer)
    this.#timer = undefined
    const n = ++this.#last
    const batch = this.#pending
    const dropped = this.#dropped
    this.#pending = []
    this.#pendingBytes = 0
    const go = () => this.#publish(n, batch, dropped).catch(() => {})
    const sent = this.#inFlight++ === 0 ? go() : this.#chain!.then(go)
    this.#chain = sent.finally(() => this.#inFlight--)
  }
}
