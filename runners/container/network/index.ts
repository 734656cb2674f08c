/**
 * Networks for boxes. Each is a namespace with one interface; its other end is in a router namespace of this process,
 * where the rules are: a box may hold root and send raw packets, and still has nothing to turn them off with.
 *
 * Nothing of it stands in the file system, in the host’s own namespace or in its firewall, and namespaces are kept by
 * descriptors of this process alone. When it dies, at whatever line, the kernel takes them away with interfaces and
 * rules, and slirp4netns ends with its pipe. So there is nothing that a later start would have to look for.
 */
import type { Egress } from '../../../shared/workload.ts'
import { type EgressOptions, plainEntry, systemResolve } from '../../egress.ts'
import type { EngineOptions, Network, Networks } from '../engine.ts'
import { type Allowlist, pinAllowlist } from './allowlist.ts'
import { NetworkError, NetworksUnavailable } from './error.ts'
import { Guard } from './guard.ts'
import { Link } from './link.ts'
import { Router } from './router.ts'
import { nameserver, openRules } from './rules.ts'

export { NetworkError, NetworksUnavailable } from './error.ts'

export interface BoxNetworks extends Networks {
  /** Of the namespace that holds the rules: `nsenter --net=<path> nft list ruleset`. */
  readonly routerPath: string
  /** Processes that serve all networks. */
  pids(): number[]
}

/** The host’s own addresses are looked at this often, and whenever a network is opened; ms. */
const ownMs = 5_000
/** The platform’s names are looked up this often; ms. */
const platformMs = 60_000
/** Numbers of boxes, and so their addresses, come around again after as many. */
const maxBoxes = 16_384
const whatBringsIt =
  'run the runner as root, with Debian’s packages nftables, iproute2 and slirp4netns, on a kernel with network namespaces, nftables and /dev/net/tun'

/** Throws `NetworksUnavailable`. */
export async function openNetworks(options: EngineOptions & { egress: EgressOptions }): Promise<BoxNetworks> {
  try {
    await using scope = new AsyncDisposableStack()
    const router = scope.use(await Router.start())
    const networks = scope.use(new RoutedNetworks(router, options.egress))
    await networks.lookAround()
    // What one box needs is tried before it is promised.
    await (await networks.open('all', AbortSignal.timeout(10_000)))[Symbol.asyncDispose]()
    scope.move()
    return networks
  } catch (cause) {
    const message = `containers can have no network: ${(cause as Error).message}`
    throw new NetworksUnavailable(message, whatBringsIt, { cause })
  }
}

class RoutedNetworks implements BoxNetworks {
  readonly #router: Router
  readonly #guard: Guard
  readonly #allowPrivate: ReadonlySet<string>
  readonly #resolve: (host: string) => Promise<string[]>
  readonly #open = new Set<Network>()
  readonly #numbers = new Set<number>()
  readonly #timers: NodeJS.Timeout[]
  #lastRules = ''
  #lastNumber = -1

  constructor(router: Router, egress: EgressOptions) {
    this.#router = router
    this.#guard = new Guard(egress)
    this.#allowPrivate = new Set(egress.allowPrivate?.map(plainEntry))
    this.#resolve = egress.resolve ?? systemResolve
    // What is known stays in force where looking again fails.
    const ignore = () => {}
    this.#timers = [
      setInterval(() => void this.#lookAtHost().catch(ignore), ownMs).unref(),
      setInterval(() => void this.lookAround().catch(ignore), platformMs).unref(),
    ]
  }

  get routerPath(): string {
    return this.#router.path
  }

  pids(): number[] {
    return this.#router.pids
  }

  async lookAround(): Promise<void> {
    await this.#guard.lookUpPlatform()
    await this.#lookAtHost()
  }

  async #lookAtHost(): Promise<void> {
    await this.#guard.readOwn()
    const { rules } = this.#guard
    if (rules === this.#lastRules) return
    await this.#router.nft(rules)
    this.#lastRules = rules
  }

  async open(egress: Exclude<Egress, 'none'>, signal: AbortSignal): Promise<Network> {
    signal.throwIfAborted()
    try {
      await this.#lookAtHost()
      const allowlist = egress === 'all' ? await this.#pinPrivate(signal) : await this.#pin(egress, signal)
      return await this.#connect(allowlist, egress === 'all', signal)
    } catch (cause) {
      signal.throwIfAborted()
      if (cause instanceof NetworkError) throw cause
      throw new NetworkError('engine', `no network: ${(cause as Error).message}`, { cause })
    }
  }

  async #pin(policy: readonly string[], signal: AbortSignal): Promise<Allowlist> {
    const aborted = Promise.withResolvers<never>()
    const abort = () => aborted.reject(signal.reason)
    signal.addEventListener('abort', abort)
    try {
      const pinned = pinAllowlist(policy, {
        allowPrivate: this.#allowPrivate,
        resolve: this.#resolve,
        isOwn: (address) => this.#guard.isOwn(address),
        isPlatform: (address, port) => this.#guard.isPlatform(address, port),
      })
      return await Promise.race([pinned, aborted.promise])
    } finally {
      signal.removeEventListener('abort', abort)
    }
  }

  /** What the operator has named may be reached by whoever may reach everything; what of it cannot be had is left out. */
  async #pinPrivate(signal: AbortSignal): Promise<Allowlist> {
    const entries = [...this.#allowPrivate]
    const found = await Promise.all(
      entries.map((entry) => this.#pin([entry], signal).catch(() => ({ pins: [], hosts: [] }))),
    )
    return { pins: found.flatMap(({ pins }) => pins), hosts: found.flatMap(({ hosts }) => hosts) }
  }

  async #connect(allowlist: Allowlist, toPublic: boolean, signal: AbortSignal): Promise<Network> {
    await using scope = new AsyncDisposableStack()
    const number = this.#takeNumber()
    scope.defer(() => void this.#numbers.delete(number))
    const link = scope.use(await Link.create(this.#router, number))
    signal.throwIfAborted()
    await this.#router.nft(openRules(link.name, allowlist.pins, toPublic))
    const router = this.#router
    scope.defer(() => router.removeRules(link.name))
    signal.throwIfAborted()
    const resources = scope.move()
    const network: Network = {
      get path() {
        return link.path
      },
      hosts: allowlist.hosts,
      nameservers: toPublic ? [nameserver] : [],
      denied: () => router.packets(link.name),
      traffic: () => router.traffic(link.name),
      join: (pid) => link.moveTo(pid),
      [Symbol.asyncDispose]: async () => {
        this.#open.delete(network)
        await resources.disposeAsync()
      },
    }
    this.#open.add(network)
    return network
  }

  #takeNumber(): number {
    for (let tried = 0; tried < maxBoxes; tried++) {
      this.#lastNumber = (this.#lastNumber + 1) % maxBoxes
      if (this.#numbers.has(this.#lastNumber)) continue
      this.#numbers.add(this.#lastNumber)
      return this.#lastNumber
    }
    throw new Error(`all ${maxBoxes} networks are in use`)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const timer of this.#timers) clearInterval(timer)
    await this.#router[Symbol.asyncDispose]()
    await Promise.all([...this.#open].map((network) => network[Symbol.asyncDispose]()))
  }
}
