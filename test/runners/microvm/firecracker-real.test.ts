/**
 * The driver with a real Firecracker, where there is one: on PATH, or where VULCAN_FIRECRACKER says. Guests are kernels
 * of a few bytes, so that what Linux needs of KVM is not needed here.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, existsSync, openSync, readdirSync, readFileSync, readlinkSync } from 'node:fs'
import { mkdir, mkdtemp, rm, stat, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { text } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Cgroup, findHierarchy } from '../../../runners/container/gvisor/cgroups.ts'
import { findProgram } from '../../../runners/container/images/processes.ts'
import { jobDriveBytes, MachineError, type MachineShape } from '../../../runners/microvm/driver.ts'
import { FirecrackerError, resources } from '../../../runners/microvm/firecracker/api.ts'
import {
  createFirecracker,
  type FirecrackerDriver,
  type FirecrackerOptions,
} from '../../../runners/microvm/firecracker/index.ts'
import { holdMachines } from '../../../runners/microvm/owners.ts'
import { startTime } from '../../../shared/process-identity.ts'
import { skip } from '../../harness.ts'
import { seeded } from '../../shared/support.ts'
import { runIn, startWorld } from '../container/network-world.ts'
import { tinyKernel } from './firecracker-guest.ts'

const binary = findProgram(process.env.VULCAN_FIRECRACKER ?? 'firecracker')

function whyNot(): string | undefined {
  if (binary === undefined) return 'no Firecracker on PATH, nor in VULCAN_FIRECRACKER'
  if (process.getuid?.() !== 0) return 'the jailer needs root'
  try {
    closeSync(openSync('/dev/kvm', 'r+'))
    return undefined
  } catch (error) {
    return `/dev/kvm cannot be opened: ${(error as Error).message}`
  }
}
const reason = whyNot()

interface Ground extends AsyncDisposable {
  dir: string
  options: FirecrackerOptions
  driver: FirecrackerDriver
  shape: MachineShape
  /** Options of one machine: each has a drive of its own. */
  machine(): Promise<{ dir: string; jobDrive: string; netns: undefined }>
  kernel(line: string, then?: 'halt' | 'again' | 'reset'): Promise<string>
}

async function lay(): Promise<Ground> {
  await using scope = new AsyncDisposableStack()
  const dir = await mkdtemp(join(tmpdir(), 'vulcan-test-firecracker-'))
  scope.defer(() => rm(dir, { recursive: true, force: true }))
  let made = 0
  const kernel: Ground['kernel'] = async (line, then) => {
    const file = join(dir, `kernel-${++made}`)
    await writeFile(file, tinyKernel(line, then))
    return file
  }
  const blank = async (name: string, bytes: number) => {
    await writeFile(join(dir, name), '')
    await truncate(join(dir, name), bytes)
    return join(dir, name)
  }
  const root = await blank('root', 2 ** 20)
  const shape = {
    kernel: await kernel('it runs'),
    initramfs: root,
    root,
    memoryMb: 64,
    vcpus: 1,
    network: false,
  }
  const options = optionsFor(dir, 'firecracker-test')
  const driver = scope.use(await createFirecracker(options))
  const machine = async () => ({
    dir,
    jobDrive: await blank(`job-${++made}`, jobDriveBytes),
    netns: undefined,
  })
  const resources = scope.move()
  return {
    dir,
    options,
    driver,
    shape,
    machine,
    kernel,
    [Symbol.asyncDispose]: () => resources.disposeAsync(),
  }
}

const cgroupParent = '/vulcan-test'
const optionsFor = (dir: string, owner: string): FirecrackerOptions => ({
  ...{ owner, cgroupParent, stateDir: join(dir, 'state') },
  firecracker: binary!,
})

const realTest = (name: string, run: (it: Ground) => Promise<void>) =>
  reason === undefined
    ? test(name, async () => {
        await using ground = await lay()
        await run(ground)
      })
    : skip(test, name, reason)

async function until(what: () => boolean): Promise<void> {
  for (const end = performance.now() + 20_000; !what(); await sleep(10))
    if (performance.now() > end) throw new Error('it does not happen')
}

const errorOf = (promise: Promise<unknown>) =>
  promise.then(
    () => undefined,
    (error: unknown) => error as Error,
  )

/** What is there of an owner’s machines. */
function leftOf({ stateDir, owner }: FirecrackerOptions) {
  const cgroup = new Cgroup(findHierarchy(), `${cgroupParent}/${owner}`)
  const list = (name: string) => {
    const path = join(stateDir, owner, name)
    return existsSync(path) ? readdirSync(path) : []
  }
  return { jails: list('jails').flatMap((name) => list(join('jails', name))), taps: list('taps'), cgroup }
}

