/**
 * Spans of user code on the runner’s side. What a guest says of them is checked and bounded here: code may draw what
 * it likes below its own run, and no more of it than `maxSpans`.
 */
import { FrameError } from '../../shared/frames.ts'
import {
  maxSpanAttributes,
  maxSpanKey,
  maxSpans,
  maxSpanText,
  maxSpanValue,
  type SpanAttributes,
  type SpanBegin,
  type SpanEnd,
} from '../../shared/guest.ts'
import { isSpanId } from '../../shared/trace.ts'
import type { Phase } from '../runner.ts'

/** In a name of an attribute; ours begin with `vulcan.`, which code does not write. */
const isKey = (text: string) =>
  text.length <= maxSpanKey && /^[\w./:-]+$/.test(text) && !text.startsWith('vulcan.')

const plain = (text: string) => text.slice(0, maxSpanText).replace(/\p{Cc}/gu, ' ')
/** Never a part: half a secret would not be known as one. */
const boundedText = (text: string) => (text.length > maxSpanValue ? `[${text.length} characters]` : text)

function attributesOf(value: unknown): SpanAttributes {
  const checked: SpanAttributes = {}
  if (value === undefined) return checked
  if (typeof value !== 'object' || value === null) throw new FrameError('attributes that are no object')
  let count = 0
  for (const [key, one] of Object.entries(value)) {
    if (count === maxSpanAttributes) break
    if (!isKey(key)) continue
    if (typeof one === 'string') checked[key] = boundedText(one)
    else if (typeof one === 'boolean' || (typeof one === 'number' && Number.isFinite(one))) checked[key] = one
    else continue
    count++
  }
  return checked
}

const isTime = (value: unknown): value is number => typeof value === 'number' && Number.isFinite(value)

export class UserSpans {
  readonly #onPhase: (phase: Phase) => void
  /** From the guest’s clock to ms since the epoch. */
  readonly #toEpoch: (ms: number) => number
  /** In the order in which they began. */
  readonly #open = new Map<string, Phase>()
  #begun = 0

  constructor(onPhase: (phase: Phase) => void, toEpoch: (ms: number) => number) {
    this.#onPhase = onPhase
    this.#toEpoch = toEpoch
  }

  /** What the guest said. Throws `FrameError` where that is no span. */
  handle(value: unknown): void {
    if (typeof value !== 'object' || value === null) throw new FrameError('a span that is no object')
    const { id, start, end } = value as Partial<SpanBegin & SpanEnd>
    if (!isSpanId(id)) throw new FrameError('a span without an id')
    if (isTime(start)) this.#begin(id, start, value as Partial<SpanBegin>)
    else if (isTime(end)) this.#end(id, end, value as Partial<SpanEnd>)
    else throw new FrameError('a span without a time')
  }

  /** The run is over: what is open ends now, and says so. */
  close(at: number): void {
    for (const [id, phase] of [...this.#open].reverse()) {
      this.#open.delete(id)
      this.#onPhase({ ...phase, end: Math.max(phase.start, at), error: 'the run ended before it' })
    }
  }

  #begin(id: string, start: number, { name, parent, kind, attributes }: Partial<SpanBegin>): void {
    if (typeof name !== 'string') throw new FrameError('a span without a name')
    if (parent !== undefined && !isSpanId(parent)) throw new FrameError('a span under what is none')
    if (this.#begun === maxSpans || this.#open.has(id)) return
    this.#begun++
    const at = this.#toEpoch(start)
    this.#open.set(id, {
      name: plain(name) || 'span',
      ...(kind === 'client' ? { kind } : {}),
      start: at,
      end: at,
      attributes: attributesOf(attributes),
      spanId: id,
      ...(parent === undefined ? {} : { parentSpanId: parent }),
    })
  }

  #end(id: string, end: number, { attributes, error }: Partial<SpanEnd>): void {
    const phase = this.#open.get(id)
    if (phase === undefined) return
    this.#open.delete(id)
    const all = { ...phase.attributes, ...attributesOf(attributes) }
    this.#onPhase({
      ...phase,
      end: Math.max(phase.start, this.#toEpoch(end)),
      attributes: attributesOf(all),
      ...(typeof error === 'string' ? { error: plain(error) } : {}),
    })
  }
}
