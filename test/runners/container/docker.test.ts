// timeout: 300
import { spawnSync } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { chmod, mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { framesTo } from '../../../runners/container/docker/attach.ts'
import { type Box, BoxError, type Network } from '../../../runners/container/engine.ts'
import { startTime } from '../../../scripts/process-identity.ts'
import type { TestDocker } from '../../dockerd.ts'
import { skip } from '../../harness.ts'
import { busyboxImage, finish, noDocker, runIn, sh, specOf, startEngine } from './docker-support.ts'

const reason = noDocker()
/** One for all tests of this file: they differ in their boxes. */
const host = reason === undefined ? await startEngine() : undefined
test.after(async () => {
  await host?.[Symbol.asyncDispose]()
})

const boxTest = (name: string, run: (it: NonNullable<typeof host>) => Promise<void>) => {
  if (host === undefined) skip(test, name, reason!)
  else test(name, () => run(host))
}

/** A box that is removed at the end. */
async function boxOf(scope: AsyncDisposableStack, making: Promise<Box>): Promise<Box> {
  const box = await making
  scope.defer(() => box.remove())
  return box
}

const eventually = async (holds: () => boolean, ms = 10_000) => {
  const until = performance.now() + ms
  while (!holds() && performance.now() < until) await sleep(20)
  return holds()
}
const isAlive = (pid: number) => startTime(pid) !== undefined

test('frames are read however they are cut', () => {
  const frame = (stream: number, bytes: string) => {
    const header = Buffer.alloc(8)
    header[0] = stream
    header.writeUInt32BE(bytes.length, 4)
    return Buffer.concat([header, Buffer.from(bytes)])
  }
  const all = Buffer.concat([frame(1, 'one'), frame(2, 'two'), frame(1, ''), frame(1, 'three')])
  for (let size = 1; size <= all.length; size++) {
    const got = ['', '', '']
    const take = framesTo((stream, bytes) => {
      got[stream] += bytes.toString()
    })
    for (let at = 0; at < all.length; at += size) assert.ok(take(all.subarray(at, at + size)))
    assert.equal(got, ['', 'onethree', 'two'])
  }
  assert.not(framesTo(() => {})(Buffer.from('HTTP/1.1 200 OK')))
})

boxTest('5 MB go in and come back on both streams, byte for byte', async (it) => {
  const input = randomBytes(5 * 2 ** 20)
  const box = await it.engine.create(specOf(it.image, sh('tee /dev/stderr')))
  try {
    const digests = [box.stdout, box.stderr].map(async (stream) => {
      const hash = createHash('sha256')
      for await (const chunk of stream) hash.update(chunk)
      return hash.digest('hex')
    })
    await box.start()
    box.stdin.end(input)
    assert.equal(await box.exited, { code: 0, oom: false })
    const expected = createHash('sha256').update(input).digest('hex')
    assert.equal(await Promise.all(digests), [expected, expected])
  } finally {
    await box.remove()
  }
})

boxTest('a process waits for who reads its output, and ends when all is read', async (it) => {
  await using scope = new AsyncDisposableStack()
  const size = 40 * 2 ** 20
  const box = await boxOf(scope, it.engine.create(specOf(it.image, sh(`head -c ${size} /dev/zero`))))
  let hasEnded = false
  void box.exited.then(() => {
    hasEnded = true
  })
  const said = text(box.stderr)
  await box.start()
  box.stdin.end()
  await sleep(1_500)
  assert.not(hasEnded)
  assert.ok(box.pids().length > 0)
  assert.ok(box.stdout.readableLength < 2 ** 20)
  let read = 0
  for await (const chunk of box.stdout) read += chunk.length
  assert.is(read, size)
  assert.is((await box.exited).code, 0)
  assert.is(await said, '')
})

boxTest('without input a process sees the end of it', async (it) => {
  assert.equal(await runIn(it, sh('cat; echo read')), { code: 0, oom: false, stdout: 'read\n', stderr: '' })
})

boxTest('exit codes come through, and signals as 128 and their number', async (it) => {
  const codes = await Promise.all(
    ['exit 0', 'exit 3', 'exit 137', 'kill -TERM $$', 'kill -KILL $$'].map((script) => runIn(it, sh(script))),
  )
  assert.equal(
    codes.map(({ code, oom }) => [code, oom]),
    [0, 3, 137, 143, 137].map((code) => [code, false]),
  )
})

boxTest('environment, directory, user and groups are those of the spec', async (it) => {
  const ran = await runIn(it, sh('echo "$A|$B"; env | grep -c FROM_IMAGE; pwd; id; echo ~'), {
    env: { PATH: '/bin', A: 'a b', B: '$(id) "\'\n;' },
    cwd: '/made/here',
    user: { uid: 1234, gid: 99, groups: [7, 8] },
  })
  const lines = ran.stdout.split('\n')
  assert.equal(lines.slice(0, 2), ['a b|$(id) "\'', ';'])
  assert.ok(ran.stdout.includes('\n/made/here\n'))
  assert.ok(/uid=1234 gid=99 groups=(99,)?7,8/.test(ran.stdout), ran.stdout)
})

boxTest('a command that is not there or is no program is the user’s fault', async (it) => {
  for (const command of ['nowhere', '/nowhere', '/bin/notes.txt', '/etc']) {
    const box = await it.engine.create(specOf(it.image, [command, 'x']))
    const error = await box.start().then(
      () => undefined,
      (thrown) => thrown,
    )
    assert.instance(error, BoxError, command)
    assert.is(error.fault, 'user', error.message)
    assert.ok(error.message.includes(command), error.message)
    await box.remove()
  }
})

boxTest('the root is read-only; /tmp has the size of the limit', async (it) => {
  const script = `
    for d in / /bin /etc /data /proc/sys; do touch $d/x 2>/dev/null && echo "$d is writable"; done
    for d in /tmp /run /var/tmp /dev/shm; do touch $d/x || echo "$d is not"; done
    echo 'echo ran' > /tmp/x; chmod 755 /tmp/x; sh /tmp/x
    for i in 1 2 3 4 5 6 7 8 9; do dd if=/dev/zero of=/tmp/$i bs=1M count=1 2>/dev/null; done
    cat /tmp/? | wc -c`
  const ran = await runIn(it, sh(script), {
    limits: { ...small, diskMb: 4 },
    user: { uid: 0, gid: 0, groups: [] },
  })
  const [first, second, ...rest] = ran.stdout.trim().split('\n')
  assert.is(first, 'ran', ran.stdout + ran.stderr)
  assert.equal(rest, [])
  const bytes = Number(second)
  assert.ok(bytes > 3 * 2 ** 20 && bytes <= 4 * 2 ** 20, second)
})

const small = { memoryMb: 64, cpu: 1, pids: 64, diskMb: 16, fileBytes: 16 * 2 ** 20 }

boxTest('mounts are seen where they should be, and written only where they may', async (it) => {
  const dir = join(it.dir, 'mounted')
  await mkdir(dir)
  await writeFile(join(dir, 'in'), 'content')
  const result = join(it.dir, 'result')
  await writeFile(result, '')
  await chmod(result, 0o666)
  const ran = await runIn(
    it,
    sh('cat in; touch /workspace/new || echo refused; echo out > /.vulcan/result'),
    {
      cwd: '/workspace',
      mounts: [
        { source: dir, target: '/workspace', readonly: true },
        { source: result, target: '/.vulcan/result', readonly: false },
      ],
    },
  )
  assert.is(ran.stdout, 'contentrefused\n')
  assert.is(await readFile(result, 'utf8'), 'out\n')
})

boxTest('volumes, variables and health checks of an image do not count', async (it) => {
  const image = await busyboxImage(join(it.dir, 'hostile'), {
    Env: ['FROM_IMAGE=1', 'PATH=/nowhere'],
    Volumes: { '/data': {}, '/more': {} },
    Entrypoint: ['/bin/false'],
    Cmd: ['x'],
    Labels: { 'vulcan.owner': 'somebody' },
    Healthcheck: { Test: ['CMD-SHELL', 'touch /tmp/checked'], Interval: 1_000_000_000 },
  })
  const ran = await runIn(
    { engine: it.engine, image },
    sh('sleep 2; cat /data/kept; ls /tmp; touch /data/x; env'),
  )
  assert.ok(ran.stdout.startsWith('of the image'), ran.stdout + ran.stderr)
  assert.not(ran.stdout.includes('checked'))
  assert.not(ran.stdout.includes('FROM_IMAGE'))
  assert.ok(ran.stderr.includes('Read-only file system'))
  assert.is(
    ((await it.docker.api('GET', '/volumes')) as { Volumes: unknown[] | null }).Volumes?.length ?? 0,
    0,
  )
})

boxTest('there are no capabilities, no new privileges and a filter of system calls', async (it) => {
  const { stdout } = await runIn(it, sh('cat /proc/self/status; cat /proc/net/dev'))
  for (const line of [
    'CapEff:\t0000000000000000',
    'CapBnd:\t0000000000000000',
    'NoNewPrivs:\t1',
    'Seccomp:\t2',
  ])
    assert.ok(stdout.includes(line), line)
  assert.equal(
    stdout.match(/^ *\w+:(?= +\d+)/gm)?.map((name) => name.trim()),
    ['lo:'],
  )
})

boxTest('memory beyond the limit is killed, and told as that', async (it) => {
  const alone = await runIn(it, ['/bin/dd', 'if=/dev/zero', 'of=/dev/null', 'bs=200M', 'count=1'], {
    limits: { ...small, memoryMb: 32 },
  })
  assert.equal([alone.code, alone.oom], [137, true])
  const survived = await runIn(it, sh('dd if=/dev/zero of=/dev/null bs=200M count=1; echo on; exit 1'), {
    limits: { ...small, memoryMb: 32 },
  })
  assert.equal([survived.code, survived.oom, survived.stdout], [1, true, 'on\n'])
  const files = await runIn(it, sh('cat /dev/zero > /tmp/x'), {
    limits: { ...small, memoryMb: 32, diskMb: 512, fileBytes: 2 ** 40 },
  })
  assert.equal([files.code, files.oom], [137, true])
})

boxTest('processor time is held to the limit', async (it) => {
  await using scope = new AsyncDisposableStack()
  const limits = { ...small, cpu: 0.2 }
  const box = await boxOf(scope, it.engine.create(specOf(it.image, sh('while :; do :; done'), { limits })))
  await box.start()
  const [before, begun] = [(await box.usage()).cpuMs!, performance.now()]
  await sleep(3_000)
  const used = (await box.usage()).cpuMs! - before
  const passed = performance.now() - begun
  assert.ok(used > 0 && used < 0.4 * passed, `${used} ms of ${passed}`)
})

boxTest('a fork bomb is held to the limit and killed', async (it) => {
  await using scope = new AsyncDisposableStack()
  const limits = { ...small, pids: 20 }
  const bomb = 'bomb() { sleep 1000 & bomb & bomb & wait; }; bomb 2>/dev/null & exec sleep 1000'
  const box = await boxOf(scope, it.engine.create(specOf(it.image, sh(bomb), { limits })))
  await box.start()
  await eventually(() => box.pids().length > 15, 3_000)
  const pids = box.pids()
  assert.ok(pids.length <= 21, `${pids.length}`)
  await box.kill()
  assert.is((await box.exited).code, 137)
  assert.equal(pids.filter(isAlive), [])
})

boxTest('a file cannot become larger than the limit', async (it) => {
  const ran = await runIn(it, sh('cat /dev/zero > /tmp/x; echo $?; stat -c %s /tmp/x'), {
    limits: { ...small, fileBytes: 2 ** 20 },
  })
  assert.is(ran.stdout, `153\n${2 ** 20}\n`)
})

boxTest('what was used is known, also of what ended at once', async (it) => {
  const box = await it.engine.create(
    specOf(it.image, sh('dd if=/dev/zero of=/dev/null bs=20M count=5 2>/dev/null')),
  )
  assert.is((await finish(box)).code, 0)
  const { cpuMs, memoryPeakMb } = await box.usage()
  await box.remove()
  assert.ok(cpuMs !== null && cpuMs > 0, `${cpuMs}`)
  assert.ok(memoryPeakMb !== null && memoryPeakMb > 0 && memoryPeakMb <= small.memoryMb, `${memoryPeakMb}`)
})

boxTest('a frozen box gets no time, and goes on when it is thawed', async (it) => {
  await using scope = new AsyncDisposableStack()
  const box = await boxOf(scope, it.engine.create(specOf(it.image, sh('while :; do :; done'))))
  await box.start()
  await box.freeze()
  const before = (await box.usage()).cpuMs!
  await sleep(500)
  assert.ok((await box.usage()).cpuMs! - before < 20)
  await box.thaw()
  let after = before
  for (let tries = 0; tries < 100 && after - before <= 50; tries++) {
    await sleep(100)
    after = (await box.usage()).cpuMs!
  }
  assert.ok(after - before > 50, `${after - before} ms`)
  await box.freeze()
  const pids = box.pids()
  await box.kill()
  assert.equal(pids.filter(isAlive), [])
})

boxTest('limits can be changed before the start and while it stands idle', async (it) => {
  const box = await it.engine.create(
    specOf(it.image, sh('dd if=/dev/zero of=/dev/null bs=100M count=1; read _; echo on')),
  )
  try {
    await box.update({ ...small, memoryMb: 256 })
    const said = text(box.stdout)
    void text(box.stderr)
    await box.start()
    await box.update({ ...small, memoryMb: 128, cpu: 0.5, pids: 10 })
    box.stdin.end('\n')
    assert.equal(await box.exited, { code: 0, oom: false })
    assert.is(await said, 'on\n')
    const error = await box.update({ ...small, diskMb: 1 }).catch((thrown) => thrown)
    assert.instance(error, BoxError)
  } finally {
    await box.remove()
  }
})

boxTest('kill ends what ignores signals and what went into the background', async (it) => {
  await using scope = new AsyncDisposableStack()
  const script =
    'trap "" TERM INT HUP; (trap "" TERM HUP; while :; do sleep 1; done) & echo up; while :; do sleep 1; done'
  const box = await boxOf(scope, it.engine.create(specOf(it.image, sh(script))))
  await box.start()
  for await (const chunk of box.stdout) if (`${chunk}`.includes('up')) break
  const pids = box.pids()
  assert.ok(pids.length >= 3)
  await Promise.all([box.kill(), box.kill()])
  assert.equal(pids.filter(isAlive), [])
  assert.equal(await box.exited, { code: 137, oom: false })
  await box.kill()
  assert.equal(box.pids(), [])
})

boxTest('what outlives the first process ends with it', async (it) => {
  await using scope = new AsyncDisposableStack()
  const box = await boxOf(scope, it.engine.create(specOf(it.image, sh('(sleep 1000 &) ; read _; exit 4'))))
  await box.start()
  const pids = box.pids()
  void text(box.stdout)
  void text(box.stderr)
  box.stdin.end('\n')
  assert.is((await box.exited).code, 4)
  assert.equal(pids.filter(isAlive), [])
})

boxTest('what is killed before it starts never starts', async (it) => {
  const box = await it.engine.create(specOf(it.image, sh('echo ran')))
  const said = text(box.stdout).catch(() => '')
  await box.kill()
  assert.is((await box.exited).code, 137)
  assert.instance(await box.start().catch((thrown) => thrown), BoxError)
  await box.remove()
  assert.is(await said, '')
})

boxTest('what is killed while it starts is dead when that settles', async (it) => {
  const boxes = await Promise.all(
    [0, 20, 60, 120, 200].map(async (ms) => ({
      ms,
      box: await it.engine.create(specOf(it.image, sh('sleep 100'))),
    })),
  )
  await Promise.all(
    boxes.map(async ({ ms, box }) => {
      const started = box.start().catch(() => {})
      await sleep(ms)
      await box.kill()
      assert.equal(box.pids(), [])
      assert.is((await box.exited).code, 137)
      await started
      await box.remove()
      await box.remove()
    }),
  )
  assert.equal(await it.docker.containers(), [])
})

boxTest('nothing is left: containers, processes, control groups, mounts', async (it) => {
  const before = traces(it.docker)
  const box = await it.engine.create(specOf(it.image, sh('sleep 1000 & sleep 1000')))
  await box.start()
  const during = traces(it.docker)
  assert.ok(during.groups > before.groups && during.mounts > before.mounts)
  const pids = box.pids()
  await box.remove()
  assert.equal(pids.filter(isAlive), [])
  assert.equal(await it.docker.containers(), [])
  assert.equal(traces(it.docker), before)
})

/** Mounts below the engine’s directory, and control groups of its containers. */
function traces(docker: TestDocker) {
  const mounts = readFileSync('/proc/self/mountinfo', 'utf8').split('\n')
  return {
    mounts: mounts.filter((line) => line.includes(docker.dir)).length,
    groups: docker.cgroups().length,
  }
}

boxTest('ten run at once, each with its own', async (it) => {
  const runs = await Promise.all(
    Array.from({ length: 10 }, (_, n) =>
      runIn(it, sh('cat; echo; echo $N >&2'), { env: { PATH: '/bin', N: `${n}` }, input: `in ${n}` }),
    ),
  )
  assert.equal(
    runs,
    Array.from({ length: 10 }, (_, n) => ({ code: 0, oom: false, stdout: `in ${n}\n`, stderr: `${n}\n` })),
  )
})

boxTest('a box shares the namespace into which its network was moved', async (it) => {
  let joined = 0
  const network: Network = {
    path: '',
    hosts: [{ address: '192.0.2.7', name: 'api.example.com' }],
    nameservers: ['192.0.2.53'],
    denied: async () => 0,
    traffic: () => undefined,
    join: async (pid) => {
      joined = pid
      const { status } = spawnSync('nsenter', [
        `--net=/proc/${pid}/ns/net`,
        'ip',
        'addr',
        'add',
        '192.0.2.7/32',
        'dev',
        'lo',
      ])
      assert.is(status, 0)
    },
    [Symbol.asyncDispose]: async () => {},
  }
  const script = `
    echo served | nc -l -p 80 192.0.2.7 & sleep 0.5
    nc api.example.com 80 </dev/null
    cat /etc/resolv.conf; echo x 2>/dev/null > /etc/hosts || echo refused`
  const { stdout } = await runIn(it, sh(script), { network })
  assert.ok(joined > 0)
  assert.ok(stdout.startsWith('served\n'), stdout)
  assert.ok(stdout.includes('nameserver 192.0.2.53'))
  assert.ok(stdout.endsWith('refused\n'))
  assert.ok(await eventually(() => !isAlive(joined)))
  assert.equal(await it.docker.containers(), [])
})

boxTest('a network that cannot be joined fails the making, and leaves nothing', async (it) => {
  const network: Network = {
    path: '',
    hosts: [],
    nameservers: [],
    denied: async () => 0,
    traffic: () => undefined,
    join: async () => {
      throw new Error('no way')
    },
    [Symbol.asyncDispose]: async () => {},
  }
  const error = await it.engine.create(specOf(it.image, sh('true'), { network })).catch((thrown) => thrown)
  assert.is(error.message, 'no way')
  for (let tries = 0; tries < 100 && (await it.docker.containers()).length > 0; tries++) await sleep(50)
  assert.equal(await it.docker.containers(), [])
})

test.run()
