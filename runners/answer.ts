/** Where the response to a call by HTTP goes: to the caller as it comes, or into the end of the workload. */
import type { HttpAnswer } from '../shared/events.ts'
import type { RunnerExchange } from '../shared/exchange.ts'
import { inlineBody, inlineBodyBytes, sealHeaders } from '../shared/http.ts'
import type { SecretBox } from '../shared/secrets.ts'
import type { BlobRef } from '../shared/workload.ts'
import type { ByteSink, HttpResponse, Outcome } from './runner.ts'

/** Headers of a response may take so much (bytes) together. */
const headersMaxBytes = 64 * 1024

export interface AnswerOptions {
  /** The workload: what sealed headers are bound to. */
  id: string
  box: SecretBox
  /** Where a caller waits; else the response is kept. */
  exchange: RunnerExchange | undefined
  /** Largest response that is kept, MiB. */
  outputMb: number
}

export class Answer {
  readonly #options: AnswerOptions
  #head: HttpResponse | undefined
  /** Of a response that is kept. */
  #parts: Uint8Array[] | undefined
  #size = 0
  #complete = false
  /** Why the response is not acceptable, if it is not. */
  excess: string | undefined

  constructor(options: AnswerOptions) {
    this.#options = options
  }

  /** As `RunEvents.respond`. */
  respond = (head: HttpResponse): ByteSink => {
    this.#checkHead(head)
    if (this.excess !== undefined) return refusing(this.excess)
    this.#head = head
    const { exchange } = this.#options
    return exchange === undefined ? this.#keep() : exchange.respond(head)
  }

  /** What the end says of it; `store` takes a body too large for a message. */
  async toEvent(
    outcome: Outcome,
    store: (bytes: Uint8Array) => Promise<BlobRef>,
  ): Promise<HttpAnswer | undefined> {
    const { id, box } = this.#options
    const whole = outcome.status === 'completed' ? outcome.response : undefined
    if (whole !== undefined) {
      const { status, headers, body } = whole
      return { status, ...sealHeaders(headers, box, id), body: await toBody(body, store) }
    }
    if (this.#head === undefined) return undefined
    const answer = { status: this.#head.status, ...sealHeaders(this.#head.headers, box, id) }
    if (this.#parts === undefined) return { ...answer, body: 'live' }
    return this.#complete ? { ...answer, body: await toBody(Buffer.concat(this.#parts), store) } : undefined
  }

  /** Looks at a response that came with the outcome. */
  check(outcome: Outcome): void {
    if (outcome.status === 'completed' && outcome.response !== undefined) this.#checkHead(outcome.response)
  }

  /** The status of the response, as far as there is one. */
  statusOf(outcome: Outcome): number | undefined {
    return outcome.status === 'completed' && outcome.response !== undefined
      ? outcome.response.status
      : this.#head?.status
  }

  /** Bytes of the response that the end has to carry or refer to. */
  kept(outcome: Outcome): number {
    return outcome.status === 'completed' && outcome.response !== undefined
      ? outcome.response.body.byteLength
      : this.#size
  }

  #checkHead({ headers }: HttpResponse): void {
    const size = headers.reduce((sum, [name, value]) => sum + name.length + value.length, 0)
    if (size > headersMaxBytes)
      this.excess = `the headers of its response take ${size} bytes where ${headersMaxBytes} are allowed`
  }

  #keep(): ByteSink {
    const limit = this.#options.outputMb * 1_048_576
    const parts: Uint8Array[] = []
    this.#parts = parts
    return {
      write: async (bytes) => {
        this.#size += bytes.byteLength
        if (this.#size > limit) {
          this.excess = `its response is larger than its limit of ${this.#options.outputMb} MiB`
          parts.length = 0
          throw new Error(this.excess)
        }
        parts.push(Uint8Array.from(bytes))
      },
      end: () => {
        this.#complete = true
      },
      fail() {},
    }
  }
}

const toBody = async (
  bytes: Uint8Array,
  store: (bytes: Uint8Array) => Promise<BlobRef>,
): Promise<HttpAnswer['body']> =>
  bytes.byteLength <= inlineBodyBytes ? inlineBody(bytes) : await store(bytes)

const refusing = (reason: string): ByteSink => ({
  write: () => Promise.reject(new Error(reason)),
  end() {},
  fail() {},
})
