import { once } from 'node:events'
import { type AddressInfo, createServer } from 'node:net'

/**
 * Binds a TCP port for a moment. Port 0 lets the kernel choose.
 *
 * @returns the port, now free again
 * @throws the bind error (`EADDRINUSE`, `EACCES`, …)
 */
export async function tryPort(host: string, port: number): Promise<number> {
  const server = createServer().listen({ host, port, exclusive: true })
  await once(server, 'listening')
  const bound = (server.address() as AddressInfo).port
  await new Promise((resolve) => server.close(resolve))
  return bound
}

/**
 * The first free port from `port` upwards; any free one when `port` is 0. None of `promised`: somebody is about to
 * listen there.
 *
 * @throws when the next hundred are all taken, or the host is not one of this machine
 */
export async function nextFreePort(
  host: string,
  port: number,
  promised: readonly number[] = [],
): Promise<number> {
  const step = port === 0 ? 0 : 1
  for (let candidate = port; ; candidate += step) {
    try {
      const free = await tryPort(host, candidate)
      if (!promised.includes(free)) return free
    } catch (error) {
      const code = (error as NodeJS.ErrnoException).code
      if (code !== 'EADDRINUSE' || port === 0 || candidate >= Math.min(port + 100, 65_535)) throw error
    }
  }
}
