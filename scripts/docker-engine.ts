import { request } from 'node:http'

const defaultSocket = '/var/run/docker.sock'
const pingTimeoutMs = 3_000

/**
 * Whether a Docker Engine answers at `DOCKER_HOST`'s value, or at the usual socket where it has none. Of a host that
 * is not a local socket this is believed: its credentials are not for the set-up.
 */
export async function engineAnswers(host: string | undefined): Promise<boolean> {
  if (host && !host.startsWith('unix://')) return true
  const socketPath = host ? host.slice('unix://'.length) : defaultSocket
  return new Promise((resolve) => {
    const call = request({ socketPath, path: '/_ping', timeout: pingTimeoutMs }, (response) => {
      response.resume()
      resolve(response.statusCode === 200)
    })
    call.on('timeout', () => call.destroy(new Error('timeout')))
    call.on('error', () => resolve(false))
    call.end()
  })
}
