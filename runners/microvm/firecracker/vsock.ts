/**
 * The byte channel to a port of the guest, through the Unix socket of Firecracker’s vsock device: the host says
 * `CONNECT <port>`, and is answered `OK <port of its own>` once somebody in the guest has taken the connection
 * (docs/vsock.md). Where nobody listens yet Firecracker hangs up, and it is tried again.
 */
import { connect, type Socket } from 'node:net'
import { Duplex } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'

/** Between two tries, ms. */
const againMs = 20
/** For one try: a guest that takes a connection says so at once, one that hangs never does; ms. */
const tryMs = 2_000
/** Of `OK 4294967295\n`. */
const maxAnswerBytes = 16

/**
 * Connected in the background: what is written waits. Ends where the guest ends it, and where `gone` settles before
 * anybody in the guest has taken the connection.
 */
export class VsockChannel extends Duplex {
  #socket: Socket | undefined
  #complete = false
  readonly #connected: Promise<Socket>
  readonly #stop = new AbortController()

  constructor(socketPath: string, port: number, gone: Promise<unknown>) {
    super()
    gone.then(() => this.#stop.abort())
    this.#connected = this.#connect(socketPath, port)
    this.#connected.then(
      (socket) => this.#use(socket),
      () => this.#end(),
    )
  }

  async #connect(path: string, port: number): Promise<Socket> {
    const { signal } = this.#stop
    for (;;) {
      const socket = await connectVsock(path, port, signal).catch(() => undefined)
      if (socket !== undefined) return socket
      await sleep(againMs, undefined, { signal })
    }
  }

  #use(socket: Socket): void {
    this.#socket = socket
    if (this.destroyed) {
      socket.destroy()
      return
    }
    socket.on('data', (chunk) => {
      if (!this.push(chunk)) socket.pause()
    })
    socket.once('error', (error) => this.destroy(error))
    socket.once('close', () => this.#end())
    socket.once('end', () => this.#end())
  }

  #end(): void {
    if (!this.#complete && !this.destroyed) this.push(null)
    this.#complete = true
  }

  override _read(): void {
    this.#socket?.resume()
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, done: (error?: Error | null) => void): void {
    this.#connected.then((socket) => socket.write(chunk, done), done)
  }

  override _final(done: (error?: Error | null) => void): void {
    this.#connected.then((socket) => socket.end(done), done)
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#stop.abort()
    this.#socket?.destroy()
    done(error)
  }
}

/** One try. Rejects where nobody takes the connection within two seconds, or `signal` is aborted. */
export function connectVsock(path: string, port: number, signal: AbortSignal): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connect({ path })
    let answer = ''
    const give = () => socket.destroy(new Error('nobody has taken the connection'))
    const timer = setTimeout(give, tryMs)
    const settle = (error?: Error) => {
      clearTimeout(timer)
      signal.removeEventListener('abort', give)
      socket.off('readable', take).off('error', settle).off('close', hangUp)
      if (error === undefined) return resolve(socket)
      // What comes of it after this is nobody’s business.
      socket.on('error', () => {}).destroy()
      reject(error)
    }
    const hangUp = () => settle(new Error('nobody listens on the port'))
    const take = () => {
      // Byte by byte: what follows the line is the guest’s.
      for (let byte = socket.read(1); byte !== null; byte = socket.read(1)) {
        answer += byte.toString('latin1')
        if (/^OK \d+\n$/.test(answer)) return settle()
        if (byte[0] === 10 || answer.length >= maxAnswerBytes)
          return settle(new Error(`an answer that is none: ${JSON.stringify(answer)}`))
      }
    }
    signal.addEventListener('abort', give, { once: true })
    if (signal.aborted) give()
    socket.on('readable', take).once('error', settle).once('close', hangUp)
    socket.write(`CONNECT ${port}\n`)
  })
}
