import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { LockedError, lockDirectory } from '../../scripts/lock.ts'
import { startTime } from '../../scripts/process-identity.ts'

async function temporary(scope: AsyncDisposableStack): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  scope.defer(() => rm(folder, { recursive: true, force: true }))
  return folder
}

test('a directory has one holder until it lets go', async () => {
  await using scope = new AsyncDisposableStack()
  const folder = await temporary(scope)
  {
    using _ = lockDirectory(folder)
    assert.throws(
      () => lockDirectory(folder),
      (error: unknown) => error instanceof LockedError && error.pid === process.pid,
    )
  }
  assert.equal(readdirSync(folder), [])
  using _ = lockDirectory(folder)
  assert.ok(existsSync(join(folder, 'lock')))
})

test('the lock of a dead process is taken over', async () => {
  await using scope = new AsyncDisposableStack()
  const folder = await temporary(scope)
  // Beyond the largest pid that Linux gives (2^22).
  writeFileSync(join(folder, 'lock'), JSON.stringify({ pid: 5_000_000, start: '1' }))
  using _ = lockDirectory(folder)
  assert.is(JSON.parse(readFileSync(join(folder, 'lock'), 'utf8')).pid, process.pid)
  assert.equal(readdirSync(folder), ['lock'])
})

test('a live process that got the pid of a dead holder does not keep the lock', async () => {
  await using scope = new AsyncDisposableStack()
  const folder = await temporary(scope)
  const start = startTime(process.ppid)!
  writeFileSync(join(folder, 'lock'), JSON.stringify({ pid: process.ppid, start }))
  assert.throws(() => lockDirectory(folder), 'is in use by process')
  writeFileSync(join(folder, 'lock'), JSON.stringify({ pid: process.ppid, start: `${Number(start) - 1}` }))
  using _ = lockDirectory(folder)
})

test('a lock file that cannot be read is taken over', async () => {
  await using scope = new AsyncDisposableStack()
  const folder = await temporary(scope)
  writeFileSync(join(folder, 'lock'), '')
  using _ = lockDirectory(folder)
})

test.run()
