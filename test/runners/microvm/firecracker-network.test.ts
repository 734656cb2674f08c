import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readdirSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { text } from 'node:stream/consumers'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { findProgram } from '../../../runners/container/images/processes.ts'
import { Namespace } from '../../../runners/container/network/namespace.ts'
import { drawIdentity, type Identity } from '../../../runners/microvm/firecracker/jailer.ts'
import { addressesOf, findNamespace, type Tap, Taps } from '../../../runners/microvm/firecracker/network.ts'
import { holdMachines } from '../../../runners/microvm/owners.ts'
import { skip } from '../../harness.ts'
import { attempt, own, places, runIn, startWorld, tcp, udp, type World } from '../container/network-world.ts'

const missing = ['ip', 'nft', 'nsenter', 'unshare'].filter((name) => findProgram(name) === undefined)
const python = findProgram('python3')
const reason =
  process.getuid?.() !== 0
    ? 'taps need root'
    : !existsSync('/dev/net/tun')
      ? 'no /dev/net/tun'
      : missing.length > 0
        ? `${missing.join(', ')} not installed`
        : undefined

interface Ground extends AsyncDisposable {
  world: World
  taps: Taps
  stateDir: string
}

async function lay(): Promise<Ground> {
  await using scope = new AsyncDisposableStack()
  const stateDir = await mkdtemp(join(tmpdir(), 'vulcan-test-taps-'))
  scope.defer(() => rm(stateDir, { recursive: true, force: true }))
  const world = scope.use(await startWorld())
  const resources = scope.move()
  return {
    world,
    stateDir,
    taps: new Taps(join(stateDir, 'taps'), 'taps-of-a-test'),
    [Symbol.asyncDispose]: () => resources.disposeAsync(),
  }
}

const networkTest = (name: string, run: (it: Ground) => Promise<void>) =>
  reason === undefined
    ? test(name, async () => {
        await using ground = await lay()
        await run(ground)
      })
    : skip(test, name, reason)

/** All that a tap leaves in a namespace. */
async function lookAt(netns: string) {
  const links = JSON.parse(await runIn(netns, 'ip', '-json', 'link')) as { ifname: string }[]
  return {
    links: links.map(({ ifname }) => ifname).sort(),
    rules: await runIn(netns, 'nft', 'list', 'ruleset'),
    forwarding: (await runIn(netns, 'cat', '/proc/sys/net/ipv4/conf/eth0/forwarding')).trim(),
  }
}

/** A namespace with one interface, that a process of the machine’s user carries to the tap. */
async function startGuest(tap: Tap, { uid }: Identity) {
  await using scope = new AsyncDisposableStack()
  const namespace = scope.use(await Namespace.create(async () => 'link set lo up\n'))
  const script = join(import.meta.dirname, 'firecracker-guest.py')
  const child = spawn(
    'nsenter',
    [`--net=${namespace.path}`, '--', python!, script, 'outer', tap.netns, tap.name, String(uid)],
    { stdio: 'pipe' },
  )
  const complaint = text(child.stderr)
  scope.defer(async () => {
    child.kill('SIGKILL')
    if (child.exitCode === null && child.signalCode === null) await once(child, 'exit')
  })
  const [line] = await Promise.race([
    once(createInterface(child.stdout), 'line'),
    complaint.then((said) => Promise.reject(new Error(said))),
  ])
  assert.is(line, 'ready')
  const ip = (...args: string[]) => runIn(namespace.path, 'ip', ...args)
  await ip('addr', 'add', tap.address, 'dev', 'eth0')
  await ip('link', 'set', 'eth0', 'up')
  await ip('route', 'add', 'default', 'via', tap.gateway)
  const resources = scope.move()
  return { path: namespace.path, ip, [Symbol.asyncDispose]: () => resources.disposeAsync() }
}

