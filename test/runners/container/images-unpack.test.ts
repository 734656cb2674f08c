/** Layers become a root file system, hostile ones do not; each refusal beside the same image without the offence. */
import { execFileSync } from 'node:child_process'
import { existsSync, lstatSync, mkdirSync, readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { gzipSync, zstdCompressSync } from 'node:zlib'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { digestOf, type Entry, type ImageSpec, tar, writeLayout } from '../../registry.ts'
import { directory, errorOf, file, link, symlink, workbench } from './images-support.ts'

const isRoot = process.getuid?.() === 0
const read = (root: string, path: string) => readFileSync(join(root, path), 'utf8')
const list = (root: string, path = '') => readdirSync(join(root, path)).sort()

test('plain, gzip and zstd layers, one of several frames, are unpacked in order', async () => {
  await using bench = await workbench()
  const third = tar([file('same', 'third'), file('only-3')])
  const frames = Buffer.concat([
    zstdCompressSync(third.subarray(0, 700)),
    // RFC 8878, 3.1.2: a skippable frame of four bytes.
    Buffer.from([0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4]),
    zstdCompressSync(third.subarray(700)),
  ])
  const fourth = tar([file('only-4')])
  const members = Buffer.concat([gzipSync(fourth.subarray(0, 512)), gzipSync(fourth.subarray(512))])
  const root = await bench.unpack(
    { entries: [file('same', 'first'), file('only-1')], compression: 'none' },
    { entries: [file('same', 'second'), file('only-2')], compression: 'gzip' },
    { tar: third, blob: frames, compression: 'zstd' },
    { tar: fourth, blob: members, compression: 'gzip' },
  )
  assert.equal(list(root), ['only-1', 'only-2', 'only-3', 'only-4', 'same'])
  assert.is(read(root, 'same'), 'third')
})

test('owners, modes and times are those of the image; set-user-id too', async () => {
  await using bench = await workbench()
  const root = await bench.unpack([
    directory('home/a/', { mode: 0o1770, uid: 1_000, gid: 70_000, mtime: 500_000_000 }),
    file('home/a/tool', 'x', { mode: 0o4755, uid: 1_001, gid: 5, mtime: 1_234_567_890 }),
    symlink('home/a/link', 'tool'),
    file('locked/', '', { type: 'directory', mode: 0 }),
    file('locked/in', 'x', { mode: 0 }),
  ])
  const home = statSync(join(root, 'home/a'))
  const tool = statSync(join(root, 'home/a/tool'))
  assert.is(tool.mode & 0o7777, 0o4755)
  assert.is(tool.mtimeMs, 1_234_567_890_000)
  assert.is(home.mtimeMs, 500_000_000_000)
  if (!isRoot) return
  assert.equal([home.mode & 0o7777, home.uid, home.gid], [0o1770, 1_000, 70_000])
  assert.equal([tool.uid, tool.gid], [1_001, 5])
  assert.is(statSync(join(root, 'locked')).mode & 0o7777, 0)
})

test('long names, names in any encoding and pax records are kept byte for byte', async () => {
  await using bench = await workbench()
  const long = `${'d'.repeat(120)}/${'f'.repeat(200)}`
  const latin = Buffer.from('caf\xe9', 'latin1')
  const far = `${'../'.repeat(1)}${'t'.repeat(150)}`
  const root = await bench.unpack([
    file(long, 'long'),
    { path: latin, content: 'latin' },
    file('short', 'x', { pax: { path: 'ünïcode/naïve', mtime: '1000000000.5', uid: '3000000' } }),
    symlink('a/far', far),
    // GNU's way to a long name.
    { path: '././@LongLink', flag: 'L', content: `gnu/${'g'.repeat(130)}\0` },
    file(`gnu/${'g'.repeat(96)}`, 'gnu', { pax: {} }),
  ])
  assert.is(read(root, long), 'long')
  assert.is(readFileSync(Buffer.concat([Buffer.from(`${root}/`), latin]), 'utf8'), 'latin')
  assert.is(read(root, 'ünïcode/naïve'), 'x')
  assert.is(readlinkSync(join(root, 'a/far')), far)
  assert.is(read(root, `gnu/${'g'.repeat(130)}`), 'gnu')
  if (isRoot) assert.is(statSync(join(root, 'ünïcode/naïve')).uid, 3_000_000)
})

test('a later layer writes through /bin to usr/bin, and absolute links mean the image’s own root', async () => {
  await using bench = await workbench()
  const root = await bench.unpack(
    [
      directory('usr/bin/'),
      directory('usr/lib/'),
      symlink('bin', 'usr/bin'),
      symlink('lib', '/usr/lib'),
      symlink('var/run', '/run'),
      file('usr/bin/sh', 'old'),
      file('usr/bin/gone'),
    ],
    [
      file('bin/sh', 'new'),
      file('bin/tool'),
      file('lib/x/y.so'),
      file('bin/.wh.gone', ''),
      file('var/run/pid', '1'),
    ],
  )
  assert.ok(lstatSync(join(root, 'bin')).isSymbolicLink())
  assert.equal(list(root, 'usr/bin'), ['sh', 'tool'])
  assert.is(read(root, 'usr/bin/sh'), 'new')
  assert.is(read(root, 'usr/lib/x/y.so'), 'lib/x/y.so')
  assert.is(read(root, 'run/pid'), '1')
})

test('a directory that a later layer names takes the place of a link, and a file that of a directory', async () => {
  await using bench = await workbench()
  const root = await bench.unpack(
    [directory('real/'), file('real/a'), symlink('name', 'real'), file('dir/deep/er/x'), file('was-file')],
    [
      directory('name/'),
      file('name/b'),
      file('dir', 'now a file'),
      directory('was-file/'),
      file('was-file/c'),
    ],
  )
  assert.equal(list(root, 'name'), ['b'])
  assert.equal(list(root, 'real'), ['a'])
  assert.is(read(root, 'dir'), 'now a file')
  assert.equal(list(root, 'was-file'), ['c'])
})

test('whiteouts take away what lower layers put there, and nothing of their own layer', async () => {
  await using bench = await workbench()
  const root = await bench.unpack(
    [
      ...['a', 'b', 'tree/x/y', 'tree/z', 'opaque/old/deep', 'opaque/kept', 'late/old'].map((path) =>
        file(path),
      ),
      symlink('dangling', 'nowhere'),
    ],
    [
      file('.wh.a', ''),
      file('.wh.tree', ''),
      file('.wh.dangling', ''),
      file('.wh.never-was', ''),
      file('no/such/.wh.dir', ''),
      // The marker first, as tools write it, and last, as the specification allows.
      file('opaque/.wh..wh..opq', ''),
      file('opaque/kept', 'new'),
      file('late/new'),
      file('late/.wh..wh..opq', ''),
      file('b', 'mine'),
      file('.wh.b', ''),
      file('.wh..wh.plnk', 'a note of aufs'),
    ],
  )
  assert.equal(list(root), ['b', 'late', 'opaque'])
  assert.is(read(root, 'b'), 'mine')
  assert.equal([list(root, 'opaque'), list(root, 'late')], [['kept'], ['new']])
  assert.is(read(root, 'opaque/kept'), 'new')
})

test('hard links share their file, within a layer and over layers, and a replaced one leaves the other', async () => {
  await using bench = await workbench()
  const root = await bench.unpack(
    [file('a', 'old'), link('dir/b', 'a'), link('./dir/c', '/dir/b'), symlink('s', 'a'), link('s2', 's')],
    [link('d', 'a'), file('a', 'new'), link('d', 'd')],
  )
  const inode = (path: string) => lstatSync(join(root, path)).ino
  assert.is(inode('dir/b'), inode('dir/c'))
  assert.is(inode('dir/b'), inode('d'))
  assert.equal([read(root, 'a'), read(root, 'd')], ['new', 'old'])
  assert.ok(lstatSync(join(root, 's2')).isSymbolicLink())
})

test('devices and FIFOs are left out, with hard links to them; extended attributes are dropped', async () => {
  await using bench = await workbench()
  const root = await bench.unpack([
    { path: 'dev/sda', type: 'block' },
    { path: 'dev/mem', type: 'char' },
    { path: 'dev/fifo', type: 'fifo' },
    link('dev/other', 'dev/mem'),
    file('plain', 'x', { pax: { 'SCHILY.xattr.security.capability': 'not binary' } }),
  ])
  assert.equal(list(root, 'dev'), [])
  assert.equal(list(root), ['dev', 'plain'])
})

test('an image of no files, and one of no layers, have an empty root', async () => {
  await using bench = await workbench()
  assert.equal(list(await bench.unpack([])), [])
  assert.equal(list(await bench.unpack()), [])
})

test('a whole Debian-like tree comes out as GNU tar has it', async () => {
  await using bench = await workbench()
  const source = join(bench.dir, 'source')
  mkdirSync(source)
  execFileSync(
    'sh',
    [
      '-c',
      'cp -a /etc/alternatives /etc/default /usr/share/zoneinfo . && ln zoneinfo/UTC hard && ln -s usr/bin bin',
    ],
    { cwd: source },
  )
  const archive = execFileSync('tar', ['-C', source, '--sort=name', '-c', '.'], { maxBuffer: 2 ** 28 })
  const root = await bench.unpack({ tar: archive })
  const listing = (dir: string) =>
    execFileSync(
      'sh',
      [
        '-c',
        'find . -printf "%P %y %m %U %G %n %l %Ts\\n" | sort; find . -type f -exec sha256sum {} + | sort',
      ],
      {
        cwd: dir,
        maxBuffer: 2 ** 28,
      },
    )
      .toString()
      .replace(/^( d .*) \d+$/m, '$1')
  // Link counts and times of links differ by nature: directories’ own are compared, times of links are not kept.
  const comparable = (text: string) => text.replace(/^(.* l .*) \d+$/gm, '$1')
  assert.ok(comparable(listing(source)).split('\n').length > 500)
  assert.is(comparable(listing(root)), comparable(listing(source)))
})

/** Each with what is said of it, and the nearest innocent image. */
const attempts: [name: string, said: RegExp, hostile: ImageSpec['layers'], innocent: ImageSpec['layers']][] =
  [
    ['a path that climbs out', /climbs out/, [[file('../../escaped')]], [[file('a/../b/../escaped')]]],
    [
      'a path that climbs out in the middle',
      /climbs out/,
      [[file('a/../../escaped')]],
      [[file('a/b/../../escaped')]],
    ],
    [
      'a link out of the root',
      /climbs out/,
      [[symlink('a/out', '../../etc')]],
      [[symlink('a/in', '../etc')]],
    ],
    [
      'an absolute link out of the root',
      /climbs out/,
      [[symlink('out', '/../etc')]],
      [[symlink('in', '/etc')]],
    ],
    [
      'a hard link to outside',
      /climbs out/,
      [[link('shadow', '../../../../etc/shadow')]],
      [[file('x'), link('shadow', 'x')]],
    ],
    [
      'a hard link to a file of the host',
      /no file of the image/,
      [[link('p', '/etc/passwd')]],
      [[file('etc/passwd'), link('p', '/etc/passwd')]],
    ],
    [
      'a hard link to a directory',
      /no file of the image/,
      [[directory('d'), link('e', 'd')]],
      [[file('d'), link('e', 'd')]],
    ],
    [
      'a hard link through a link to outside',
      /no file of the image/,
      [[symlink('x', '/etc'), link('p', 'x/passwd')]],
      [[symlink('x', '/etc'), file('etc/passwd'), link('p', 'x/passwd')]],
    ],
    [
      'a whiteout of the directory above',
      /hides no file/,
      [[file('a/b')], [file('a/.wh...', '')]],
      [[file('a/b')], [file('a/.wh....', '')]],
    ],
    [
      'a whiteout of the directory itself',
      /hides no file/,
      [[file('a/b')], [file('a/.wh..', '')]],
      [[file('a/b')], [file('a/.wh.b', '')]],
    ],
    [
      'a whiteout that climbs out',
      /climbs out/,
      [[file('../../.wh.tmp', '')]],
      [[file('../tmp/x'.slice(3)), file('.wh.tmp', '')]],
    ],
    [
      'links that never end',
      /too many links/,
      [[symlink('a', 'b'), symlink('b', 'a'), file('a/x')]],
      [[symlink('a', 'b'), symlink('b', 'c'), file('a/x')]],
    ],
    [
      'a file that is used as a directory',
      /not a directory/,
      [[file('a')], [file('a/b')]],
      [[file('a')], [directory('a'), file('a/b')]],
    ],
    ['a name that no file system takes', /too long/, [[file('n'.repeat(256))]], [[file('n'.repeat(255))]]],
    [
      'a path that no kernel takes',
      /too long/,
      [[file('d/'.repeat(2_000))]],
      [[file(`${'d/'.repeat(1_000)}f`)]],
    ],
    ['a root that is a file', /root is to be/, [[file('./')]], [[directory('./')]]],
    [
      'a sparse file',
      /sparse/,
      [[file('s', 'x', { pax: { 'GNU.sparse.major': '1' } })]],
      [[file('s', 'x', { pax: { comment: '1' } })]],
    ],
    [
      'a sparse file of the old kind',
      /sparse/,
      [[file('s', 'x', { flag: 'S' })]],
      [[file('s', 'x', { flag: '7' })]],
    ],
    [
      'an entry of an unknown type',
      /type/,
      [[file('s', '', { flag: 'Z' })]],
      [[file('s', '', { flag: '0' })]],
    ],
    [
      'an owner that is none',
      /owner/,
      [[file('s', 'x', { pax: { uid: '99999999999' } })]],
      [[file('s', 'x', { pax: { uid: '99999' } })]],
    ],
    [
      'a name with a NUL',
      /NUL/,
      [[file('s', 'x', { pax: { path: 'a\0b' } })]],
      [[file('s', 'x', { pax: { path: 'ab' } })]],
    ],
    [
      'a broken extended header',
      /extended header/,
      [[{ path: 'x', flag: 'x', content: '99 path=a\n' }, file('s')]],
      [[{ path: 'x', flag: 'x', content: '9 path=a\n' }, file('s')]],
    ],
    [
      'an archive that is cut off',
      /middle of an entry/,
      [{ tar: tar([file('a', 'x'.repeat(2_000))]).subarray(0, 1_024) }],
      [{ tar: tar([file('a', 'x'.repeat(2_000))]).subarray(0, 2_560) }],
    ],
    [
      'bytes that are no archive',
      /not a tar archive/,
      [{ tar: Buffer.alloc(1_024, 'x') }],
      [{ tar: Buffer.alloc(1_024) }],
    ],
    ['gzip data that is damaged', /damaged/, [damaged('gzip', true)], [damaged('gzip', false)]],
    ['zstd data that is damaged', /damaged/, [damaged('zstd', true)], [damaged('zstd', false)]],
    [
      'a layer of another diff_id',
      /diff_id/,
      [{ entries: [file('a')], diffId: digestOf(Buffer.from('another')) }],
      [{ entries: [file('a')] }],
    ],
  ]

function damaged(compression: 'gzip' | 'zstd', really: boolean) {
  const plain = tar([file('a', 'some text '.repeat(500))])
  const blob = Buffer.from(compression === 'gzip' ? gzipSync(plain) : zstdCompressSync(plain))
  return { tar: plain, compression, blob: really ? blob.subarray(0, blob.length - 20) : blob }
}

for (const [name, said, hostile, innocent] of attempts)
  test(`${name} is refused`, async () => {
    await using bench = await workbench()
    await bench.unpack(...innocent)
    const before = list(bench.dir)
    const error = await bench.refusal(...hostile)
    assert.is(error.reason, 'invalid_workload', error.message)
    assert.match(error.message, said)
    assert.match(error.message, bench.layouts)
    assert.equal(list(bench.dir), before)
    assert.equal(list(join(bench.dir, 'store/tmp')), [])
  })

test('what is written through any kind of link stays in the root', async () => {
  await using bench = await workbench()
  const target = join(bench.dir, 'outside')
  mkdirSync(target)
  const below = target.slice(1)
  const root = await bench.unpack(
    [
      symlink('abs', target),
      symlink('self', '.'),
      symlink('two', 'abs/..'),
      symlink('end', `${target}/pwned`),
    ],
    [
      file('abs/pwned'),
      file('self/self/abs/again'),
      file('two/three'),
      file('end', 'replaced'),
      file('abs/.wh.x', ''),
    ],
    [file('proc-root', 'x'), symlink('p', '/proc/1/root'), file('p/tmp/pwned')],
  )
  assert.equal(list(target), [])
  assert.equal(list(root, below), ['again', 'pwned'])
  assert.is(read(root, 'end'), 'replaced')
  assert.is(read(root, 'proc/1/root/tmp/pwned'), 'p/tmp/pwned')
  assert.not.ok(existsSync('/tmp/pwned'))
})

test('a bomb of bytes ends at the limit, in one layer or over several', async () => {
  const maxBytes = 8 * 1024 * 1024
  await using bench = await workbench({ maxBytes })
  const zeros = (path: string, megabytes: number): Entry => ({
    path,
    content: Buffer.alloc(megabytes * 2 ** 20),
  })
  await bench.unpack([zeros('a', 7)])
  for (const compression of ['gzip', 'zstd'] as const) {
    const bomb = { entries: [zeros('a', 64)], compression }
    assert.match((await bench.refusal(bomb)).message, /larger than 8 MiB/)
  }
  const error = await bench.refusal([zeros('a', 4)], [zeros('b', 3)], [zeros('c', 2)])
  assert.is(error.reason, 'invalid_workload')
  assert.match(error.message, /layer 3.*larger than/)
  // Behind the end of the archive too, and in what is hidden again.
  const behind = Buffer.concat([tar([file('a')]), Buffer.alloc(16 * 2 ** 20)])
  assert.match((await bench.refusal({ tar: behind })).message, /larger than/)
  assert.equal(list(join(bench.dir, 'store/tmp')), [])
})

test('a bomb of entries ends at the limit', async () => {
  await using bench = await workbench({ maxEntries: 100 })
  const many = (count: number) => Array.from({ length: count }, (_, i) => file(`f${i}`, ''))
  await bench.unpack(many(100))
  assert.match((await bench.refusal(many(60), many(60))).message, /more than 100 entries/)
  const headers = file('x', '', { pax: { comment: 'x'.repeat(2 * 2 ** 20) } })
  assert.match((await bench.refusal([headers])).message, /headers/)
})

test('a refused image is refused again without being unpacked again', async () => {
  await using bench = await workbench()
  const layout = join(bench.layouts, 'bad')
  await writeLayout(layout, { layers: [[file('../x')]] })
  using image = await bench.get(`oci:${layout}`)
  const first = await errorOf(image.root())
  const second = await errorOf(image.root())
  assert.is(second.message, first.message)
  assert.is(second.reason, 'invalid_workload')
})

test.run()
