import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { ensureInitramfs } from '../../rootfs/initramfs.ts'

type Entry = { mode: string; content: string; device: string }

/** What an archive of the form `newc` has, by path (cpio(5)). */
function read(bytes: Buffer): Record<string, Entry> {
  const entries: Record<string, Entry> = {}
  const even = (at: number) => Math.ceil(at / 4) * 4
  for (let at = 0; ; ) {
    assert.is(bytes.toString('latin1', at, at + 6), '070701')
    const field = (index: number) =>
      Number.parseInt(bytes.toString('latin1', at + 6 + index * 8, at + 14 + index * 8), 16)
    // Owner, group and time.
    assert.equal([field(2), field(3), field(5)], [0, 0, 0])
    const nameEnd = at + 110 + field(11)
    const path = bytes.toString('latin1', at + 110, nameEnd - 1)
    const begin = even(nameEnd)
    const content = bytes.toString('latin1', begin, begin + field(6))
    const entry = { mode: field(1).toString(8), content, device: `${field(9)}:${field(10)}` }
    at = even(begin + field(6))
    if (path === 'TRAILER!!!') {
      assert.is(at, bytes.length)
      return entries
    }
    entries[path] = entry
  }
}

test('an initramfs has the agent as /init, and modules with their order; the same inputs give the same file', async () => {
  const dir = mkdtempSync(join(tmpdir(), 'vulcan-test-'))
  using _remove = { [Symbol.dispose]: () => rmSync(dir, { recursive: true }) }
  writeFileSync(join(dir, 'agent'), 'the agent')
  writeFileSync(join(dir, 'b.ko'), 'first')
  writeFileSync(join(dir, 'a.ko'), 'behind')
  writeFileSync(join(dir, 'order'), 'b.ko\na.ko\n')
  const content = { agent: join(dir, 'agent'), modules: dir }
  const file = await ensureInitramfs(join(dir, 'cache'), content)
  const entries = read(readFileSync(file))
  assert.equal(entries.init, { mode: '100755', content: 'the agent', device: '0:0' })
  assert.equal(entries['dev/console'], { mode: '20600', content: '', device: '5:1' })
  assert.is(entries['modules/order']!.content, 'b.ko\na.ko\n')
  assert.is(entries['modules/a.ko']!.content, 'behind')
  assert.is(entries.dev!.mode, '40755')

  const elsewhere = await ensureInitramfs(join(dir, 'other'), content)
  assert.equal(readFileSync(elsewhere), readFileSync(file))
  assert.is(await ensureInitramfs(join(dir, 'cache'), content), file)

  const plain = read(
    readFileSync(await ensureInitramfs(join(dir, 'cache'), { ...content, modules: undefined })),
  )
  assert.equal(
    Object.keys(plain).filter((path) => path.startsWith('modules')),
    [],
  )
  writeFileSync(join(dir, 'agent'), 'another agent')
  assert.is.not(await ensureInitramfs(join(dir, 'cache'), content), file)
})

test.run()
