import { execFileSync, spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  chmodSync,
  linkSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs'
import { open } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { ErofsError, type ErofsSource, writeErofs } from '../../rootfs/erofs.ts'
import { which } from '../../scripts/host-tools.ts'
import { skip } from '../harness.ts'

const fsck = which('fsck.erofs', process.env.PATH ?? '')
const maxBytes = 2 ** 30

function bench(): { dir: string } & Disposable {
  const dir = mkdtempSync(join(tmpdir(), 'vulcan-test-'))
  return { dir, [Symbol.dispose]: () => rmSync(dir, { recursive: true, force: true }) }
}

async function write(sources: ErofsSource[], file: string, owner: 'kept' | 'root' = 'kept', room = maxBytes) {
  const handle = await open(file, 'w+')
  await using _close = { [Symbol.asyncDispose]: () => handle.close() }
  const bytes = await writeErofs(sources, handle, { owner, maxBytes: room })
  await handle.truncate(bytes)
  return bytes
}

/** Files around all the sizes at which something changes, names of all kinds, many and deep entries, links. */
function fill(root: string): void {
  mkdirSync(root, { recursive: true })
  for (const size of [0, 1, 4031, 4032, 4033, 4095, 4096, 4097, 8192, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
    writeFileSync(join(root, `file-${size}`), Buffer.alloc(size, `content of ${size} `))
  for (const name of ['-first', '!', '~last', 'a b', 'ü', '\n', '\'"$(x)', 'x'.repeat(255)])
    writeFileSync(join(root, name), name)
  writeFileSync(Buffer.concat([Buffer.from(`${root}/`), Buffer.from([0xff, 0xfe, 0x80])]), 'not UTF-8')
  const many = join(root, 'many')
  mkdirSync(many)
  for (let index = 0; index < 700; index++)
    writeFileSync(join(many, `${'n'.repeat(index % 200)}${index}`), `${index}`)
  mkdirSync(join(root, ...Array.from({ length: 60 }, (_, level) => `level ${level}`)), { recursive: true })
  symlinkSync('/etc/passwd', join(root, 'absolute'))
  symlinkSync('../../../../outside', join(root, 'climbing'))
  symlinkSync(`${'y/'.repeat(2_000)}z`, join(root, 'long'))
  writeFileSync(join(root, 'one'), 'two names')
  linkSync(join(root, 'one'), join(root, 'two'))
  chmodSync(join(root, 'one'), 0o751)
  mkdirSync(join(root, 'closed'), { mode: 0o700 })
  chmodSync(join(root, 'closed'), 0o1711)
  settle(root)
}

/** Times that are the same each time. */
function settle(folder: string): void {
  for (const name of readdirSync(folder, { encoding: 'buffer' })) {
    const path = Buffer.concat([Buffer.from(`${folder}/`), name])
    const stat = lstatSync(path)
    if (stat.isDirectory()) settle(path.toString())
    else if (!stat.isSymbolicLink()) utimesSync(path, 1_000_000_000, 1_000_000_000)
  }
  utimesSync(folder, 1_000_000_001, 1_000_000_001)
}

/** What is there, by name (a byte in each character): kind, mode, content. */
function listing(folder: string, prefix = ''): Record<string, string> {
  const found: Record<string, string> = {}
  for (const name of readdirSync(folder, { encoding: 'buffer' })) {
    const path = Buffer.concat([Buffer.from(`${folder}/`), name])
    const stat = lstatSync(path)
    const key = `${prefix}${name.toString('latin1')}`
    if (stat.isDirectory()) Object.assign(found, listing(path.toString(), `${key}/`))
    const content = stat.isSymbolicLink() ? readlinkSync(path) : stat.isFile() ? hashOf(path) : ''
    found[key] = [stat.mode.toString(8), stat.isSymbolicLink() ? 0 : stat.mtimeMs, content].join(' ')
  }
  return found
}

const hashOf = (path: Buffer | string) => createHash('sha256').update(readFileSync(path)).digest('hex')

if (fsck === undefined) skip(test, 'a tree comes back as it was', 'erofs-utils is not installed')
else
  test('a tree comes back as it was', async () => {
    using place = bench()
    const [source, image, back] = ['source', 'image', 'back'].map((name) => join(place.dir, name)) as [
      string,
      string,
      string,
    ]
    fill(source)
    const bytes = await write([{ source, path: '.' }], image)
    assert.is(bytes % 4096, 0)
    assert.is(lstatSync(image).size, bytes)
    execFileSync(fsck, ['--preserve', `--extract=${back}`, image])
    const [found, wanted] = [listing(back), listing(source)]
    const names = new Set([...Object.keys(found), ...Object.keys(wanted)])
    assert.equal(
      [...names].filter((name) => found[name] !== wanted[name]),
      [],
    )
  })

test('the same tree gives the same bytes, wherever it lies', async () => {
  using place = bench()
  const first = join(place.dir, 'first')
  fill(first)
  const second = join(place.dir, 'somewhere', 'second')
  fill(second)
  for (const [index, source] of [first, second].entries())
    await write([{ source, path: '.' }], join(place.dir, `image-${index}`), 'root')
  assert.is(hashOf(join(place.dir, 'image-0')), hashOf(join(place.dir, 'image-1')))
})

test('sources stand where they are asked for, and only there', async () => {
  using place = bench()
  const source = join(place.dir, 'source')
  mkdirSync(join(source, 'below'), { recursive: true })
  writeFileSync(join(source, 'below', 'file'), 'here')
  const image = join(place.dir, 'image')
  await write(
    [
      { source, path: '0' },
      { source: join(source, 'below', 'file'), path: 'deep/er/one' },
      { source, path: 'deep/two' },
    ],
    image,
  )
  if (fsck) {
    execFileSync(fsck, [`--extract=${join(place.dir, 'back')}`, image])
    const files = Object.keys(listing(join(place.dir, 'back'))).filter((path) => /file|one/.test(path))
    assert.equal(files.sort(), ['0/below/file', 'deep/er/one', 'deep/two/below/file'])
  }
  const refused = async (...sources: ErofsSource[]) => {
    try {
      await write(sources, join(place.dir, 'refused'))
    } catch (error) {
      assert.instance(error, ErofsError)
      assert.is(lstatSync(join(place.dir, 'refused')).size, 0)
      return
    }
    assert.unreachable()
  }
  for (const path of ['', '..', '/abs', 'a/../b', 'a//b', './a', 'a/', 'n'.repeat(256), 'nul\0'])
    await refused({ source, path })
  await refused({ source, path: 'a' }, { source, path: 'a' })
  await refused({ source, path: '.' }, { source, path: 'below' })
  await refused({ source: join(source, 'below/file'), path: 'a' }, { source, path: 'a/b' })
  await refused({ source: join(source, 'below/file'), path: '.' })
})

test('devices, pipes and sockets are left out; a pipe is not waited for', async () => {
  using place = bench()
  const source = join(place.dir, 'source')
  mkdirSync(source)
  assert.is(spawnSync('mkfifo', [join(source, 'pipe')]).status, 0)
  if (process.getuid?.() === 0) spawnSync('mknod', [join(source, 'zero'), 'c', '1', '5'])
  writeFileSync(join(source, 'file'), 'stays')
  await write([{ source, path: '.' }], join(place.dir, 'image'))
  if (!fsck) return
  execFileSync(fsck, [`--extract=${join(place.dir, 'back')}`, join(place.dir, 'image')])
  assert.equal(readdirSync(join(place.dir, 'back')), ['file'])
})

test('what does not fit is refused before anything is written', async () => {
  using place = bench()
  const source = join(place.dir, 'source')
  mkdirSync(source)
  writeFileSync(join(source, 'file'), Buffer.alloc(100_000))
  const image = join(place.dir, 'image')
  try {
    await write([{ source, path: '.' }], image, 'kept', 64 * 1024)
    assert.unreachable()
  } catch (error) {
    assert.instance(error, ErofsError)
    assert.match((error as Error).message, /room for 65536/)
  }
  assert.is(lstatSync(image).size, 0)
  await write([{ source, path: '.' }], image, 'kept', 128 * 1024)
})

test('holes of files take no disk', async () => {
  using place = bench()
  const source = join(place.dir, 'source')
  mkdirSync(source)
  writeFileSync(join(source, 'hole'), 'begins')
  truncateSync(join(source, 'hole'), 500_000_000)
  const image = join(place.dir, 'image')
  assert.ok((await write([{ source, path: '.' }], image)) > 500_000_000)
  assert.ok(lstatSync(image).blocks * 512 < 3_000_000)
})

test('trees of many entries and of great depth are written', async () => {
  using place = bench()
  const source = join(place.dir, 'source')
  const deep = join(source, ...Array.from({ length: 250 }, () => 'd'))
  mkdirSync(deep, { recursive: true })
  writeFileSync(join(deep, 'bottom'), 'x')
  const wide = join(source, 'wide')
  mkdirSync(wide)
  for (let index = 0; index < 5_000; index++) writeFileSync(join(wide, `file ${index}`), 'y')
  const image = join(place.dir, 'image')
  await write([{ source, path: '.' }], image)
  if (fsck) assert.is(spawnSync(fsck, [image]).status, 0)
})

test.run()
