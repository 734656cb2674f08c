import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { chmod, copyFile, mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { test } from 'uvu'
import * as assert from 'uvu/assert'

const original = join(import.meta.dirname, '../../scripts/bootstrap.mjs')

/** An `npm` that installs this Node and nothing else, slowly, and keeps count; it fails where `broken` exists. */
const npm = `#!/bin/sh
echo "$@" >> npm.log
test -e broken && exit 1
sleep 0.3
mkdir -p node_modules/.bin && ln -sf '${process.execPath}' node_modules/.bin/node`

async function project(scope: AsyncDisposableStack) {
  const root = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  scope.defer(() => rm(root, { recursive: true, force: true }))
  await mkdir(join(root, 'scripts'))
  await mkdir(join(root, 'bin'))
  await copyFile(original, join(root, 'scripts/bootstrap.mjs'))
  await writeFile(join(root, 'bin/npm'), npm)
  await chmod(join(root, 'bin/npm'), 0o755)
  await writeFile(join(root, 'package-lock.json'), '{}')
  const start = (...args: string[]) => {
    const child = spawn(process.execPath, ['scripts/bootstrap.mjs', ...args], {
      cwd: root,
      env: { ...process.env, PATH: `${join(root, 'bin')}:${process.env.PATH}` },
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    const ended = Promise.all([once(child, 'close'), text(child.stdout), text(child.stderr)]).then(
      ([[code], stdout, stderr]) => ({ code, stdout, stderr }),
    )
    return { child, ended }
  }
  const installs = () => readFileSync(join(root, 'npm.log'), 'utf8').trim().split('\n').length
  return { root, start, installs }
}

test('dependencies are installed once, and again when the lock file changes', async () => {
  await using scope = new AsyncDisposableStack()
  const { root, start, installs } = await project(scope)
  for (let run = 0; run < 2; run++) assert.is((await start().ended).code, 0)
  assert.is(installs(), 1)
  await writeFile(join(root, 'package-lock.json'), '{"changed": true}')
  assert.is((await start().ended).code, 0)
  assert.is(installs(), 2)
})

test('the script gets its arguments and gives its output and exit code', async () => {
  await using scope = new AsyncDisposableStack()
  const { root, start } = await project(scope)
  await writeFile(
    join(root, 'script.ts'),
    'console.log(process.argv.slice(2)); process.exitCode = 3 as number',
  )
  const { code, stdout } = await start('script.ts', 'a b', '--c').ended
  assert.is(code, 3)
  assert.match(stdout, "[ 'a b', '--c' ]")
})

test('two at once install once', async () => {
  await using scope = new AsyncDisposableStack()
  const { start, installs } = await project(scope)
  const results = await Promise.all([start(), start()].map(({ ended }) => ended))
  for (const { code } of results) assert.is(code, 0)
  assert.is(installs(), 1)
})

test('the lock of an installer that died does not keep others waiting', async () => {
  await using scope = new AsyncDisposableStack()
  const { root, start, installs } = await project(scope)
  // Beyond the largest pid that Linux gives (2^22).
  await symlink('5000000', join(root, '.npm-ci.lock'))
  assert.is((await start().ended).code, 0)
  assert.is(installs(), 1)
})

test('a failed install says so, runs nothing, and is tried again', async () => {
  await using scope = new AsyncDisposableStack()
  const { root, start } = await project(scope)
  await writeFile(join(root, 'script.ts'), 'console.log("ran")')
  await writeFile(join(root, 'broken'), '')
  const failed = await start('script.ts').ended
  assert.is(failed.code, 1)
  assert.match(failed.stderr, 'npm ci failed with exit code 1')
  assert.not.match(failed.stdout, 'ran')
  await rm(join(root, 'broken'))
  assert.match((await start('script.ts').ended).stdout, 'ran')
})

test('signals reach the script', async () => {
  await using scope = new AsyncDisposableStack()
  const { root, start } = await project(scope)
  await writeFile(
    join(root, 'script.ts'),
    'process.on("SIGTERM", () => process.exit(7)); setInterval(() => {}, 1000); console.log("up")',
  )
  const { child, ended } = start('script.ts')
  await once(child.stdout, 'data')
  child.kill('SIGTERM')
  assert.is((await ended).code, 7)
})

test.run()
