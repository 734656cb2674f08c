/**
 * The interface of a machine on the host: a tap in a network namespace that somebody else has made, with four addresses
 * of its own, and rules that let it out through the namespace’s interface under that one’s address. Where it may go
 * from there is for the rules behind that interface.
 *
 * A record of each is written before anything of it is made: a namespace may outlive this process, and then the next
 * start’s janitor takes away what is named there. Names hold the owner’s, so that they are nobody else’s.
 */
import { createHash } from 'node:crypto'
import { closeSync, openSync, readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs'
import { mkdir, readdir, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { z } from 'zod'
import { Namespace, runIn } from '../../container/network/namespace.ts'
import type { Identity } from './jailer.ts'

/** How many /30s of 198.19.0.0/17 (RFC 2544, used by no network) one namespace has. */
const maxTaps = 8_192

export interface Addresses {
  /** Of the guest, with prefix length. */
  address: string
  /** Of the tap. */
  gateway: string
}

/** Of the tap of this number in its namespace. The first is what a namespace with a single machine uses. */
export function addressesOf(number: number): Addresses {
  const of = (host: number) => `198.19.${number >> 6}.${(number & 63) * 4 + host}`
  return { address: `${of(2)}/30`, gateway: of(1) }
}

const Record = z.object({
  /** Of the interface, and of the table with its rules. */
  name: z.string().regex(/^vm[0-9a-f]{8}[0-9a-z]{1,4}$/),
  /** Such as `net:[4026531840]`. */
  namespace: z.string(),
  /** Through which it leaves; null: nowhere. */
  wayOut: z.string().nullable(),
  /** Packets were not forwarded from there before. */
  opened: z.boolean(),
})
type Record = z.infer<typeof Record>

export interface Tap extends Addresses, AsyncDisposable {
  name: string
  /** Path of the network namespace that it is in. */
  netns: string
}

export class Taps {
  readonly #dir: string
  readonly #prefix: string
  /** Numbers in use, of each namespace. */
  readonly #numbers = new Map<string, Set<number>>()
  /** Namespaces from which the taps that are there have packets forwarded. */
  readonly #opened = new Set<string>()
  #made = 0
  #last: Promise<unknown> = Promise.resolve()

  /** `dir` is for the records: see `tapsDir`. */
  constructor(dir: string, owner: string) {
    this.#dir = dir
    this.#prefix = prefixOf(owner)
  }

  /** In the namespace at `netns`; undefined: in a new one, from which nothing leads anywhere. */
  async open(netns: string | undefined, identity: Identity): Promise<Tap> {
    if (netns !== undefined) return await this.#open(netns, identity)
    using namespace = await Namespace.create(async () => '')
    return await this.#open(namespace.path, identity)
  }

  async #open(path: string, identity: Identity): Promise<Tap> {
    await using scope = new AsyncDisposableStack()
    // Held: who gave it may give it up first.
    const descriptor = openSync(path, 'r')
    scope.defer(() => closeSync(descriptor))
    const netns = `/proc/${process.pid}/fd/${descriptor}`
    // One after the other: each looks at what is there.
    const opening = this.#last.then(() => this.#make(scope, netns, identity))
    this.#last = opening.catch(() => {})
    const { name, addresses } = await opening
    const resources = scope.move()
    return { ...addresses, name, netns, [Symbol.asyncDispose]: () => resources.disposeAsync() }
  }

  async #make(scope: AsyncDisposableStack, netns: string, identity: Identity) {
    const namespace = namespaceAt(netns)
    const number = this.#take(namespace, await takenIn(netns))
    scope.defer(() => this.#give(namespace, number))
    const wayOut = await wayOutOf(netns)
    if (wayOut !== null && (await forwarding(netns, wayOut)) === '0') this.#opened.add(namespace)
    const name = `${this.#prefix}${(this.#made++ % 36 ** 4).toString(36)}`
    const record: Record = { name, namespace, wayOut, opened: this.#opened.has(namespace) }
    const file = join(this.#dir, `${name}.json`)
    await mkdir(this.#dir, { recursive: true, mode: 0o700 })
    scope.defer(async () => {
      await takeDown(netns, record)
      await rm(file, { force: true })
    })
    await writeFile(file, JSON.stringify(record))
    const addresses = addressesOf(number)
    await setUp(netns, record, addresses, identity)
    return { name, addresses }
  }

  #take(namespace: string, taken: ReadonlySet<string>): number {
    const numbers = this.#numbers.get(namespace) ?? new Set()
    for (let number = 0; number < maxTaps; number++) {
      if (numbers.has(number) || taken.has(addressesOf(number).gateway)) continue
      this.#numbers.set(namespace, numbers.add(number))
      return number
    }
    throw new Error(`all ${maxTaps} addresses of the namespace are in use`)
  }

  #give(namespace: string, number: number): void {
    const numbers = this.#numbers.get(namespace)
    numbers?.delete(number)
    if (numbers?.size !== 0) return
    this.#numbers.delete(namespace)
    this.#opened.delete(namespace)
  }
}

/** Where the records of an owner are, below its directory. */
export const tapsDir = (dir: string) => join(dir, 'taps')

/** Takes away what a dead owner has left in namespaces that are still there. Throws where something resists. */
export async function removeTaps(dir: string, owner: string): Promise<void> {
  const files = await readdir(dir).catch(() => [])
  for (const file of files) {
    const record = readRecord(join(dir, file))
    if (record === undefined || !record.name.startsWith(prefixOf(owner))) continue
    const netns = findNamespace(record.namespace)
    if (netns !== undefined) await takeDown(netns, record)
    await rm(join(dir, file), { force: true })
  }
}

/** An interface has 15 letters at most: `vm`, 8 that stand for the owner, and a number. */
const prefixOf = (owner: string) => `vm${createHash('sha256').update(owner).digest('hex').slice(0, 8)}`

function readRecord(file: string): Record | undefined {
  try {
    return Record.parse(JSON.parse(readFileSync(file, 'utf8')))
  } catch {
    return undefined
  }
}

/**
 * Of packets from the guest only those with its address are taken, and only on their way out; nothing of the namespace
 * itself is reached, nor the tap of another machine.
 */
function rulesOf({ name, wayOut }: Record, { address }: Addresses): string {
  const guest = address.split('/')[0]
  const out =
    wayOut === null
      ? ''
      : `
    iifname "${name}" oifname "${wayOut}" accept
    oifname "${name}" iifname "${wayOut}" ct state established,related accept`
  const translate =
    wayOut === null
      ? ''
      : `
  chain translate {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr ${guest} oifname "${wayOut}" masquerade
  }`
  return `table inet ${name} {
  chain sources {
    type filter hook prerouting priority raw; policy accept;
    iifname != "${name}" return
    meta nfproto != ipv4 drop
    ip saddr != ${guest} drop
  }
  chain input {
    type filter hook input priority filter; policy accept;
    iifname "${name}" drop
  }
  chain forward {
    type filter hook forward priority filter; policy accept;${out}
    iifname "${name}" drop
    oifname "${name}" drop
  }${translate}
}
`
}

async function setUp(netns: string, record: Record, addresses: Addresses, { uid, gid }: Identity) {
  const { name, wayOut, opened } = record
  await runIn(netns, 'nft', ['-f', '-'], rulesOf(record, addresses))
  await runIn(
    netns,
    'ip',
    ['-batch', '-'],
    `tuntap add dev ${name} mode tap user ${uid} group ${gid}
link set dev ${name} addrgenmode none
addr add ${addresses.gateway}/30 dev ${name}
link set dev ${name} up
`,
  )
  if (wayOut === null) return
  await setForwarding(netns, name, '1')
  if (opened) await setForwarding(netns, wayOut, '1')
}

/** What is not there is no error: a crash may have come between any two steps. */
async function takeDown(netns: string, { name, wayOut, opened }: Record): Promise<void> {
  await ignoring(/Cannot find device|does not exist/, runIn(netns, 'ip', ['link', 'del', 'dev', name]))
  await ignoring(/No such file or directory/, runIn(netns, 'nft', ['delete', 'table', 'inet', name]))
  if (wayOut === null || !opened) return
  // Another machine may have come meanwhile, that found it open.
  const others = (await linksIn(netns)).some((one) => /^vm[0-9a-f]{8}/.test(one))
  if (!others) await ignoring(/No such file or directory/, setForwarding(netns, wayOut, '0'))
}

async function ignoring(message: RegExp, action: Promise<unknown>): Promise<void> {
  await action.catch((error: Error) => {
    if (!message.test(error.message)) throw error
  })
}

const forwardingOf = (dev: string) => `/proc/sys/net/ipv4/conf/${dev}/forwarding`
const forwarding = async (netns: string, dev: string) =>
  (await runIn(netns, 'cat', [forwardingOf(dev)])).trim()
const setForwarding = (netns: string, dev: string, value: '0' | '1') =>
  runIn(netns, 'tee', [forwardingOf(dev)], value)

/** The interface of the default route; null: there is none. */
async function wayOutOf(netns: string): Promise<string | null> {
  const routes = JSON.parse(await runIn(netns, 'ip', ['-json', '-4', 'route', 'show', 'default'])) as {
    dev?: string
  }[]
  const dev = routes[0]?.dev
  // It goes into rules and a path.
  return dev !== undefined && /^[A-Za-z0-9_-]{1,15}$/.test(dev) ? dev : null
}

interface Link {
  ifname: string
  addr_info: { local?: string }[]
}

const addressList = async (netns: string) =>
  JSON.parse(await runIn(netns, 'ip', ['-json', '-4', 'addr', 'show'])) as Link[]

async function takenIn(netns: string): Promise<Set<string>> {
  const links = await addressList(netns)
  return new Set(links.flatMap(({ addr_info }) => addr_info.flatMap(({ local }) => local ?? [])))
}

async function linksIn(netns: string): Promise<string[]> {
  const links = JSON.parse(await runIn(netns, 'ip', ['-json', 'link', 'show'])) as Link[]
  return links.map(({ ifname }) => ifname)
}

/** How the kernel names the one at this path. */
const namespaceAt = (path: string) => `net:[${statSync(path).ino}]`

/** A path of the namespace of this name, where a process is in it, this process holds it, or `ip netns` has it. */
export function findNamespace(name: string): string | undefined {
  const named = list('/run/netns').map((entry) => `/run/netns/${entry}`)
  const held = list('/proc/self/fd').map((entry) => `/proc/self/fd/${entry}`)
  const entered = list('/proc')
    .filter((entry) => /^\d+$/.test(entry))
    .map((pid) => `/proc/${pid}/ns/net`)
  return (
    named.find((path) => inode(path) === name) ??
    entered.find((path) => link(path) === name) ??
    // Not by `self`: another program is to enter it.
    held.find((path) => link(path) === name)?.replace('self', String(process.pid))
  )
}

const inode = (path: string) => quietly(() => namespaceAt(path))
const link = (path: string) => quietly(() => readlinkSync(path))
const list = (dir: string) => quietly(() => readdirSync(dir)) ?? []

function quietly<T>(read: () => T): T | undefined {
  try {
    return read()
  } catch {
    return undefined
  }
}
