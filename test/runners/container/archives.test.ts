import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { existsSync, lstatSync, readdirSync, readFileSync, readlinkSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { gzipSync, zstdCompressSync } from 'node:zlib'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { ArchiveError, Archives, archiveLimits, linkInto } from '../../../runners/container/archives.ts'
import { type TarEntry, tarOf, tgzOf, zipOf } from '../../gateway/archives.ts'
import { skip } from '../../harness.ts'
import { archive, sleep } from './jobs.ts'

async function open(budgetMb = 100, limits = archiveLimits) {
  const parent = await mkdtemp(join(tmpdir(), 'vulcan-archives-'))
  const dir = join(parent, 'archives')
  const archives = new Archives(dir, budgetMb, limits)
  return {
    archives,
    dir,
    parent,
    async [Symbol.asyncDispose]() {
      await archives[Symbol.asyncDispose]()
      await rm(parent, { recursive: true, force: true })
    },
  }
}

/** What is wrong with it; nothing of it is left. */
async function refused(bytes: Uint8Array, limits = archiveLimits): Promise<string> {
  await using opened = await open(100, limits)
  try {
    await opened.archives.get(archive(bytes))
  } catch (error) {
    assert.instance(error, ArchiveError)
    assert.equal(readdirSync(opened.dir), [])
    assert.equal(readdirSync(opened.parent), ['archives'])
    return (error as Error).message
  }
  throw new Error('it was not refused')
}
const refusedTar = (...entries: TarEntry[]) => refused(tarOf(entries))

test('tar, gzipped tar and zip give the same files', async () => {
  await using opened = await open()
  const files = { 'a.txt': 'one', 'deep/er/b.txt': 'two' }
  const entries = Object.entries(files).map(([path, text]) => ({ path, text }))
  for (const bytes of [tarOf(entries), tgzOf(files), zipOf(entries)]) {
    using got = await opened.archives.get(archive(bytes))
    assert.is(readFileSync(join(got.path, 'a.txt'), 'utf8'), 'one')
    assert.is(readFileSync(join(got.path, 'deep/er/b.txt'), 'utf8'), 'two')
    assert.is(lstatSync(join(got.path, 'deep/er')).mode & 0o777, 0o755)
  }
})

test('programs stay executable, links inside stay links, the last of two files is meant', async () => {
  await using opened = await open()
  using got = await opened.archives.get(
    archive(
      tarOf([
        { path: 'bin/', type: 'Directory' },
        { path: 'bin/run', text: 'first' },
        { path: 'bin/run', text: 'second' },
        { path: 'run', type: 'SymbolicLink', linkpath: 'bin/run' },
        { path: 'same', type: 'Link', linkpath: 'bin/run' },
        { path: 'empty', type: 'Directory' },
      ]),
    ),
  )
  assert.is(readFileSync(join(got.path, 'run'), 'utf8'), 'second')
  assert.is(readlinkSync(join(got.path, 'run')), 'bin/run')
  assert.is(readFileSync(join(got.path, 'same'), 'utf8'), 'second')
  assert.is(lstatSync(join(got.path, 'bin/run')).mode & 0o777, 0o755)
  assert.is(lstatSync(join(got.path, 'empty')).isDirectory(), true)
})

test('large files come through whole', async () => {
  await using opened = await open()
  const bytes = Buffer.alloc(5_000_000, 'vulcan')
  using got = await opened.archives.get(archive(tgzOf({ 'a/big': bytes, small: 'x' })))
  assert.is(readFileSync(join(got.path, 'a/big')).equals(bytes), true)
  assert.is(readFileSync(join(got.path, 'small'), 'utf8'), 'x')
})

test('paths and links that climb out are refused', async () => {
  assert.match(await refusedTar({ path: '../x', text: '1' }), /must be relative/)
  assert.match(await refusedTar({ path: '/etc/x', text: '1' }), /must be relative|absolute/)
  assert.match(await refusedTar({ path: 'a/../../x', text: '1' }), /must be relative/)
  assert.match(await refused(zipOf([{ path: '../x', text: '1' }])), /relative|\.\./)
  assert.match(await refusedTar({ path: 'x', type: 'SymbolicLink', linkpath: '/etc/passwd' }), /out of/)
  assert.match(await refusedTar({ path: 'x', type: 'SymbolicLink', linkpath: '../y' }), /out of/)
  assert.match(await refused(zipOf([{ path: 'x', text: '../../y', mode: 0o120777 }])), /out of/)
  assert.match(
    await refusedTar({ path: 'x', type: 'Link', linkpath: '../../etc/passwd' }),
    /must be relative/,
  )
  // A link that stays inside by its text, and leads out by the link before it.
  assert.match(
    await refusedTar(
      { path: 'a/b/p', type: 'SymbolicLink', linkpath: '../..' },
      { path: 'a/b/x', type: 'SymbolicLink', linkpath: 'p/../etc' },
    ),
    /out of/,
  )
  // A file through a link.
  assert.match(
    await refusedTar(
      { path: 'd', type: 'SymbolicLink', linkpath: '../../outside' },
      { path: 'd/evil', text: '1' },
    ),
    /both a link and a directory|out of/,
  )
})

test('devices, pipes, and what is no archive are refused', async () => {
  assert.match(await refusedTar({ path: 'null', type: 'CharacterDevice' }), /CharacterDevice/)
  assert.match(await refusedTar({ path: 'pipe', type: 'FIFO' }), /FIFO/)
  assert.match(await refused(Buffer.from('hello')), /neither a tar/)
  assert.match(await refused(tgzOf({ a: 'x'.repeat(10_000) }).subarray(0, 60)), /not intact/)
  assert.match(await refused(gzipSync(gzipSync(tarOf([{ path: 'a' }])))), /compressed twice/)
  assert.match(await refused(gzipSync(zstdCompressSync(tarOf([{ path: 'a' }])))), /compressed twice/)
})

test('bombs are refused before they fill the disk', async () => {
  const limits = { ...archiveLimits, bytes: 1_000_000, entries: 50 }
  const zeros = Buffer.alloc(20_000_000)
  assert.match(await refused(tgzOf({ zeros }), limits), /more than 1000000 bytes/)
  assert.match(await refused(zipOf([{ path: 'zeros', text: zeros }]), limits), /more than 1000000 bytes/)
  assert.match(await refused(zipOf([{ path: 'zeros', text: zeros, claims: 10 }]), limits), /not intact/)
  const many = Array.from({ length: 60 }, (_, i) => ({ path: `f${i}` }))
  assert.match(await refused(tarOf(many), limits), /more than 50 entries/)
  assert.match(
    await refused(tarOf([{ path: 'a', text: 'x'.repeat(1000) }]), { ...limits, packedBytes: 500 }),
    /more than 500 bytes/,
  )
})

test('directories that no entry names count too', async () => {
  const limits = { ...archiveLimits, entries: 50 }
  const deep = (name: string) => ({ path: `${name}/${'d/'.repeat(30)}f`, text: 'x' })
  assert.match(await refused(tarOf([deep('a'), deep('b')]), limits), /more than 50 entries/)
  await using opened = await open(100, limits)
  using got = await opened.archives.get(archive(tarOf([deep('a'), { ...deep('a'), path: 'a/d/g' }])))
  // 31 directories and two files.
  assert.is(got.entries, 33)
})

test('links that send whoever follows them round and round are given up', async () => {
  // Each leads through the one before it, and makes its way long.
  const round = 'd/../'.repeat(16)
  const links = Array.from({ length: 200 }, (_, i): TarEntry => {
    const before = i % 40
    return { path: `l${i}`, type: 'SymbolicLink', linkpath: `${round}${before === 0 ? 'd' : `l${i - 1}`}` }
  })
  const all = tarOf([{ path: 'd/', type: 'Directory' }, ...links])
  assert.match(await refused(all, { ...archiveLimits, lookups: 10_000 }), /lead too far/)
})

test('a second compression is found where the first piece is too short to show it', async () => {
  const inner = gzipSync(tarOf([{ path: 'hidden', text: 'x' }]))
  const rest = gzipSync(inner.subarray(1))
  // RFC 1952: a comment, longer than what is read at once, before the rest.
  const head = Buffer.from(rest.subarray(0, 10))
  head[3] = 16
  const comment = Buffer.alloc(70_001, 'c')
  comment[70_000] = 0
  const bytes = Buffer.concat([gzipSync(inner.subarray(0, 1)), head, comment, rest.subarray(10)])
  assert.match(await refused(bytes), /compressed twice/)
  assert.match(await refused(gzipSync('')), /no tar/)
})

test('archives that are refused leave no descriptors', async () => {
  const open = () => readdirSync('/proc/self/fd').length
  const noise = randomBytes(300_000)
  const before = open()
  for (let i = 0; i < 10; i++) {
    await refused(tgzOf({ '../x': Buffer.concat([noise, Buffer.from([i])]) }))
    await refused(Buffer.concat([tgzOf({ x: 'x' }).subarray(0, 40), noise, Buffer.from([i])]))
  }
  await sleep(300)
  assert.ok(open() < before + 5, `${before} before, ${open()} now`)
})

const roomTest = process.getuid?.() === 0 ? test : (name: string) => skip(test, name, 'only root can mount')
roomTest('a full disk is said in the middle of a file, and the next try is another', async () => {
  const small = await mkdtemp(join(tmpdir(), 'vulcan-archives-'))
  execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', small])
  try {
    await using archives = new Archives(join(small, 'archives'), 100)
    const zeros = Buffer.alloc(9_000_000)
    for (const bytes of [
      tgzOf({ zeros, x: 'x' }),
      zipOf([{ path: 'zeros', text: zeros }]),
      tgzOf({ zeros, x: 'x' }),
    ]) {
      const code = await archives.get(archive(bytes)).catch((error) => error.code)
      assert.is(code, 'ENOSPC')
    }
    using _ = await archives.get(archive(tgzOf({ x: 'x' })))
  } finally {
    execFileSync('umount', [small])
    await rm(small, { recursive: true })
  }
})

test('archives of many empty files take room too', async () => {
  await using opened = await open(1)
  for (const letter of ['a', 'b', 'c']) {
    const files = Array.from({ length: 200 }, (_, i) => ({ path: `${letter}${i}`, text: '' }))
    using _ = await opened.archives.get(archive(tarOf(files)))
  }
  await sleep(500)
  assert.is(readdirSync(opened.dir).length, 1)
})

test('bytes that are not those of the digest are refused', async () => {
  await using opened = await open()
  const source = { ...archive(tgzOf({ a: 'x' })), sha256: '0'.repeat(64) }
  await opened.archives.get(source).then(
    () => assert.unreachable(),
    (error) => assert.match(error.message, /digest/),
  )
})

test('several that want the same share one unpacking; what nobody holds is evicted by least use', async () => {
  await using opened = await open(1)
  let opens = 0
  const big = (letter: string) => {
    const source = archive(tgzOf({ f: letter.repeat(600_000) }))
    const { open: openBytes } = source
    const counted = () => {
      opens++
      return openBytes()
    }
    return { ...source, open: counted }
  }
  const [a, b] = [big('a'), big('b')]
  const [first, second] = await Promise.all([opened.archives.get(a), opened.archives.get(a)])
  assert.is(opens, 1)
  first[Symbol.dispose]()
  first[Symbol.dispose]()
  const other = await opened.archives.get(b)
  assert.is(existsSync(second.path), true)
  second[Symbol.dispose]()
  for (let i = 0; i < 100 && existsSync(second.path); i++) await new Promise((done) => setTimeout(done, 20))
  assert.is(existsSync(second.path), false)
  assert.is(existsSync(other.path), true)
  using again = await opened.archives.get(a)
  assert.is(opens, 3)
  assert.is(readFileSync(join(again.path, 'f'), 'utf8').length, 600_000)
})

test('an unpacked archive can be linked into another directory', async () => {
  await using opened = await open()
  using got = await opened.archives.get(
    archive(
      tarOf([
        { path: 'a/b', text: 'x' },
        { path: 'l', type: 'SymbolicLink', linkpath: 'a/b' },
      ]),
    ),
  )
  const target = await mkdtemp(join(opened.parent, 'into-'))
  await linkInto(got.path, target)
  assert.is(readFileSync(join(target, 'l'), 'utf8'), 'x')
  assert.is(lstatSync(join(target, 'a/b')).nlink, 2)
})

test.run()
