/** How snapshots are kept: made once, whole or not at all, shared and let go. */
import { mkdir, mkdtemp, readdir, readFile, rm, utimes, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { machineMemoryMb, machineVcpus } from '../../../runners/microvm/classes.ts'
import { type Left, Templates } from '../../../runners/microvm/templates.ts'

const left: Left = { running: { stdin: 1, stdout: 2, stderr: 3 }, cpu_ms: 4.5 }

async function inDirectory(body: (dir: string) => Promise<void>): Promise<void> {
  const dir = await mkdtemp(join(tmpdir(), 'vulcan-templates-'))
  try {
    await body(dir)
  } finally {
    await rm(dir, { recursive: true, force: true })
  }
}

/** Writes so many bytes, after a moment. */
const making =
  (made: string[], bytes = 10) =>
  async (dir: string) => {
    made.push(dir)
    await sleep(30)
    await writeFile(join(dir, 'memory'), Buffer.alloc(bytes, 1))
    return left
  }

const visible = async (dir: string) => (await readdir(dir)).filter((name) => name !== 'locks')

test('several that ask, also of different owners, share one making', () =>
  inDirectory(async (dir) => {
    const key = Templates.key(['a', 1])
    const made: string[] = []
    const all = await Promise.all([Templates.open(dir, 100), Templates.open(dir, 100)])
    const kept = await Promise.all([...all, ...all].map((one) => one.get(key, making(made))))
    assert.is(made.length, 1)
    for (const one of kept) assert.equal(one.left, left)
    assert.is((await readFile(join(kept[0]!.dir, 'memory'))).length, 10)
    assert.is((await all[0]!.get(key, making(made))).fresh, false)
    assert.is(made.length, 1)
    assert.equal(await visible(dir), [key])
    assert.is.not(Templates.key(['a', 2]), key)
  }))

test('a making that fails leaves nothing, and the next tries again', () =>
  inDirectory(async (dir) => {
    const templates = await Templates.open(dir, 100)
    const key = Templates.key('x')
    const failing = async (made: string) => {
      await writeFile(join(made, 'half'), '')
      throw new Error('no room')
    }
    await templates.get(key, failing).then(
      () => assert.unreachable(),
      (error) => assert.is(error.message, 'no room'),
    )
    assert.equal(await visible(dir), [])
    assert.is((await templates.get(key, making([]))).fresh, true)
    await templates.drop(key)
    assert.equal(await visible(dir), [])
  }))

test('what dead processes have left half made is removed, what live ones make is not', () =>
  inDirectory(async (dir) => {
    const templates = await Templates.open(dir, 100)
    await mkdir(join(dir, '.999999999-1-00000000.1', 'machine'), { recursive: true })
    const slow = templates.get(Templates.key('slow'), async (made) => {
      await sleep(200)
      await writeFile(join(made, 'memory'), '')
      return left
    })
    await sleep(50)
    await Templates.open(dir, 100)
    const names = await visible(dir)
    assert.is(names.length, 1)
    assert.not.match(names[0]!, '999999999')
    assert.is((await slow).fresh, true)
  }))

test('over the budget those go that were used longest ago, but none that was used just now', () =>
  inDirectory(async (dir) => {
    const templates = await Templates.open(dir, 3)
    const keys = ['a', 'b', 'c', 'd'].map((name) => Templates.key(name))
    for (const [i, key] of keys.slice(0, 3).entries()) {
      await templates.get(key, making([], 2 ** 20))
      const used = Date.now() / 1_000 - 3_600 * (5 - i)
      await utimes(join(dir, key, 'left.json'), used, used)
    }
    // Makes the first of them one of the last.
    await templates.get(keys[0]!, () => Promise.reject(new Error('it is there')))
    await templates.get(keys[3]!, making([], 2 ** 20))
    assert.equal((await visible(dir)).sort(), [keys[0]!, keys[2]!, keys[3]!].sort())
    const week = Date.now() / 1_000 - 8 * 24 * 3_600
    await utimes(join(dir, keys[2]!, 'left.json'), week, week)
    await templates.get(Templates.key('e'), making([], 10))
    assert.not.ok((await visible(dir)).includes(keys[2]!))
  }))

test('what cannot be read is made anew', () =>
  inDirectory(async (dir) => {
    const templates = await Templates.open(dir, 100)
    const key = Templates.key('broken')
    const { dir: machine } = await templates.get(key, making([]))
    await writeFile(join(machine, '..', 'left.json'), '{"running":"yes"}')
    const made: string[] = []
    assert.is((await templates.get(key, making(made))).fresh, true)
    assert.is(made.length, 1)
  }))

test('machines come in few sizes, each with room for what is not the job’s', () => {
  assert.equal(
    [8, 64, 96, 128, 129, 256, 300, 512, 1_024, 3_072].map(machineMemoryMb),
    [128, 128, 192, 192, 256, 384, 384, 768, 1_536, 4_096],
  )
  for (let mb = 8; mb < 5_000; mb += 7) assert.ok(machineMemoryMb(mb) >= mb + 64)
  assert.equal(
    [machineVcpus(0.1, 2), machineVcpus(1, 2), machineVcpus(1.5, 2), machineVcpus(64, 2)],
    [1, 1, 2, 2],
  )
})

test.run()
