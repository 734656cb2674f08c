import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createClient } from '@libsql/client'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { isHopeless, openDatabase } from '../../dispatcher/database.ts'

async function openNew() {
  const dir = await mkdtemp(join(tmpdir(), 'vulcan-writer-'))
  const url = `file:${join(dir, 'x.db')}`
  const database = await openDatabase({ url })
  const other = createClient({ url, timeout: 10 })
  return {
    database,
    other,
    seqs: async () => (await other.execute('SELECT seq FROM told ORDER BY seq')).rows.map(({ seq }) => seq),
    async [Symbol.asyncDispose]() {
      database.close()
      other.close()
      await rm(dir, { recursive: true })
    },
  }
}

const add = (seq: number) => ({ sql: 'INSERT INTO told (stream, seq) VALUES (?, ?)', args: [`s${seq}`, seq] })

test('a write is one transaction, and says what its statements returned', async () => {
  await using opened = await openNew()
  const { database, seqs } = opened
  const count = { sql: 'SELECT count(*), ?1 FROM told', args: ['x'] }
  assert.equal(await database.write([count, add(1), add(2), count]), [[[0, 'x']], [], [], [[2, 'x']]])
  assert.equal(await seqs(), [1, 2])
})

test('a write that fails leaves nothing behind: no row, no lock, and the next one goes through', async () => {
  await using opened = await openNew()
  const { database, other, seqs } = opened
  for (let round = 0; round < 3; round++) {
    const failure = await database.write([add(10 + round), add(7), add(7)]).catch((error) => error)
    assert.ok(isHopeless(failure), String(failure))
    await other.execute(add(20 + round))
    await database.write([add(30 + round)])
  }
  assert.equal(await seqs(), [20, 21, 22, 30, 31, 32])
})

test('a write while somebody else writes fails so that it can be tried again', async () => {
  await using opened = await openNew()
  const { database, other, seqs } = opened
  await database.write([add(1)])
  const theirs = await other.transaction('write')
  await theirs.execute(add(2))
  const failure = await database.write([add(3)]).catch((error) => error)
  assert.is(failure.code, 'SQLITE_BUSY')
  assert.not(isHopeless(failure))
  await database.failed(failure)
  await theirs.commit()
  await database.write([add(3)])
  assert.equal(await seqs(), [1, 2, 3])
})

test.run()
