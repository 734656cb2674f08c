// timeout: 300
/** Containers as a user meets them: deployed functions, archives and images, by HTTP to a real sandbox. */
import { execFile } from 'node:child_process'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { findRuntime } from '../runners/container/runtimes/index.ts'
import { cacheDirectory } from '../scripts/cache-directory.ts'
import type { Workload } from '../shared/workload.ts'
import { tarOf, tgzOf } from './gateway/archives.ts'
import { skip } from './harness.ts'
import { backendOf, offerOf } from './offers.ts'
import { http, startTestPlatform } from './platform.ts'
import { reader, startRegistry, writeLayout } from './registry.ts'
import { until } from './shared/support.ts'

const execute = promisify(execFile)
const cacheDir = cacheDirectory(process.env)
const scope = new AsyncDisposableStack()
const folder = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
scope.defer(() => rm(folder, { recursive: true, force: true }))
const platform = scope.use(
  await startTestPlatform({
    VULCAN_ISOLATIONS: 'isolate,gvisor',
    VULCAN_IMAGE_DIRECTORIES: join(cacheDir, 'runtimes'),
  }),
)
const { url } = platform

/** Why nothing can be run under gvisor here; undefined where it can. */
async function obstacle(): Promise<string | undefined> {
  const { available, reason } = await offerOf(url, 'gvisor')
  if (!available) return `gvisor is unavailable: ${reason}`
  for (const name of ['base', 'node', 'python'] as const)
    if ((await findRuntime(name, cacheDir)) === undefined)
      return `the runtime image ${name} is not there (npm run setup -- gvisor)`
  return undefined
}
const unavailable = await obstacle()
const under = (name: string, run: () => Promise<void>) =>
  unavailable === undefined ? test(name, run) : skip(test, name, unavailable)

async function run(spec: Record<string, unknown>): Promise<Workload> {
  const { body } = await http<Workload>(`${url}/v1/workloads`, { body: { isolation: 'gvisor', ...spec } })
  assert.is(body.status, 'completed', JSON.stringify(body))
  return body
}

async function deploy(name: string, body: Record<string, unknown>): Promise<Record<string, unknown>> {
  const answer = await http(`${url}/v1/functions/${name}`, {
    method: 'PUT',
    body: { isolation: 'gvisor', ...body },
  })
  assert.is(answer.status, 201, JSON.stringify(answer.body))
  return answer.body
}

async function invoke(name: string, body: unknown): Promise<Workload> {
  const answer = await http<Workload>(`${url}/v1/functions/${name}/invocations`, { body })
  assert.is(answer.body.status, 'completed', JSON.stringify(answer.body))
  return answer.body
}

async function upload(bytes: Uint8Array): Promise<string> {
  const headers = { 'content-type': 'application/octet-stream' }
  const answer = await fetch(`${url}/v1/blobs`, { method: 'POST', headers, body: new Uint8Array(bytes) })
  return ((await answer.json()) as { blob: string }).blob
}

const linesOf = async (id: string): Promise<string[]> => {
  const { body } = await http<{ lines: { text: string }[] }>(`${url}/v1/workloads/${id}/logs`)
  return body.lines.map(({ text }) => text)
}

under('code, archives and commands run and say what they were', async () => {
  const python = await run({
    runtime: 'python',
    code: 'def handler(input, ctx):\n    print("hello from python")\n    return {"y": input["x"] * 2}',
    input: { x: 21 },
  })
  assert.equal(python.output, { y: 42 })
  assert.match(python.receipt!.image_digest!, /^sha256:[0-9a-f]{64}$/)
  await until('its line', async () => (await linesOf(python.id)).includes('hello from python') || undefined)
  const node = await run({
    runtime: 'node',
    code: 'import { readFileSync } from "node:fs"; export default (n) => [n, typeof readFileSync]',
    input: 7,
  })
  assert.equal(node.output, [7, 'function'])
  const archive = await upload(
    tgzOf({ 'run.sh': 'echo "in $PWD with $(cat)"; cat data', data: 'of its own' }),
  )
  const command = await run({
    archive: { blob: archive },
    entrypoint: ['sh', 'run.sh'],
    input: 'x',
    limits: { disk_mb: 8 },
  })
  assert.is(command.output, 'in /workspace with "x"\nof its own')
  assert.equal([command.exit_code, command.receipt!.limits.disk_mb], [0, 8])
})