test('addresses are /30s of a range that no network uses', () => {
  assert.equal(addressesOf(0), { address: '198.19.0.2/30', gateway: '198.19.0.1' })
  assert.equal(addressesOf(1), { address: '198.19.0.6/30', gateway: '198.19.0.5' })
  assert.equal(addressesOf(64), { address: '198.19.1.2/30', gateway: '198.19.1.1' })
  assert.equal(addressesOf(8_191), { address: '198.19.127.254/30', gateway: '198.19.127.253' })
  const all = Array.from({ length: 8_192 }, (_, number) => addressesOf(number).gateway)
  assert.is(new Set(all).size, 8_192)
})

networkTest('machines of a namespace have addresses of their own, and give them back', async (it) => {
  const netns = it.world.hostPath
  const before = await lookAt(netns)
  const [first, second, third] = await Promise.all([1, 2, 3].map(() => it.taps.open(netns, drawIdentity())))
  assert.equal(
    [first, second, third].map((tap) => tap!.address),
    [0, 1, 2].map((number) => addressesOf(number).address),
  )
  assert.is(new Set([first, second, third].map((tap) => tap!.name)).size, 3)
  await second![Symbol.asyncDispose]()
  await using again = await it.taps.open(netns, drawIdentity())
  assert.is(again.address, second!.address)
  assert.is((await lookAt(netns)).forwarding, '1')
  for (const tap of [third, first, again]) await tap![Symbol.asyncDispose]()
  assert.equal(await lookAt(netns), before)
})

networkTest('an address that somebody else has in the namespace is left to them', async (it) => {
  const netns = it.world.hostPath
  await runIn(netns, 'ip', 'addr', 'add', `${addressesOf(0).gateway}/32`, 'dev', 'lo')
  await using tap = await it.taps.open(netns, drawIdentity())
  assert.equal({ address: tap.address, gateway: tap.gateway }, addressesOf(1))
})

networkTest('without a namespace it leads nowhere, and is gone with its machine', async (it) => {
  const tap = await it.taps.open(undefined, drawIdentity())
  const name = (await runIn(tap.netns, 'readlink', '/proc/self/ns/net')).trim()
  assert.match(await runIn(tap.netns, 'ip', '-json', 'link'), tap.name)
  assert.is(await runIn(tap.netns, 'ip', 'route', 'show', 'default'), '')
  await tap[Symbol.asyncDispose]()
  assert.is(findNamespace(name), undefined)
})

networkTest('a namespace that is given up before its machine is gone with it', async (it) => {
  const namespace = await Namespace.create(async () => 'link set lo up\n')
  const name = (await runIn(namespace.path, 'readlink', '/proc/self/ns/net')).trim()
  const tap = await it.taps.open(namespace.path, drawIdentity())
  namespace[Symbol.dispose]()
  assert.match(await runIn(tap.netns, 'ip', '-json', 'link'), tap.name)
  await tap[Symbol.asyncDispose]()
  assert.is(findNamespace(name), undefined)
  assert.equal(readdirSync(join(it.stateDir, 'taps')), [])
})

networkTest('a namespace is found while something holds it', async () => {
  const namespace = await Namespace.create(async () => '')
  const name = await runIn(namespace.path, 'readlink', '/proc/self/ns/net')
  const found = findNamespace(name.trim())
  assert.ok(found?.startsWith(`/proc/${process.pid}/fd/`), found)
  namespace[Symbol.dispose]()
  assert.is(findNamespace(name.trim()), undefined)
})

const guestTest = (name: string, run: (it: Ground) => Promise<void>) =>
  python === undefined ? skip(test, name, 'python3 not installed') : networkTest(name, run)

guestTest('a guest reaches the outside by the namespace’s own address', async (it) => {
  const identity = drawIdentity()
  await using tap = await it.taps.open(it.world.hostPath, identity)
  await using guest = await startGuest(tap, identity)
  // Nobody outside knows a way to the guest’s address: an answer was sent to another.
  assert.equal(await attempt(guest.path, [tcp(places.allowed), udp(places.other)]), [
    `reached allowed ${places.allowed}`,
    'reached other from me',
  ])
})

