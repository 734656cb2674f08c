// timeout: 240
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readdirSync, readFileSync, readlinkSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { cacheDirectory } from '../../../scripts/cache-directory.ts'
import { findNatsServer } from '../../../scripts/nats-server.ts'
import { skip } from '../../harness.ts'
import type { Target } from './network-client.ts'
import { attempt, own, places, runIn, startWorld, tcp, udp, type World } from './network-world.ts'

const test = suite('network')
const names: [name: string, run: (world: World) => Promise<void>][] = []
/** Needs root and a world of its own. */
const inWorld = (name: string, run: (world: World) => Promise<void>) => names.push([name, run])

const broker = 4_222
/** slirp4netns’s own addresses: the host as seen through it, and its name server. */
const alias = '198.19.255.2'
const nameserver = '198.19.255.3'

/** A real broker on every address of a namespace. */
async function startBroker(path: string): Promise<AsyncDisposable> {
  const binary = await findNatsServer({ cacheDir: cacheDirectory(process.env), log: console.error })
  const args = [`--net=${path}`, '--', binary, '-a', '0.0.0.0', '-p', String(broker)]
  const server = spawn('nsenter', args, { stdio: 'ignore' })
  const exited = once(server, 'exit')
  for (let tries = 0; !(await attempt(path, [tcp('127.0.0.1', broker)]))[0]!.startsWith('reached'); tries++) {
    assert.ok(tries < 50, 'the broker answers')
    await sleep(100)
  }
  return {
    async [Symbol.asyncDispose]() {
      server.kill('SIGKILL')
      await exited
    },
  }
}

async function startNetworks(world: World, options: { allowPrivate?: string[]; platform?: string[] } = {}) {
  const host = await world.startHost()
  const { routerPath, pids } = await host.call('start', options)
  return { host, routerPath, pids }
}

/** Acts while a rule stands in front of all others in that chain. */
async function withRule<T>(path: string, chain: string, rule: string, act: () => Promise<T>): Promise<T> {
  const inserted = await runIn(
    path,
    'nft',
    '-e',
    '-a',
    'insert',
    'rule',
    'inet',
    'vulcan',
    chain,
    ...rule.split(' '),
  )
  const handle = /# handle (\d+)/.exec(inserted)![1]!
  try {
    return await act()
  } finally {
    await runIn(path, 'nft', 'delete', 'rule', 'inet', 'vulcan', chain, 'handle', handle)
  }
}
/** Acts without the wall between the boxes and the way out. */
const withoutWall = <T>(path: string, act: () => Promise<T>) =>
  withRule(path, 'forward', 'iifname "box*" oifname "tap0" accept', act)

const each = (results: string[], expected: RegExp, targets: Target[]) =>
  results.forEach((result, i) => {
    const { protocol, host, port } = targets[i]!
    assert.match(result, expected, `${protocol} ${host}:${port}: ${result}`)
  })

inWorld('all reaches what is public, and names are resolved', async (world) => {
  const { host } = await startNetworks(world)
  const box = await host.call('open', 1, 'all')
  assert.equal(box.hosts, [])
  assert.equal(box.nameservers, [nameserver])
  const dns = (name: string): Target => ({ protocol: 'dns', host: nameserver, port: 53, name })
  assert.equal(
    await attempt(box.path, [
      tcp(places.allowed),
      tcp(places.other, 443),
      udp(places.allowed),
      dns('allowed.example'),
      dns('unknown.example'),
    ]),
    [
      `reached allowed ${places.allowed}`,
      `reached other ${places.other}`,
      'reached allowed from me',
      `reached ${places.allowed}`,
      'refused ENOTFOUND',
    ],
  )
  assert.is(await host.call('denied', 1), 0)
})

