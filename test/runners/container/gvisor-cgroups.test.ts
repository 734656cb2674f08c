import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Cgroup, findHierarchy, type Hierarchy } from '../../../runners/container/gvisor/cgroups.ts'
import { startTime } from '../../../scripts/process-identity.ts'
import { skip } from '../../harness.ts'
import { cgroupParent } from './gvisor-support.ts'

// Where the controllers are those of version 1, version 2 may be mounted beside them: what it does without controllers
// can be tried there.
const unified = '/sys/fs/cgroup/unified'
const beside = (): Hierarchy | undefined =>
  existsSync(`${unified}/cgroup.procs`) ? { version: 2, mount: unified, roots: [unified] } : undefined

const isRoot = process.getuid?.() === 0
const hierarchies: [string, Hierarchy | undefined][] = [
  ['this host’s control groups', isRoot ? findHierarchy() : undefined],
  ['control groups of version 2 without controllers', isRoot ? beside() : undefined],
]

for (const [what, hierarchy] of hierarchies) {
  const name = `${what}: processes are frozen, thawed, killed, and the groups removed`
  if (hierarchy === undefined) {
    skip(test, name, isRoot ? 'not mounted here' : 'needs root')
    continue
  }
  test(name, async () => {
    const parent = new Cgroup(hierarchy, `${cgroupParent}/cgroups-${randomBytes(4).toString('hex')}`)
    const group = parent.child('below')
    await group.make()
    assert.equal(await parent.children(), ['below'])
    try {
      // It turns as fast as it can, and answers when it is asked.
      const child = spawn('/bin/sh', ['-c', 'trap "echo here" USR1; while :; do :; done'])
      const exited = once(child, 'exit')
      await group.join(child.pid!)
      assert.equal(group.pids(), [child.pid])
      await sleep(200)
      await group.freeze()
      child.kill('SIGUSR1')
      const told = once(child.stdout, 'data')
      assert.is(await Promise.race([told.then(() => 'told'), sleep(300, 'silent')]), 'silent')
      await group.thaw()
      await told
      await group.kill(child.pid)
      assert.ok(startTime(child.pid!) !== undefined, 'spared')
      await group.freeze()
      await group.kill()
      const [, signal] = await exited
      assert.is(signal, 'SIGKILL')
      assert.equal(group.pids(), [])
    } finally {
      await parent.removeTree()
    }
    const dirs = hierarchy.roots.map((root) => join(root, parent.path))
    for (const dir of dirs) assert.not(existsSync(dir))
    assert.equal(parent.pids(), [])
    await parent.removeTree()
    await new Cgroup(hierarchy, cgroupParent).removeIfEmpty()
  })
}

test.run()
