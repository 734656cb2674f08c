import { spawnSync } from 'node:child_process'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { suite } from 'uvu'
import * as assert from 'uvu/assert'
import { buildAgent } from '../../rootfs/agent.ts'
import { cacheDirectory } from '../../scripts/cache-directory.ts'
import { skip } from '../harness.ts'
import { lacking } from './guest.ts'

const missing = await lacking()
const build = suite('guest agent: build')
const name = 'the agent is one static program, built once, and runs as the first process only'
if (missing !== undefined) skip(build, name, missing)
else
  build(name, async () => {
    const cacheDir = cacheDirectory(process.env)
    const first = await buildAgent({ cacheDir, log: () => {} })
    const said: string[] = []
    assert.equal(await buildAgent({ cacheDir, log: (line) => said.push(line) }), first)
    assert.equal(said, [])
    assert.not.ok((await readFile(first.path)).subarray(0, 4_096).includes('/ld-'))
    const { status, stderr } = spawnSync(first.path, { encoding: 'utf8' })
    assert.is(status, 64)
    assert.match(stderr, /first process only/)
  })

build('without a compiler the error says what to install', async () => {
  const path = process.env.PATH
  const cacheDir = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  try {
    process.env.PATH = cacheDir
    await buildAgent({ cacheDir, log: () => {} }).then(
      () => assert.unreachable(),
      (error) => assert.match(error.message, /install the packages gcc and libc6-dev/),
    )
  } finally {
    process.env.PATH = path
    await rm(cacheDir, { recursive: true, force: true })
  }
})

build.run()