inWorld('what is not public is refused at once and counted, and only by the wall', async (world) => {
  await using _onHost = await startBroker(world.hostPath)
  await using _outside = await startBroker(world.outsidePath)
  const { host, routerPath } = await startNetworks(world, { platform: [`${places.broker}:${broker}`] })
  const box = await host.call('open', 1, 'all')
  const targets = [
    tcp(places.neighbour),
    tcp(places.private),
    tcp(places.carrier),
    tcp(places.metadata),
    tcp(own.public),
    tcp(own.private),
    tcp(own.idle),
    tcp(own.public, broker),
    tcp(places.broker, broker),
  ]
  const begun = performance.now()
  each(await attempt(box.path, targets), /^refused ECONNREFUSED$/, targets)
  assert.ok(performance.now() - begun < 2_500, 'nothing was waited for')
  assert.is(await host.call('denied', 1), targets.length)
  each(await withoutWall(routerPath, () => attempt(box.path, targets)), /^reached /, targets)
  each(await attempt(box.path, targets), /^refused ECONNREFUSED$/, targets)
  // What answers for the host’s resolver answers names and nothing else.
  assert.equal(await attempt(box.path, [tcp(nameserver, broker)]), ['refused ECONNREFUSED'])
  // Another port of the platform’s host is not the platform.
  assert.equal(await attempt(box.path, [tcp(places.broker)]), [`reached broker ${places.broker}`])

  const datagrams = [udp(places.neighbour), udp(places.private), udp(places.metadata)]
  each(await attempt(box.path, datagrams), /^refused ECONNREFUSED$/, datagrams)
  each(await withoutWall(routerPath, () => attempt(box.path, datagrams)), /^reached /, datagrams)
})

inWorld('the loopback of the host is out of reach', async (world) => {
  await using _onHost = await startBroker(world.hostPath)
  const { host, routerPath } = await startNetworks(world)
  const box = await host.call('open', 1, 'all')
  assert.match((await attempt(world.hostPath, [tcp('127.0.0.1', broker)]))[0]!, /^reached INFO/)
  // Its own is there, and nothing is behind it.
  assert.equal(await attempt(box.path, [tcp('127.0.0.1', broker)]), ['refused ECONNREFUSED'])
  const walls = await attempt(box.path, [tcp(alias, broker)])
  assert.equal(walls, ['refused ECONNREFUSED'])
  const [second] = await withoutWall(routerPath, () => attempt(box.path, [tcp(alias, broker)]))
  assert.not.match(second!, /^reached/, 'the way out itself refuses it as well')

  // The same way out without that wall leads there.
  await using bare = await startContainer()
  const path = `/proc/${bare.pid}/ns/net`
  const args = [`--net=${world.hostPath}`, '--', 'slirp4netns', '--configure', '--cidr=198.19.255.0/24']
  const slirp = spawn('nsenter', [...args, String(bare.pid), 'tap0'], { stdio: 'ignore' })
  const exited = once(slirp, 'exit')
  try {
    let result = ''
    for (let tries = 0; tries < 50 && !result.startsWith('reached'); tries++) {
      await sleep(100)
      result = (await attempt(path, [tcp(alias, broker)]))[0]!
    }
    assert.match(result, /^reached INFO/)
  } finally {
    slirp.kill('SIGKILL')
    await exited
  }

  // A box that sends packets for 127.0.0.1 over its interface, as one with a network stack of its own may.
  await runIn(box.path, 'ip', 'addr', 'flush', 'dev', 'lo')
  await runIn(box.path, 'ip', 'route', 'flush', 'table', 'local', '127.0.0.0/8')
  await runIn(
    box.path,
    'sh',
    '-c',
    'for f in all eth0; do echo 1 > /proc/sys/net/ipv4/conf/$f/route_localnet; done',
  )
  assert.not.match((await attempt(box.path, [tcp('127.0.0.1', broker)]))[0]!, /^reached/)
  const [third] = await withoutWall(routerPath, () => attempt(box.path, [tcp('127.0.0.1', broker)]))
  assert.not.match(third!, /^reached/)
})