guestTest('a guest reaches neither what listens in the namespace, nor another guest', async (it) => {
  const identity = drawIdentity()
  await using tap = await it.taps.open(it.world.hostPath, identity)
  await using guest = await startGuest(tap, identity)
  const neighbour = drawIdentity()
  await using tapBeside = await it.taps.open(it.world.hostPath, neighbour)
  await using beside = await startGuest(tapBeside, neighbour)
  await using _ = await it.world.serve(beside.path, [
    { protocol: 'tcp', address: '0.0.0.0', port: 80, name: 'neighbour' },
  ])
  const [guestAddress] = tapBeside.address.split('/')
  const targets = [own.public, tap.gateway, tapBeside.gateway, guestAddress!, '127.0.0.1']
  const outcomes = await attempt(
    guest.path,
    targets.map((host) => tcp(host)),
  )
  assert.equal(outcomes, ['silent', 'silent', 'silent', 'silent', 'refused ECONNREFUSED'])
  assert.equal(await attempt(beside.path, [tcp(places.allowed)]), [`reached allowed ${places.allowed}`])
})

guestTest('nothing is taken from a guest under another address than its own', async (it) => {
  const identity = drawIdentity()
  await using tap = await it.taps.open(it.world.hostPath, identity)
  await using guest = await startGuest(tap, identity)
  await guest.ip('addr', 'add', '198.19.0.6/32', 'dev', 'eth0')
  await guest.ip('addr', 'add', `${own.private}/32`, 'dev', 'eth0')
  const from = (address: string) => ({ ...udp(places.allowed), from: address })
  const outcomes = await attempt(guest.path, [
    from('198.19.0.6'),
    from(own.private),
    from(tap.address.split('/')[0]!),
  ])
  assert.equal(outcomes, ['silent', 'silent', 'reached allowed from 198.19.0.2'])
})

guestTest('a tap is its machine’s user’s only', async (it) => {
  await using tap = await it.taps.open(it.world.hostPath, drawIdentity())
  const stranger = startGuest(tap, { uid: 65_534, gid: 65_534 })
  const error = await stranger.then(
    (guest) => guest[Symbol.asyncDispose](),
    (error: Error) => error,
  )
  assert.match(String(error), 'Operation not permitted')
})

networkTest(
  'what a killed runner had in a namespace that outlives it, the next start takes away',
  async (it) => {
    const netns = it.world.hostPath
    const before = await lookAt(netns)
    const start = async (owner: string) => {
      const script = join(import.meta.dirname, 'firecracker-owner.ts')
      const argument = JSON.stringify({ stateDir: it.stateDir, owner, netns })
      const child = spawn(process.execPath, [script, argument], { stdio: ['ignore', 'pipe', 'inherit'] })
      const [line] = (await once(createInterface(child.stdout), 'line')) as [string]
      return { child, names: JSON.parse(line) as string[] }
    }
    const sweep = async () => {
      const holding = await holdMachines({
        owner: 'next',
        stateDir: it.stateDir,
        cgroupParent: '/vulcan-test',
      })
      await holding[Symbol.asyncDispose]()
    }
    const kill = async ({ child }: { child: ReturnType<typeof spawn> }) => {
      child.kill('SIGKILL')
      await once(child, 'exit')
    }
    const [alive, dead] = [await start('live-one'), await start('dead-one')]
    try {
      await kill(dead)
      const left = await lookAt(netns)
      for (const name of [...dead.names, ...alive.names]) {
        assert.ok(left.links.includes(name))
        assert.match(left.rules, name)
      }
      // A crash may have come between any two steps.
      await runIn(netns, 'ip', 'link', 'del', dead.names[0]!)
      await runIn(netns, 'nft', 'delete', 'table', 'inet', dead.names[1]!)
      await sweep()
      const kept = await lookAt(netns)
      for (const name of dead.names) {
        assert.not.ok(kept.links.includes(name))
        assert.not.match(kept.rules, name)
      }
      for (const name of alive.names) assert.ok(kept.links.includes(name))
      assert.is(existsSync(join(it.stateDir, 'dead-one')), false)
      assert.is(existsSync(join(it.stateDir, 'live-one')), true)
    } finally {
      await kill(alive)
    }
    await sweep()
    assert.equal(await lookAt(netns), before)
  },
)

test.run()
