/** How boxes come to jobs and go again, over boxes that are processes of this host. */
import { existsSync, globSync, readdirSync } from 'node:fs'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { OwnFiles } from '../../../runners/container/files.ts'
import { tgzOf } from '../../gateway/archives.ts'
import { archive, failure, job, output, run, sleep } from './jobs.ts'
import { LocalBox, localRunner, localTest } from './local-engine.ts'

const counter = 'let n = 0; export default () => ++n'

async function until(what: string, holds: () => boolean): Promise<void> {
  const deadline = performance.now() + 20_000
  while (!holds()) {
    if (performance.now() > deadline) throw new Error(`it never came to be: ${what}`)
    await sleep(20)
  }
}

localTest('the same code finds its box again; other code, environment or limits do not', async () => {
  await using local = await localRunner()
  const { runner } = local
  const start = async (source: string, options = {}) => (await run(runner, source, options)).outcome.start
  assert.is.not(await start(counter), 'warm')
  assert.is(await start(counter), 'warm')
  assert.is(await output(runner, counter), 3)
  assert.is(await output(runner, `${counter} //`), 1)
  assert.is(await output(runner, counter, { env: { A: '1' } }), 1)
  assert.is(await output(runner, counter, { limits: { memory_mb: 99 } }), 1)
  assert.is(await output(runner, counter, { input: 5, limits: { timeout_s: 5 } }), 4)
})

localTest('two at once have a box each', async () => {
  await using local = await localRunner()
  const slow =
    'let n = 0; export default async () => { await new Promise((r) => setTimeout(r, 200)); return ++n }'
  const all = await Promise.all([1, 2, 3].map(() => output(local.runner, slow)))
  assert.equal(all, [1, 1, 1])
})

localTest('idle boxes are frozen after a moment, and thawed for the next', async () => {
  await using local = await localRunner({ freezeMs: 100 })
  const { runner, engine } = local
  await output(runner, counter)
  await until('all are frozen', () => engine.boxes.every((box) => box.frozen || box.pids().length === 0))
  assert.is(await output(runner, counter), 2)
})

localTest('boxes made before anybody needs them hold nothing of others', async () => {
  await using local = await localRunner()
  const { runner, engine } = local
  await until('blanks of both languages', () => engine.boxes.length >= 2 && runner.pids().length >= 4)
  await sleep(300)
  const look = `import fs from 'node:fs'
    export default (input, ctx) => [fs.readdirSync('/workspace'), Object.keys(ctx.env), typeof globalThis.mine]`
  const poison = `globalThis.mine = 1; export default () => 1`
  assert.is((await run(runner, poison, { env: { A: '1' } })).outcome.start, 'pooled')
  await sleep(500)
  const { outcome } = await run(runner, look)
  assert.equal(outcome.status === 'completed' && JSON.parse(outcome.output), [['index.mjs'], [], 'undefined'])
  const files = archive(
    tgzOf({
      'main.py': 'import sub.mod\ndef handler(i, c):\n    return sub.mod.name',
      'sub/mod.py': 'name = "x"',
    }),
  )
  const python = await run(runner, files, { runtime: 'python' })
  assert.is(python.outcome.start, 'pooled')
  assert.is(python.outcome.status === 'completed' && python.outcome.output, '"x"')
  // With another user it cannot be one of them.
  assert.is((await run(runner, poison, { user: '0' })).outcome.start, 'cold')
})

localTest('prewarmed boxes hold the program, and none of it runs before its job', async () => {
  await using local = await localRunner()
  const { runner, engine } = local
  const source = 'const at = Date.now(); export default (asked) => [at >= asked, process.env.A]'
  const program = job(source, { limits: { memory_mb: 77 } })
  runner.prewarm(program, 2)
  const made = () => engine.boxes.filter((box) => box.pids().length > 0).length
  await until('two of it, one of each language', () => made() >= 4)
  await sleep(300)
  const asked = Date.now()
  const options = { input: asked, env: { A: '1' }, limits: { memory_mb: 77 } }
  const { outcome } = await run(runner, source, options)
  assert.is(outcome.start, 'pooled')
  assert.is(outcome.status === 'completed' && outcome.output, '[true,"1"]')
  runner.prewarm(program, 0)
})

