// timeout: 300
/** What the runner is made of, together, on gVisor: the shims, pooled boxes, frozen ones, Go, images with handlers. */
import { createHash } from 'node:crypto'
import { existsSync, readdirSync } from 'node:fs'
import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { gzipSync } from 'node:zlib'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import {
  type ContainerOptions,
  createContainerRunner,
  probeContainer,
} from '../../../runners/container/index.ts'
import { findRuntime } from '../../../runners/container/runtimes/index.ts'
import type { Runner } from '../../../runners/runner.ts'
import { cacheDirectory } from '../../../scripts/cache-directory.ts'
import { type TarEntry, tarOf, tgzOf } from '../../gateway/archives.ts'
import { skip } from '../../harness.ts'
import { archive, failure, job, output, run, sleep } from './jobs.ts'

const dir = await mkdtemp(join(tmpdir(), 'vulcan-handlers-'))
const options: ContainerOptions = {
  slots: 4,
  dataDir: join(dir, 'data'),
  cacheDir: cacheDirectory(process.env),
  egress: {},
  insecureRegistries: [],
  imageDirectories: [dir],
  diskBudgetMb: 20_480,
}
const probe = await probeContainer('gvisor', options)
const missing = probe.available
  ? ['node', 'python', 'go'].find((name) => !probe.capabilities.runtimes.includes(name as 'node'))
  : undefined
const obstacle = !probe.available
  ? `gvisor is not available here: ${probe.reason}; ${probe.fix}`
  : missing === undefined
    ? undefined
    : `the runtime image for ${missing} was not built: npm run setup -- gvisor`
let runner: Runner
const python = { runtime: 'python' } as const

const onGvisor = (name: string, body: () => Promise<void>) =>
  obstacle === undefined ? test(name, body) : skip(test, name, obstacle)

test.before(async () => {
  if (obstacle === undefined) runner = await createContainerRunner('gvisor', options)
})
test.after(async () => {
  if (obstacle === undefined) await runner[Symbol.asyncDispose]()
  await rm(dir, { recursive: true, force: true })
})

/** Waits until a job finds a box that was made before it came. */
async function pooled(source: (n: number) => string, options: Parameters<typeof run>[2] = {}) {
  for (let n = 0; n < 40; n++) {
    const ran = await run(runner, source(n), options)
    if (ran.outcome.start === 'pooled') return ran
    await sleep(500)
  }
  throw new Error('no box was ever made ahead')
}

onGvisor('a box made ahead takes code and runs it, frozen or not', async () => {
  const { outcome, texts } = await pooled(
    (n) => `console.log('up'); export default (i) => [i, ${n} >= 0, process.getuid() > 0]`,
    {
      input: 'x',
    },
  )
  assert.equal(outcome.status === 'completed' && JSON.parse(outcome.output), ['x', true, true])
  assert.equal(texts, ['up'])
  assert.ok(outcome.usage.cpu_ms! >= 0)
  assert.match(outcome.imageDigest!, /^sha256:/)
})

onGvisor('a box made ahead takes an archive', async () => {
  let start = ''
  for (let n = 0; n < 40 && start !== 'pooled'; n++) {
    const files = {
      'main.py': 'import deep.er\ndef handler(i, c):\n    return deep.er.name',
      'deep/er.py': `name = ${n}`,
    }
    const { outcome } = await run(runner, archive(tgzOf(files)), python)
    assert.is(outcome.status === 'completed' && outcome.output, String(n))
    start = outcome.start
    await sleep(500)
  }
  assert.is(start, 'pooled')
})

onGvisor('new code finds a blank however many came before it', async () => {
  const starts: string[] = []
  for (let n = 0; n < 10; n++) {
    // The first ones come while blanks are in the making.
    const { outcome } = await run(runner, `export default () => 'new ${n}'`)
    starts.push(outcome.start)
    await sleep(n < 4 ? 130 : 2_000)
  }
  assert.equal(starts.slice(6), ['pooled', 'pooled', 'pooled', 'pooled'])
})

