import { readFileSync, readlinkSync } from 'node:fs'
import { open, readdir, readFile, stat, utimes, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { MachineError } from '../../../runners/microvm/driver.ts'
import { groupsOf, qemuTests } from './qemu-support.ts'

const machineTest = await qemuTests()

machineTest('a machine stands still while it is paused', async (it) => {
  await using guest = await it.restore(await it.template(it.shape))
  const { machine } = guest
  assert.equal(await guest.run('head -n 1 /dev/vda'), { said: 'the root drive\n', code: 0 })
  assert.equal(it.driver.pids(), [machine.pid])
  await machine.pause()
  const { cpuMs, memoryMb } = await machine.usage()
  assert.ok(cpuMs > 0 && memoryMb > 20)
  let hasAnswered = false
  const answer = guest.run('echo up').then((ran) => {
    hasAnswered = true
    return ran
  })
  await new Promise((resolve) => setTimeout(resolve, 300))
  assert.not.ok(hasAnswered)
  assert.ok((await machine.usage()).cpuMs - cpuMs < 100)
  await machine.resume()
  assert.equal(await answer, { said: 'up\n', code: 0 })
})

machineTest('restored machines begin alike and have memory of their own', async (it) => {
  const template = await it.template(it.shape)
  const before = await readFile(join(template.dir, 'memory'))
  await using one = await it.restore(template)
  await using other = await it.restore(template)
  await one.run('echo one >/note')
  await other.run('echo other >/note')
  assert.is((await one.run('cat /note')).said, 'one\n')
  assert.is((await other.run('cat /note')).said, 'other\n')
  await using third = await it.restore(template)
  assert.is((await third.run('cat /note')).code, 1)
  assert.ok(before.equals(await readFile(join(template.dir, 'memory'))), 'the template is as it was')
  // The directory is all it takes.
  assert.equal((await readdir(template.dir)).sort(), ['memory', 'state', 'template.json'])
})

machineTest('a machine that is idle does not tick', async (it) => {
  await using guest = await it.restore(await it.template(it.shape))
  const source = '/sys/devices/system/clocksource/clocksource0'
  assert.match((await guest.run(`cat ${source}/current_clocksource`)).said, /^tsc/)
  const ticks = async () => {
    const { said } = await guest.run('cat /proc/interrupts')
    return Number(/LOC: +(\d+)/.exec(said)![1])
  }
  // The first moments of a kernel are not idle.
  await guest.run('sleep 1')
  const before = await ticks()
  await guest.run('sleep 3')
  const found = (await ticks()) - before
  // A kernel that ticks does so 300 times at least.
  assert.ok(found < 150, `${found} interrupts`)
})

machineTest('a machine that is made ahead of its need has no huge pages', async (it) => {
  const template = await it.template(it.shape)
  await using soon = await it.restore(template)
  await using ahead = await it.restore(template, { ahead: true })
  const hugePages = ({ machine }: typeof soon) =>
    /^THP_enabled:\s+(\d)/m.exec(readFileSync(`/proc/${machine.pid}/status`, 'latin1'))?.[1]
  assert.equal([hugePages(soon), hugePages(ahead)], ['1', '0'])
  assert.is((await ahead.run('echo up')).said, 'up\n')
})

machineTest('what the host writes to a job drive after the restore is what the guest reads', async (it) => {
  const template = await it.template(it.shape)
  const options = await it.place()
  await using guest = await it.restore(template, options)
  {
    await using drive = await open(options.jobDrive, 'r+')
    await drive.write('of the job\n', 0)
    await drive.write('and further on\n', 1_000_000_000)
  }
  assert.is((await guest.run('head -n 1 /dev/vdb')).said, 'of the job\n')
  const further = 'dd if=/dev/vdb bs=1000000 skip=1000 count=1 2>/dev/null | head -n 1'
  assert.is((await guest.run(further)).said, 'and further on\n')
  assert.is((await guest.run('echo x >/dev/vdb')).code, 1)
  assert.is((await guest.run('echo x >/dev/vda')).code, 1)
})

machineTest('a machine that ends by itself is told, and leaves nothing', async (it) => {
  const guest = await it.restore(await it.template(it.shape))
  guest.machine.channel.write('poweroff -f\n')
  assert.equal(await guest.machine.exited, { code: 0, signal: null })
  assert.equal(it.driver.pids(), [])
  assert.ok(groupsOf(it.options.owner).every((dir) => dir.endsWith(it.options.owner)))
})

machineTest('a kernel that panics ends the machine', async (it) => {
  const guest = await it.restore(await it.template(it.shape))
  // The first process must not end.
  guest.machine.channel.write('exit 1\n')
  const { code } = await guest.machine.exited
  assert.is(code, 0)
  assert.match(guest.machine.console(), 'Kernel panic')
})

machineTest('a kill is final, whatever the guest does, and safe more than once', async (it) => {
  const guest = await it.restore(await it.template(it.shape))
  const { machine } = guest
  machine.channel.write('while :; do :; done\n')
  const closed = new Promise((resolve) => machine.channel.once('close', resolve))
  await Promise.all([machine.kill(), machine.kill()])
  await machine.kill()
  assert.equal(await machine.exited, { code: null, signal: 'SIGKILL' })
  await closed
  const failed = await machine.pause().catch((error) => error)
  assert.instance(failed, MachineError)
  assert.is((await machine.usage()).memoryMb, 0)
})

machineTest('a VMM that somebody else kills is told at once', async (it) => {
  const guest = await it.restore(await it.template(it.shape))
  const pausing = guest.machine.pause()
  process.kill(guest.machine.pid, 'SIGKILL')
  await pausing.catch((error) => assert.instance(error, MachineError))
  assert.equal(await guest.machine.exited, { code: null, signal: 'SIGKILL' })
  assert.equal(it.driver.pids(), [])
})

machineTest('a console is kept to its last part, however much is said', async (it) => {
  await using guest = await it.restore(await it.template(it.shape))
  await guest.run('seq 1 20000 >/dev/ttyS0')
  await guest.run('echo the last word >/dev/ttyS0')
  // What is in the pipe is read beside the answer.
  await new Promise((resolve) => setTimeout(resolve, 200))
  const said = guest.machine.console()
  assert.ok(said.length <= 16 * 1024)
  assert.match(said, 'the last word')
})

machineTest('a machine may use all the memory that it has', async (it) => {
  await using guest = await it.restore(await it.template(it.shape))
  const fill =
    'mount -t tmpfs -o size=110m none /tmp && dd if=/dev/zero of=/tmp/full bs=1M count=100 2>/dev/null'
  assert.is((await guest.run(fill)).code, 0)
  assert.is((await guest.run('wc -c </tmp/full')).said, '104857600\n')
  assert.ok((await guest.machine.usage()).memoryMb > 100)
})

machineTest('what QEMU does not take is told in its words, and leaves nothing', async (it) => {
  const shape = { ...it.shape, kernel: it.shape.root }
  const failed = await it.driver.boot(shape, await it.place()).catch((error) => error)
  assert.instance(failed, MachineError)
  assert.match(failed.message, 'qemu')
  const missing = await it.driver.boot({ ...it.shape, root: '/nowhere' }, await it.place()).catch((e) => e)
  assert.instance(missing, MachineError)
  assert.match(missing.message, 'ENOENT')
  assert.equal(it.driver.pids(), [])
  assert.ok(groupsOf(it.options.owner).every((dir) => dir.endsWith(it.options.owner)))
})

machineTest('a machine reads no faster than it may', async (it) => {
  const template = await it.template(it.shape)
  await using guest = await it.restore(template, { diskBytesPerSecond: 2 ** 20 })
  const begun = performance.now()
  assert.is((await guest.run('dd if=/dev/vda of=/dev/null bs=1M skip=1 count=4 2>/dev/null')).code, 0)
  assert.ok(performance.now() - begun > 2_000)
})

machineTest(
  'a machine runs as a user of its own, with nothing, within its groups',
  async (it) => {
    const template = await it.template(it.shape)
    await using one = await it.restore(template, { cpu: 0.5 })
    await using other = await it.restore(template)
    const nets = [one, other].map(({ machine: { pid } }) => readlinkSync(`/proc/${pid}/ns/net`))
    assert.is(nets[0], nets[1])
    assert.is.not(nets[0], readlinkSync('/proc/self/ns/net'))
    const users = [one, other].map(({ machine: { pid } }) => {
      const status = readFileSync(`/proc/${pid}/status`, 'latin1')
      const field = (name: string) => new RegExp(`^${name}:[ \\t]+(.*)$`, 'm').exec(status)?.[1]
      assert.equal(['CapPrm', 'CapEff', 'CapBnd', 'CapAmb'].map(field), Array(4).fill('0'.repeat(16)))
      assert.equal([field('NoNewPrivs'), field('Seccomp')], ['1', '2'])
      assert.is(field('Groups'), '')
      return field('Uid')!
    })
    for (const uids of users) assert.ok(uids.split('\t').every((uid) => Number(uid) >= 2 ** 31))
    assert.is.not(users[0], users[1])
    const groups = groupsOf(it.options.owner)
    const value = (name: string) =>
      groups.map((dir) => read(join(dir, name))).filter((text) => text !== undefined && text !== 'max')
    const quotas = [...value('cpu.cfs_quota_us'), ...value('cpu.max')]
    assert.ok(quotas.some((quota) => /^50000\b/.test(quota!)))
    const limits = [...value('memory.limit_in_bytes'), ...value('memory.max')].map(Number)
    assert.is(limits.filter((bytes) => bytes === (192 + 192) * 2 ** 20).length, 2)
  },
  { root: true },
)

machineTest('what is no template, or not what was written, is refused', async (it) => {
  const template = await it.template(it.shape)
  const { mtime, atime } = await stat(join(template.dir, 'memory'))
  const refusal = async () => {
    const failed = await it.restore(template).catch((error) => error)
    assert.instance(failed, MachineError)
    return failed.message
  }
  const manifest = join(template.dir, 'template.json')
  const written = await readFile(manifest, 'utf8')
  await writeFile(manifest, written.replace(/QEMU [\d.]+/, 'QEMU 1.0'))
  assert.match(await refusal(), /is for QEMU 1\.0/)
  await writeFile(manifest, '{')
  assert.match(await refusal(), /cannot be used/)
  await writeFile(manifest, written)
  await utimes(join(template.dir, 'memory'), atime, new Date(mtime.getTime() + 1_000))
  assert.match(await refusal(), /was changed/)
  const changed = String((await stat(join(template.dir, 'memory'), { bigint: true })).mtimeNs)
  await writeFile(manifest, JSON.stringify({ ...JSON.parse(written), changed_ns: changed }))
  const state = join(template.dir, 'state')
  const whole = await readFile(state)
  await writeFile(state, whole.subarray(0, 5_000))
  assert.match(await refusal(), /microvm-/)
  await writeFile(state, whole)
  assert.equal(it.driver.pids(), [])
  await using guest = await it.restore(template)
  assert.is((await guest.run('true')).code, 0)
})

const read = (file: string): string | undefined => {
  try {
    return readFileSync(file, 'latin1').trim()
  } catch {
    return undefined
  }
}

test.run()
