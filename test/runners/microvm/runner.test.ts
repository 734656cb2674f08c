// timeout: 600
/** The isolation microvm behind the Runner interface, over real machines. */
import { mkdtemp, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { createMicrovmRunner, probeMicrovm } from '../../../runners/microvm/index.ts'
import type { Runner } from '../../../runners/runner.ts'
import { cacheDirectory } from '../../../scripts/cache-directory.ts'
import { tgzOf } from '../../gateway/archives.ts'
import { skip } from '../../harness.ts'
import { archive, output, run } from '../container/jobs.ts'

const dataDir = await mkdtemp(join(tmpdir(), 'vulcan-test-microvm-'))
const options = {
  ...{ slots: 4, dataDir, cacheDir: cacheDirectory(process.env), egress: { allowPrivate: [], platform: [] } },
  ...{ insecureRegistries: [], imageDirectories: [], diskBudgetMb: 20_480, snapshots: true },
  // Nothing stands ready but what a test has asked for.
  pool: { count: 4, memoryMb: 1_024, ageMs: 600_000 },
}
const probe = await probeMicrovm(options)
const runner: Runner | undefined = probe.available ? await createMicrovmRunner(options) : undefined
// Templates are made where there are none yet: on a busy host that takes longer than a run may.
if (runner !== undefined)
  for (const runtime of ['node', 'python'] as const) await run(runner, '', { runtime, timeoutMs: 200_000 })
test.after(async () => {
  await runner?.[Symbol.asyncDispose]()
  await rm(dataDir, { recursive: true, force: true })
})

const vmTest = (name: string, body: (runner: Runner) => Promise<void>) => {
  if (runner !== undefined) test(name, () => body(runner))
  else skip(test, name, probe.available ? '' : `${probe.reason}; ${probe.fix}`)
}

const shell = (files: Record<string, string>) => archive(tgzOf(files))
const sh = { runtime: 'oci', entrypoint: ['sh', 'main.sh'] } as { runtime: 'oci'; entrypoint: string[] }

const drawn = `import { randomBytes, randomInt, randomUUID } from 'node:crypto'
import { readFileSync } from 'node:fs'
export default () => ({
  random: Math.random(), bytes: randomBytes(8).toString('hex'), uuid: randomUUID(), int: randomInt(2 ** 47),
  web: crypto.getRandomValues(new Uint32Array(2)).join(), boot: readFileSync('/proc/sys/kernel/random/boot_id', 'utf8'),
  now: Date.now(),
})`

vmTest(
  'a hundred restores have a hundred random numbers of each kind, boot ids, and the right time',
  async (it) => {
    const all: Record<string, unknown>[] = []
    let restored = 0
    const draw = async (n: number) => {
      const before = Date.now()
      const { outcome } = await run(it, `${drawn} // ${n}`)
      assert.is(outcome.status, 'completed', JSON.stringify(outcome))
      const found = JSON.parse(outcome.status === 'completed' ? outcome.output : '')
      assert.ok(
        found.now >= before - 5_000 && found.now <= Date.now() + 5_000,
        `${found.now - before} ms off`,
      )
      all.push(found)
      if (outcome.start !== 'warm') restored++
    }
    for (let n = 0; n < 100; n += 2) await Promise.all([draw(n), draw(n + 1)])
    assert.is(restored, 100)
    for (const kind of ['random', 'bytes', 'uuid', 'int', 'web', 'boot'])
      assert.is(new Set(all.map((found) => found[kind])).size, 100, kind)
  },
)

vmTest('python draws other numbers after each restore', async (it) => {
  const all: string[] = []
  for (let n = 0; n < 8; n++)
    all.push(
      JSON.stringify(
        await output(
          it,
          `import random, secrets, uuid # ${n}\ndef handler(i, c):\n    return [random.random(), secrets.token_hex(4), str(uuid.uuid4())]`,
          { runtime: 'python' },
        ),
      ),
    )
  const columns = all.map((text) => JSON.parse(text) as unknown[])
  for (const i of [0, 1, 2]) assert.is(new Set(columns.map((row) => row[i])).size, 8)
})

vmTest('a receipt says what ran it and how that came to be; a warm one keeps the right time', async (it) => {
  const source = 'let n = 0; export default () => [++n, Date.now()]'
  const first = await run(it, source)
  assert.match(first.outcome.machine?.vmm ?? '', /^(QEMU|Firecracker) \d/)
  assert.ok(['boot', 'restore', 'pool'].includes(first.outcome.machine?.start ?? ''))
  // Long enough for it to be paused.
  await sleep(3_000)
  const { outcome } = await run(it, source)
  assert.is(outcome.start, 'warm')
  assert.is(outcome.machine?.start, 'pool')
  const [n, at] = JSON.parse(outcome.status === 'completed' ? outcome.output : '[]') as number[]
  assert.is(n, 2)
  assert.ok(Math.abs(at! - Date.now()) < 2_500, `${at! - Date.now()} ms off`)
})

vmTest('archives come small and large, with links and programs in them', async (it) => {
  const files: Record<string, string> = { 'main.sh': './sub/run; ls f | wc -l; cat f/7; wc -c < big' }
  for (let i = 0; i < 150; i++) files[`f/${i}`] = `file ${i}\n`
  files.big = 'b'.repeat(3_000_000)
  files['sub/run'] = '#!/bin/sh\necho ran in $PWD\n'
  const script = { ...sh, entrypoint: ['sh', '-c', 'sh ./sub/run; ls f | wc -l; cat f/7; wc -c < big'] }
  assert.is(await output(it, shell(files), script), 'ran in /workspace\n150\nfile 7\n3000000\n')
  const small = await output(it, shell({ 'main.sh': 'cat data/x; pwd', 'data/x': 'here ' }), sh)
  assert.is(small, 'here /workspace\n')
})

vmTest('what a handler brings with it is found, however large', async (it) => {
  const files: Record<string, string> = {
    'package.json': '{"type":"module","main":"src/index.js"}',
    'src/index.js':
      "import x from 'dep'; import { readFileSync } from 'node:fs'\nexport default () => [x, readFileSync('big.txt').length]",
    'node_modules/dep/package.json': '{"name":"dep","main":"index.cjs"}',
    'node_modules/dep/index.cjs': 'module.exports = 42',
    'big.txt': 'x'.repeat(2_000_000),
  }
  assert.equal(await output(it, archive(tgzOf(files))), [42, 2_000_000])
  const { 'big.txt': _, ...few } = files
  few['big.txt'] = 'few'
  assert.equal(await output(it, archive(tgzOf(few))), [42, 3])
})

vmTest('input, result file, exit code and streams of a command', async (it) => {
  const script =
    'read line; echo "out $line"; echo err >&2; echo "{\\"got\\":\\"$line\\"}" > "$VULCAN_RESULT"'
  const { outcome, lines } = await run(it, shell({ 'main.sh': script }), { ...sh, input: 7 })
  assert.equal(outcome.status === 'completed' && JSON.parse(outcome.output), { got: '7' })
  assert.equal(lines.map(({ stream, text }) => `${stream} ${text}`).sort(), ['stderr err', 'stdout out 7'])
  const failed = await run(it, shell({ 'main.sh': 'exit 9' }), sh)
  assert.is(failed.outcome.status === 'failed' && failed.outcome.exitCode, 9)
  const missing = await run(it, shell({ 'main.sh': '' }), { ...sh, entrypoint: ['/no/such/command'] })
  assert.is(missing.outcome.status === 'failed' && missing.outcome.cause, 'invalid_workload')
})

vmTest(
  'a machine that dies under its code is lost, with what is known of it; the next run works',
  async (it) => {
    const before = new Set(it.pids())
    const { outcome } = await run(it, shell({ 'main.sh': 'echo begun; sleep 60' }), {
      ...sh,
      onLine: () => {
        for (const pid of it.pids()) if (!before.has(pid)) process.kill(pid, 'SIGKILL')
      },
    })
    assert.is(outcome.status, 'failed')
    if (outcome.status !== 'failed') return
    assert.is(outcome.cause, 'runner_lost')
    assert.match(outcome.error.message, 'SIGKILL')
    assert.is(await output(it, 'export default () => 1'), 1)
  },
)

vmTest('a machine that stands still is given up', async (it) => {
  const before = new Set(it.pids())
  const { outcome } = await run(it, shell({ 'main.sh': 'echo begun; sleep 60' }), {
    ...sh,
    onLine: () => {
      for (const pid of it.pids()) if (!before.has(pid)) process.kill(pid, 'SIGSTOP')
    },
  })
  assert.is(outcome.status === 'failed' && outcome.cause, 'runner_lost')
  assert.match(outcome.status === 'failed' ? outcome.error.message : '', 'has not answered')
})

vmTest('a Go program is built in a machine and runs in another', async (it) => {
  if (probe.available && !probe.capabilities.runtimes.includes('go')) return
  const source = 'package main\nimport "os"\nfunc main() { os.Stdout.WriteString("from go") }\n'
  const ran = await run(it, source, { runtime: 'go', timeoutMs: 280_000 })
  assert.is(
    ran.outcome.status === 'completed' && ran.outcome.output,
    '"from go"',
    JSON.stringify(ran.outcome),
  )
})

vmTest('nothing is left of it when it is closed', async (it) => {
  await it[Symbol.asyncDispose]()
  assert.equal(it.pids(), [])
  // What was found out about this host’s KVM is kept.
  const left = await readdir(join(dataDir, 'microvm', 'qemu')).catch(() => [])
  assert.equal(
    left.filter((name) => name !== 'kvm.json'),
    [],
  )
})

test.run()