under(
  'a Node project is called by JSON and by HTTP, streamed and in the background, with its packages',
  async () => {
    const deployed = await deploy('app', {
      runtime: 'node',
      files: {
        'package.json': '{"type":"module","dependencies":{"is-number":"7.0.0"}}',
        'index.ts': `import isNumber from 'is-number'
        import { hostname } from 'node:os'
        export default {
          async fetch(request: Request, env: Record<string, string>): Promise<Response> {
            const { pathname } = new URL(request.url)
            if (pathname !== '/stream') return Response.json([isNumber(3), env.MODE, typeof hostname(), await request.text()], { status: 201 })
            const body = new ReadableStream({
              async start(controller) {
                for (let i = 0; i < 50; i++) controller.enqueue(new Uint8Array(100_000).fill(65 + i % 26))
                controller.close()
              },
            })
            return new Response(body)
          },
        }`,
      },
      env: { MODE: 'test' },
      limits: { memory_mb: 256 },
    })
    assert.equal([deployed.runtime, deployed.isolation], ['node', 'gvisor'])
    const answer = await fetch(`${url}/fn/app/x`, { method: 'POST', body: 'a body' })
    assert.equal([answer.status, await answer.json()], [201, [true, 'test', 'string', 'a body']])
    const stream = await fetch(`${url}/fn/app/stream`)
    assert.is((await stream.arrayBuffer()).byteLength, 5_000_000)
    const later = await fetch(`${url}/fn/app/later`, { headers: { prefer: 'respond-async' } })
    assert.is(later.status, 202)
    const { id } = (await later.json()) as Workload
    const kept = await until('its answer', async () => {
      const response = await fetch(`${url}/v1/workloads/${id}/response`)
      return response.status === 201 ? await response.json() : undefined
    })
    assert.equal(kept, [true, 'test', 'string', ''])
  },
)

under('a Python project finds what was vendored with it, as handler and as command', async () => {
  const files = {
    'main.py': 'import greeting\ndef handler(input, ctx):\n    return greeting.hello(input)',
    'vendor/greeting.py': 'def hello(name):\n    return f"hello, {name}"',
    'report.py': 'import greeting, sys\nprint(greeting.hello(sys.stdin.read()))',
  }
  await deploy('greet', { runtime: 'python', files, prewarm: 1 })
  assert.is((await invoke('greet', 'vulcan')).output, 'hello, vulcan')
  assert.is((await invoke('greet', 'again')).receipt!.start, 'warm')
  await deploy('report', { runtime: 'python', files, entrypoint: ['python3', 'report.py'] })
  assert.is((await invoke('report', 1)).output, 'hello, 1\n')
  const json = await fetch(`${url}/fn/greet`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: '"caller"',
  })
  assert.equal([json.status, await json.json()], [200, 'hello, caller'])
})

under('JavaScript that is built for isolates runs in a container too', async () => {
  await deploy('built', {
    files: {
      'index.ts': `import { twice } from './lib.ts'\nexport default (n: number) => twice(n)`,
      'lib.ts': 'export const twice = (n: number) => 2 * n',
    },
  })
  assert.is((await invoke('built', 21)).output, 42)
})

under('an error of built TypeScript points at the lines that the user wrote', async () => {
  await deploy('faulty', {
    runtime: 'typescript',
    code: 'type Input = { n: number }\n\nexport default ({ n }: Input): number => {\n  throw new Error("no " + n)\n}',
  })
  const { body } = await http<Workload>(`${url}/v1/functions/faulty/invocations`, { body: { n: 1 } })
  assert.equal([body.status, body.cause, body.error?.message], ['failed', 'user_error', 'no 1'])
  assert.match(body.error!.stack!, /index\.ts:4:\d+/)
})

under('an image runs from a layout directory and from its bytes, and keeps its digest', async () => {
  const base = (await findRuntime('base', cacheDir))!
  const entrypoint = ['sh', '-c', 'echo "$GREETING from $(id -u)"']
  const common = { entrypoint, env: { GREETING: 'hello' }, user: '1234' }
  const layout = await run({ image: `oci:${base.layout}`, ...common })
  assert.is(layout.output, 'hello from 1234\n')
  assert.is(layout.receipt!.image_digest, base.digest)
  assert.is(layout.receipt!.code_sha256, null)

  const archive = join(folder, 'base.tar')
  await execute('skopeo', ['--insecure-policy', 'copy', `oci:${base.layout}`, `oci-archive:${archive}`])
  const blob = await upload(await readFile(archive))
  const loaded = await run({ image: { blob }, ...common })
  assert.is(loaded.output, 'hello from 1234\n')
  const deployed = await deploy('image', { image: { blob }, ...common })
  assert.equal([deployed.runtime, (deployed.source as { blob: string }).blob], ['oci', blob])
  assert.is((await invoke('image', null)).output, 'hello from 1234\n')
})

