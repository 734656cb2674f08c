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

export interface Logbook {
  write(line: LogLine): void
  /** Hands out what is left; the count is final. The last batch may still be on its way to the stream. */
  close(): LogCount
  /**
   * True when all batches but the last have been stored, so that an end published now comes behind them.
   */
  readonly settled: boolean
  /** Settles when every batch has been stored or given up. Never rejects. */
  flushed(): Promise<void>
}

/**
 * `publish` is called for one batch at a time, in order; where it rejects, that batch is a gap that readers are
 * told of. It must put the batch on the wire before it returns its promise.
 */
export function openLogbook(
  limits: LogLimits,
  publish: (n: number, lines: LogLine[], dropped: number) => Promise<unknown>,
): Logbook {
  let pending: LogLine[] = []
  let pendingBytes = 0
  let last = 0
  let lines = 0
  let bytes = 0
  let dropped = 0
  let timer: NodeJS.Timeout | undefined
  let inFlight = 0
  let chain: Promise<unknown> = Promise.resolve()

  const send = () => {
    clearTimeout(timer)
    timer = undefined
    const n = ++last
    const batch = pending
    const lost = dropped
    pending = []
    pendingBytes = 0
    const go = () => publish(n, batch, lost).catch(() => {})
    chain = (inFlight++ === 0 ? go() : chain.then(go)).finally(() => inFlight--)
  }

  return {
    write(line) {
      if (line.text.length > lineLength) line = { ...line, text: `${line.text.slice(0, lineLength)}…` }
      const size = Buffer.byteLength(line.text) + 64
      if (lines >= limits.lines || bytes + size > limits.bytes) {
        dropped++
        return
      }
      lines++
      bytes += size
      pendingBytes += size
      pending.push(line)
      if (pending.length >= batchLines || pendingBytes >= batchBytes) send()
      else timer ??= setTimeout(send, lingerMs)
    },
    close() {
      if (pending.length > 0 || dropped > 0) send()
      clearTimeout(timer)
      return { last, lines, dropped }
    },
    get settled() {
      return inFlight <= 1
    },
    async flushed() {
      await chain
    },
  }
}
