import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { duplexPair } from 'node:stream'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { findMachineParts } from '../../../rootfs/index.ts'
import { type QemuLine, qemuArguments } from '../../../runners/microvm/qemu/arguments.ts'
import { createQemu } from '../../../runners/microvm/qemu/index.ts'
import { launchArgs } from '../../../runners/microvm/qemu/launch.ts'
import { Qmp, QmpError } from '../../../runners/microvm/qemu/qmp.ts'
import { isMachineUser, Users } from '../../../runners/microvm/users.ts'
import { skip } from '../../harness.ts'
import { cacheDir, cgroupParent, newOwner, noMachines } from './qemu-support.ts'

const boot: QemuLine = {
  name: 'owner.m1',
  shape: { kernel: '/k', initramfs: '/i', root: '/r', memoryMb: 192, vcpus: 2, network: false },
  version: { text: '7.2.22', build: '', major: 7, minor: 2 },
  accelerator: 'emulation',
  start: { kind: 'boot', tscKhz: 2_000_000 },
  isNetworkOpen: false,
  diskBytesPerSecond: undefined,
}
const restore: QemuLine = { ...boot, start: { kind: 'restore', memory: 'file' } }
/** The values of an option, in their order. */
const values = (line: QemuLine, option: string) => {
  const args = qemuArguments(line)
  return args.filter((_, index) => args[index - 1] === option)
}
const version = (major: number, minor: number) => ({ text: `${major}.${minor}`, build: '', major, minor })

test('a restored machine is the same but for its memory and where it begins', () => {
  const [booted, restored] = [qemuArguments(boot), qemuArguments(restore)]
  assert.equal(
    booted.filter((arg) => !restored.includes(arg)),
    [
      'memory-backend-file,id=mem,size=192M,mem-path=/proc/self/fd/8,share=on',
      '-kernel',
      '/proc/self/fd/10',
      '-initrd',
      '/proc/self/fd/11',
      '-append',
      'console=ttyS0 quiet panic=-1 reboot=t random.trust_cpu=on no_timer_check mitigations=off tsc=reliable tsc_early_khz=2000000',
    ],
  )
  assert.equal(
    restored.filter((arg) => !booted.includes(arg)),
    ['memory-backend-file,id=mem,size=192M,mem-path=/proc/self/fd/8,share=off', '-incoming', 'defer'],
  )
})

test('devices are these and no others, and no path of the host is told', () => {
  const line = { ...boot, shape: { ...boot.shape, network: true } }
  assert.equal(values(line, '-device'), [
    'virtio-blk-device,drive=root,serial=root',
    'virtio-blk-device,drive=job,serial=job',
    'virtio-serial-device,max_ports=2',
    'virtserialport,chardev=agent,name=vulcan',
    'virtio-rng-device,rng=rng',
    'virtio-net-device,netdev=net,mac=52:54:00:12:34:56',
  ])
  assert.equal(values(boot, '-device').slice(-1), ['virtio-rng-device,rng=rng'])
  for (const arg of qemuArguments(line)) assert.not.match(arg, /(^|=)\/[kir]$/)
  for (const drive of values(line, '-blockdev').map((text) => JSON.parse(text)))
    assert.equal([drive['read-only'], drive.file['read-only'], drive.file.locking], [true, true, 'off'])
  const sandbox = 'on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny'
  assert.equal(values(line, '-sandbox'), [sandbox])
})

test('a network is open only within a namespace', () => {
  const line = { ...boot, shape: { ...boot.shape, network: true } }
  assert.equal(values(line, '-netdev'), ['user,id=net,ipv6=off,restrict=on'])
  assert.equal(values({ ...line, isNetworkOpen: true }, '-netdev'), ['user,id=net,ipv6=off,restrict=off'])
  assert.equal(values({ ...boot, isNetworkOpen: true }, '-netdev'), [])
})

test('newer versions map templates read-only and take state from a file', () => {
  const memory = (line: QemuLine) => values(line, '-object')[0]
  assert.match(memory({ ...restore, version: version(8, 2) })!, 'share=off,readonly=on,rom=off')
  assert.not.match(memory({ ...restore, version: version(8, 1) })!, 'readonly')
  assert.not.match(memory({ ...boot, version: version(10, 0) })!, 'readonly')
  const sets = (line: QemuLine) => values(line, '-add-fd')
  assert.equal(sets({ ...restore, version: version(10, 0) }), ['fd=9,set=3', 'fd=6,set=1', 'fd=7,set=2'])
  assert.equal(sets(restore), ['fd=6,set=1', 'fd=7,set=2'])
  assert.match(memory({ ...restore, start: { kind: 'restore', memory: 'stream' } })!, 'memory-backend-ram')
})

test('bandwidth is one for both drives', () => {
  const line = { ...boot, diskBytesPerSecond: 1_000 }
  assert.ok(values(line, '-object').includes('throttle-group,id=disk,x-bps-total=1000'))
  for (const drive of values(line, '-blockdev').map((text) => JSON.parse(text)))
    assert.equal([drive.driver, drive['throttle-group'], drive.file.driver], ['throttle', 'disk', 'raw'])
})

