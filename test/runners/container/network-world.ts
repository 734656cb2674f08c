/**
 * A small internet in namespaces, so that no packet of a test leaves this machine: `host` is where a runner lives,
 * `outside` holds every other address. Nothing of it is named anywhere; it ends with its processes.
 */
import { type ChildProcess, execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import type { Target } from './network-client.ts'
import type { HostCalls } from './network-host.ts'
import type { Listening } from './network-servers.ts'

const exec = promisify(execFile)
const script = (name: string) => join(import.meta.dirname, name)

/** Addresses of the outside, each with TCP on 80, 443 and 8080, and UDP on 443 and 7777. */
export const places = {
  allowed: '93.184.216.34',
  other: '93.184.216.35',
  /** In the host’s own private network. */
  neighbour: '10.99.0.7',
  private: '192.168.7.7',
  carrier: '100.64.1.1',
  metadata: '169.254.169.254',
  broker: '45.33.66.6',
} as const
/** Addresses of the host. The last is of an interface without a carrier. */
export const own = { public: '45.33.10.2', private: '10.99.0.2', idle: '45.33.77.1' } as const
/** Where the host’s own resolver listens, as systemd’s does. */
const resolver = '127.0.0.53'

export type Host = AsyncDisposable & {
  pid: number
  call<Name extends keyof HostCalls>(
    name: Name,
    ...args: Parameters<HostCalls[Name]>
  ): Promise<Awaited<ReturnType<HostCalls[Name]>>>
  kill(): Promise<void>
}

export type World = AsyncDisposable & {
  /** Where the host’s network namespace is entered. */
  hostPath: string
  outsidePath: string
  /** A runner on the host, as root or without any right. */
  startHost(user?: 'root' | 'nobody'): Promise<Host>
  /** Servers in a namespace. */
  serve(path: string, listening: Listening[]): Promise<AsyncDisposable>
}

/** Runs a command in a network namespace, and resolves to its output. */
export async function runIn(path: string, ...command: string[]): Promise<string> {
  return (await exec('nsenter', [`--net=${path}`, '--', ...command])).stdout
}

/** What comes of each target when it is tried from a network namespace. */
export async function attempt(path: string, targets: Target[]): Promise<string[]> {
  return JSON.parse(await runIn(path, process.execPath, script('network-client.ts'), JSON.stringify(targets)))
}

export const tcp = (host: string, port = 80): Target => ({ protocol: 'tcp', host, port })
export const udp = (host: string, port = 7_777): Target => ({ protocol: 'udp', host, port })

/** A script with an IPC channel, behind a command that changes its namespaces. */
function start(command: string[], name: string): ChildProcess {
  const [file, ...args] = command
  return spawn(file!, [...args, process.execPath, script(name)], {
    stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
  })
}

async function end(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return
  child.kill('SIGKILL')
  await once(child, 'exit')
}

async function listen(child: ChildProcess, listening: Listening[]): Promise<void> {
  child.send(listening)
  const over = AbortSignal.timeout(20_000)
  await Promise.race([
    once(child, 'message', { signal: over }),
    once(child, 'exit', { signal: over }).then(() => Promise.reject(new Error('servers did not start'))),
  ])
}

export async function startWorld(): Promise<World> {
  await using scope = new AsyncDisposableStack()
  const dir = mkdtempSync(join(tmpdir(), 'vulcan-test-network-'))
  scope.defer(() => rmSync(dir, { recursive: true }))
  mkdirSync(join(dir, 'shared'))
  writeFileSync(join(dir, 'resolv.conf'), `nameserver ${resolver}\n`)

  const outside = start(['unshare', '--net', '--'], 'network-servers.ts')
  scope.defer(() => end(outside))
  const hostServers = start(['unshare', '--net', '--'], 'network-servers.ts')
  scope.defer(() => end(hostServers))
  // Both have changed namespaces once their script has been started.
  await Promise.all([listen(outside, []), listen(hostServers, [])])
  const outsidePath = `/proc/${outside.pid}/ns/net`
  const hostPath = `/proc/${hostServers.pid}/ns/net`

  const batch = (path: string, lines: string[]) =>
    runIn(path, 'sh', '-c', 'printf "%s\\n" "$@" | ip -batch -', 'sh', ...lines)
  await batch(hostPath, [
    'link set lo up',
    `link add eth0 type veth peer name eth0 netns ${outsidePath}`,
    `addr add ${own.public}/24 dev eth0`,
    `addr add ${own.private}/24 dev eth0`,
    'addr add 2a00:1450::2/64 dev eth0 nodad',
    'link set eth0 up',
    'route add default via 45.33.10.1',
    'link add idle type veth peer name idle0',
    `addr add ${own.idle}/32 dev idle`,
    'link set idle up',
  ])
  await batch(outsidePath, [
    'link set lo up',
    'addr add 45.33.10.1/24 dev eth0',
    'addr add 2a00:1450::1/64 dev eth0 nodad',
    `addr add ${places.neighbour}/24 dev eth0`,
    'link set eth0 up',
    ...Object.values(places)
      .filter((address) => address !== places.neighbour)
      .map((address) => `addr add ${address}/32 dev lo`),
  ])
  await listen(
    outside,
    Object.entries(places).flatMap(([name, address]) => [
      ...[80, 443, 8_080].map((port): Listening => ({ protocol: 'tcp', address, port, name })),
      ...[443, 7_777].map((port): Listening => ({ protocol: 'udp', address, port, name })),
    ]),
  )
  await listen(outside, [{ protocol: 'tcp', address: '2a00:1450::1', port: 80, name: 'six' }])
  await listen(hostServers, [
    { protocol: 'tcp', address: '0.0.0.0', port: 80, name: 'host' },
    { protocol: 'dns', address: resolver, port: 53, names: { 'allowed.example': places.allowed } },
  ])

  const hosts = scope.adopt(new Set<Host>(), async (all) => {
    for (const host of all) await host.kill()
  })
  const startHost: World['startHost'] = async (user = 'root') => {
    const child = start(
      [
        'nsenter',
        `--net=${hostPath}`,
        '--',
        'unshare',
        '--mount',
        '--',
        'sh',
        '-c',
        // As on most hosts, mounts are shared.
        `mount --bind "$0/resolv.conf" /etc/resolv.conf && cd "$0/shared" && mount -t tmpfs --make-shared none . &&
         cd "$0/shared" && mkdir deep && mount -t tmpfs none deep && cd / && exec "$@"`,
        dir,
        ...(user === 'root' ? [] : ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups']),
      ],
      'network-host.ts',
    )
    const host = talkTo(child)
    hosts.add(host)
    return host
  }
  const resources = scope.move()
  return {
    hostPath,
    outsidePath,
    startHost,
    serve: async (path, listening) => {
      const child = start(['nsenter', `--net=${path}`, '--'], 'network-servers.ts')
      await listen(child, listening)
      return { [Symbol.asyncDispose]: () => end(child) }
    },
    [Symbol.asyncDispose]: () => resources.disposeAsync(),
  }
}

/** A script of network-host.ts that runs. */
export function talkTo(child: ChildProcess): Host {
  type Reply = { number: number; result?: unknown; error?: { name: string; message: string } }
  const waiting = new Map<number, PromiseWithResolvers<unknown>>()
  let last = 0
  child.on('message', ({ number, result, error }: Reply) => {
    const call = waiting.get(number)
    waiting.delete(number)
    if (error === undefined) call?.resolve(result)
    else call?.reject(Object.assign(new Error(error.message), error))
  })
  child.once('exit', () => {
    for (const call of waiting.values()) call.reject(new Error('the host has ended'))
  })
  const kill = () => end(child)
  return {
    pid: child.pid!,
    call: async (name, ...args) => {
      const number = ++last
      const call = Promise.withResolvers<unknown>()
      waiting.set(number, call)
      child.send({ number, name, args })
      return (await call.promise) as never
    },
    kill,
    [Symbol.asyncDispose]: kill,
  }
}