onGvisor('a box that was kept ready for code with a network has that network', async () => {
  if (!runner.capabilities.egress.includes('all')) return
  const source = 'import os from "node:os"; export default () => Object.keys(os.networkInterfaces())'
  const egress = 'all' as const
  runner.prewarm(job(source, { egress }), 1)
  await sleep(5_000)
  const open = await run(runner, source, { egress, env: { A: '1' } })
  assert.is(open.outcome.start, 'pooled')
  assert.is(open.outcome.status === 'completed' && JSON.parse(open.outcome.output).length, 2)
  runner.prewarm(job(source, { egress }), 0)
  const closed = await run(runner, source)
  assert.is(closed.outcome.status === 'completed' && closed.outcome.output, '["lo"]')
})

onGvisor('a warm box is frozen, and thaws with its state', async () => {
  const counter = 'let n = 0; setInterval(() => n += 1000, 50); export default () => ++n % 1000'
  assert.is(await output(runner, counter), 1)
  await sleep(1_500)
  const frozen = await run(runner, counter)
  assert.is(frozen.outcome.start, 'warm')
  assert.is(frozen.outcome.status === 'completed' && frozen.outcome.output, '2')
  const states = `let n = 0; setInterval(() => n++, 10); export default () => n`
  await run(runner, states)
  await sleep(3_000)
  // Awake it would have counted to 300.
  const counted = (await output(runner, states)) as number
  assert.ok(counted < 150, `${counted} ticks`)
})

onGvisor('Go source is built once and run as a command', async () => {
  const source = `package main
import ("encoding/json"; "fmt"; "os")
func main() {
	var in struct{ X int }
	json.NewDecoder(os.Stdin).Decode(&in)
	fmt.Fprintln(os.Stderr, "doubling")
	json.NewEncoder(os.Stdout).Encode(in.X * 2)
}`
  const first = await run(runner, source, { runtime: 'go', input: { X: 21 }, timeoutMs: 200_000 })
  assert.is(
    first.outcome.status === 'completed' && first.outcome.output.trim(),
    '42',
    JSON.stringify(first.outcome),
  )
  assert.ok(first.texts.includes('doubling'))
  const module = archive(
    tgzOf({
      'go.mod': 'module example.test/x\n\ngo 1.21\n',
      'main.go': 'package main\nimport "example.test/x/sub"\nfunc main() { println(sub.Name); print(1) }',
      'sub/sub.go': 'package sub\nconst Name = "sub"',
    }),
  )
  assert.equal((await run(runner, module, { runtime: 'go', timeoutMs: 200_000 })).texts, ['sub', '1'])
  const bad = await failure(runner, 'package main\nfunc main() { nope() }', 'invalid_workload', {
    runtime: 'go',
    timeoutMs: 200_000,
  })
  assert.match(bad.error.message, /main\.go:2:\d+: undefined: nope/)
})

/** An image of a runtime’s with more files in it, as an OCI layout below `dir`. */
async function imageWith(name: 'python' | 'base', entries: TarEntry[], more: object): Promise<string> {
  const layout = await mkdtemp(join(dir, 'image-'))
  await cp((await findRuntime(name, options.cacheDir))!.layout, layout, { recursive: true })
  const blob = (digest: string) => join(layout, 'blobs/sha256', digest.slice('sha256:'.length))
  const read = async (path: string) => JSON.parse(await readFile(path, 'utf8'))
  const put = async (bytes: Buffer) => {
    const digest = `sha256:${createHash('sha256').update(bytes).digest('hex')}`
    await writeFile(blob(digest), bytes)
    return { digest, size: bytes.length }
  }
  const index = await read(join(layout, 'index.json'))
  const manifest = await read(blob(index.manifests[0].digest))
  const config = await read(blob(manifest.config.digest))
  const tar = tarOf(entries)
  config.rootfs.diff_ids.push(`sha256:${createHash('sha256').update(tar).digest('hex')}`)
  Object.assign(config.config, more)
  manifest.layers.push({
    mediaType: 'application/vnd.oci.image.layer.v1.tar+gzip',
    ...(await put(gzipSync(tar))),
  })
  Object.assign(manifest.config, await put(Buffer.from(JSON.stringify(config))))
  Object.assign(index.manifests[0], await put(Buffer.from(JSON.stringify(manifest))))
  await writeFile(join(layout, 'index.json'), JSON.stringify(index))
  return `oci:${layout}`
}

