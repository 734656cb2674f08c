/** The wire between the router and one box: a pair of interfaces, `eth0` in the box’s namespace. */
import { Namespace, runIn } from './namespace.ts'
import type { Router } from './router.ts'
import { mtu } from './way-out.ts'

export class Link implements AsyncDisposable {
  /** Of its end in the router. */
  readonly name: string
  readonly #router: Router
  readonly #inside: string
  #namespace: Namespace

  private constructor(router: Router, { name, inside }: Ends, namespace: Namespace) {
    this.#router = router
    this.name = name
    this.#inside = inside
    this.#namespace = namespace
  }

  /** In a new namespace. Of the numbers in use each is given once. Nothing is let through yet. */
  static async create(router: Router, number: number): Promise<Link> {
    const ends = endsOf(number)
    const namespace = await Namespace.create(async ({ path }) => {
      await router.ip(
        `link add ${ends.name} mtu ${mtu} type veth peer name eth0 mtu ${mtu} netns ${path}\n${ends.router}`,
      )
      return ends.inside
    })
    return new Link(router, ends, namespace)
  }

  get path(): string {
    return this.#namespace.path
  }

  /** To the namespace of a process: see `Network`. */
  async moveTo(pid: number): Promise<void> {
    const target = Namespace.of(pid)
    try {
      await runIn(this.path, 'ip', ['link', 'set', 'dev', 'eth0', 'netns', target.path])
      await runIn(target.path, 'ip', ['-batch', '-'], this.#inside)
    } catch (error) {
      target[Symbol.dispose]()
      throw error
    }
    this.#namespace[Symbol.dispose]()
    this.#namespace = target
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      await this.#router.removeLink(this.name)
    } finally {
      this.#namespace[Symbol.dispose]()
    }
  }
}

interface Ends {
  name: string
  /** What makes each end ready, as lines for `ip -batch`. */
  router: string
  inside: string
}

/** Each wire has four addresses of 198.18.0.0/16 (RFC 2544, used by no network): the second is the router’s. */
function endsOf(number: number): Ends {
  const name = `box${number}`
  const address = (host: number) => `198.18.${number >> 6}.${(number & 63) * 4 + host}`
  return {
    name,
    router: `addr add ${address(1)}/30 dev ${name}\nlink set dev ${name} up\n`,
    inside: `link set dev lo up
link set dev eth0 addrgenmode none
addr add ${address(2)}/30 dev eth0
link set dev eth0 up
route add default via ${address(1)}
`,
  }
}
