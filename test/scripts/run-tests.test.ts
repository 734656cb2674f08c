import { spawnSync } from 'node:child_process'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { gone } from '../../scripts/process-identity.ts'
import { runTests } from '../../scripts/testing/run-tests.ts'

const main = join(import.meta.dirname, '../../scripts/test.ts')
const header = "import { suite, test } from 'uvu'\n"

async function project(scope: AsyncDisposableStack, files: Record<string, string>): Promise<string> {
  const root = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  scope.defer(() => rm(root, { recursive: true, force: true }))
  for (const [file, body] of Object.entries(files)) {
    await mkdir(dirname(join(root, file)), { recursive: true })
    await writeFile(join(root, file), header + body)
  }
  return root
}

/** Runs one test file with this body. */
async function verdict(body: string, timeoutMs = 20_000) {
  await using scope = new AsyncDisposableStack()
  const root = await project(scope, { 'a.test.mjs': body })
  const lines: string[] = []
  const counts = await runTests({
    root,
    files: ['a.test.mjs'],
    timeoutMs,
    log: (line) => lines.push(line),
  })
  return { ...counts, text: lines.join('\n') }
}

test('passes, failures and skips with their reasons are counted', async () => {
  const result = await verdict(`
    test('good', () => {})
    test('bad', () => { throw new Error('the reason') })
    test.skip('later'); console.log('SKIP later: needs hardware')
    test.run()`)
  assert.equal([result.passed, result.failed, result.skipped], [1, 1, 1])
  assert.match(result.text, 'bad: the reason')
  assert.match(result.text, /^SKIP {2}a\.test\.mjs {2}later: needs hardware$/m)
})

test('in two lanes two files run at once, and all are counted', async () => {
  await using scope = new AsyncDisposableStack()
  const meets = (own: string, other: string) => `
    import { existsSync, writeFileSync } from 'node:fs'
    test('meets the other', async () => {
      writeFileSync(new URL('${own}.here', import.meta.url), '')
      while (!existsSync(new URL('${other}.here', import.meta.url))) await new Promise((go) => setTimeout(go, 20))
    })
    test.run()`
  const plain = `test('one', () => {}); test.run()`
  const files = {
    'a.test.mjs': meets('a', 'd'),
    'b.test.mjs': plain,
    'c.test.mjs': plain,
    'd.test.mjs': meets('d', 'a'),
  }
  const root = await project(scope, files)
  const counts = await runTests({ root, files: Object.keys(files), lanes: 2, timeoutMs: 20_000, log() {} })
  assert.equal(counts, { passed: 4, failed: 0, skipped: 0 })
})

test('a failed file may be run again alone, counts by that, and is told; more than so many are not', async () => {
  await using scope = new AsyncDisposableStack()
  // Fails unless it was run before.
  const unsteady = `
    import { existsSync, writeFileSync } from 'node:fs'
    const mark = new URL('was-here', import.meta.url)
    test('second time lucky', () => {
      if (existsSync(mark)) return
      writeFileSync(mark, '')
      throw new Error('the first time')
    })
    test.run()`
  const bad = `test('bad', () => { throw new Error('always') }); test.run()`
  const run = async (files: Record<string, string>) => {
    const lines: string[] = []
    const root = await project(scope, files)
    const log = (line: string) => lines.push(line)
    const counts = await runTests({ root, files: Object.keys(files), timeoutMs: 20_000, again: 1, log })
    return { ...counts, text: lines.join('\n') }
  }
  const lucky = await run({ 'a.test.mjs': unsteady })
  assert.equal([lucky.passed, lucky.failed], [1, 0])
  assert.match(
    lucky.text,
    /^UNSTEADY {2}a\.test\.mjs {2}second time lucky: the first time; passed when run again$/m,
  )
  const bound = await run({ 'a.test.mjs': bad })
  assert.equal([bound.passed, bound.failed, bound.text.match(/^again/gm)?.length], [0, 1, 1])
  const many = await run({ 'a.test.mjs': unsteady, 'b.test.mjs': bad })
  assert.equal([many.passed, many.failed, many.text.match(/^again/gm)?.length], [0, 2, undefined])
})