onGvisor('a handler inside of an image: its own files, its user, warm', async () => {
  const text = `import os
n = 0
def handler(input, ctx):
    global n
    n += 1
    print("in", os.getcwd())
    return [n, input, os.getuid(), os.environ["FROM"]]`
  const reference = await imageWith(
    'python',
    [
      { path: 'app/', type: 'Directory' },
      { path: 'app/main.py', text },
    ],
    {
      WorkingDir: '/app',
      User: '1234:5678',
      Env: ['PATH=/usr/bin:/bin', 'FROM=image'],
    },
  )
  const image = { kind: 'image', reference } as const
  for (const n of [1, 2]) {
    const { outcome, texts } = await run(runner, image, { ...python, entrypoint: 'main.py', input: 'x' })
    assert.equal(
      outcome.status === 'completed' && JSON.parse(outcome.output),
      [n, 'x', 1234, 'image'],
      JSON.stringify(outcome),
    )
    assert.equal(texts, ['in /app'])
    assert.is(outcome.start, n === 1 ? 'cold' : 'warm')
  }
  const nowhere = await failure(runner, image, 'invalid_workload', { ...python, entrypoint: '/app/other.py' })
  assert.match(nowhere.error.message, /no file \/app\/other\.py/)
  const without = await failure(runner, image, 'invalid_workload', { runtime: 'node', entrypoint: 'main.py' })
  assert.match(without.error.message, /cannot run the handler: .*node/)
})

onGvisor('an image as a command: what it says itself, and what replaces it', async () => {
  const entries: TarEntry[] = [
    { path: 'etc/passwd', text: 'root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n' },
    { path: 'etc/group', text: 'root:x:0:\nann:x:1000:\nlab:x:2000:ann\n' },
  ]
  const reference = await imageWith('base', entries, {
    Entrypoint: ['/bin/sh', '-c'],
    Cmd: ['echo "$(id -u) $(id -g) $(id -G) $HOME $PWD"'],
    WorkingDir: '/srv/made/here',
    User: 'ann',
    Env: ['PATH=/usr/bin:/bin'],
  })
  const image = { kind: 'image', reference } as const
  const oci = { runtime: 'oci' } as const
  assert.is(await output(runner, image, oci), '1000 1000 1000 2000 /home/ann /srv/made/here\n')
  assert.is(await output(runner, image, { ...oci, user: '0', entrypoint: ['id', '-u'] }), 0)
  assert.is(await output(runner, image, { ...oci, workingDir: '/tmp', entrypoint: ['pwd'] }), '/tmp\n')
  await failure(runner, image, 'invalid_workload', { ...oci, user: 'bob' })
  await failure(runner, image, 'invalid_workload', { ...oci, entrypoint: ['/no/such/command'] })
})

onGvisor('memory that is spent is told as such: by V8, by the kernel, in a child', async () => {
  const limits = { memory_mb: 96 }
  const most = { limits, timeoutMs: 60_000 }
  await failure(
    runner,
    'export default () => { const a = []; for (;;) a.push({ x: new Array(99).fill(a.length) }) }',
    'oom',
    most,
  )
  await failure(
    runner,
    'export default () => { const a = []; for (;;) a.push(Buffer.alloc(1e6, 1)) }',
    'oom',
    most,
  )
  const child = `import subprocess, sys
def handler(input, ctx):
    subprocess.run([sys.executable, "-c", "a = []\\nwhile True: a.append(b'x' * 1000000)"], check=True)`
  await failure(runner, child, 'oom', { ...most, ...python })
  assert.is(await output(runner, 'export default () => 1', { limits }), 1)
})

onGvisor('nothing is left when the runner ends', async () => {
  await runner[Symbol.asyncDispose]()
  assert.equal(runner.pids(), [])
  const kept = join(options.dataDir, 'containers')
  for (const name of readdirSync(kept))
    assert.equal(
      readdirSync(join(kept, name)).filter((entry) => existsSync(join(kept, name, entry, 'owner.json'))),
      [],
      name,
    )
})

test.run()
