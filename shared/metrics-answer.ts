/**
 * How what a process counts gets to whoever asks: on the bus, where a gateway gathers the answers of all, and as the
 * page that each process serves itself.
 */
import { randomUUID } from 'node:crypto'
import { promisify } from 'node:util'
import { gunzip, gzip } from 'node:zlib'
import { z } from 'zod'
import type { Bus } from './bus.ts'
import { Family, familiesOf, type Registry } from './metrics.ts'
import { metricsSubject } from './subjects.ts'

const pack = promisify(gzip)
const unpack = promisify(gunzip)

/** Milliseconds that those who are expected are waited for. */
const patienceMs = 3_000
/** Milliseconds without another word, after which nobody is waited for who is not expected. */
const quietMs = 50
/** An answer is not unpacked beyond so many bytes. */
const answerBytes = 64 * 1_048_576
/** A process that has not answered so often in a row is no longer expected. */
const missesUntilForgotten = 3

const Answer = z.object({ process: z.string(), families: z.array(Family) })
type Answer = z.infer<typeof Answer>

/** A process that has heard the question says so at once by its id: gathering its figures may take it a while. */
const processId = /^[a-z][a-z0-9-]{0,99}$/
const gzipMagic = 0x1f

/** Answers for this process until it is disposed of. `process` is its id, as in events and heartbeats. */
export function answerMetrics(bus: Bus, process: string, registry: Registry): Disposable {
  const subscription = bus.listen(metricsSubject, (message) => {
    const { reply } = message
    if (reply === undefined) return
    message.respond(process)
    void (async () => {
      const answer: Answer = { process, families: await familiesOf(registry) }
      bus.send(reply, await pack(JSON.stringify(answer)))
    })().catch(() => {})
  })
  return { [Symbol.dispose]: () => subscription.unsubscribe() }
}

export interface Gathered {
  /** Of every process that answered, the asking one apart, if it was told of. */
  families: Family[]
  /** Ids of those that answered, and of those that were expected and did not. */
  answered: string[]
  missing: string[]
}

/** Asks all processes at once, and waits for those that say they are there, answered lately, or are expected. */
export class MetricsGatherer {
  readonly #bus: Bus
  readonly #self: string
  readonly #expected: () => string[]
  readonly #patienceMs: number
  /** How often in a row each that has answered before did not. */
  readonly #misses = new Map<string, number>()
  #asking: Promise<Gathered> | undefined

  /**
   * @param self the id of the asking process, whose own answer is left out
   * @param waitMs for those who are expected; 3 s unless given
   */
  constructor(bus: Bus, self: string, expected: () => string[], waitMs = patienceMs) {
    this.#bus = bus
    this.#self = self
    this.#expected = expected
    this.#patienceMs = waitMs
  }

  /** Those who ask while somebody does get the same. Never rejects; takes at most some three seconds. */
  gather(): Promise<Gathered> {
    this.#asking ??= this.#ask().finally(() => {
      this.#asking = undefined
    })
    return this.#asking
  }

  async #ask(): Promise<Gathered> {
    const answers = new Map<string, Family[]>()
    const waited = new Set([...this.#expected(), ...this.#misses.keys()])
    waited.delete(this.#self)
    if (this.#bus.connected) await this.#collect(answers, waited)
    for (const process of answers.keys()) this.#misses.set(process, 0)
    const missing = [...waited].filter((process) => !answers.has(process))
    for (const process of missing) {
      const misses = (this.#misses.get(process) ?? 0) + 1
      if (misses < missesUntilForgotten) this.#misses.set(process, misses)
      else this.#misses.delete(process)
    }
    return { families: [...answers.values()].flat(), answered: [...answers.keys()], missing }
  }

  async #collect(answers: Map<string, Family[]>, waited: Set<string>): Promise<void> {
    const inbox = `_INBOX.${randomUUID()}`
    const { promise: over, resolve: finish } = Promise.withResolvers<void>()
    const patience = setTimeout(finish, this.#patienceMs)
    let quiet: NodeJS.Timeout | undefined
    const look = () => {
      clearTimeout(quiet)
      if ([...waited].every((process) => answers.has(process))) quiet = setTimeout(finish, quietMs)
    }
    const subscription = this.#bus.listen(inbox, (message) => {
      if (message.data[0] !== gzipMagic) {
        const word = message.string()
        if (processId.test(word) && word !== this.#self) waited.add(word)
        look()
        return
      }
      void (async () => {
        const text = await unpack(message.data, { maxOutputLength: answerBytes })
        const { process, families } = Answer.parse(JSON.parse(text.toString()))
        if (process !== this.#self) answers.set(process, families)
        look()
      })().catch(() => {})
    })
    this.#bus.publish(metricsSubject, '', inbox)
    look()
    await over
    clearTimeout(patience)
    clearTimeout(quiet)
    subscription.unsubscribe()
  }
}
