import { spawnSync } from 'node:child_process'
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { skip } from '../harness.ts'

const module = new URL('../../scripts/host-tools.ts', import.meta.url).href

type Tried = { missing: string[]; log: string; calls: string[] }

/**
 * Gets the tools of `sets` where PATH has nothing but these programs, each a shell script that answers `--version`
 * with nothing. An `apt-get` also writes down how it is called.
 */
function ensureTools(sets: string[], programs: Record<string, string>): Tried {
  using scope = new DisposableStack()
  const folder = mkdtempSync(join(tmpdir(), 'vulcan-test-'))
  scope.defer(() => rmSync(folder, { recursive: true }))
  const bin = join(folder, 'bin')
  mkdirSync(bin)
  for (const [name, script] of Object.entries(programs)) {
    const record = name === 'apt-get' ? `echo "$@" >> ${folder}/calls\n` : ''
    writeFileSync(join(bin, name), `#!/bin/sh\nPATH=/usr/bin:/bin\n${record}${script}\n`)
    chmodSync(join(bin, name), 0o755)
  }
  writeFileSync(join(folder, 'calls'), '')
  const code = `
    import { ensureTools } from '${module}'
    let log = ''
    const options = { path: ${JSON.stringify(bin)}, log: (line) => { log += line + '\\n' } }
    const missing = await ensureTools(${JSON.stringify(sets)}, options)
    console.log(JSON.stringify({ missing, log }))`
  const { status, stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', code], {
    env: { PATH: bin },
    encoding: 'utf8',
  })
  assert.is(status, 0, stderr)
  const calls = readFileSync(join(folder, 'calls'), 'utf8').trim().split('\n')
  return { ...(JSON.parse(stdout) as Omit<Tried, 'calls'>), calls }
}

const verbs = ({ calls }: Tried) => calls.map((call) => /\b(install|update)\b/.exec(call)?.[0])
const installed = (...programs: string[]) => Object.fromEntries(programs.map((name) => [name, 'exit 0']))
const allOfDocker = installed('skopeo', 'bwrap', 'busybox', 'nft', 'ip', 'slirp4netns', 'nsenter')

if (process.getuid?.() === 0) {
  test('as root, what is missing is installed, with fresh package lists where the old ones do not do', () => {
    const failing = ensureTools(['isolate'], {
      'apt-get': 'case "$*" in *install*) echo E: no >&2; exit 100;; esac',
    })
    assert.equal(verbs(failing), ['install', 'update', 'install'])
    assert.match(failing.log, 'could not be installed: E: no')
    assert.match(failing.missing.join(), /^bwrap, which .*, is missing: install the package bubblewrap/)
    assert.equal(verbs(ensureTools(['isolate'], { 'apt-get': 'exit 0' })), ['install'])
  })

  test('only what is missing is installed, in one go, and the scripts of packages start no service', () => {
    const { skopeo: _, nft: __, ...rest } = allOfDocker
    // What a package's script would do, with the PATH that it would have.
    const script = [
      'for word; do case "$word" in DPkg::Path=*) PATH=$(echo "$word" | cut -d= -f2);; esac; done',
      'case "$*" in *install*) ;; *) exit 0;; esac',
      'invoke-rc.d docker start && deb-systemd-invoke start docker.service || exit 100',
    ]
    const tried = ensureTools(['docker'], { ...rest, 'apt-get': script.join('\n') })
    assert.equal(verbs(tried), ['install'])
    assert.match(tried.calls[0]!, /install --yes --no-install-recommends skopeo nftables$/)
    assert.not.match(tried.log, 'could not')
  })
} else {
  const reason = 'this is not root'
  skip(test, 'as root, what is missing is installed', reason)
  skip(test, 'only what is missing is installed, and no service is started', reason)
  test('without root, what to install is said', () => {
    const { missing, calls } = ensureTools(['isolate'], { 'apt-get': 'exit 0' })
    assert.equal(calls, [''])
    assert.match(missing.join(), 'install the package bubblewrap; this is not root')
  })
}

test('where all is there nothing is done', () => {
  const tried = ensureTools(['docker'], { ...allOfDocker, 'apt-get': 'exit 0' })
  assert.equal(tried, { missing: [], log: '', calls: [''] })
})

test('a runsc without systrap does not do, and a machine that cannot fetch one is told', () => {
  const others = allOfDocker
  const old = ensureTools(['gvisor'], { ...others, runsc: 'echo runsc version 0.0~20221219.0' })
  assert.is(old.missing.length, 1)
  assert.match(
    old.missing[0]!,
    /^runsc, .* is missing: install the package runsc of Debian bookworm-backports/,
  )
  const newer = ensureTools(['gvisor'], { ...others, runsc: 'echo runsc version release-20250407.0' })
  assert.equal(newer.missing, [])
})

test('set-up of an isolation that there is not says so', () => {
  for (const name of ['xen', 'toString']) {
    const { status, stderr } = spawnSync(
      process.execPath,
      [join(import.meta.dirname, '../../scripts/setup.ts'), name],
      { encoding: 'utf8' },
    )
    assert.is(status, 1)
    assert.match(stderr, name)
  }
})

test.run()