inWorld(
  'an allowlist reaches the addresses found for its names, on their ports, and nothing else',
  async (world) => {
    const { host, routerPath } = await startNetworks(world)
    await host.call('name', 'api.example', [places.allowed, '2a00:1450::1', places.neighbour])
    await host.call('name', 'web.example', [places.other])
    const box = await host.call('open', 1, ['api.example:80', 'api.example:8080', 'web.example:443'])
    assert.equal(box.nameservers, [])
    assert.equal(box.hosts, [
      { address: places.allowed, name: 'api.example' },
      { address: places.other, name: 'web.example' },
    ])
    const allowed = [
      tcp(places.allowed),
      tcp(places.allowed, 8_080),
      tcp(places.other, 443),
      udp(places.other, 443),
    ]
    each(await attempt(box.path, allowed), /^reached /, allowed)
    const refused = [
      tcp(places.allowed, 443),
      tcp(places.other),
      tcp(places.other, 8_080),
      tcp(places.neighbour),
      tcp(places.metadata),
      tcp(places.broker),
      tcp(nameserver, 53),
    ]
    each(await attempt(box.path, refused), /^refused ECONNREFUSED$/, refused)
    assert.is(await host.call('denied', 1), refused.length)
    const datagrams: Target[] = [
      udp(places.allowed, 443),
      udp(places.allowed),
      { protocol: 'dns', host: nameserver, port: 53, name: 'allowed.example' },
    ]
    each(await attempt(box.path, datagrams), /^refused /, datagrams)
    const reachable = [...refused.slice(0, -1), ...datagrams]
    each(await withoutWall(routerPath, () => attempt(box.path, reachable)), /^reached /, reachable)
  },
)

inWorld('a name that changes its address leads nowhere', async (world) => {
  const { host } = await startNetworks(world)
  await host.call('name', 'api.example', [places.allowed])
  const box = await host.call('open', 1, ['api.example:80'])
  for (const address of [places.metadata, places.neighbour, own.public, '127.0.0.1']) {
    await host.call('name', 'api.example', [address])
    assert.equal(await attempt(box.path, [tcp(places.allowed), tcp(address)]), [
      `reached allowed ${places.allowed}`,
      'refused ECONNREFUSED',
    ])
    const error = await host.call('open', 2, ['api.example:80']).catch((error) => error)
    assert.match(error.message, /names api\.example:80, which is not allowed: its address is not public/)
    assert.is(error.fault, 'user')
  }
})

inWorld('an entry that cannot be had is refused by name', async (world) => {
  const { host } = await startNetworks(world, {
    platform: [`${places.broker}:${broker}`],
    allowPrivate: ['127.0.0.1:80', `${places.metadata}:80`, `${places.broker}:${broker}`],
  })
  await host.call('name', 'six.example', ['2a00:1450::1'])
  const refused: [string, RegExp][] = [
    ['*.example.com:443', /names \*\.example\.com:443: a container is held to addresses/],
    ['unknown.example:80', /unknown\.example, which could not be resolved: unknown\.example is unknown/],
    ['six.example:80', /six\.example, which has no IPv4 address/],
    [`${places.allowed}:0`, /0 is not a port/],
    [`${places.allowed}:99999`, /99999 is not a port/],
    [`${places.neighbour}:80`, /not allowed/],
    [`${places.broker}:${broker}`, /not allowed/],
    [`${own.idle}:80`, /not allowed/],
    [`${places.metadata}:80`, /not allowed/],
    ['127.0.0.1:80', /not allowed/],
    ['224.0.0.1:80', /not allowed/],
  ]
  for (const [entry, message] of refused) {
    const error = await host.call('open', 1, [`${places.allowed}:80`, entry]).catch((error) => error)
    assert.is(error.name, 'NetworkError', entry)
    assert.is(error.fault, 'user', entry)
    assert.match(error.message, message)
  }
})

inWorld(
  'a private address is reached where its operator names it, and the policy or `all` covers it',
  async (world) => {
    const { host } = await startNetworks(world, { allowPrivate: [`${places.neighbour}:80`, 'db.example:80'] })
    await host.call('name', 'db.example', [places.private])
    const named = await host.call('open', 1, [`${places.neighbour}:80`, 'db.example:80'])
    const all = await host.call('open', 2, 'all')
    const targets = [tcp(places.neighbour), tcp(places.private)]
    each(await attempt(named.path, targets), /^reached /, targets)
    each(await attempt(all.path, targets), /^reached /, targets)
    const other = await host.call('open', 3, [`${places.other}:80`])
    each(await attempt(other.path, targets), /^refused /, targets)
    const beside = [tcp(places.neighbour, 443), tcp(places.private, 443), tcp(places.carrier)]
    each(await attempt(named.path, beside), /^refused /, beside)
    each(await attempt(all.path, beside), /^refused /, beside)
  },
)

