/** The contract of commands, over boxes that are processes of this host. */
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { tarOf } from '../../gateway/archives.ts'
import { archive, failure, output, type RunOptions, run } from './jobs.ts'
import { localRunner, localTest } from './local-engine.ts'

const local = await localRunner()
const { runner } = local
test.after(async () => local[Symbol.asyncDispose]())

const shell = (script: string, options: RunOptions = {}): RunOptions => ({
  runtime: 'oci',
  entrypoint: ['sh', '-c', script],
  ...options,
})

localTest('the input comes on standard input, then its end; nothing is an empty one', async () => {
  assert.equal(await output(runner, 'x', shell('cat', { input: { a: [1, 'é'] } })), { a: [1, 'é'] })
  assert.is(await output(runner, 'x', shell('cat')), null)
  const big = 'x'.repeat(3_000_000)
  assert.is(await output(runner, 'x', shell('wc -c', { input: big })), 3_000_002)
  // One that does not read it ends all the same.
  assert.is(await output(runner, 'x', shell('exec <&-; echo 1', { input: big })), 1)
})

localTest('the result is the file of VULCAN_RESULT, else standard output: JSON, or text', async () => {
  const { outcome, lines } = await run(
    runner,
    'x',
    shell('echo out; echo err >&2; echo "{\\"a\\": 1}" > "$VULCAN_RESULT"'),
  )
  assert.is(outcome.status === 'completed' && outcome.exitCode, 0)
  assert.equal(outcome.status === 'completed' && JSON.parse(outcome.output), { a: 1 })
  assert.equal(lines.map(({ level, stream, text }) => `${level} ${stream} ${text}`).sort(), [
    'error stderr err',
    'info stdout out',
  ])
  assert.equal(await output(runner, 'x', shell('printf "[1, 2]"')), [1, 2])
  assert.is(await output(runner, 'x', shell('printf "plain text"')), 'plain text')
  assert.is(await output(runner, 'x', shell('echo [1]; echo 2')), '[1]\n2\n')
  assert.is(await output(runner, 'x', shell('printf "half \\360"')), 'half \ufffd')
  assert.is(await output(runner, 'x', shell('printf text > $VULCAN_RESULT; echo 5')), 'text')
  assert.is(await output(runner, 'x', shell('true')), null)
})

localTest('the exit code decides, and a signal is told', async () => {
  const failed = await failure(runner, 'x', 'exit_code', shell('echo 1; exit 3'))
  assert.is(failed.exitCode, 3)
  const ended = await failure(runner, 'x', 'exit_code', shell('kill -TERM $$'))
  assert.is(ended.exitCode, 143)
  assert.match(ended.error.message, /signal 15/)
  await failure(runner, 'x', 'invalid_workload', { runtime: 'oci', entrypoint: ['/no/such/command'] })
})

localTest('environment, working directory, files of the source', async () => {
  const source = archive(
    tarOf([
      { path: 'run.sh', text: 'pwd; cat deep/file; echo $MODE' },
      { path: 'deep/file', text: 'hello\n' },
    ]),
  )
  const options = { runtime: 'oci', entrypoint: ['sh', 'run.sh'], env: { MODE: 'test' } } as const
  assert.is(
    await output(runner, source, { ...options, entrypoint: [...options.entrypoint] }),
    '/workspace\nhello\ntest\n',
  )
  assert.is(await output(runner, 'code itself', shell('cat code')), 'code itself')
  assert.is(await output(runner, 'x', shell('pwd', { workingDir: '/usr/share' })), '/usr/share\n')
  await failure(runner, 'x', 'exit_code', shell('echo 1 > /workspace/new'))
  const image = { kind: 'image', reference: 'registry.test/app:1' } as const
  assert.is(await output(runner, image, { runtime: 'oci', entrypoint: ['id', '-u'], user: 'ann' }), 1000)
})

localTest('results that are too large', async () => {
  const limits = { output_mb: 1 }
  const whole = 'head -c 1048576 /dev/zero | tr "\\0" 1'
  await failure(runner, 'x', 'output_too_large', shell(`${whole}; echo 1`, { limits }))
  await failure(runner, 'x', 'output_too_large', shell(`(${whole}; echo 1) > $VULCAN_RESULT`, { limits }))
  // Text that is longer as JSON.
  await failure(runner, 'x', 'output_too_large', shell('head -c 1000000 /dev/zero', { limits }))
  const endless = shell('cat /dev/zero > $VULCAN_RESULT', { limits, timeoutMs: 30_000 })
  const { ms } = await run(runner, 'x', endless)
  assert.ok(ms < 20_000)
  await failure(runner, 'x', 'output_too_large', endless)
  // Lines are no result where there is a file.
  assert.is(await output(runner, 'x', shell(`${whole}; ${whole}; echo 5 > $VULCAN_RESULT`, { limits })), 5)
})

localTest('a result that is no file of ours any more is not read', async () => {
  // The file is a mount of its own: it cannot be replaced by a link.
  const script = 'ln -sf /etc/hostname $VULCAN_RESULT || echo kept'
  assert.is(await output(runner, 'x', shell(script)), 'kept\n')
})

localTest('a stop kills whatever ignores signals, with what it left behind', async () => {
  const stubborn = 'trap "" TERM INT HUP; (trap "" TERM; setsid sleep 600 &) ; while :; do sleep 1; done'
  const { outcome, ms } = await run(runner, 'x', shell(stubborn, { timeoutMs: 600 }))
  assert.is(outcome.status, 'stopped')
  assert.ok(ms < 5_000)
  const box = local.engine.boxes.find(({ spec }) => spec.argv.includes(stubborn))!
  assert.equal(box.pids(), [])
})

localTest('lines come while it runs', async () => {
  const seen: number[] = []
  const start = performance.now()
  await run(
    runner,
    'x',
    shell('echo 1; sleep 1; echo 2', { onLine: () => seen.push(performance.now() - start) }),
  )
  assert.is(seen.length, 2)
  assert.ok(seen[1]! - seen[0]! > 500, `${seen}`)
})

localTest('by HTTP the body is the input, and the result the answer', async () => {
  const { response, body } = await run(
    runner,
    'x',
    shell('cat', { request: { method: 'POST', body: Buffer.from('{"a":1}') } }),
  )
  assert.is(response!.status, 200)
  assert.is(body.toString(), '{"a":1}')
})

test.run()
