/** What no box may reach though it may look public: the addresses of this host, and those of the platform. */
import { readFile } from 'node:fs/promises'
import { BlockList, isIPv4 } from 'node:net'
import { type EgressOptions, plainEntry, systemResolve } from '../../egress.ts'
import { guardRules } from './rules.ts'

export class Guard {
  readonly #names: readonly string[]
  readonly #resolve: (host: string) => Promise<string[]>
  /** `address` or `address/bits`, sorted. */
  #own: string[] = []
  #ownList = new BlockList()
  /** Address and port, by name. */
  #platform = new Map<string, [string, number][]>()

  constructor({ platform = [], resolve = systemResolve }: EgressOptions) {
    this.#names = platform.map(plainEntry)
    this.#resolve = resolve
  }

  isOwn(address: string): boolean {
    return this.#ownList.check(address, 'ipv4')
  }

  isPlatform(address: string, port: number): boolean {
    return this.#pairs.some(([theirs, at]) => theirs === address && at === port)
  }

  /** What the router is to know of it, as text for `nft -f`. */
  get rules(): string {
    return guardRules(this.#own, this.#pairs)
  }

  get #pairs(): [string, number][] {
    return [...this.#platform.values()].flat()
  }

  /** Throws where the kernel does not tell. */
  async readOwn(): Promise<void> {
    const own = localAddresses(await readFile('/proc/net/fib_trie', 'utf8'))
    const list = new BlockList()
    for (const entry of own) {
      const [net, bits] = entry.split('/')
      if (bits === undefined) list.addAddress(net!, 'ipv4')
      else list.addSubnet(net!, Number(bits), 'ipv4')
    }
    this.#own = own
    this.#ownList = list
  }

  /** Takes as long as the resolver does. */
  async lookUpPlatform(): Promise<void> {
    for (const entry of this.#names) {
      const at = entry.lastIndexOf(':')
      const host = entry.slice(0, at)
      // What was known stays where there is no answer.
      const addresses = isIPv4(host) ? [host] : await this.#resolve(host).catch(() => undefined)
      if (addresses === undefined) continue
      const pairs = [...new Set(addresses.filter(isIPv4))].map((one): [string, number] => [
        one,
        Number(entry.slice(at + 1)),
      ])
      this.#platform.set(entry, pairs)
    }
  }
}

/**
 * The kernel’s own list (/proc/net/fib_trie) of what it takes for itself, also of interfaces that are down: a line with
 * the first address of each prefix, and below it a line such as `/32 host LOCAL` or `/32 link BROADCAST`.
 */
export function localAddresses(trie: string): string[] {
  const found = new Set<string>()
  let address = ''
  for (const line of trie.split('\n')) {
    address = /^ *\|-- ([\d.]+)$/.exec(line)?.[1] ?? address
    const bits = /^ *\/(\d+) \w+ (?:LOCAL|BROADCAST)/.exec(line)?.[1]
    if (bits !== undefined) found.add(bits === '32' ? address : `${address}/${bits}`)
  }
  return [...found].sort()
}