inWorld(
  'an address that the host takes for itself is cut off, also under connections that stand',
  async (world) => {
    const { host } = await startNetworks(world)
    const box = await host.call('open', 1, [`${places.other}:80`])
    assert.match((await attempt(box.path, [tcp(places.other)]))[0]!, /^reached other/)
    await runIn(world.hostPath, 'ip', 'addr', 'add', `${places.other}/32`, 'dev', 'lo')
    await host.call('open', 2, 'all')
    assert.equal(await attempt(world.hostPath, [tcp(places.other)]), [`reached host ${places.other}`])
    assert.equal(await attempt(box.path, [tcp(places.other)]), ['refused ECONNREFUSED'])
  },
)

inWorld('a box reaches no other box, and cannot send in its name', async (world) => {
  const { host, routerPath } = await startNetworks(world)
  const a = await host.call('open', 1, 'all')
  const b = await host.call('open', 2, 'all')
  const addressOf = async (path: string) =>
    /inet (198\.18[\d.]+)/.exec(await runIn(path, 'ip', '-4', 'addr', 'show', 'dev', 'eth0'))![1]!
  const address = await addressOf(b.path)
  await using server = await world.serve(b.path, [
    { protocol: 'tcp', address: '0.0.0.0', port: 80, name: 'b' },
  ])
  void server
  assert.equal(await attempt(a.path, [tcp(address)]), ['refused ECONNREFUSED'])
  const free = await withRule(routerPath, 'forward', 'iifname "box*" oifname "box*" accept', () =>
    attempt(a.path, [tcp(address)]),
  )
  assert.equal(free, [`reached b ${address}`])

  // A and B exchange nothing, yet what A sends as B would reach the outside.
  await runIn(a.path, 'ip', 'addr', 'add', `${address}/32`, 'dev', 'eth0')
  const seen = async () => {
    const counter = await runIn(routerPath, 'nft', 'list', 'counter', 'inet', 'vulcan', 'seen')
    return Number(/packets (\d+)/.exec(counter)![1])
  }
  await runIn(routerPath, 'nft', 'add', 'counter', 'inet', 'vulcan', 'seen')
  const rule = `iifname "tap0" ip daddr ${address} counter name seen`
  const forged = { ...udp(places.allowed), from: address }
  await withRule(routerPath, 'forward', rule, async () => {
    assert.equal(await attempt(a.path, [forged]), ['silent'])
    assert.is(await seen(), 0)
    await withRule(routerPath, 'sources', 'iifname "box*" accept', () => attempt(a.path, [forged]))
    assert.ok((await seen()) > 0, 'the answer came back for B')
  })
})

inWorld('there is no way out by IPv6', async (world) => {
  const { host } = await startNetworks(world)
  const box = await host.call('open', 1, 'all')
  const six = tcp('2a00:1450::1')
  assert.match((await attempt(world.hostPath, [six]))[0]!, /^reached six/)
  assert.equal(await attempt(box.path, [six]), ['refused ENETUNREACH'])
  await runIn(box.path, 'ip', 'addr', 'add', '2a00:1450::3/64', 'dev', 'eth0', 'nodad')
  assert.not.match((await attempt(box.path, [six]))[0]!, /^reached/)
})

