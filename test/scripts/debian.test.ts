// timeout: 300
import { existsSync, lstatSync, statSync } from 'node:fs'
import { mkdir, mkdtemp, rm, symlink } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { debianUris, openDebian, unpackPackage } from '../../scripts/debian.ts'
import { which } from '../../scripts/host-tools.ts'
import { skip } from '../harness.ts'

async function temporary(scope: AsyncDisposableStack): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  scope.defer(() => rm(folder, { recursive: true, force: true }))
  return folder
}

async function rejection(promise: Promise<unknown>): Promise<Error> {
  return promise.then(
    () => assert.unreachable() as never,
    (error: Error) => error,
  )
}

test("the machine's archives are read from both formats of apt's sources", () => {
  const lines = `# deb http://off.example/debian bookworm main
deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian/ bookworm main contrib
deb http://security.example/debian-security bookworm-security main
deb https://packages.example/cloud stable main
deb-src http://sources.example/debian bookworm main`
  assert.equal(debianUris(lines), ['http://mirror.example/debian', 'http://security.example/debian-security'])

  const stanzas = `Types: deb deb-src
# a comment
URIs: http://one.example/debian
 http://two.example/debian
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: http://backports.example/debian-backports
Suites: bookworm-backports
Components: main

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main`
  assert.equal(debianUris(stanzas), ['http://one.example/debian', 'http://two.example/debian'])
})

const hasDebian = which('apt-get', process.env.PATH ?? '') && existsSync('/etc/debian_version')
if (hasDebian) {
  test('packages of any suite are found and fetched, and the system knows nothing of it', async () => {
    await using scope = new AsyncDisposableStack()
    const folder = await temporary(scope)
    const lists = () => statSync('/var/lib/apt/lists').mtimeMs
    const before = lists()
    {
      await using archive = await openDebian(['bookworm', 'bookworm-backports'])
      const [ordinary, backport] = await archive.find(['hostname', 'runsc/bookworm-backports'])
      assert.is(ordinary!.name, 'hostname')
      assert.match(backport!.version, /bpo12/)
      const [file] = await archive.download([ordinary!], folder)
      assert.ok(existsSync(file!))
      assert.match(
        (await rejection(archive.find(['hostname', 'no-such-package']))).message,
        'no-such-package',
      )

      const root = join(folder, 'root')
      await mkdir(join(root, 'usr/bin'), { recursive: true })
      await symlink('usr/bin', join(root, 'bin'))
      await unpackPackage(file!, root, ['./usr/share/man'])
      assert.ok(lstatSync(join(root, 'bin')).isSymbolicLink())
      assert.ok(lstatSync(join(root, 'usr/bin/hostname')).isFile())
      assert.ok(existsSync(join(root, 'usr/share/doc')))
      assert.not.ok(existsSync(join(root, 'usr/share/man')))
    }
    assert.is(lists(), before)
  })

  test('a suite that there is not, and a package that is none, are errors that say so', async () => {
    await using scope = new AsyncDisposableStack()
    const folder = await temporary(scope)
    assert.is((await rejection(openDebian(['no-such-suite']))).name, 'DebianError')
    assert.match(
      (await rejection(unpackPackage('/etc/passwd', folder))).message,
      '/etc/passwd could not be unpacked',
    )
  })
} else {
  const reason = 'this machine is no Debian'
  skip(test, 'packages of any suite are found and fetched, and the system knows nothing of it', reason)
  skip(test, 'a suite that there is not, and a package that is none, are errors that say so', reason)
}

test.run()