realTest('a machine boots, is paused, written down, and goes on where it was in another', async (it) => {
  const shape = { ...it.shape, kernel: await it.kernel('tick', 'again') }
  const booted = await it.driver.boot(shape, await it.machine())
  await until(() => booted.console().includes('tick'))
  assert.equal(it.driver.pids(), [booted.pid])
  await booted.pause()
  const dir = join(it.dir, 'template')
  await mkdir(dir)
  await booted.snapshot(dir)
  assert.is((await stat(join(dir, 'memory'))).size, shape.memoryMb * 2 ** 20)
  assert.match(JSON.stringify(await booted.ask(resources.instance())), '"state":"Paused"')
  await booted.resume()
  assert.match(JSON.stringify(await booted.ask(resources.instance())), '"state":"Running"')
  await booted.kill()
  assert.equal(await booted.exited, { code: null, signal: 'SIGKILL' })

  // More than one at a time, of the same files.
  const restored = await Promise.all(
    [1, 2].map(async () => it.driver.restore({ shape, dir }, await it.machine())),
  )
  for (const machine of restored) await until(() => machine.console().includes('tick'))
  assert.is(new Set(it.driver.pids()).size, 2)
  for (const machine of restored) await machine.kill()
  assert.equal(it.driver.pids(), [])
  assert.equal(leftOf(it.options).jails, [])
})

realTest('a paused machine gets no time, says nothing, and goes on', async (it) => {
  const shape = { ...it.shape, kernel: await it.kernel('tick', 'again') }
  const machine = await it.driver.boot(shape, await it.machine())
  await until(() => machine.console().includes('tick'))
  await machine.pause()
  const { cpuMs } = await machine.usage()
  await sleep(300)
  assert.is((await machine.usage()).cpuMs, cpuMs)
  await machine.resume()
  for (const end = performance.now() + 20_000; (await machine.usage()).cpuMs === cpuMs; await sleep(10))
    assert.ok(performance.now() < end)
  await machine.pause()
  await machine.kill()
})

realTest('a console holds what the guest says, and nothing else', async (it) => {
  const machine = await it.driver.boot(it.shape, await it.machine())
  await until(() => machine.console().endsWith('\n'))
  assert.is(machine.console(), 'it runs\n')
})

realTest('a machine has every wall that is promised', async (it) => {
  const machine = await it.driver.boot(it.shape, await it.machine())
  const proc = (name: string) => `/proc/${machine.pid}/${name}`
  const status = readFileSync(proc('status'), 'utf8')
  const field = (name: string) => new RegExp(`^${name}:\\s+(.*)$`, 'm').exec(status)?.[1]
  const [uid] = field('Uid')!.split('\t').map(Number)
  assert.ok(uid! >= 0x7000_0000, `user ${uid}`)
  assert.is(field('Gid'), [uid, uid, uid, uid].join('\t'))
  assert.is(field('CapEff'), '0000000000000000')
  assert.is(field('NoNewPrivs'), '1')
  assert.is(field('Seccomp'), '2')
  for (const namespace of ['net', 'mnt', 'pid'])
    assert.is.not(readlinkSync(proc(`ns/${namespace}`)), readlinkSync(`/proc/self/ns/${namespace}`))
  // Of the host it sees its own files.
  const names = readdirSync(proc('root')).sort()
  const files = ['api.sock', 'dev', 'firecracker', 'initramfs', 'job.img', 'kernel', 'log', 'metrics']
  assert.equal(
    names.filter((name) => name !== 'run' && name !== 'firecracker.pid'),
    [...files, 'root.img', 'snapshot', 'v.sock'],
  )
  assert.match(readFileSync(proc('cgroup'), 'utf8'), `${cgroupParent}/firecracker-test/m1`)
  const { memoryMb } = await machine.usage()
  assert.ok(memoryMb > 0 && memoryMb < 64, `${memoryMb} MiB`)
})

realTest('KVM is believed once a kernel has said a word', async (it) => {
  const kernel = await it.kernel('Linux version 0')
  await using driver = await createFirecracker({ ...optionsFor(it.dir, 'trial'), kernel })
  assert.match(driver.version, /^Firecracker \d+\.\d+\.\d+ \(KVM\)$/)
  assert.equal(driver.pids(), [])
})