inWorld('a sandbox of gVisor is held by the same rules', async (world) => {
  await using _onHost = await startBroker(world.hostPath)
  const { host, routerPath } = await startNetworks(world)
  await host.call('open', 1, 'all')
  await host.call('open', 2, [`${places.allowed}:80`])
  const reached = [
    tcp(places.allowed),
    udp(places.allowed),
    { protocol: 'dns', host: nameserver, port: 53, name: 'allowed.example' } as const,
  ]
  const refused = [
    tcp(places.neighbour),
    tcp(places.metadata),
    tcp(own.public, broker),
    udp(places.metadata),
    udp(places.private),
  ]
  const loopback = [tcp('127.0.0.1', broker), tcp(alias, broker)]
  const targets = [...reached, ...refused, ...loopback]
  const tryThem = async (id: number) => {
    const dir = await mkdtemp(join(tmpdir(), 'vgn-'))
    try {
      return await host.call('gvisor', id, dir, targets)
    } finally {
      await rm(dir, { recursive: true })
    }
  }
  const all = await tryThem(1)
  each(all.slice(0, 3), /^reached /, targets)
  each(all.slice(3), /^refused ECONNREFUSED$/, targets.slice(3))
  assert.is(await host.call('denied', 1), refused.length + 1)
  const list = await tryThem(2)
  assert.is(list[0], `reached allowed ${places.allowed}`)
  each(list.slice(1), /^refused /, targets.slice(1))
  // runsc takes the address off the interface: a network serves one sandbox.
  await host.call('open', 3, 'all')
  const free = await withoutWall(routerPath, () => tryThem(3))
  each(free.slice(0, 8), /^reached /, targets)
  each(free.slice(8), /^refused /, loopback)
})

inWorld('the interface moves to the namespace of a process', async (world) => {
  const { host } = await startNetworks(world)
  await host.call('open', 1, [`${places.allowed}:80`])
  const error = await host.call('join', 1, host.pid).catch((error) => error)
  assert.match(error.message, /no network namespace of its own/)
  await using container = await startContainer()
  const path = await host.call('join', 1, container.pid)
  for (const entrance of [path, `/proc/${container.pid}/ns/net`]) {
    assert.equal(await attempt(entrance, [tcp(places.allowed), tcp(places.other)]), [
      `reached allowed ${places.allowed}`,
      'refused ECONNREFUSED',
    ])
  }
  await host.call('close', 1)
  assert.not.match(await runIn(`/proc/${container.pid}/ns/net`, 'ip', 'link'), /eth0/)
})

inWorld('what each box has sent and received is counted', async (world) => {
  const { host } = await startNetworks(world)
  const [box] = await Promise.all([host.call('open', 1, 'all'), host.call('open', 2, 'all')])
  const [before, other] = [await host.call('traffic', 1), await host.call('traffic', 2)]
  const targets = [tcp(places.allowed), tcp(places.allowed)]
  each(await attempt(box!.path, targets), /^reached /, targets)
  const after = await host.call('traffic', 1)
  // Each way the three packets that make a connection, at least 40 bytes each.
  assert.ok(after!.in - before!.in >= 160 && after!.out - before!.out >= 160, JSON.stringify([before, after]))
  assert.ok((await host.call('traffic', 2))!.in - other!.in < 160)
})

inWorld('a way out that falls is replaced', async (world) => {
  const { host, pids } = await startNetworks(world)
  const box = await host.call('open', 1, 'all')
  process.kill(pids[0]!, 'SIGKILL')
  for (let tries = 0; ; tries++) {
    const [result] = await attempt(box.path, [tcp(places.allowed)])
    if (result!.startsWith('reached')) break
    assert.ok(tries < 50, result!)
    await sleep(100)
  }
  assert.is.not((await host.call('pids'))[0], pids[0])
  assert.equal(await attempt(box.path, [tcp(places.metadata)]), ['refused ECONNREFUSED'])
})

inWorld('a box that takes its interface away is closed as any other', async (world) => {
  const { host, routerPath } = await startNetworks(world)
  const boxes = await Promise.all([1, 2, 3].map((id) => host.call('open', id, 'all')))
  await runIn(boxes[1]!.path, 'ip', 'link', 'del', 'dev', 'eth0')
  await Promise.all([1, 2, 3].map((id) => host.call('close', id)))
  assert.not.match(await runIn(routerPath, 'ip', 'link'), /box/)
  assert.not.match(await runIn(routerPath, 'nft', 'list', 'ruleset'), /chain box/)
})

