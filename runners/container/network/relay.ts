/**
 * The seam for services: a port of the host that leads into a box which has no network at all. The box sees a
 * directory of the host (a `Mount`; runsc needs `--host-uds=create`) and something in it listens on a Unix socket
 * there, or relays from it to a port of the box’s own loopback. The relay on the host’s side is this.
 */
import { once } from 'node:events'
import { closeSync, constants, fstatSync, openSync } from 'node:fs'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'

export interface RelayOptions {
  /** Address of the host to listen on. */
  host: string
  /** 0: any that is free. */
  port: number
  /** Absolute, in a directory that the box may write to: all but its last part is ours. */
  socket: string
}

export interface Relay extends AsyncDisposable {
  readonly port: number
}

/** open(2), which Node does not name: the descriptor stands for the file and opens nothing. */
const O_PATH = 0o10000000

/**
 * Every connection to the port becomes one to the socket; where nothing listens there, it is reset. Disposing of it
 * ends all. Throws where the port cannot be had.
 */
export async function openRelay({ host, port, socket: path }: RelayOptions): Promise<Relay> {
  const sockets = new Set<Socket>()
  const keep = (socket: Socket) => {
    sockets.add(socket)
    return socket.once('close', () => sockets.delete(socket))
  }
  const server = createServer({ allowHalfOpen: true, noDelay: true }, (client) => {
    keep(client)
    try {
      const service = keep(connectTo(path))
      // Each way to its own end; one that breaks takes the other with it.
      client.pipe(service).pipe(client)
      client.on('error', () => {}).once('close', () => service.destroy())
      service
        .on('error', () => {})
        .once('close', () => {
          if (!client.writableEnded) client.resetAndDestroy()
        })
    } catch {
      client.on('error', () => {}).resetAndDestroy()
    }
  })
  await once(server.listen({ host, port }), 'listening')
  return {
    port: (server.address() as AddressInfo).port,
    async [Symbol.asyncDispose]() {
      const closed = once(server, 'close')
      server.close()
      for (const socket of sockets) socket.destroy()
      await closed
    },
  }
}

/**
 * Connects to a socket that hostile code has made. It must be one, and not a link: that would lead our clients to any
 * socket of the host. What was looked at is what is connected to, whatever stands at that path by then.
 */
function connectTo(path: string): Socket {
  const descriptor = openSync(path, O_PATH | constants.O_NOFOLLOW)
  try {
    if (!fstatSync(descriptor).isSocket()) throw new Error(`${path} is not a socket`)
    const socket = connect({ path: `/proc/self/fd/${descriptor}`, allowHalfOpen: true })
    return socket.once('close', () => closeSync(descriptor))
  } catch (error) {
    closeSync(descriptor)
    throw error
  }
}