for (const [how, then, message] of [
  ['hangs', 'halt', /runs no guest: no word of a kernel within 5 s/],
  ['resets', 'reset', /runs no guest: it ended at once/],
] as const)
  realTest(`KVM is not believed where the kernel ${how}`, async (it) => {
    const kernel = await it.kernel('', then)
    const options = { ...optionsFor(it.dir, 'trial'), kernel }
    assert.match(String(await errorOf(createFirecracker(options))), message)
    const { jails, cgroup } = leftOf(options)
    assert.equal([jails, cgroup.pids(), existsSync(join(options.stateDir, 'trial'))], [[], [], false])
  })

realTest('what Firecracker refuses is told in its own words', async (it) => {
  const machine = await it.driver.boot(it.shape, await it.machine())
  const error = await errorOf(machine.ask(resources.action('InstanceStart')))
  assert.instance(error, FirecrackerError)
  assert.match(error!.message, /^Firecracker, PUT \/actions: .*not supported after starting/i)
  const unknown = { method: 'PUT' as const, path: '/entropy', body: { more: 1 } }
  assert.match((await errorOf(machine.ask(unknown)))!.message, /unknown field/)
})

realTest('a machine that cannot start is an error, and leaves nothing', async (it) => {
  const shape = { ...it.shape, kernel: it.shape.root }
  const error = await errorOf(it.driver.boot(shape, await it.machine()))
  assert.instance(error, MachineError)
  assert.match(error!.message, /PUT \/actions: .*kernel/i)
  assert.equal(it.driver.pids(), [])
  assert.equal(leftOf(it.options).jails, [])
  assert.match(
    String(await errorOf(it.driver.restore({ shape: it.shape, dir: it.dir }, await it.machine()))),
    /ENOENT/,
  )
})

realTest('a guest that resets ends its machine, its channel and all that was made for it', async (it) => {
  const shape = { ...it.shape, kernel: await it.kernel('bye', 'reset') }
  const machine = await it.driver.boot(shape, await it.machine())
  assert.is(await text(machine.channel), '')
  assert.equal(await machine.exited, { code: null, signal: null })
  assert.match(machine.console(), 'bye')
  assert.equal(leftOf(it.options).jails, [])
  assert.equal(await leftOf(it.options).cgroup.children(), [])
  await machine.kill()
})

realTest('of a console that never ends the last is kept', async (it) => {
  const shape = { ...it.shape, kernel: await it.kernel('x'.repeat(200), 'again') }
  const machine = await it.driver.boot(shape, await it.machine())
  await until(() => machine.console().length >= 16_384)
  await sleep(200)
  assert.ok(machine.console().length <= 16_384)
  assert.match(machine.console(), 'x'.repeat(200))
})

realTest('metrics are there when asked for', async (it) => {
  const machine = await it.driver.boot(it.shape, await it.machine())
  for (let i = 0; i < 12; i++) {
    const { api_server, vsock } = await machine.metrics()
    assert.type(api_server, 'object')
    assert.type(vsock, 'object')
  }
})

realTest('the limit of the disk holds for a booted and a restored machine', async (it) => {
  const config = async (machine: Awaited<ReturnType<FirecrackerDriver['boot']>>) => {
    const whole = (await machine.ask({ method: 'GET', path: '/vm/config' })) as { drives: object[] }
    return JSON.stringify(whole.drives)
  }
  const booted = await it.driver.boot(it.shape, { ...(await it.machine()), diskBytesPerSecond: 7e6 })
  assert.match(await config(booted), '"size":7000000')
  await booted.pause()
  const dir = join(it.dir, 'template')
  await mkdir(dir)
  await booted.snapshot(dir)
  await booted.kill()
  const restored = await it.driver.restore(
    { shape: it.shape, dir },
    { ...(await it.machine()), diskBytesPerSecond: 5e6 },
  )
  assert.match(await config(restored), '"size":5000000')
  assert.match(JSON.stringify(await restored.ask(resources.instance())), '"state":"Running"')
})

