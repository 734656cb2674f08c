import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { gvisorTests, runIn, running, sh, specOf } from './gvisor-support.ts'

const boxTest = await gvisorTests()
const allocate = (mb: number) => ['dd', 'if=/dev/zero', 'of=/dev/null', `bs=${mb}M`, 'count=1']

boxTest('every limit was exceeded when the engine began, and held', async (it) => {
  const enforced = 'enforced'
  assert.equal(it.engine.limits, {
    memory: enforced,
    cpu: enforced,
    pids: enforced,
    file_size: enforced,
    disk: enforced,
  })
  assert.equal(it.engine.missing, [])
  assert.match(it.engine.version, /^runsc \d{8} \((systrap|ptrace)\)$/)
})

boxTest('memory up to the limit is there, and more ends as oom', async (it) => {
  const limits = { memoryMb: 64 }
  const fits = await runIn(it, allocate(60), { limits })
  assert.is(fits.code, 0, fits.stderr)
  const { oom } = await runIn(it, allocate(192), { limits })
  assert.ok(oom)
})

boxTest('a box whose memory is spent by many processes ends as oom', async (it) => {
  const script =
    'for i in 1 2 3 4; do dd if=/dev/zero of=/dev/null bs=64M count=100 & done; wait; echo survived'
  const ran = await runIn(it, sh(script), { limits: { memoryMb: 64 } })
  assert.ok(ran.oom)
  assert.not.match(ran.stdout, 'survived')
})

boxTest('what lies in scratch space counts as memory, within its size', async (it) => {
  const fill = 'dd if=/dev/zero of=/tmp/a bs=1M count=48'
  const limits = { memoryMb: 32, fileBytes: 2 ** 30 }
  const full = await runIn(it, sh(`${fill}; stat -c %s /tmp/a; df -k /tmp | tail -1`), {
    limits: { ...limits, diskMb: 8 },
  })
  assert.match(full.stderr, 'No space left on device')
  assert.match(full.stdout, /^8388608\n\S+ +8192 /)
  for (const place of ['/var/tmp', '/run', '/dev/shm']) {
    const other = await runIn(it, sh(`dd if=/dev/zero of=${place}/a bs=1M count=48`), {
      limits: { ...limits, diskMb: 8 },
    })
    assert.match(other.stderr, 'No space left on device', place)
  }
  const spent = await runIn(it, sh(fill.replace('48', '200')), { limits: { ...limits, diskMb: 256 } })
  assert.ok(spent.oom)
})

boxTest('a file can have so many bytes', async (it) => {
  const ran = await runIn(it, sh('dd if=/dev/zero of=/tmp/a bs=1000 count=200; stat -c %s /tmp/a'), {
    limits: { fileBytes: 100_000 },
  })
  assert.match(ran.stdout, /^100000\n/)
})

boxTest('no core is dumped', async (it) => {
  const { stdout } = await runIn(it, sh('ulimit -c; ulimit -n; ulimit -u'), { limits: { pids: 23 } })
  assert.is(stdout, '0\n16384\n23\n')
})

for (const uid of [0, 1000])
  boxTest(
    `a fork bomb of user ${uid} gets no more processes than it may, and the host goes on`,
    async (it) => {
      const bomb = 'b() { b | b & }; echo up; b; sleep 60'
      const box = await running(it, bomb, { limits: { pids: 32 }, user: { uid, gid: uid, groups: [] } })
      try {
        await sleep(1_000)
        const next = await runIn(it, ['echo', 'next'])
        assert.is(next.stdout, 'next\n')
        // One host process each, those kept for others to come, and some for runsc.
        assert.ok(box.pids().length < 32 * 2 + 16, `${box.pids().length} processes`)
      } finally {
        await box.remove()
      }
      assert.equal(box.pids(), [])
    },
  )

boxTest('a fork bomb in a user namespace of its own is held by the host', async (it) => {
  const box = await running(it, 'echo up; unshare -U -r sh -c "b() { b | b & }; b; sleep 60"; sleep 60', {
    limits: { pids: 16, memoryMb: 256 },
  })
  try {
    await sleep(1_500)
    assert.is((await runIn(it, ['echo', 'next'])).stdout, 'next\n')
  } finally {
    await box.remove()
  }
  assert.equal(box.pids(), [])
})

boxTest('a share of the cores holds from the start, and can be changed', async (it) => {
  const box = await running(it, 'echo up; while :; do :; done', { limits: { cpu: 0.25 } })
  try {
    const share = async () => {
      const [before, since] = [(await box.usage()).cpuMs!, performance.now()]
      await sleep(1_500)
      return ((await box.usage()).cpuMs! - before) / (performance.now() - since)
    }
    const narrow = await share()
    assert.ok(narrow < 0.4, `${narrow} cores`)
    await box.update({ ...specOf(it.image, []).limits, cpu: 0.05 })
    const narrower = await share()
    assert.ok(narrower < 0.15, `${narrower} cores`)
  } finally {
    await box.remove()
  }
})

boxTest('the memory of a box that is not started yet can be changed', async (it) => {
  const spec = specOf(it.image, allocate(128), { limits: { memoryMb: 32 } })
  for (const memoryMb of [160, 40]) {
    const box = await it.engine.create(spec)
    try {
      await box.update({ ...spec.limits, memoryMb })
      box.stdout.resume()
      box.stderr.resume()
      await box.start()
      assert.is((await box.exited).oom, memoryMb === 40)
    } finally {
      await box.remove()
    }
  }
})

boxTest('usage is that of the user’s code', async (it) => {
  const box = await it.engine.create(specOf(it.image, allocate(32)))
  try {
    const idle = await box.usage()
    assert.ok(idle.cpuMs! < 50 && idle.memoryPeakMb! < 4, JSON.stringify(idle))
    box.stdout.resume()
    box.stderr.resume()
    await box.start()
    await box.exited
    const usage = await box.usage()
    assert.ok(usage.memoryPeakMb! > 28 && usage.memoryPeakMb! < 48, `${usage.memoryPeakMb} MiB`)
    assert.ok(usage.cpuMs! > 0)
    await box.remove()
    assert.equal(await box.usage(), usage)
  } finally {
    await box.remove()
  }
})

test.run()
