// timeout: 120
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { inside, runStep, type Step } from '../../gateway/build/sandbox.ts'
import { until } from '../shared/support.ts'

const idle: Step = {
  args: [],
  binds: [],
  writable: [],
  scratch: [],
  env: {},
  network: false,
  cwd: '/',
  stdin: '',
  timeoutMs: 20_000,
}

/** Runs JavaScript where a build’s bundler runs, with walls left out where a control asks for it. */
const run = (code: string, over: Partial<Step> = {}) =>
  runStep({ ...idle, args: ['--input-type=module', '--eval', code], ...over }, {})

async function folder(): Promise<AsyncDisposable & { path: string }> {
  const path = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) }
}

test('a step sees no file of the host but those it was given, and those it cannot write', async () => {
  await using dir = await folder()
  const secret = join(dir.path, 'secret.txt')
  await writeFile(secret, 'host-only-text')
  const read = `import { readFileSync } from 'node:fs'
    for (const path of ['/etc/passwd', '${secret}', '/proc/self/environ', '/proc/1/root${secret}', '${process.cwd()}/package.json'])
      try { console.log(path, readFileSync(path, 'utf8')) } catch (error) { console.log(path, error.code) }`
  const { stdout, code } = await run(read)
  assert.is(code, 0)
  for (const line of stdout.trim().split('\n')) assert.match(line, / ENOENT$/)
  const given = await run(read, { binds: [[secret, secret]] })
  assert.match(given.stdout, 'host-only-text')

  const write = `import { writeFileSync } from 'node:fs'; writeFileSync('${dir.path}/new.txt', 'x')`
  assert.is.not((await run(write, { binds: [[dir.path, dir.path]] })).code, 0)
  assert.not(existsSync(join(dir.path, 'new.txt')))
  assert.is((await run(write, { writable: [[dir.path, dir.path]] })).code, 0)
  assert.ok(existsSync(join(dir.path, 'new.txt')))
  for (const path of ['/x', `${inside}/x`, '/dev/x', '/usr/x'])
    assert.is.not(
      (await run(`import { writeFileSync } from 'node:fs'; writeFileSync('${path}', 'x')`)).code,
      0,
      path,
    )
})

test('a step has no environment but what it was given, and no other process in sight', async () => {
  process.env.VULCAN_TEST_TOKEN = 'host-only-text'
  const { stdout } = await run('console.log(JSON.stringify([process.env, process.pid, process.getuid()]))', {
    env: { A: '1' },
  })
  delete process.env.VULCAN_TEST_TOKEN
  const [env, pid, uid] = JSON.parse(stdout)
  assert.is(env.A, '1')
  assert.not.match(JSON.stringify(env), 'host-only-text')
  assert.not('PATH' in env)
  assert.ok(pid < 10)
  assert.is(uid, 65534)
})

test('a step without network reaches nobody; with it, it does', async () => {
  const server = createServer((_, response) => response.end('reached'))
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  const code = `console.log(await fetch('http://127.0.0.1:${port}').then((a) => a.text(), (e) => e.cause.code))`
  try {
    assert.match((await run(code)).stdout, /^E[A-Z]+\s$/)
    assert.is((await run(code, { network: true })).stdout, 'reached\n')
  } finally {
    server.close()
  }
})

test('a step that takes too long, or too much memory or disk, is ended', async () => {
  const endless = await run('for (;;) {}', { timeoutMs: 1_000 })
  assert.ok(endless.timedOut)
  const hungry = await run(
    'const all = []; for (let i = 0; i < 40; i++) all.push(Buffer.alloc(100 * 1_048_576, 1)); console.log("had 4 GB")',
  )
  assert.is.not(hungry.code, 0)
  assert.not.match(hungry.stdout, 'had 4 GB')
  await using dir = await folder()
  const large = `import { openSync, writeSync } from 'node:fs'
    process.on('SIGXFSZ', () => {})
    const file = openSync('${dir.path}/large', 'w'); const part = Buffer.alloc(1_048_576)
    writeSync(file, part, 0, part.length, 600 * 1_048_576); console.log('wrote')`
  const wrote = await run(large, { writable: [[dir.path, dir.path]] })
  assert.not.match(wrote.stdout, 'wrote')
})

test('a step can be given up at any moment of its start', async () => {
  const ends = await Promise.all(
    Array.from({ length: 40 }, async (_, i) => {
      await delay(i * 25)
      const stop = AbortSignal.timeout(i)
      return await runStep({ ...idle, args: ['--eval', 'setInterval(() => {}, 1000)'] }, {}, stop).then(
        () => 'ended',
        (error) => error.name,
      )
    }),
  )
  assert.equal([...new Set(ends)], ['TimeoutError'])
})

test('what a step has started is gone with it', async () => {
  const marker = `marker-${process.pid}-${Date.now()}`
  const alive = () =>
    readdirSync('/proc').filter((pid) => {
      try {
        return /^\d+$/.test(pid) && readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes(marker)
      } catch {
        return false
      }
    }).length
  const code = `import { spawn } from 'node:child_process'
    spawn(process.execPath, ['--eval', 'setInterval(() => {}, 1000)', '${marker}'], { detached: true, stdio: 'ignore' }).unref()
    setInterval(() => {}, 1000)`
  const stop = new AbortController()
  const step = { ...idle, args: ['--input-type=module', '--eval', code, marker] }
  const running = runStep(step, {}, stop.signal).then(
    () => 'ended',
    (error) => error.message,
  )
  await until('its processes', () => alive() >= 3 || undefined)
  stop.abort(new Error('given up'))
  assert.is(await running, 'given up')
  await until('none of them', () => alive() === 0 || undefined)
})

test.run()