localTest('a job that is given up leaves its box, and none of its code has run', async () => {
  await using local = await localRunner()
  const { runner } = local
  const prepared = runner.prepare(job('globalThis.ran = 1; export default () => 1'))
  prepared.release()
  const stopped = runner.prepare(job('export default () => 1'))
  const stop = new AbortController()
  stop.abort('killed')
  const outcome = await stopped.run(stop.signal, {
    onLog: () => assert.unreachable(),
    respond: () => assert.unreachable() as never,
  })
  assert.is(outcome.status, 'stopped')
})

localTest('a job that is stopped before its code has begun says so, one that runs does not', async () => {
  await using local = await localRunner()
  const { runner } = local
  const before = async (source: string, isTime: (line: Promise<void>) => Promise<void>) => {
    const stop = new AbortController()
    const line = Promise.withResolvers<void>()
    void isTime(line.promise).then(() => stop.abort('timeout'))
    const outcome = await runner
      .prepare(job(source, { user: '1234' }))
      .run(stop.signal, { onLog: () => line.resolve(), respond: () => assert.unreachable() as never })
    assert.is(outcome.status, 'stopped')
    return outcome.status === 'stopped' && outcome.before
  }
  assert.type(await before('export default () => 1', () => Promise.resolve()), 'string')
  const endless = 'export default () => { console.log("up"); return new Promise(() => {}) }'
  assert.is(await before(endless, (line) => line), undefined)
})

localTest('a box made for another user is used for its jobs alone', async () => {
  await using local = await localRunner()
  const { runner, engine } = local
  const source = 'export default () => process.getuid()'
  runner.prewarm(job(source, { user: '1234' }), 1)
  const isMade = () => engine.boxes.some(({ spec }) => spec.user.uid === 1234)
  await until('one with that user', isMade)
  await sleep(1_000)
  assert.is((await run(runner, source)).outcome.start, 'pooled')
  const { outcome } = await run(runner, source, { user: '1234' })
  assert.equal([outcome.start, outcome.status === 'completed' && outcome.output], ['pooled', '1234'])
})

localTest('blanks go on being made when others are asked for in the meantime', async () => {
  await using local = await localRunner()
  const { runner } = local
  // Some of them come while a blank is in the making.
  for (let i = 0; i < 20; i++) {
    void run(runner, `export default () => 'early ${i}'`)
    await sleep(37)
  }
  await sleep(3_000)
  for (const n of [1, 2, 3]) {
    assert.is((await run(runner, `export default () => 'late ${n}'`)).outcome.start, 'pooled')
    await sleep(1_500)
  }
})

localTest('where all places are taken a blank pushes out what was idle longest', async () => {
  await using local = await localRunner({ count: 4 })
  const { runner } = local
  for (let i = 0; i < 8; i++) await output(runner, `${counter} // ${i}`)
  await sleep(2_000)
  assert.is((await run(runner, `${counter} // new`)).outcome.start, 'pooled')
  await sleep(1_500)
  assert.is((await run(runner, `${counter} // newer`)).outcome.start, 'pooled')
  assert.is(await output(runner, `${counter} // new`), 2)
})

localTest('more than there are places for is not made again and again', async () => {
  await using local = await localRunner({ count: 3 })
  const { runner, engine } = local
  runner.prewarm(job(counter), 6)
  await sleep(3_000)
  const made = engine.boxes.length
  await sleep(3_000)
  assert.is(engine.boxes.length, made)
})

localTest('idle boxes go by number and by age', async () => {
  await using local = await localRunner({ count: 3, warmMs: 1_500 })
  const { runner } = local
  for (let i = 0; i < 6; i++) await output(runner, `${counter} // ${i}`)
  await until('few are left', () => runner.pids().length <= 2 * 3)
  await sleep(5_000)
  assert.is(await output(runner, `${counter} // 5`), 1)
})

