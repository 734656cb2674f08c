import { once } from 'node:events'
import { mkdir, writeFile } from 'node:fs/promises'
import { type AddressInfo, createServer } from 'node:net'
import { join } from 'node:path'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { machineKinds, machineWindowBytes } from '../../shared/machine.ts'
import { skip } from '../harness.ts'
import { Guest, lacking, shell, start } from './guest.ts'

const missing = await lacking()
const life = suite('guest agent: life')
/** One machine for each test, one after the other. */
const test = (name: string, run: (guest: Guest) => Promise<void>, devices: string[] = []) => {
  if (missing !== undefined) return skip(life, name, missing)
  life(name, async () => {
    await using guest = await Guest.boot({ devices })
    await run(guest)
  })
}

test('a process runs as its user in its directory, and its streams, code, result and usage come back', async (guest) => {
  await guest.configure({ time_ms: Date.UTC(2031, 0, 1) })
  guest.put('/workspace/a/greeting', 'file', 'hello')
  guest.put('/workspace/link', 'link', 'a/greeting')
  const script =
    'cat link; read x; echo "$x $HOME $(id -u):$(id -g) $(pwd) $(date +%Y)"; echo wrong >&2; echo [1] >$R; exit 7'
  const running = guest.start(
    shell(script, {
      cwd: '/workspace',
      env: { PATH: '/bin', HOME: '/nowhere', R: '/.vulcan/result' },
      user: { uid: 1234, gid: 2345, groups: [3456] },
      result: '/.vulcan/result',
    }),
  )
  await running
  guest.send(machineKinds.data, Buffer.from('input\n'), 0)
  guest.send(machineKinds.end, undefined, 0)
  const { stdout, stderr, result, exited } = await guest.finish()
  assert.is(stdout, 'helloinput /nowhere 1234:2345 /workspace 2031\n')
  assert.is(stderr, 'wrong\n')
  assert.is(result, '[1]\n')
  assert.is(exited.code, 7)
  assert.is(exited.oom, false)
  assert.ok(exited.usage.cpu_ms > 0 && exited.usage.memory_peak_mb > 0)
  assert.ok((await guest.ping()) < 10_000)
  guest.send(machineKinds.off)
  assert.ok(await guest.isOff(), 'it powers off when it is told to')
})

test('what was made ready before a start is what the process finds, at the size it asks for', async (guest) => {
  await guest.configure()
  const result = '/.vulcan/result'
  guest.send(machineKinds.warm, { directories: ['/bin', '/nowhere'], result, result_bytes: 1024 })
  await guest.ping()
  guest.put('/workspace/greeting', 'file', 'hello')
  const script = 'ls -d /nowhere; cat greeting; head -c 200000 /dev/zero >$R; wc -c <$R'
  const env = { PATH: '/bin', R: result }
  await guest.start(shell(script, { cwd: '/workspace', env, result, result_bytes: 300_000 }))
  guest.send(machineKinds.end, undefined, 0)
  const found = await guest.finish()
  assert.is(found.stdout, 'hello200000\n')
  assert.is(found.result, '\0'.repeat(200_000))
})

test('output waits for credit, input for its reader, and what is left running ends with the first process', async (guest) => {
  await guest.configure()
  guest.generous = false
  const script = '(sleep 1000 &) ; (sleep 1000; echo never) & head -c 3000000 /dev/zero; wc -c'
  await guest.start(shell(script))
  while (guest.received(1) < machineWindowBytes) await guest.ping()
  for (let i = 0; i < 20; i++) await guest.ping()
  assert.is(guest.received(1), machineWindowBytes)
  guest.generous = true
  guest.credit(1, machineWindowBytes)
  let sent = 0
  let window = machineWindowBytes
  while (sent < 1_000_000) {
    if (window < 32_768) window += Number((await guest.next(machineKinds.credit)).payload)
    else {
      guest.send(machineKinds.data, Buffer.alloc(32_768), 0)
      sent += 32_768
      window -= 32_768
    }
  }
  guest.send(machineKinds.end, undefined, 0)
  const { stdout, exited } = await guest.finish()
  assert.is(stdout.length, 3_000_000 + `${sent}\n`.length)
  assert.ok(stdout.endsWith(`\0${sent}\n`))
  assert.is(exited.code, 0)
})

