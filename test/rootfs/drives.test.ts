import { execFileSync, spawnSync } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import {
  existsSync,
  linkSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { driveOf, type RootFormat, writeJobDrive } from '../../rootfs/drives.ts'
import { ErofsError } from '../../rootfs/erofs.ts'
import { systemPath, which } from '../../scripts/host-tools.ts'
import { skip } from '../harness.ts'

function bench(): { dir: string } & Disposable {
  const dir = mkdtempSync(join(tmpdir(), 'vulcan-test-'))
  return { dir, [Symbol.dispose]: () => rmSync(dir, { recursive: true, force: true }) }
}

const hashOf = (path: string) => createHash('sha256').update(readFileSync(path)).digest('hex')
const newDigest = () => `sha256:${randomBytes(32).toString('hex')}`

/** A small root file system, with the times that an image gives its files. */
function makeRoot(root: string): string {
  mkdirSync(join(root, 'usr/bin'), { recursive: true })
  mkdirSync(join(root, 'tmp'), { mode: 0o1777 })
  symlinkSync('usr/bin', join(root, 'bin'))
  writeFileSync(join(root, 'usr/bin/one'), Buffer.alloc(100_000, 'program '), { mode: 0o755 })
  linkSync(join(root, 'usr/bin/one'), join(root, 'usr/bin/two'))
  for (let index = 0; index < 300; index++) writeFileSync(join(root, `usr/file-${index}`), `${index}`)
  for (const name of ['usr/bin/one', ...Array.from({ length: 300 }, (_, index) => `usr/file-${index}`)])
    utimesSync(join(root, name), 1_000_000_000, 1_000_000_000)
  for (const name of ['usr/bin', 'usr', 'tmp', '.'])
    utimesSync(join(root, name), 1_000_000_000, 1_000_000_000)
  return root
}

const hasMke2fs = which('mke2fs', systemPath) !== undefined
const checks: Record<RootFormat, string[]> = { erofs: ['fsck.erofs'], ext4: ['e2fsck', '-f', '-n'] }

for (const format of ['erofs', 'ext4'] as const) {
  const name = `${format}: the root drive of an image is sound, and the same wherever it was unpacked`
  if (format === 'ext4' && !hasMke2fs) skip(test, name, 'e2fsprogs is not installed')
  else
    test(name, async () => {
      using place = bench()
      const files: string[] = []
      for (const number of [1, 2]) {
        const root = makeRoot(join(place.dir, `root-${number}`))
        files.push(await driveOf({ digest: newDigest(), root: async () => root }, format, place.dir))
      }
      assert.is.not(files[0], files[1])
      assert.is(hashOf(files[0]!), hashOf(files[1]!))
      const [program, ...args] = checks[format] as [string, ...string[]]
      const checked = spawnSync(program, [...args, files[0]!], {
        encoding: 'utf8',
        env: { PATH: systemPath },
      })
      if (checked.error === undefined) assert.is(checked.status, 0, checked.stdout + checked.stderr)
    })
}

if (!hasMke2fs) skip(test, 'an ext4 drive has the tree', 'e2fsprogs is not installed')
else
  test('an ext4 drive has the tree', async () => {
    using place = bench()
    const root = makeRoot(join(place.dir, 'root'))
    const file = await driveOf({ digest: newDigest(), root: async () => root }, 'ext4', place.dir)
    const ask = (request: string) =>
      execFileSync('debugfs', ['-R', request, file], {
        encoding: 'utf8',
        env: { PATH: systemPath },
        stdio: 'pipe',
      })
    assert.is(ask('cat /usr/file-123'), '123')
    assert.match(ask('stat /bin'), /Fast link dest: "usr\/bin"/)
    assert.match(ask('stat /usr/bin/one'), /Links: 2 [\s\S]* mtime: 0x3b9aca00/)
    const back = join(place.dir, 'program')
    ask(`dump /usr/bin/two ${back}`)
    assert.is(hashOf(back), hashOf(join(root, 'usr/bin/one')))
  })

test('several that ask for a drive at once get one, made once, and nothing else stays', async () => {
  using place = bench()
  const root = makeRoot(join(place.dir, 'root'))
  let asked = 0
  const image = {
    digest: newDigest(),
    async root() {
      asked++
      return root
    },
  }
  const files = await Promise.all(Array.from({ length: 5 }, () => driveOf(image, 'erofs', place.dir)))
  assert.is(new Set(files).size, 1)
  assert.is(asked, 1)
  for (const folder of ['tmp', 'locks']) assert.equal(readdirSync(join(place.dir, 'microvm', folder)), [])
})

test('a drive whose making fails is made by the next that asks', async () => {
  using place = bench()
  const digest = newDigest()
  try {
    await driveOf({ digest, root: () => Promise.reject(new Error('no such image')) }, 'erofs', place.dir)
    assert.unreachable()
  } catch (error) {
    assert.is((error as Error).message, 'no such image')
  }
  const root = makeRoot(join(place.dir, 'root'))
  assert.ok(existsSync(await driveOf({ digest, root: async () => root }, 'erofs', place.dir)))
  assert.equal(readdirSync(join(place.dir, 'microvm/tmp')), [])
})

test('what a dead process has left is removed by the next that makes something', async () => {
  using place = bench()
  const left = join(place.dir, 'microvm/tmp/1-1-00000000.0')
  mkdirSync(left, { recursive: true })
  const root = makeRoot(join(place.dir, 'root'))
  await driveOf({ digest: newDigest(), root: async () => root }, 'erofs', place.dir)
  assert.not.ok(existsSync(left))
})

test('a digest that is none names no file', async () => {
  using place = bench()
  for (const digest of ['sha256:../../x', '', 'sha256:', 'sha256:abc/../../../../etc/x'])
    try {
      await driveOf({ digest, root: async () => place.dir }, 'erofs', place.dir)
      assert.unreachable()
    } catch (error) {
      assert.match((error as Error).message, 'is no digest')
    }
})

test('a job drive keeps its length, and takes no disk beyond its content', async () => {
  using place = bench()
  const file = join(place.dir, 'job')
  writeFileSync(file, '')
  truncateSync(file, 2 ** 31)
  const source = join(place.dir, 'source')
  mkdirSync(source)
  writeFileSync(join(source, 'main.py'), 'print(1)')
  const bytes = await writeJobDrive(
    [
      { source, path: '0' },
      { source: join(source, 'main.py'), path: '1' },
    ],
    file,
  )
  const stat = lstatSync(file)
  assert.is(stat.size, 2 ** 31)
  assert.ok(bytes < 100_000 && stat.blocks * 512 < 1_000_000, `${bytes} bytes, ${stat.blocks} blocks`)
})

test('a job that its drive has no room for is refused, and the drive stays blank', async () => {
  using place = bench()
  const file = join(place.dir, 'job')
  writeFileSync(file, '')
  truncateSync(file, 2 ** 20)
  const source = join(place.dir, 'source')
  mkdirSync(source)
  writeFileSync(join(source, 'large'), '')
  truncateSync(join(source, 'large'), 2 ** 40)
  try {
    await writeJobDrive([{ source, path: '.' }], file)
    assert.unreachable()
  } catch (error) {
    assert.instance(error, ErofsError)
  }
  assert.is(lstatSync(file).blocks, 0)
})

test('a link in the place of a job drive is not followed', async () => {
  using place = bench()
  const victim = join(place.dir, 'victim')
  writeFileSync(victim, 'untouched'.repeat(10_000))
  symlinkSync(victim, join(place.dir, 'job'))
  try {
    await writeJobDrive([], join(place.dir, 'job'))
    assert.unreachable()
  } catch (error) {
    assert.is((error as NodeJS.ErrnoException).code, 'ELOOP')
  }
  assert.match(readFileSync(victim, 'utf8'), /^untouched/)
})

test.run()