localTest('a box that somebody kills is a lost runner, idle or at work; the next has another', async () => {
  await using local = await localRunner()
  const { runner, engine } = local
  const kill = () => {
    for (const pid of runner.pids()) {
      try {
        process.kill(pid, 'SIGKILL')
      } catch {
        // It is dead already.
      }
    }
  }
  const waiting = 'export default () => { console.log("up"); return new Promise(() => {}) }'
  await failure(runner, waiting, 'runner_lost', { onLine: kill })
  await failure(runner, 'x', 'runner_lost', {
    runtime: 'oci',
    entrypoint: ['sh', '-c', 'echo up; sleep 60'],
    onLine: kill,
  })
  assert.is(await output(runner, counter), 1)
  kill()
  await until(
    'it is noticed',
    () => engine.boxes.every((box) => box.pids().length === 0) || runner.pids().length > 0,
  )
  await sleep(300)
  assert.is(await output(runner, counter), 1)
})

localTest('an error holds nothing of what another call wrote', async () => {
  await using local = await localRunner()
  const source = `import { spawnSync } from 'node:child_process'
    export default (n) => {
      spawnSync('sh', ['-c', 'echo words of ' + n + ' >&2'], { stdio: 'inherit' })
      if (n === 2) process.exit(3)
    }`
  assert.equal((await run(local.runner, source, { input: 1 })).texts, ['words of 1'])
  const { error } = await failure(local.runner, source, 'exit_code', { input: 2 })
  assert.match(error.message, /exit code 3: words of 2$/)
})

localTest('a box that cannot be killed harms nobody else', async () => {
  await using local = await localRunner()
  const { runner, engine } = local
  const rejections: unknown[] = []
  const onRejection = (error: unknown) => rejections.push(error)
  process.on('unhandledRejection', onRejection)
  try {
    const waiting = `import { writeSync } from 'node:fs'
      export default (text) => { console.log('up'); if (text) writeSync(3, text); return new Promise(() => {}) }`
    const spoil = () => {
      for (const box of engine.boxes.filter(({ kill }) => kill === LocalBox.prototype.kill)) {
        const kill = box.kill.bind(box)
        box.kill = () => kill().then(() => Promise.reject(new Error('it does not die')))
        box.remove = kill
      }
    }
    const stop = new AbortController()
    const onLine = () => {
      spoil()
      stop.abort('killed')
    }
    const { outcome } = await run(runner, waiting, { signal: stop.signal, onLine })
    assert.is(outcome.status, 'stopped')
    await failure(runner, waiting, 'runner_lost', { input: 'no frame at all', onLine: spoil })
    await sleep(500)
    assert.equal(rejections, [])
    assert.is(await output(runner, counter), 1)
  } finally {
    process.off('unhandledRejection', onRejection)
  }
})

localTest('a flood of messages that mean nothing does not take the runner’s time', async () => {
  await using local = await localRunner()
  // `stop` of the request’s body, of the run that is the first of its box.
  const source = `import { writeSync } from 'node:fs'
    export default () => {
      const one = Buffer.from([0, 0, 0, 10, 36, 0, 0, 0, 1, 0, 0, 0, 0, 0])
      const many = Buffer.concat(Array(1_000).fill(one))
      for (const until = Date.now() + 3_000; Date.now() < until; ) {
        for (let at = 0; at < many.length; ) {
          try {
            at += writeSync(3, many, at)
          } catch (error) {
            if (error.code !== 'EAGAIN') throw error
          }
        }
      }
    }`
  const before = process.cpuUsage()
  const { outcome } = await run(local.runner, source, { request: {} })
  const { user, system } = process.cpuUsage(before)
  assert.is(outcome.status, 'completed', JSON.stringify(outcome))
  assert.ok(user + system < 1_200_000, `${(user + system) / 1000} ms of 3 s`)
})

localTest('a caller who breaks off is no failure of the platform, and costs no box', async () => {
  await using local = await localRunner()
  const { runner } = local
  const source = 'n = 0\ndef handler(i, c):\n    global n\n    n += 1\n    return n'
  const python = { runtime: 'python' } as const
  assert.is(await output(runner, source, python), 1)
  const body = (async function* () {
    yield Buffer.from('{')
    throw new Error('the caller is gone')
  })()
  const { error } = await failure(runner, source, 'user_error', {
    ...python,
    request: { method: 'POST', body },
  })
  assert.is(error.message, 'the caller is gone')
  assert.is(await output(runner, source, python), 2)
  const nul = await failure(runner, source, 'user_error', { ...python, env: { A: 'a\0b' } })
  assert.match(nul.error.message, /null byte/)
})

