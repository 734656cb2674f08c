import { spawnSync } from 'node:child_process'
import { chmodSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { skip } from '../harness.ts'

const module = new URL('../../scripts/setup.ts', import.meta.url).href

/** Looks for bubblewrap where PATH has nothing but an `apt-get` that runs `script`. */
function ensureBubblewrap(script: string) {
  const folder = mkdtempSync(join(tmpdir(), 'vulcan-test-'))
  using scope = new DisposableStack()
  scope.defer(() => rmSync(folder, { recursive: true }))
  writeFileSync(
    join(folder, 'apt-get'),
    `#!/bin/sh\ntest "$1" = --version && exit 0\necho "$@" >> ${folder}/calls\n${script}\n`,
  )
  chmodSync(join(folder, 'apt-get'), 0o755)
  writeFileSync(join(folder, 'calls'), '')
  const code = `import { ensureBubblewrap } from '${module}'; await ensureBubblewrap(console.log)`
  const { status, stdout } = spawnSync(process.execPath, ['--input-type=module', '-e', code], {
    env: { PATH: folder },
    encoding: 'utf8',
  })
  const calls = readFileSync(join(folder, 'calls'), 'utf8').trim().split('\n')
  return { status, stdout, verbs: calls.map((call) => /install|update/.exec(call)?.[0]) }
}

if (process.getuid?.() === 0) {
  test('as root, bubblewrap is installed, with fresh package lists where the old ones do not do', () => {
    const { status, stdout, verbs } = ensureBubblewrap('case "$*" in *install*) exit 100;; esac')
    assert.is(status, 0)
    assert.equal(verbs, ['install', 'update', 'install'])
    assert.match(stdout, 'could not be installed')
    assert.equal(ensureBubblewrap('exit 0').verbs, ['install'])
  })
} else {
  skip(test, 'as root, bubblewrap is installed', 'this is not root')
  test('without root, what to install is printed', () => {
    const { status, stdout } = ensureBubblewrap('exit 0')
    assert.is(status, 0)
    assert.match(stdout, 'install the package bubblewrap')
  })
}

test('set-up of an isolation that is not there yet, or of none, says so', () => {
  for (const name of ['gvisor', 'docker', 'microvm', 'toString']) {
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
