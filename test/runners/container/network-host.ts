/** Stands for a runner on a host of its own: opens networks as it is told over IPC. Ends with who started it. */

import { mkdirSync, symlinkSync } from 'node:fs'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import type { Network } from '../../../runners/container/engine.ts'
import { createGvisor } from '../../../runners/container/gvisor/index.ts'
import { type BoxNetworks, openNetworks } from '../../../runners/container/network/index.ts'
import type { Egress } from '../../../shared/workload.ts'
import type { Target } from './network-client.ts'

let networks: BoxNetworks | undefined
const open = new Map<number, Network>()
const answers: Record<string, string[]> = {}

/** What it does; arguments and results are JSON. */
const calls = {
  async start(options: { allowPrivate?: string[]; platform?: string[] }) {
    const resolve = async (host: string) => {
      const found = answers[host]
      if (found === undefined) throw Object.assign(new Error(`${host} is unknown`), { code: 'ENOTFOUND' })
      return found
    }
    networks = await openNetworks({ owner: 'test', stateDir: '/nowhere', egress: { ...options, resolve } })
    return { routerPath: networks.routerPath, pids: networks.pids() }
  },
  /** The addresses that a name has from now on. */
  async name(host: string, addresses: string[]) {
    answers[host] = addresses
  },
  async open(id: number, egress: Exclude<Egress, 'none'>) {
    const network = await networks!.open(egress, AbortSignal.timeout(20_000))
    open.set(id, network)
    return { path: network.path, hosts: network.hosts, nameservers: network.nameservers }
  },
  async denied(id: number) {
    return await open.get(id)!.denied()
  },
  async traffic(id: number) {
    return open.get(id)!.traffic() ?? null
  },
  async join(id: number, pid: number) {
    await open.get(id)!.join(pid)
    return open.get(id)!.path
  },
  /** Tries targets from a sandbox of gVisor with that network: what network-client.ts prints, or what went wrong. */
  async gvisor(id: number, stateDir: string, targets: Target[]) {
    await using engine = await createGvisor({ owner: `test-${process.pid}`, stateDir })
    const root = join(stateDir, 'root')
    mkdirSync(root)
    // The host’s programs, in a root that holds nothing else.
    for (const name of ['bin', 'lib', 'lib64']) symlinkSync(`usr/${name}`, join(root, name))
    const readonly = (path: string) => ({ source: path, target: path, readonly: true })
    const box = await engine.create({
      image: {
        digest: `sha256:${'0'.repeat(64)}`,
        config: { entrypoint: [], cmd: [], env: {}, workingDir: '/', user: '' },
        layout: '',
        root: async () => root,
        [Symbol.dispose]() {},
      },
      argv: [process.execPath, join(import.meta.dirname, 'network-client.ts'), JSON.stringify(targets)],
      env: {},
      cwd: '/',
      user: { uid: 0, gid: 0, groups: [] },
      mounts: [readonly('/usr'), readonly(join(import.meta.dirname, '../../..'))],
      limits: { memoryMb: 512, cpu: 1, pids: 64, diskMb: 16, fileBytes: 1 << 20 },
      network: open.get(id),
    })
    try {
      await box.start()
      box.stdin.end()
      const [output, complaint, { code }] = await Promise.all([
        text(box.stdout),
        text(box.stderr),
        box.exited,
      ])
      return code === 0 ? (JSON.parse(output) as string[]) : [`exit ${code}: ${complaint}`]
    } finally {
      await box.remove()
    }
  },
  async close(id: number) {
    await open.get(id)![Symbol.asyncDispose]()
    open.delete(id)
  },
  async pids() {
    return networks!.pids()
  },
  async stop() {
    await networks![Symbol.asyncDispose]()
  },
  /** Opens and closes for ever, several at once. */
  async churn() {
    const round = async () => {
      const network = await networks!.open('all', AbortSignal.timeout(20_000))
      await network[Symbol.asyncDispose]()
    }
    const forever = async (): Promise<void> => round().then(forever)
    for (let i = 0; i < 3; i++) void forever()
  },
}
export type HostCalls = typeof calls

if (import.meta.main) {
  process.once('disconnect', () => process.exit())
  process.on('message', async ({ number, name, args }: { number: number; name: string; args: unknown[] }) => {
    try {
      const call = calls[name as keyof HostCalls] as (...args: unknown[]) => Promise<unknown>
      process.send!({ number, result: await call(...args) })
    } catch (error) {
      const { message, name, fix, fault } = error as Error & { fix?: string; fault?: string }
      process.send!({ number, error: { message, name, fix, fault } })
    }
  })
}
