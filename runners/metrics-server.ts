/** `GET /metrics` of a runner process, on this host alone. */
import { once } from 'node:events'
import { createServer, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { familiesOf, metricsPage, type Registry } from '../shared/metrics.ts'

export interface MetricsServer extends AsyncDisposable {
  readonly url: string
}

/**
 * Listens on loopback: what is counted names functions, and asks nobody who they are.
 *
 * @param port 0, or one that another runner of this host has already: any free one
 */
export async function serveMetrics(registry: Registry, port: number): Promise<MetricsServer> {
  const server = createServer(async (request, response) => {
    if (request.url?.split('?', 1)[0] !== '/metrics') return response.writeHead(404).end()
    try {
      const { body, contentType } = await metricsPage(await familiesOf(registry), request.headers.accept)
      response.writeHead(200, { 'content-type': contentType }).end(body)
    } catch (error) {
      response.writeHead(500).end((error as Error).message)
    }
  })
  try {
    await listening(server, port)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EADDRINUSE') throw error
    await listening(server, 0)
  }
  server.unref()
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/metrics`,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

async function listening(server: Server, port: number): Promise<void> {
  server.listen(port, '127.0.0.1')
  await once(server, 'listening')
}
