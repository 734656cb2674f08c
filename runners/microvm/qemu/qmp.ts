/** What the runner says to QEMU: the QEMU Machine Protocol (docs/interop/qmp-spec.rst), over a socket. */
import type { Duplex } from 'node:stream'
import { z } from 'zod'

/** The longest line that is taken: QEMU’s own answers to what is asked here are below 4 KiB. */
const maxLineBytes = 64 * 1024

const Message = z.union([
  z.looseObject({ event: z.string(), data: z.record(z.string(), z.unknown()).optional() }),
  z.looseObject({ return: z.unknown(), id: z.int() }),
  z.looseObject({ error: z.object({ class: z.string(), desc: z.string() }), id: z.int().optional() }),
  z.looseObject({ QMP: z.looseObject({}) }),
])

export class QmpError extends Error {
  override name = 'QmpError'
}

export interface QmpEvent {
  name: string
  data: Record<string, unknown>
}

interface Call {
  command: string
  resolve(value: unknown): void
  reject(error: Error): void
}

/** Commands are carried out one after the other, so that several may be under way. */
export class Qmp {
  readonly #socket: Duplex
  readonly #calls = new Map<number, Call>()
  readonly #listeners = new Set<(event: QmpEvent) => void>()
  /** Of those who wait for events: to be told that none will come. */
  readonly #waiting = new Set<(error: QmpError) => void>()
  #last = 0
  #text = ''
  #failure: QmpError | undefined

  constructor(socket: Duplex) {
    this.#socket = socket
    socket.setEncoding('utf8')
    socket.on('data', (piece: string) => this.#take(piece))
    socket.on('error', (cause) => this.#fail(new QmpError(`QEMU cannot be spoken to: ${cause.message}`)))
    for (const end of ['end', 'close']) socket.once(end, () => this.#fail(new QmpError('QEMU has gone')))
  }

  /**
   * What a command returns. The first has to be `qmp_capabilities`. Rejects with `QmpError`: refused, no answer in
   * `ms`, or the connection is lost.
   */
  call(command: string, args?: Record<string, unknown>, ms = 10_000): Promise<unknown> {
    if (this.#failure !== undefined) return Promise.reject(this.#failure)
    const id = ++this.#last
    return new Promise((resolve, reject) => {
      const late = setTimeout(
        () => settle(() => reject(new QmpError(`no answer to ${command} in ${ms} ms`))),
        ms,
      )
      const settle = (how: () => void) => {
        clearTimeout(late)
        this.#calls.delete(id)
        how()
      }
      this.#calls.set(id, {
        command,
        resolve: (value) => settle(() => resolve(value)),
        reject: (error) => settle(() => reject(error)),
      })
      // As short as may be: QEMU reads one byte at a time.
      this.#socket.write(`${JSON.stringify({ execute: command, ...(args && { arguments: args }), id })}\n`)
    })
  }

  /** The first event that `matches`. Rejects with `QmpError` after `ms`, or where the connection is lost. */
  event(matches: (event: QmpEvent) => boolean, ms: number, what: string): Promise<QmpEvent> {
    if (this.#failure !== undefined) return Promise.reject(this.#failure)
    return new Promise((resolve, reject) => {
      const end = () => {
        clearTimeout(late)
        this.#listeners.delete(take)
        this.#waiting.delete(refuse)
      }
      const take = (event: QmpEvent) => {
        if (!matches(event)) return
        end()
        resolve(event)
      }
      const refuse = (error: QmpError) => {
        end()
        reject(error)
      }
      const late = setTimeout(() => refuse(new QmpError(`${what} took more than ${ms} ms`)), ms)
      this.#listeners.add(take)
      this.#waiting.add(refuse)
    })
  }
  #take(piece: string): void {
    if (this.#failure !== undefined) return
    this.#text += piece
    const lines = this.#text.split('\n')
    this.#text = lines.pop()!
    if ([...lines, this.#text].some((line) => line.length > maxLineBytes))
      this.#fail(new QmpError('QEMU says a line that is too long'))
    for (const line of lines) {
      if (this.#failure !== undefined) return
      if (line.trim() !== '') this.#takeLine(line)
    }
  }

  #takeLine(line: string): void {
    let message: z.infer<typeof Message>
    try {
      message = Message.parse(JSON.parse(line))
    } catch {
      this.#fail(new QmpError(`QEMU says what is no QMP: ${JSON.stringify(line.slice(0, 200))}`))
      return
    }
    if ('event' in message) {
      const event = { name: message.event as string, data: (message.data ?? {}) as Record<string, unknown> }
      for (const listener of [...this.#listeners]) listener(event)
    } else if ('id' in message) {
      const call = this.#calls.get(message.id as number)
      if ('error' in message) {
        const { desc } = message.error as { desc: string }
        call?.reject(new QmpError(`${call.command}: ${desc.slice(0, 1_000)}`))
      } else call?.resolve(message.return)
    } else if ('error' in message) this.#fail(new QmpError('QEMU did not understand a command'))
  }

  #fail(failure: QmpError): void {
    if (this.#failure !== undefined) return
    this.#failure = failure
    this.#text = ''
    for (const call of [...this.#calls.values()]) call.reject(failure)
    for (const refuse of [...this.#waiting]) refuse(failure)
    this.#socket.destroy()
  }
}
