import { mkdir, rm, symlink } from 'node:fs/promises'
import { join } from 'node:path'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { machineKinds } from '../../shared/machine.ts'
import { skip } from '../harness.ts'
import { busyboxRoot, Guest, lacking, shell } from './guest.ts'

const missing = await lacking()
const walls = suite('guest agent: walls')
const root = { user: { uid: 0, gid: 0, groups: [] } }
/** One machine for each test, one after the other. */
const test = (name: string, run: (guest: Guest) => Promise<void>, image = busyboxRoot) => {
  if (missing !== undefined) return skip(walls, name, missing)
  walls(name, async () => {
    await using guest = await Guest.boot({ root: image })
    await guest.configure()
    await run(guest)
  })
}

test('user 0 has no capability, no device and no way to the agent', async (guest) => {
  const attempts = [
    'grep -c ^Cap.*0000000000000000 /proc/self/status',
    'mount -t tmpfs x /tmp && echo mounted',
    'mknod /tmp/vda b 254 0 && echo made',
    'ls /dev /sys',
    'ls -d /proc/1 && echo seen',
    'for p in /proc/[0-9]*; do test "$(cat $p/comm)" = init && echo seen; done',
    'kill -9 1',
    'echo x >/proc/sys/kernel/core_pattern && echo written',
    'echo b >/proc/sysrq-trigger',
    'echo x >/etc/hosts && echo written',
    'touch /bin/x /x /dev/x && echo written',
    'for f in $(ls /proc); do test -f /proc/$f && (echo >/proc/$f) 2>/tmp/no && test ! -c /proc/$f && echo open: $f; done',
    'cat /proc/kcore | head -c 1 | wc -c',
    'for d in mem kmsg vda vdb vport0p1 hwrng ttyS0 console; do test -e /dev/$d && echo there: $d; done',
    'echo end',
  ]
  const { stdout, stderr } = await guest.run(shell(attempts.join('\n'), root))
  const devices = 'fd full null random shm stderr stdin stdout urandom zero'.split(' ').join('\n')
  assert.is(stdout, `5\n/dev:\n${devices}\n0\nend\n`, stderr)
  assert.ok((await guest.ping()) < 10_000)
})

test('a fork bomb meets its limit, the agent answers, and all of it ends by a signal', async (guest) => {
  await guest.start(shell('f() { f | f & f; }; f; sleep 1000', { pids: 24 }))
  for (let i = 0; i < 20; i++) assert.ok((await guest.ping()) < 10_000)
  assert.ok((await guest.usage()).cpu_ms > 0)
  guest.send(machineKinds.signal, { signal: 9 })
  const { exited } = await guest.finish()
  assert.is(exited.code, 137)
  assert.is(exited.oom, false)
})

test('who takes more memory than the limit is killed with all of the tree, and it is told', async (guest) => {
  const { stdout, exited } = await guest.run(
    shell('(tail /dev/zero; echo left) & wait; echo left', { memory_mb: 48 }),
  )
  assert.is(stdout, '')
  assert.is(exited.oom, true)
  assert.is(exited.code, 137)
  assert.ok(exited.usage.oom_kills > 0)
  assert.ok(
    exited.usage.memory_peak_mb > 40 && exited.usage.memory_peak_mb <= 49,
    `${exited.usage.memory_peak_mb}`,
  )
  assert.ok((await guest.ping()) < 10_000)
})

test('files, /tmp and the result have their limits', async (guest) => {
  const script = [
    'head -c 3000000 /dev/zero >/tmp/long; echo $?',
    'for i in 1 2 3 4 5 6 7 8 9; do head -c 1000000 /dev/zero >/run/$i; done; echo $?',
    'head -c 5000 /dev/zero >/.vulcan/result',
    'rm /.vulcan/result 2>/dev/null; (echo x >/.vulcan/other) 2>/dev/null || echo no',
  ]
  await guest.configure({ disk_mb: 8 })
  const limits = { file_bytes: 2_000_000, result: '/.vulcan/result', result_bytes: 1000 }
  const { stdout, result } = await guest.run(shell(script.join('\n'), { ...limits, env: { PATH: '/bin' } }))
  assert.is(stdout, '153\n1\nno\n')
  assert.is(result.length, 1001)
})

test(
  'links of an image lead nowhere but into it',
  async (guest) => {
    const more = { cwd: '/deep/cwd', result: '/.vulcan/result', env: { PATH: '/bin' } }
    const script =
      'pwd; cat /etc/hosts; echo x >/tmp/x; ls /root /vulcan; echo y >/dev/null; echo done >/.vulcan/result'
    const { stdout, result } = await guest.run(shell(script, more))
    assert.match(stdout, /^\/root\/cwd\n127.0.0.1 localhost\n/)
    assert.match(stdout, /^\/root:\ncwd$/m)
    assert.match(stdout, /^\/vulcan:\nx$/m)
    assert.is(result, 'done\n')
  },
  async (dir) => {
    await busyboxRoot(dir)
    await rm(join(dir, 'var'), { recursive: true })
    for (const name of ['root', 'vulcan']) await mkdir(join(dir, name))
    const links = {
      tmp: '/vulcan',
      run: '/proc/1/root',
      dev: '../../../dev-of-image',
      proc: '/nowhere/../there',
      deep: '/root',
      'etc/hosts': '/vulcan/hosts',
    }
    for (const [path, to] of Object.entries(links)) await symlink(to, join(dir, path))
  },
)

walls.run()