test('the job drive is written after the boot, mounted when it is asked for, also below a process that runs', async (guest) => {
  const tree = join(guest.dir, 'workspace')
  await mkdir(join(tree, 'sub'), { recursive: true })
  await writeFile(join(tree, 'sub', 'file'), 'from the drive')
  await writeFile(join(guest.dir, 'program'), '#!/bin/sh\necho program\n', { mode: 0o755 })
  await guest.configure()
  const script = 'read x; cat /workspace/sub/file; /.vulcan/program; echo >/workspace/x; cat /tmp/late'
  await guest.start(shell(script))
  await guest.writeJob([
    { source: tree, path: '0' },
    { source: join(guest.dir, 'program'), path: '1' },
  ])
  guest.send(machineKinds.mount, [
    { path: '0', target: '/workspace' },
    { path: '1', target: '/.vulcan/program' },
  ])
  await guest.next(machineKinds.mounted)
  guest.put('/tmp/late', 'file', 'late')
  await guest.configure({ mounts: [{ path: '0', target: '/workspace' }] })
  guest.send(machineKinds.data, Buffer.from('\n'), 0)
  const { stdout, stderr } = await guest.finish()
  assert.is(stdout, 'from the driveprogram\nlate')
  assert.match(stderr, /workspace\/x: Read-only file system/)

  guest.send(machineKinds.mount, [{ path: 'none', target: '/elsewhere' }])
  assert.match((await guest.failed()).message, /none/)
})

test('a host that comes back finds the agent as it was; what cannot be run is the user’s fault', async (guest) => {
  await guest.configure()
  await guest.reconnect()
  assert.ok((await guest.ping()) < 10_000)
  guest.send(machineKinds.start, start(['nothing-of-this-name']))
  assert.equal(await guest.failed(), {
    fault: 'user',
    message: 'nothing-of-this-name: No such file or directory',
  })
})

test(
  'the network has the address, the way out and the names that it is told, and may be told twice',
  async (guest) => {
    const server = createServer((socket) => socket.end('from outside')).listen(0, '127.0.0.1')
    await once(server, 'listening')
    const { port } = server.address() as AddressInfo
    try {
      const network = {
        address: '10.0.2.15/24',
        gateway: '10.0.2.2',
        nameservers: ['10.0.2.3'],
        hosts: [{ address: '10.0.2.2', name: 'outside.example' }],
      }
      await guest.configure({ network })
      await guest.configure({ network })
      const script = `nc outside.example ${port} </dev/null; echo; ip -4 -o addr; ip route; cat /etc/resolv.conf; nc 127.0.0.1 1`
      const { stdout, stderr } = await guest.run(shell(script))
      assert.match(stdout, /^from outside$/m)
      assert.match(stdout, /^1: lo {4}inet 127.0.0.1\/8/m)
      assert.match(stdout, /^2: eth0 {4}inet 10.0.2.15\/24/m)
      assert.match(stdout, /^default via 10.0.2.2 dev eth0/m)
      assert.match(stdout, /^nameserver 10.0.2.3$/m)
      assert.match(stderr, /refused/)
    } finally {
      server.close()
    }
  },
  ['-netdev', 'user,id=net', '-device', 'virtio-net-device,netdev=net'],
)

for (const [what, bytes] of [
  ['a frame that is too long', Buffer.from([0xff, 0xff, 0xff, 0xff, 1, 0])],
  ['a start without JSON', Buffer.from([0, 0, 0, 3, 4, 0, 0x7b])],
] as const)
  test(`${what} powers the machine off`, async (guest) => {
    guest.raw(bytes)
    assert.ok(await guest.isOff())
  })

life.run()