inWorld('nothing is left of a network, nor of all, and the host’s mounts stay', async (world) => {
  const host = await world.startHost()
  await host.call('name', 'unused.example', [])
  // What others mount on this machine comes and goes.
  const mounts = () =>
    readFileSync(`/proc/${host.pid}/mountinfo`, 'utf8')
      .match(/.*vulcan-test-network.*/g)!
      .join('\n')
  const mountsBefore = mounts()
  assert.match(mountsBefore, /\/shared\/deep .* shared:/)
  const { routerPath } = await host.call('start', {})
  await host.call('open', 1, 'all')
  await host.call('close', 1)
  const state = async () => ({
    rules: (await runIn(routerPath, 'nft', 'list', 'ruleset')).replace(/own {[^}]*}/, ''),
    links: (await runIn(routerPath, 'ip', '-o', 'link')).split('\n').map((line) => line.split(':')[1]),
    descriptors: readdirSync(`/proc/${host.pid}/fd`).length,
    inHost: await runIn(
      world.hostPath,
      'sh',
      '-c',
      'ip -o link; ip rule; ip route; nft list ruleset; ls /run/netns 2>/dev/null; true',
    ),
    processes: processesIn(world.hostPath).length,
  })
  const before = await state()
  assert.match(before.rules, /chain public/)
  for (let round = 0; round < 5; round++) {
    await Promise.all(
      [1, 2, 3].map((id) => host.call('open', id, id === 1 ? [`${places.allowed}:80`] : 'all')),
    )
    if (round === 0) assert.ok((await state()).links.length > before.links.length)
    await Promise.all([1, 2, 3].map((id) => host.call('close', id)))
  }
  assert.equal(await state(), before)
  const { length } = processesIn(world.hostPath)
  await host.call('open', 1, 'all')
  await host.call('stop')
  assert.is(processesIn(world.hostPath).length, length - 1)
  assert.is(mounts(), mountsBefore)
})

inWorld(
  'a runner that is killed at any moment leaves nothing, and takes nothing from another',
  async (world) => {
    const other = await startNetworks(world)
    const box = await other.host.call('open', 1, 'all')
    const calm = processesIn(world.hostPath).length
    for (let round = 0; round < 8; round++) {
      const host = await world.startHost()
      const started = host.call('start', {}).then(() => host.call('churn'))
      await Promise.all([started.catch(() => {}), sleep(60 + round * 60).then(() => host.kill())])
      for (let tries = 0; processesIn(world.hostPath).length > calm; tries++) {
        assert.ok(tries < 100, `round ${round}: ${processesIn(world.hostPath).map(commandOf).join('; ')}`)
        await sleep(50)
      }
    }
    assert.equal(await attempt(box.path, [tcp(places.allowed)]), [`reached allowed ${places.allowed}`])
  },
)

inWorld('a host that cannot says what would help', async (world) => {
  const host = await world.startHost('nobody')
  const error = await host.call('start', {}).catch((error) => error)
  assert.is(error.name, 'NetworksUnavailable')
  assert.match(error.message, /unshare/)
  assert.match(error.fix, /root.*nftables.*slirp4netns/)
})

/** Processes in that network namespace. */
function processesIn(path: string): number[] {
  const namespace = readlinkSync(path)
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => {
      try {
        return readlinkSync(`/proc/${pid}/ns/net`) === namespace
      } catch {
        return false
      }
    })
}

function commandOf(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ')
  } catch {
    return ''
  }
}

/** A process with a network namespace of its own. */
async function startContainer(): Promise<AsyncDisposable & { pid: number }> {
  const child = spawn('unshare', ['--net', '--', 'sh', '-c', 'echo; exec sleep 600'], {
    stdio: ['ignore', 'pipe', 'ignore'],
  })
  const exited = once(child, 'exit')
  await once(child.stdout, 'data')
  return {
    pid: child.pid!,
    async [Symbol.asyncDispose]() {
      child.kill('SIGKILL')
      await exited
    },
  }
}

for (const [name, run] of names) {
  if (process.getuid!() !== 0) {
    skip(test, name, 'network namespaces need root')
    continue
  }
  test(name, async () => {
    await using world = await startWorld()
    await run(world)
  })
}
test.run()