under(
  'an image runs by reference from a registry, its lines stream, and one with users asks for the secret',
  async () => {
    const base = (await findRuntime('base', cacheDir))!
    await using open = await startRegistry()
    const pushed = await open.push(base.layout, 'team/base:1')
    const command = {
      entrypoint: [
        'sh',
        '-c',
        'for i in 1 2 3; do echo "line $i"; sleep 0.3; done; echo \'{"n":3}\' > $VULCAN_RESULT',
      ],
    }
    const accepted = await http<Workload>(`${url}/v1/workloads/async`, {
      body: { image: pushed.reference, ...command },
    })
    assert.equal([accepted.status, accepted.body.isolation], [202, 'gvisor'])
    const stream = await fetch(`${url}/v1/workloads/${accepted.body.id}/logs`, {
      headers: { accept: 'text/event-stream' },
    })
    assert.equal(
      [...(await stream.text()).matchAll(/"text":"(line \d)"/g)].map(([, text]) => text),
      ['line 1', 'line 2', 'line 3'],
    )
    const { body } = await http<Workload>(`${url}/v1/workloads/${accepted.body.id}`)
    assert.equal(
      [body.status, body.output, body.receipt!.image_digest],
      ['completed', { n: 3 }, pushed.digest],
    )
    assert.match(body.routing_reason, 'an image')

    await using closed = await startRegistry({ credentials: true })
    // Other bytes than those that are here already.
    const own = join(folder, 'own')
    await writeLayout(own, { layers: [{ entries: [{ path: 'x', content: 'x' }] }] })
    const { reference } = await closed.push(own, 'team/own:1')
    const denied = { image: reference, entrypoint: ['/x'], retry: { max_attempts: 1 } }
    const without = await http<Workload>(`${url}/v1/workloads`, { body: denied })
    assert.equal(
      [without.body.status, without.body.cause],
      ['failed', 'image_not_found'],
      JSON.stringify(without.body),
    )
    const secret = `${reader.username}:${reader.password}`
    await http(`${url}/v1/secrets/REGISTRY`, { method: 'PUT', body: { value: secret } })
    // It was fetched: what is left is that its file is no program.
    const fetched = await until('the secret', async () => {
      const answer = await http<Workload>(`${url}/v1/workloads`, {
        body: { ...denied, image_auth: 'REGISTRY' },
      })
      return answer.body.cause === 'image_not_found' ? undefined : answer.body
    })
    assert.not.match(JSON.stringify(fetched), reader.password)
    assert.match(fetched.receipt?.image_digest ?? fetched.error!.message, /sha256|\/x/)
  },
)

under('what is no image, no archive or not there is said so', async () => {
  const cases: [spec: Record<string, unknown>, cause: string][] = [
    [{ image: 'oci:/etc' }, 'image_not_found'],
    [{ image: '127.0.0.1:9/never/there:1' }, 'backend_unavailable'],
    [{ image: { blob: await upload(tarOf([{ path: 'a', text: 'a' }])) } }, 'invalid_workload'],
    [{ archive: { blob: await upload(Buffer.from('no tar')) }, entrypoint: ['true'] }, 'invalid_workload'],
  ]
  for (const [spec, cause] of cases) {
    const body = { isolation: 'gvisor', retry: { max_attempts: 1 }, ...spec }
    const answer = await http<Workload>(`${url}/v1/workloads`, { body })
    assert.equal([answer.body.status, answer.body.cause], ['failed', cause], JSON.stringify(answer.body))
  }
})

test('what is offered, and what is not, says why', async () => {
  const docker = await backendOf(url, 'docker')
  assert.equal([docker.available, docker.reason], [false, 'no docker runner has been seen'])
  assert.match(docker.fix!, 'npm run setup -- docker')
  assert.is((await backendOf(url, 'isolate')).available, true)
  const ready = await http<{ ready: boolean }>(`${url}/readyz`)
  assert.equal([ready.status, ready.body.ready], [200, true])
  const { limits, version } = (await backendOf(url, 'gvisor')).capabilities ?? {}
  if (unavailable === undefined) {
    assert.match(version!, 'runsc')
    for (const limit of ['memory', 'cpu', 'pids', 'file_size', 'disk'] as const)
      assert.ok(['enforced', 'not enforced'].includes(limits![limit]!), limit)
  }
})

test('everything ends', async () => {
  await scope[Symbol.asyncDispose]()
})

test.run()
