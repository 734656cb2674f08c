import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { mkdir, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { holdMachines, nameOf } from '../../../runners/microvm/owners.ts'
import { createQemu } from '../../../runners/microvm/qemu/index.ts'
import { gone, startTime } from '../../../scripts/process-identity.ts'
import { thisBoot, thisPidNamespace } from '../../../shared/process-identity.ts'
import { cgroupParent, groupsOf, newOwner, qemuTests } from './qemu-support.ts'

const machineTest = await qemuTests()

machineTest('machines of a killed process are gone, and the next start removes the rest', async (it) => {
  const template = await it.template(it.shape)
  await using mine = await it.restore(template)
  const { stateDir } = it.options
  const owner = newOwner()
  const options = { ...it.options, owner }
  const child = spawn(
    process.execPath,
    [join(import.meta.dirname, 'qemu-owner.ts'), JSON.stringify({ options, template })],
    { stdio: ['ignore', 'pipe', 'inherit'] },
  )
  const [line] = await once(child.stdout!, 'data')
  const pids: number[] = JSON.parse(String(line))
  assert.is(pids.length, 2)
  for (const pid of pids) assert.is.not(startTime(pid), undefined)
  child.kill('SIGKILL')
  await once(child, 'exit')
  for (const pid of pids) assert.ok(await gone(pid, 10_000), `machine ${pid} lives`)
  assert.ok(existsSync(join(stateDir, `${owner}.owner.json`)))

  const next = await createQemu({ ...it.options, owner: newOwner() })
  assert.not.ok((await readdir(stateDir)).some((name) => name.startsWith(owner)))
  assert.equal(groupsOf(owner), [])
  await next[Symbol.asyncDispose]()
  // What lives stays.
  assert.is((await mine.run('echo still here')).said, 'still here\n')
})

machineTest('a driver that is closed leaves nothing and takes its machines along', async (it) => {
  const template = await it.template(it.shape)
  const options = { ...it.options, owner: newOwner() }
  const driver = await createQemu(options)
  const machine = await driver.restore(template, await it.place())
  const late = driver.restore(template, await it.place()).catch((error) => error)
  await driver[Symbol.asyncDispose]()
  assert.equal(await machine.exited, { code: null, signal: 'SIGKILL' })
  await late
  assert.equal(driver.pids(), [])
  assert.equal(groupsOf(options.owner), [])
  assert.not.ok((await readdir(options.stateDir)).some((name) => name.startsWith(options.owner)))
  assert.match((await driver.restore(template, await it.place()).catch((error) => error)).message, 'closed')
})

test('a sweep kills what a dead owner’s name is on, and nothing else', async () => {
  const stateDir = await mkdtemp(join(tmpdir(), 'vulcan-test-owners-'))
  const [dead, alive] = [newOwner(), newOwner()]
  const named = (name: string): ChildProcess =>
    spawn('/bin/sh', ['-c', 'sleep 1000; true', name], { stdio: 'ignore', detached: true })
  const record = (name: string, pid: number, started: string) =>
    writeFile(
      join(stateDir, `${name}.owner.json`),
      JSON.stringify({
        ...{ name, pid, started, boot: thisBoot(), namespace: thisPidNamespace() },
        cgroup: `${cgroupParent}/${name}`,
      }),
    )
  const processes = [named(nameOf(dead, 'm1')), named(nameOf(alive, 'm1')), named(`${dead}x.m1`)]
  const [left, theirs, other] = processes as [ChildProcess, ChildProcess, ChildProcess]
  try {
    // The pid lives, and is another process: it began at another time.
    await record(dead, process.pid, '1')
    await mkdir(join(stateDir, dead, 'boxes'), { recursive: true })
    await record(alive, process.pid, startTime(process.pid)!)
    await mkdir(join(stateDir, alive))
    const options = { owner: newOwner(), stateDir, cgroupParent, sweepMs: 50 }
    {
      await using holding = await holdMachines(options)
      assert.ok(await gone(left.pid!, 5_000))
      assert.equal(
        (await readdir(stateDir)).sort(),
        [alive, `${alive}.owner.json`, options.owner, `${options.owner}.owner.json`].sort(),
      )
      assert.is(holding.dir, join(stateDir, options.owner))
      // The timer finds what comes later.
      await record(dead, process.pid, '1')
      const until = performance.now() + 10_000
      while (existsSync(join(stateDir, `${dead}.owner.json`)) && performance.now() < until) await sleep(20)
      assert.not.ok(existsSync(join(stateDir, `${dead}.owner.json`)))
    }
    for (const child of [theirs, other]) assert.is.not(startTime(child.pid!), undefined)
    assert.equal((await readdir(stateDir)).sort(), [alive, `${alive}.owner.json`])
  } finally {
    for (const child of processes) {
      // Its shell, and what that runs.
      try {
        process.kill(-child.pid!, 'SIGKILL')
      } catch {
        // It is gone.
      }
    }
    await rm(stateDir, { recursive: true, force: true })
  }
})

test.run()
