/** Restate: its server, and one service by its SDK in a process of its own. */
import { spawn } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { tryPort } from '../../scripts/ports.ts'
import { answers, ended, type Peer } from './peer.ts'

const service = (sdk: string, port: number) => `
import * as restate from ${JSON.stringify(sdk)}
const bench = restate.service({ name: 'bench', handlers: { double: async (ctx, { x }) => ({ y: x * 2 }) } })
await restate.serve({ services: [bench], port: ${port} })
`

/** Its ingress takes `POST /bench/double` with \`{"x": n}\`. */
export async function startRestate(peers: string): Promise<Peer> {
  const folder = await mkdtemp(join(tmpdir(), 'vulcan-restate-'))
  const [ingress, admin, fabric, code] = (await Promise.all(
    Array.from({ length: 4 }, () => tryPort('127.0.0.1', 0)),
  )) as [number, number, number, number]
  const scope = new AsyncDisposableStack()
  scope.defer(() => rm(folder, { recursive: true, force: true }))
  try {
    const sdk = pathToFileURL(join(peers, 'node_modules/@restatedev/restate-sdk/dist/index.js')).href
    const script = join(folder, 'service.mjs')
    await writeFile(script, service(sdk, code))
    const own = { ...process.env, RESTATE_LOGGING: 'ERROR', RUST_LOG: 'error' }
    const sdkProcess = spawn(process.execPath, [script], { env: own, stdio: 'ignore', detached: true })
    scope.defer(() => ended(sdkProcess))
    const server = spawn(
      join(peers, 'node_modules/.bin/restate-server'),
      ['--base-dir', join(folder, 'data')],
      {
        env: {
          ...own,
          RESTATE_INGRESS__BIND_ADDRESS: `127.0.0.1:${ingress}`,
          RESTATE_ADMIN__BIND_ADDRESS: `127.0.0.1:${admin}`,
          RESTATE_BIND_ADDRESS: `127.0.0.1:${fabric}`,
          RESTATE_ADVERTISED_ADDRESS: `http://127.0.0.1:${fabric}`,
          RESTATE_DISABLE_TELEMETRY: 'true',
          DO_NOT_TRACK: '1',
        },
        stdio: 'ignore',
        detached: true,
      },
    )
    scope.defer(() => ended(server))
    await answers(`http://127.0.0.1:${admin}/health`, server)
    await register(admin, code)
    const url = `http://127.0.0.1:${ingress}`
    await answers(url, server)
    return { url, [Symbol.asyncDispose]: () => scope.disposeAsync() }
  } catch (error) {
    await scope.disposeAsync()
    throw error
  }
}

async function register(admin: number, service: number): Promise<void> {
  let answer = ''
  for (let tries = 0; tries < 100; tries++) {
    const response = await fetch(`http://127.0.0.1:${admin}/deployments`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ uri: `http://127.0.0.1:${service}` }),
    }).catch(() => undefined)
    if (response?.ok) return
    answer = (await response?.text()) ?? 'no answer'
    await new Promise((resolve) => setTimeout(resolve, 200))
  }
  throw new Error(`Restate did not take the service: ${answer}`)
}
