import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { text } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { BoxError } from '../../../runners/container/engine.ts'
import { createGvisor } from '../../../runners/container/gvisor/index.ts'
import { gone } from '../../../scripts/process-identity.ts'
import {
  finish,
  type GvisorHost,
  gvisorTests,
  newOwner,
  processesOf,
  runIn,
  running,
  sh,
  specOf,
  traces,
} from './gvisor-support.ts'

const boxTest = await gvisorTests()

const allGone = async (pids: number[]) => {
  for (const pid of pids) assert.ok(await gone(pid, 10_000), `process ${pid} lives`)
}
/** What an engine without boxes has. */
const idle = (it: GvisorHost) => traces(it).filter((trace) => !/\/b\d+$/.test(trace))

boxTest('a running box is dead when kill settles, and gone when remove does', async (it) => {
  const before = traces(it)
  assert.equal(before, idle(it))
  const box = await running(it, 'trap "" TERM INT HUP; (sleep 1000 &); echo up; while :; do sleep 1; done')
  const pids = box.pids()
  assert.ok(pids.length > 2)
  await box.kill()
  await allGone(pids)
  assert.equal(box.pids(), [])
  assert.equal({ ...(await box.exited) }, { code: 128 + 9, oom: false })
  await box.kill()
  await Promise.all([box.remove(), box.remove(), box.kill()])
  assert.equal(traces(it), before)
})

boxTest('what was written before a kill can be read after it', async (it) => {
  const box = await it.engine.create(specOf(it.image, sh('echo said; sleep 1000')))
  try {
    await box.start()
    await sleep(500)
    await box.kill()
    assert.is(await text(box.stdout), 'said\n')
  } finally {
    await box.remove()
  }
})

boxTest('a box that was not started can be killed, and cannot be started then', async (it) => {
  const before = traces(it)
  const box = await it.engine.create(specOf(it.image, sh('echo never')))
  const pids = box.pids()
  const output = text(box.stdout)
  await box.kill()
  await allGone(pids)
  const failed = await box.start().catch((error) => error)
  assert.instance(failed, BoxError)
  assert.is(failed.fault, 'engine')
  assert.is(await output, '')
  await box.exited
  await box.remove()
  assert.equal(traces(it), before)
})

boxTest('a box can be killed at any moment of its start', async (it) => {
  const before = traces(it)
  for (const ms of [0, 2, 5, 10, 15, 20, 30, 50]) {
    const box = await it.engine.create(specOf(it.image, sh('sleep 1000')))
    const pids = box.pids()
    const starting = box.start().catch((error) => error)
    await sleep(ms)
    await box.kill()
    await starting
    await allGone(pids)
    await box.remove()
    await box.exited
  }
  assert.equal(traces(it), before)
})

boxTest('a frozen box does nothing until it is thawed', async (it) => {
  const box = await running(it, 'echo up; while read -r line; do echo "$line"; done')
  try {
    let heard = ''
    box.stdout.on('data', (piece: Buffer) => {
      heard += piece
    })
    await box.freeze()
    const { cpuMs } = await box.usage()
    box.stdin.write('one\n')
    await sleep(500)
    assert.is(heard, '')
    assert.ok((await box.usage()).cpuMs! - cpuMs! < 5)
    await box.thaw()
    const until = performance.now() + 10_000
    while (heard === '' && performance.now() < until) await sleep(5)
    assert.is(heard, 'one\n')
    for (let n = 0; n < 20; n++) {
      await box.freeze()
      await box.thaw()
    }
  } finally {
    await box.remove()
  }
})

boxTest('a frozen box can be killed', async (it) => {
  const before = traces(it)
  const box = await running(it, 'echo up; sleep 1000')
  const pids = box.pids()
  await box.freeze()
  await box.kill()
  await allGone(pids)
  await box.remove()
  assert.equal(traces(it), before)
})

boxTest('a box that is frozen and thawed as it is killed dies all the same', async (it) => {
  for (let n = 0; n < 5; n++) {
    const box = await running(it, 'echo up; while :; do :; done')
    const pids = box.pids()
    const freezing = [box.freeze(), box.thaw(), box.freeze()]
    await sleep(n)
    await box.kill()
    await allGone(pids)
    await Promise.allSettled(freezing)
    await box.remove()
  }
})

