import { globSync, readFileSync } from 'node:fs'
import { basename, join } from 'node:path'
import { gzipSync, zstdCompressSync } from 'node:zlib'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { vmlinuxOf } from '../../rootfs/bzimage.ts'
import { dependenciesOf } from '../../rootfs/elf.ts'
import { readParts } from '../../rootfs/parts.ts'
import { cacheDirectory } from '../../scripts/cache-directory.ts'
import { skip } from '../harness.ts'

/** What stands in front of a payload, as far as it is read. */
function bzImage(payload: Buffer): Buffer {
  const setup = Buffer.alloc(4 * 512)
  setup[0x1f1] = 2
  setup.write('HdrS', 0x202, 'latin1')
  setup.writeUInt32LE(512, 0x248)
  setup.writeUInt32LE(payload.length, 0x24c)
  return Buffer.concat([setup, payload, Buffer.alloc(100)])
}

const length = (bytes: number) => {
  const field = Buffer.alloc(4)
  field.writeUInt32LE(bytes)
  return field
}
const kernel = Buffer.concat([
  Buffer.from('\x7fELF', 'latin1'),
  Buffer.alloc(5_000, 'ab'),
  Buffer.from('the end'),
])

test('a kernel comes out of its compressed form', () => {
  assert.equal(vmlinuxOf(bzImage(gzipSync(kernel))), kernel)
  assert.equal(vmlinuxOf(bzImage(Buffer.concat([zstdCompressSync(kernel), length(kernel.length)]))), kernel)
})

test('LZ4: literals, repetitions that overlap themselves, lengths of more than a byte', () => {
  // 6 literals; 4,998 bytes from two before (15 + 255 × 19 + 134 + 4); 7 literals that end the block.
  const block = Buffer.concat([
    Buffer.from([0x6f]),
    Buffer.from('\x7fELFab', 'latin1'),
    Buffer.from([2, 0]),
    Buffer.alloc(19, 255),
    Buffer.from([134, 0x70]),
    Buffer.from('the end'),
  ])
  const frame = (bytes: Buffer, size: number) =>
    bzImage(Buffer.concat([length(0x184c2102), length(bytes.length), bytes, length(size)]))
  assert.equal(vmlinuxOf(frame(block, kernel.length)), kernel)

  const refused: [string, Buffer][] = [
    ['a length that is not so', frame(block, kernel.length + 1)],
    ['more than there is room for', frame(block, 100)],
    ['a reference to before the beginning', frame(Buffer.from([0x10, 0x7f, 2, 0, 0]), 8)],
    ['a claim of gigabytes', frame(block, 2 ** 31)],
    ['no kernel', bzImage(gzipSync(Buffer.from('something else')))],
    ['an unknown compression', bzImage(Buffer.alloc(100, 7))],
    ['no bzImage', Buffer.alloc(10_000)],
  ]
  for (const [what, bytes] of refused) assert.throws(() => vmlinuxOf(bytes), undefined, what)
})

const parts = await readParts(cacheDirectory(process.env), 'packaged')
if (parts?.kernel.modules === undefined)
  skip(test, "Debian's kernel has every module behind what it needs", 'this kernel was not made here')
else {
  const { vmlinux, bzImage: packed, modules } = parts.kernel
  test("Debian's kernel comes out the same, whether the code that does it was compiled meanwhile or not", () => {
    const once = vmlinuxOf(readFileSync(packed!))
    assert.ok(vmlinuxOf(readFileSync(packed!)).equals(once))
    assert.ok(readFileSync(vmlinux).equals(once))
  })
  test("Debian's kernel has every module behind what it needs", () => {
    assert.is(readFileSync(vmlinux).toString('latin1', 0, 4), '\x7fELF')
    const order = readFileSync(join(modules, 'order'), 'utf8').trim().split('\n')
    assert.equal(globSync('*.ko', { cwd: modules }).sort(), [...order].sort())
    const loaded = new Set<string>()
    const isHere = new Set(order.map((name) => basename(name, '.ko')))
    for (const name of order) {
      const needed = dependenciesOf(readFileSync(join(modules, name)))
      assert.equal(
        needed.filter((other) => isHere.has(other) && !loaded.has(other)),
        [],
        name,
      )
      loaded.add(basename(name, '.ko'))
    }
    for (const name of ['virtio_mmio', 'virtio_blk', 'virtio_console', 'virtio_net', 'erofs', 'overlay'])
      assert.ok(loaded.has(name), name)
  })
}

test.run()
