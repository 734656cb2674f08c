import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createServer } from 'node:net'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { Template } from '../../../runners/microvm/driver.ts'
import { type QemuHost, qemuTests } from './qemu-support.ts'

const machineTest = await qemuTests()

/** Says a word to whoever connects to this port of the loopback. */
const server = `require('node:net').createServer((socket) => socket.end('inside\\n'))
  .listen(7000, '127.0.0.1', () => console.log('up'))`
const up = 'ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up'
const call = (port: number) => `timeout 4 nc 10.0.2.2 ${port} </dev/null`

let made: Promise<Template> | undefined
const networked = (it: QemuHost): Promise<Template> => {
  made ??= it.template({ ...it.shape, network: true, vcpus: 2 })
  return made
}

machineTest(
  'a machine’s network is that of the namespace it is given',
  async (it) => {
    const script = 'ip link set dev lo up && exec "$0" -e "$1"'
    const args = ['--net', '--', 'sh', '-c', script, process.execPath, server]
    const child = spawn('unshare', args, { stdio: ['ignore', 'pipe', 'inherit'] })
    try {
      await once(child.stdout!, 'data')
      await using guest = await it.restore(await networked(it), { netns: `/proc/${child.pid}/ns/net` })
      assert.match((await guest.run('ls /sys/devices/system/cpu')).said, 'cpu1')
      assert.is((await guest.run(up)).code, 0)
      // Where nothing is but what was put there.
      assert.is((await guest.run(call(7_000))).said, 'inside\n')
    } finally {
      child.kill('SIGKILL')
    }
  },
  { root: true },
)

machineTest('a machine without a namespace reaches nobody, also not the host', async (it) => {
  let reached = 0
  const host = createServer((socket) => {
    reached++
    socket.end('host\n')
  })
  await once(host.listen(0, '127.0.0.1'), 'listening')
  const { port } = host.address() as { port: number }
  try {
    const template = await networked(it)
    assert.equal(it.driver.guestNetwork(template.shape), { address: '10.0.2.15/24', gateway: '10.0.2.2' })
    await using guest = await it.restore(template)
    assert.is((await guest.run(up)).code, 0)
    assert.is.not((await guest.run(call(port))).code, 0)
    assert.is(reached, 0)
  } finally {
    host.close()
  }
})

machineTest('a machine has no interface where its shape has none', async (it) => {
  assert.is(it.driver.guestNetwork(it.shape), undefined)
  await using guest = await it.restore(await it.template(it.shape))
  assert.is((await guest.run('ls /sys/class/net')).said, 'lo\n')
})

test.run()