test('a before hook that throws fails the tests it kept from running', async () => {
  const result = await verdict(`
    test.before(() => { throw new Error('no server') })
    test('one', () => {}); test('two', () => {})
    test.run()`)
  assert.equal([result.passed, result.failed], [0, 2])
})

test('an after.each hook that throws does not hide the failed assertion', async () => {
  const result = await verdict(`
    test.after.each(() => { throw new Error('hook') })
    test('one', () => { throw new Error('the assertion') })
    test.run()`)
  assert.equal([result.passed, result.failed], [0, 1])
  assert.match(result.text, 'one: the assertion')
})

test('an open handle is a failure at the timeout, and is killed', async () => {
  const result = await verdict(
    `console.log('pid', process.pid); setInterval(() => {}, 1000); test('one', () => {}); test.run()`,
    1_500,
  )
  assert.is(result.failed, 1)
  assert.match(result.text, 'did not end within 1.5 s')
  assert.ok(await gone(Number(/pid (\d+)/.exec(result.text)![1]), 5_000))
})

test('a file may set its own timeout', async () => {
  const result = await verdict(
    `// timeout: 1\nsetInterval(() => {}, 1000); test('one', () => {}); test.run()`,
  )
  assert.match(result.text, 'did not end within 1 s')
})

test('a process that a file leaves running is killed and is a failure', async () => {
  const result = await verdict(`
    import { spawn } from 'node:child_process'
    test('one', () => {
      const child = spawn('sleep', ['1000'], { detached: true, stdio: 'ignore' })
      child.unref()
      console.log('pid', child.pid)
    })
    test.run()`)
  assert.equal([result.passed, result.failed], [1, 1])
  assert.match(result.text, 'left processes behind: sleep 1000')
  assert.ok(await gone(Number(/pid (\d+)/.exec(result.text)![1]), 5_000))
})

for (const [what, body, problem] of [
  ['no tests', 'test.run()', 'registers no tests'],
  ['no run()', "test('one', () => {})", 'uvu did not finish'],
  ['a syntax error', 'test(', 'exited with code 1'],
  [
    'an exit with code 0 in the middle',
    "test('one', () => process.exit(0)); test.run()",
    'exited with code 1',
  ],
  [
    'a test behind run()',
    "test('one', () => {}); test.run(); test('two', () => {})",
    '2 tests registered, 1 run',
  ],
  [
    'a suite without run()',
    "const a = suite('a'), b = suite('b'); a('one', () => {}); b('two', () => {}); a.run()",
    '2 tests registered, 1 run',
  ],
  [
    'an only',
    "test.only('one', () => {}); test('two', () => {}); test.run()",
    '1 tests skipped without a reason',
  ],
  ['a skip without a reason', "test('one', () => {}); test.skip('two'); test.run()", 'without a reason'],
] as const) {
  test(`a file with ${what} fails`, async () => {
    const result = await verdict(body)
    assert.ok(result.failed > 0)
    assert.match(result.text, problem)
  })
}

test('the command closes with the counts and exits with 1 when something failed', async () => {
  await using scope = new AsyncDisposableStack()
  const root = await project(scope, {
    'test/good.test.ts': "test('one', () => {}); test.run()",
    'test/deep/bad.test.ts': "test('two', () => { throw new Error('x') }); test.run()",
    'test/long.soak.ts': "test('three', () => {}); test.run()",
  })
  const run = (...args: string[]) => {
    const { status, stdout } = spawnSync(process.execPath, [main, ...args, '--in', root], {
      encoding: 'utf8',
    })
    return [status, stdout.trimEnd().split('\n').at(-1)]
  }
  assert.equal(run(), [1, '1 passed, 1 failed, 0 skipped'])
  assert.equal(run('good'), [0, '1 passed, 0 failed, 0 skipped'])
  assert.equal(run('soak'), [0, '1 passed, 0 failed, 0 skipped'])
  assert.equal(run('nothing-like-this'), [1, '0 passed, 1 failed, 0 skipped'])
})

test.run()
