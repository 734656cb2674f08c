/** Rehearsals of shims before a snapshot, over boxes that are processes of this host. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Shim } from '../../../runners/container/handler.ts'
import { handlerEnv, shimArgv } from '../../../runners/container/plan.ts'
import { type DoneHeader, inBox, type RunHeader } from '../../../runners/container/protocol.ts'
import { rehearse } from '../../../runners/container/rehearsal.ts'
import { makeShims } from '../../../runners/container/shims/bundle.ts'
import { type LocalBox, LocalEngine, localConfig, localImages, localTest } from './local-engine.ts'

/** A box whose shim has rehearsed, with a workspace that holds `files`. */
async function rehearsed(language: 'node' | 'python', files: Record<string, string>) {
  await using scope = new AsyncDisposableStack()
  const dir = await mkdtemp(join(tmpdir(), 'vulcan-rehearsal-'))
  scope.defer(() => rm(dir, { recursive: true, force: true }))
  const engine = scope.use(new LocalEngine())
  const shims = await makeShims()
  const [name, target] = language === 'node' ? ['shim.mjs', inBox.nodeShim] : ['shim.py', inBox.pythonShim]
  await writeFile(join(dir, name), shims[language])
  for (const [file, text] of Object.entries(files)) await writeFile(join(dir, file), text)
  const image = await localImages(dir).get(
    { kind: 'reference', reference: 'x' },
    new AbortController().signal,
  )
  const box = await engine.create({
    image,
    argv: shimArgv(language, 256),
    env: handlerEnv(localConfig, '/'),
    cwd: '/tmp',
    user: { uid: 65_534, gid: 65_534, groups: [] },
    mounts: [
      { source: join(dir, name), target, readonly: true },
      { source: dir, target: inBox.workspace, readonly: true },
    ],
    limits: { memoryMb: 256, cpu: 1, pids: 64, diskMb: 64, fileBytes: 2 ** 20 },
    network: undefined,
  })
  await rehearse(box, language)
  const held = scope.move()
  return { box, [Symbol.asyncDispose]: () => held.disposeAsync() }
}

/** As the runner does it with a box that was resumed. */
function call(box: LocalBox, entry: string): Promise<unknown> {
  for (const stream of [box.stdout, box.stderr]) stream.removeAllListeners('data')
  const shim = new Shim(
    Object.assign(Object.create(box), { resumed: true }) as LocalBox,
    () => void box.kill(),
  )
  const header: Omit<RunHeader, 'mark'> = {
    ...{ root: inBox.workspace, entry, output_bytes: 2 ** 20, inline_bytes: 0 },
  }
  return new Promise((resolve, reject) =>
    shim.start(
      {
        onLine() {},
        onMessage() {},
        onDone: ({ status, message }: DoneHeader, output) =>
          status === 'completed' ? resolve(JSON.parse(output!)) : reject(new Error(message ?? status)),
        onGone: () => reject(new Error('it died')),
      },
      header,
      JSON.stringify({ id: 'w', attempt: 1, traceparent: null, env: {} }),
      '1',
    ),
  )
}

localTest('node: after a rehearsal nothing of it is to be seen, and random numbers are others', async () => {
  const text = `const fs = require('node:fs')
    const values = Array.from({ length: 1000 }, Math.random)
    module.exports = () => ({
      cwd: process.cwd(), tmp: fs.readdirSync('/tmp'), cache: Object.keys(require.cache), name: Math.random.name,
      sound: values.every((v) => v >= 0 && v < 1), mean: values.reduce((a, b) => a + b) / 1000, first: values[0],
    })`
  const found: Record<string, unknown>[] = []
  for (let n = 0; n < 2; n++) {
    await using it = await rehearsed('node', { 'index.js': text })
    found.push((await call(it.box, 'index.js')) as Record<string, unknown>)
  }
  const [one, two] = found as [Record<string, unknown>, Record<string, unknown>]
  assert.equal([one.cwd, one.tmp, one.cache], ['/workspace', [], ['/workspace/index.js']])
  assert.ok(one.sound)
  assert.ok(Math.abs((one.mean as number) - 0.5) < 0.08, String(one.mean))
  assert.is(one.name, 'random')
  assert.is.not(one.first, two.first)
})

localTest('python: after a rehearsal nothing of it is to be seen', async () => {
  const text = `import os, random, sys
def handler(input, ctx):
    return [os.getcwd(), os.listdir('/tmp'), [p for p in sys.path if 'rehears' in p], 'part' in sys.modules, sys.modules['main'].__file__]
`
  await using it = await rehearsed('python', { 'main.py': text })
  assert.equal(await call(it.box, 'main.py'), ['/workspace', [], [], false, '/workspace/main.py'])
})

test.run()