realTest(
  'a machine with a network has a tap in the namespace it is given, restored under another name',
  async (it) => {
    await using world = await startWorld()
    const taps = async () => {
      const links = JSON.parse(await runIn(world.hostPath, 'ip', '-json', 'link')) as { ifname: string }[]
      return links.map(({ ifname }) => ifname).filter((name) => name.startsWith('vm'))
    }
    const shape = { ...it.shape, network: true }
    assert.equal(it.driver.guestNetwork(shape), { address: '198.19.0.2/30', gateway: '198.19.0.1' })
    // As templates are made: its interface leads nowhere.
    const booted = await it.driver.boot(shape, await it.machine())
    assert.equal(await taps(), [])
    await booted.pause()
    const dir = join(it.dir, 'template')
    await mkdir(dir)
    await booted.snapshot(dir)
    await booted.kill()
    const machine = async () => ({ ...(await it.machine()), netns: world.hostPath })
    const one = await it.driver.restore({ shape, dir }, await machine())
    const other = await it.driver.boot(shape, await machine())
    assert.equal(one.network, it.driver.guestNetwork(shape))
    assert.equal(other.network, { address: '198.19.0.6/30', gateway: '198.19.0.5' })
    assert.is((await taps()).length, 2)
    assert.is(readlinkSync(`/proc/${one.pid}/ns/net`), readlinkSync(world.hostPath))
    await one.kill()
    assert.is((await taps()).length, 1)
    await other.kill()
    assert.equal(await taps(), [])
    assert.equal(leftOf(it.options).taps, [])
  },
)

realTest('what a killed runner leaves, the next start takes away', async (it) => {
  await using world = await startWorld()
  const driver = optionsFor(it.dir, 'killed')
  const shape = { ...it.shape, network: true }
  const script = join(import.meta.dirname, 'firecracker-owner.ts')
  const argument = JSON.stringify({ driver, shape, machine: await it.machine(), netns: world.hostPath })
  const child = spawn(process.execPath, [script, argument], { stdio: ['ignore', 'pipe', 'inherit'] })
  const [line] = (await once(createInterface(child.stdout), 'line')) as [string]
  const [pid] = JSON.parse(line) as [number]
  child.kill('SIGKILL')
  await once(child, 'exit')
  const left = leftOf(driver)
  assert.equal([left.jails, left.cgroup.child('m1').pids(), left.taps.length], [['m1'], [pid], 1])
  await using _ = await createFirecracker(optionsFor(it.dir, 'next'))
  const now = leftOf(driver)
  assert.equal([now.jails, now.taps, startTime(pid)], [[], [], undefined])
  assert.equal([await now.cgroup.children(), existsSync(join(driver.stateDir, 'killed'))], [[], false])
  assert.not.match(await runIn(world.hostPath, 'ip', 'link'), /vm[0-9a-f]{8}/)
  assert.is(await runIn(world.hostPath, 'nft', 'list', 'ruleset'), '')
})

const seed = Number(process.env.VULCAN_SEED ?? Date.now() % 1_000_000)

realTest(
  'a runner killed at any moment leaves nothing that the next start does not take away',
  async (it) => {
    await using world = await startWorld()
    const random = seeded(seed)
    const shape = { ...it.shape, network: true, kernel: await it.kernel('tick', 'again') }
    const script = join(import.meta.dirname, 'firecracker-owner.ts')
    for (let round = 0; round < 5; round++) {
      const driver = optionsFor(it.dir, `killed-${round}`)
      const argument = JSON.stringify({ driver, shape, machine: await it.machine(), netns: world.hostPath })
      const child = spawn(process.execPath, [script, argument], { stdio: 'ignore' })
      const killedAfter = Math.round(100 + random() * 300)
      await sleep(killedAfter)
      child.kill('SIGKILL')
      await once(child, 'exit')
      const next = await holdMachines({ ...driver, owner: 'next' })
      await next[Symbol.asyncDispose]()
      const what = `seed ${seed}, round ${round}, after ${killedAfter} ms`
      const left = readdirSync(driver.stateDir).filter((name) => name.startsWith('killed'))
      assert.equal([left, await leftOf(driver).cgroup.children()], [[], []], what)
      assert.not.match(await runIn(world.hostPath, 'ip', 'link'), /vm[0-9a-f]{8}/, what)
      assert.is(await runIn(world.hostPath, 'nft', 'list', 'ruleset'), '', what)
    }
  },
)

realTest('a driver that is closed has no machines, and makes none', async (it) => {
  const starting = it.driver.boot(it.shape, await it.machine())
  starting.catch(() => {})
  const machine = await it.driver.boot(it.shape, await it.machine())
  await it.driver[Symbol.asyncDispose]()
  await machine.exited
  await starting.then((late) => late.exited).catch(() => {})
  assert.equal(it.driver.pids(), [])
  assert.match(String(await errorOf(it.driver.boot(it.shape, await it.machine()))), 'closed')
  assert.is(existsSync(join(it.options.stateDir, it.options.owner)), false)
})

test.run()