boxTest('a sandbox that somebody else kills is lost', async (it) => {
  for (const which of ['runsc', 'runsc-sandbox']) {
    const box = await running(it, 'echo up; sleep 1000')
    try {
      const named = box.pids().find((pid) => {
        const [program] = readFileSync(`/proc/${pid}/cmdline`, 'latin1').split('\0')
        return basename(program!) === which
      })
      process.kill(named!, 'SIGKILL')
      const exit = await box.exited
      assert.is(exit.lost, true, which)
      assert.is(exit.oom, false)
    } finally {
      await box.remove()
    }
  }
})

boxTest('ten boxes at once, each with its own', async (it) => {
  const before = traces(it)
  const ran = await Promise.all(
    Array.from({ length: 10 }, (_, n) =>
      runIn(it, sh('cat; exit $N'), { env: { PATH: '/bin', N: `${n}` }, input: `${n}` }),
    ),
  )
  assert.equal(
    ran.map(({ stdout, code }) => [stdout, code]),
    ran.map((_, n) => [`${n}`, n]),
  )
  assert.equal(traces(it), before)
})

boxTest('an engine that is closed takes its boxes with it, and leaves nothing', async (it) => {
  const options = { ...it.options, owner: newOwner() }
  const engine = await createGvisor(options)
  const boxes = await Promise.all([
    running({ ...it, engine }, 'echo up; sleep 1000'),
    engine.create(specOf(it.image, sh('sleep 1000'))),
  ])
  const creating = engine.create(specOf(it.image, sh('sleep 1000'))).catch((error) => error)
  const pids = boxes.flatMap((box) => box.pids())
  await engine[Symbol.asyncDispose]()
  await creating
  await allGone(pids)
  assert.equal(traces({ options }), [])
  assert.instance(await engine.create(specOf(it.image, ['true'])).catch((error) => error), BoxError)
})

boxTest('what a killed owner left is removed by the next, and what lives is left alone', async (it) => {
  const other = await running(it, 'echo up; cat')
  try {
    const options = { ...it.options, owner: newOwner(), launchers: 2 }
    const root = await it.image.root()
    const child = spawn(
      process.execPath,
      [join(import.meta.dirname, 'gvisor-owner.ts'), JSON.stringify({ options, root })],
      {
        stdio: ['ignore', 'pipe', 'inherit'],
      },
    )
    const [said] = (await once(child.stdout, 'data')) as [Buffer]
    const pids = (JSON.parse(said.toString()) as number[][]).flat()
    assert.ok(pids.length > 6)
    child.kill('SIGKILL')
    await once(child, 'exit')
    assert.ok(traces({ options }).length > 0)

    const next = { ...it.options, owner: newOwner() }
    const engine = await createGvisor(next)
    try {
      assert.equal(traces({ options }), [])
      await allGone(pids)
      assert.equal(processesOf(options.owner), [])
      const rest = text(other.stdout)
      other.stdin.end('still here')
      assert.is(await rest, 'still here')
    } finally {
      await engine[Symbol.asyncDispose]()
    }
  } finally {
    await other.remove()
  }
})

boxTest('boxes end with their owner’s process, but for frozen ones', async (it) => {
  const options = { ...it.options, owner: newOwner() }
  const root = await it.image.root()
  const child = spawn(
    process.execPath,
    [join(import.meta.dirname, 'gvisor-owner.ts'), JSON.stringify({ options, root })],
    {
      stdio: ['ignore', 'pipe', 'inherit'],
    },
  )
  const [said] = (await once(child.stdout, 'data')) as [Buffer]
  const [ran, , made] = JSON.parse(said.toString()) as number[][]
  child.kill('SIGKILL')
  await once(child, 'exit')
  await allGone([...ran!, ...made!])
  await (await createGvisor({ ...it.options, owner: newOwner() }))[Symbol.asyncDispose]()
  assert.equal(traces({ options }), [])
})