test('the way to QEMU drops what the runner has', () => {
  const identity = { uid: 2 ** 31, gid: 2 ** 31, groups: [] }
  const args = launchArgs({ command: ['/q', '-x'], netns: '/proc/1/fd/9', identity, prefix: [] })
  assert.equal(args.slice(3), [
    ...['nsenter', '--net=/proc/1/fd/9', '--'],
    ...['setpriv', '--pdeathsig', 'KILL', '--no-new-privs', '--reuid', '2147483648', '--regid', '2147483648'],
    ...['--clear-groups', '--inh-caps=-all', '--bounding-set=-all', '--', '/q', '-x'],
  ])
  const plain = launchArgs({ command: ['/q'], netns: undefined, identity: undefined, prefix: [] })
  assert.equal(plain.slice(3), ['setpriv', '--pdeathsig', 'KILL', '--no-new-privs', '--', '/q'])
  const small = launchArgs({
    command: ['/q'],
    netns: undefined,
    identity: undefined,
    prefix: ['first', '--'],
  })
  assert.equal(small.slice(3), ['first', '--', ...plain.slice(3)])
})

test('each machine has a user that no other has, until it is given back', () => {
  const users = new Users([7])
  if (!users.areOthers) return assert.is(users.take(), undefined)
  const taken = Array.from({ length: 600 }, () => users.take()!)
  for (const { uid, gid, groups } of taken) {
    assert.ok(isMachineUser(uid) && uid === gid && uid < 2 ** 32 - 1)
    assert.equal(groups, [7])
  }
  const own = taken.filter(({ uid }) => uid !== 65_534)
  assert.is(new Set(own.map(({ uid }) => uid)).size, own.length)
  if (own.length === 0) return
  users.giveBack(own[5])
  assert.is(users.take()!.uid, own[5]!.uid)
})

const session = () => {
  const [ours, theirs] = duplexPair()
  theirs.setEncoding('utf8')
  return { qmp: new Qmp(ours), theirs }
}
const rejection = async (promise: Promise<unknown>): Promise<string> => {
  const error = await promise.then(
    () => undefined,
    (error) => error,
  )
  assert.instance(error, QmpError)
  return error.message
}

test('answers go to their commands, and events to who waits for them', async () => {
  const { qmp, theirs } = session()
  const heard: string[] = []
  theirs.on('data', (text: string) => heard.push(...text.trim().split('\n')))
  const calls = [qmp.call('qmp_capabilities'), qmp.call('stop'), qmp.call('cont', { a: 1 })]
  const event = qmp.event(({ name }) => name === 'RESUME', 5_000, 'waiting')
  await new Promise(setImmediate)
  assert.equal(JSON.parse(heard[2]!), { execute: 'cont', arguments: { a: 1 }, id: 3 })
  const said =
    '{"QMP":{"version":{},"capabilities":[]}}\r\n{"return":{},"id":1}\r\n{"event":"STOP","timestamp":{}}\r\n' +
    '{"event":"RESUME","data":{"x":1}}\r\n{"id":3,"return":{"y":2}}\r\n' +
    '{"id":2,"error":{"class":"GenericError","desc":"no"}}\r\n'
  const failed = rejection(calls[1]!)
  // Cut anywhere.
  for (const piece of said.match(/.{1,7}/gs)!) theirs.write(piece)
  assert.equal(await event, { name: 'RESUME', data: { x: 1 } })
  assert.equal([await calls[0], await calls[2]], [{}, { y: 2 }])
  assert.is(await failed, 'stop: no')
})

test('whatever is no QMP ends the conversation, and everybody who waits is told', async () => {
  const garbage = [
    'no json\n',
    '[]\n',
    '{"event":7}\n',
    '{"return":{},"id":"1"}\n',
    '{"error":{"class":"JSONParsing","desc":"?"}}\n',
    `${'x'.repeat(70_000)}`,
    `{"event":"${'x'.repeat(70_000)}"}\n`,
    '\u0000\u0001\u0002\n',
  ]
  for (const said of garbage) {
    const { qmp, theirs } = session()
    const waiting = [rejection(qmp.call('stop')), rejection(qmp.event(() => true, 5_000, 'waiting'))]
    theirs.write(said)
    await Promise.all(waiting)
    assert.match(await rejection(qmp.call('cont')), 'QEMU')
    await rejection(qmp.event(() => true, 5_000, 'waiting'))
  }
})

test('an answer that does not come, or nobody at the other end, is an error', async () => {
  const { qmp, theirs } = session()
  assert.match(await rejection(qmp.call('stop', undefined, 30)), 'no answer to stop in 30 ms')
  assert.match(await rejection(qmp.event(() => true, 30, 'waiting')), 'waiting took more than 30 ms')
  // It was answered too late: nobody waits any more.
  theirs.write('{"return":{},"id":1}\n{"return":{},"id":99}\n')
  const last = rejection(qmp.call('cont'))
  theirs.destroy()
  await last
})

const reason = await noMachines()
const name = 'KVM is used where a machine runs under it, and not tried twice'
if (reason !== undefined) skip(test, name, reason)
else
  test(name, async () => {
    const stateDir = await mkdtemp(join(tmpdir(), 'vulcan-test-kvm-'))
    const { kernel } = (await findMachineParts(cacheDir, { kernelFormat: 'either' }))!
    const look = async () => {
      await using driver = await createQemu({ owner: newOwner(), stateDir, cgroupParent, kernel })
      const { works, why } = JSON.parse(await readFile(join(stateDir, 'kvm.json'), 'utf8'))
      assert.is(driver.accelerator, works ? 'kvm' : 'emulation')
      assert.match(driver.version, works ? '(KVM)' : '(emulation)')
      assert.is(driver.walls.includes('hardware virtualisation'), works)
      assert.type(why, 'string')
      return (await readFile(join(stateDir, 'kvm.json'), 'utf8')) as string
    }
    try {
      const first = await look()
      const begun = performance.now()
      assert.is(await look(), first)
      assert.ok(performance.now() - begun < 4_000)
    } finally {
      await rm(stateDir, { recursive: true, force: true })
    }
  })

test.run()
