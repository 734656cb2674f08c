/** workerd with one function and no queue. */
import { spawn } from 'node:child_process'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { tryPort } from '../../scripts/ports.ts'
import { answers, ended, type Peer } from './peer.ts'

const config = (port: number) => `using Workerd = import "/workerd/workerd.capnp";
const config :Workerd.Config = (
  services = [ (name = "main", worker = .worker) ],
  sockets = [ ( name = "http", address = "127.0.0.1:${port}", http = (), service = "main" ) ]
);
const worker :Workerd.Worker = (
  modules = [ (name = "index.js", esModule = embed "index.js") ],
  compatibilityDate = "2026-01-01",
);
`

/** Serves `code`, an ES module with a fetch handler. */
export async function startWorkerd(peers: string, code: string): Promise<Peer> {
  const folder = await mkdtemp(join(tmpdir(), 'vulcan-workerd-'))
  const port = await tryPort('127.0.0.1', 0)
  await writeFile(join(folder, 'index.js'), code)
  await writeFile(join(folder, 'config.capnp'), config(port))
  const child = spawn(join(peers, 'node_modules/.bin/workerd'), ['serve', 'config.capnp'], {
    cwd: folder,
    stdio: 'ignore',
    detached: true,
  })
  const url = `http://127.0.0.1:${port}`
  await answers(url, child)
  return {
    url,
    async [Symbol.asyncDispose]() {
      await ended(child)
      await rm(folder, { recursive: true })
    },
  }
}