boxTest('a record that is not ours, or of a live process, removes nothing', async (it) => {
  const { stateDir, owner } = it.options
  const record = JSON.parse(readFileSync(join(stateDir, `${owner}.owner.json`), 'utf8'))
  const dead = { ...record, name: 'other', pid: 2 ** 22, started: '1' }
  // It claims to be the owner of what another file names.
  await writeFile(join(stateDir, 'gvisor-x.owner.json'), JSON.stringify({ ...dead, name: owner }))
  await writeFile(
    join(stateDir, 'gvisor-y.owner.json'),
    JSON.stringify({ ...dead, name: 'gvisor-y', cgroup: '/../..' }),
  )
  await writeFile(
    join(stateDir, 'gvisor-z.owner.json'),
    JSON.stringify({ ...dead, name: 'gvisor-z', namespace: 'pid:[1]' }),
  )
  await writeFile(join(stateDir, 'note'), 'of somebody')
  await (await createGvisor({ ...it.options, owner: newOwner() }))[Symbol.asyncDispose]()
  for (const name of ['gvisor-x.owner.json', 'gvisor-y.owner.json', 'gvisor-z.owner.json', 'note', owner])
    assert.ok(existsSync(join(stateDir, name)), name)
  assert.is((await runIn(it, ['echo', 'works'])).stdout, 'works\n')
})

boxTest('state may lie far down, and leaves nothing anywhere else', async (it) => {
  const stateDir = join(it.dir, 'a-long-name-'.repeat(8), 'with "quotes" and spaces', 'state'.repeat(20))
  const options = { ...it.options, owner: newOwner(), stateDir }
  const sockets = () =>
    ['/run', '/tmp'].flatMap((dir) => readdirSync(dir).filter((name) => /^runsc-/.test(name)))
  const before = sockets()
  const engine = await createGvisor(options)
  try {
    const box = await running({ ...it, engine }, 'echo up; sleep 1000', { cwd: '/not/there' })
    assert.equal(sockets(), before)
    process.kill(box.pids()[0]!, 'SIGKILL')
    assert.ok((await box.exited).lost)
    await box.remove()
  } finally {
    await engine[Symbol.asyncDispose]()
  }
  assert.equal(traces({ options }), [])
  assert.equal(sockets(), before)
})

boxTest('where systrap does not work, ptrace does all of it', async (it) => {
  const options = { ...it.options, owner: newOwner(), platforms: ['ptrace' as const] }
  const engine = await createGvisor(options)
  try {
    assert.match(engine.version, /\(ptrace\)$/)
    assert.equal(engine.limits, it.engine.limits)
    assert.is((await runIn({ ...it, engine }, sh('cat; exit 3'), { input: 'in' })).stdout, 'in')
    const box = await running(
      { ...it, engine },
      'trap "" TERM; (sleep 1000 &); echo up; while :; do sleep 1; done',
    )
    const pids = box.pids()
    await box.freeze()
    await box.kill()
    await allGone(pids)
  } finally {
    await engine[Symbol.asyncDispose]()
  }
  assert.equal(traces({ options }), [])
})

boxTest('a runsc that cannot run is told, and leaves nothing', async (it) => {
  const options = { ...it.options, owner: newOwner(), runsc: '/bin/false' }
  const failed = await createGvisor(options).catch((error) => error)
  assert.instance(failed, Error)
  assert.equal(traces({ options }), [])
  const missing = { ...options, owner: newOwner(), runsc: '/nowhere/runsc' }
  assert.match((await createGvisor(missing).catch((error) => error)).message, 'runsc')
  assert.equal(traces({ options: missing }), [])
})

boxTest('many boxes one after the other leave nothing', async (it) => {
  const before = traces(it)
  const descriptors = () => readdirSync('/proc/self/fd').length
  await runIn(it, ['true'])
  const open = descriptors()
  for (let n = 0; n < 12; n++) {
    const box = await it.engine.create(specOf(it.image, sh('echo $PPID')))
    if (n % 3 === 0) await box.remove()
    else {
      await finish(box)
      await box.remove()
    }
  }
  assert.equal(traces(it), before)
  assert.ok(descriptors() <= open + 2, `${descriptors()} descriptors, ${open} before`)
})

test.run()