localTest('oom is told by the kernel’s counter, whatever the exit code, where the run fails', async () => {
  await using local = await localRunner()
  const { runner, engine } = local
  const mark = () => {
    for (const box of engine.boxes) box.oomKills = 1
  }
  const child =
    'export default async (input) => { console.log("now"); await new Promise((r) => setTimeout(r, 100)); if (input) throw new Error("my child died") }'
  await failure(runner, child, 'oom', { input: true, onLine: mark })
  assert.is((await run(runner, `${child} //`, { input: false, onLine: mark })).outcome.status, 'completed')
  const command = ['sh', '-c', 'echo now; sleep 0.2; exit 1']
  await failure(runner, 'x', 'oom', { runtime: 'oci', entrypoint: command, onLine: mark })
})

localTest('what cannot be run says whose fault it is', async () => {
  await using local = await localRunner()
  const { runner } = local
  const image = (reference: string) => ({ kind: 'image', reference }) as const
  await failure(runner, image('registry.test/missing:1'), 'image_not_found', { runtime: 'oci' })
  await failure(runner, image('registry.test/app:1'), 'invalid_workload', { runtime: 'oci' })
  const nobody = await failure(runner, image('registry.test/app:1'), 'invalid_workload', {
    runtime: 'oci',
    entrypoint: ['id'],
    user: 'bob',
  })
  assert.match(nobody.error.message, /no user bob/)
  const go = await failure(runner, 'package main', 'backend_unavailable', { runtime: 'go' })
  assert.match(go.error.message, /npm run setup/)
  await failure(runner, 'export default () => 1', 'backend_unavailable', { egress: 'all' })
  await failure(runner, archive(Buffer.from('no archive')), 'invalid_workload', { runtime: 'node' })
  const unready = await failure(runner, image('registry.test/app:1'), 'invalid_workload', {
    runtime: 'node',
    entrypoint: '/nowhere.js',
  })
  assert.match(unready.error.message, /no file \/nowhere\.js/)
})

localTest('a handler inside of an image', async () => {
  await using local = await localRunner()
  const image = { kind: 'image', reference: 'registry.test/app:1' } as const
  // Any file of this host’s own that is a module: what the image would have.
  const { outcome } = await run(local.runner, image, {
    runtime: 'python',
    entrypoint: globSync('/usr/lib/python3*/this.py')[0],
  })
  assert.is(outcome.status === 'failed' && outcome.cause, 'invalid_workload')
  assert.match(outcome.status === 'failed' ? outcome.error.message : '', /no handler/)
})

localTest('a runner that ends leaves neither processes nor files', async () => {
  const local = await localRunner()
  await output(local.runner, counter)
  const running = run(local.runner, 'export default () => new Promise(() => {})')
  await until('it runs', () => local.runner.pids().length > 0)
  await local.runner[Symbol.asyncDispose]()
  assert.is.not((await running).outcome.status, 'completed')
  for (const box of local.engine.boxes) assert.equal(box.pids(), [])
  assert.equal(readdirSync(join(local.dir, 'files')), [])
  await local[Symbol.asyncDispose]()
})

localTest('files of dead processes are removed, those of living ones are not', async () => {
  const parent = await mkdtemp(join(tmpdir(), 'vulcan-files-'))
  try {
    await using mine = await OwnFiles.open(parent, 'mine')
    const dead = join(parent, 'dead')
    await mkdir(dead)
    await writeFile(join(dead, 'owner.json'), JSON.stringify({ pid: process.pid, start: '1', boot: 'other' }))
    await mkdir(join(parent, 'just-made'))
    await using other = await OwnFiles.open(parent, 'other')
    assert.is(existsSync(dead), false)
    assert.is(existsSync(join(parent, 'just-made')), true)
    assert.is(existsSync(mine.path), true)
    assert.is(existsSync(other.path), true)
  } finally {
    await rm(parent, { recursive: true, force: true })
  }
})

test.run()
