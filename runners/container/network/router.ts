/** The namespace between the boxes of this process and the outside. The rules are here, out of reach of any box. */
import type { Bytes } from '../engine.ts'
import { Meter } from './meter.ts'
import { Namespace, runIn } from './namespace.ts'
import { baseRules, closeRules } from './rules.ts'
import { Together } from './together.ts'
import { WayOut } from './way-out.ts'

/** Of the interfaces that are taken down together. */
const leaving = 1

export class Router implements AsyncDisposable {
  readonly #namespace: Namespace
  readonly #wayOut: WayOut
  readonly #meter: Meter
  readonly #removeRules = new Together((names) => this.nft(names.map(closeRules).join('')))
  readonly #removeLinks = new Together((names) => this.#takeDown(names))
  #lastRules: Promise<unknown> = Promise.resolve()
  #closed = false

  private constructor(namespace: Namespace, wayOut: WayOut, meter: Meter) {
    this.#namespace = namespace
    this.#wayOut = wayOut
    this.#meter = meter
  }

  /** Throws where a tool is missing or refuses. */
  static async start(): Promise<Router> {
    const namespace = await Namespace.create(async ({ path }) => {
      const set = (value: string, ...names: string[]) =>
        runIn(
          path,
          'tee',
          names.map((name) => `/proc/sys/net/${name}`),
          value,
        )
      await set('1', 'ipv4/ip_forward', 'ipv6/conf/all/disable_ipv6', 'ipv6/conf/default/disable_ipv6')
      // What is refused is to hear of it at once, however much it is.
      await set('0', 'ipv4/icmp_ratelimit')
      await runIn(path, 'nft', ['-f', '-'], baseRules)
      return 'link set lo up\n'
    })
    try {
      await using scope = new AsyncDisposableStack()
      const meter = scope.use(await Meter.open(namespace.path))
      const router = new Router(namespace, await WayOut.open(namespace.path), meter)
      scope.move()
      return router
    } catch (error) {
      namespace[Symbol.dispose]()
      throw error
    }
  }

  get path(): string {
    return this.#namespace.path
  }

  get pids(): number[] {
    return [this.#wayOut.pid, this.#meter.pid].filter((pid) => pid !== undefined)
  }

  /** Lines for `ip -batch`. */
  async ip(lines: string): Promise<void> {
    await runIn(this.path, 'ip', ['-batch', '-'], lines)
  }

  /** Lines for `nft -f`, all carried out or none; one call after the other. */
  async nft(lines: string): Promise<void> {
    const change = this.#lastRules.then(() => runIn(this.path, 'nft', ['-f', '-'], lines))
    this.#lastRules = change.catch(() => {})
    await change
  }

  /** Undoes `openRules`. */
  async removeRules(box: string): Promise<void> {
    if (!this.#closed) await this.#removeRules.add(box)
  }

  /** Takes both ends of a wire away. */
  async removeLink(box: string): Promise<void> {
    if (!this.#closed) await this.#removeLinks.add(box)
  }

  /** The kernel waits some 20 ms behind each removal, and holds up every other change of networks on the host. */
  async #takeDown(names: string[]): Promise<void> {
    const lines = names.map((name) => `link set dev ${name} group ${leaving}`)
    lines.push(`link del group ${leaving}`, '')
    try {
      await runIn(this.path, 'ip', ['-force', '-batch', '-'], lines.join('\n'))
    } catch (error) {
      // Whoever has rights in the namespace at its other end may have taken one away.
      if (!(error as Error).message.includes('Cannot find device')) throw error
    }
  }

  /** Packets that a counter has seen. */
  async packets(counter: string): Promise<number> {
    const json = await runIn(this.path, 'nft', ['-j', 'list', 'counter', 'inet', 'vulcan', counter])
    // libnftables-json(5): `{ "nftables": [{ "metainfo": … }, { "counter": { "packets": n, … } }] }`
    const { nftables } = JSON.parse(json) as { nftables: { counter?: { packets: number } }[] }
    return nftables.find((one) => one.counter !== undefined)!.counter!.packets
  }

  /** Bytes that a box has received and sent; undefined: not known any more. */
  traffic(box: string): Bytes | undefined {
    return this.#meter.read(box)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true
    await this.#lastRules
    await this.#wayOut[Symbol.asyncDispose]()
    await this.#meter[Symbol.asyncDispose]()
    this.#namespace[Symbol.dispose]()
  }
}
