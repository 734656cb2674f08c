// timeout: 300
/** MicroVMs as a user meets them: archives with `isolation: auto`, deployed or posted, by HTTP to a real machine. */
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { findRuntime } from '../runners/container/runtimes/index.ts'
import { cacheDirectory } from '../scripts/cache-directory.ts'
import type { Workload } from '../shared/workload.ts'
import { tgzOf } from './gateway/archives.ts'
import { skip } from './harness.ts'
import { backendOf, offerOf } from './offers.ts'
import { http, startTestPlatform } from './platform.ts'
import { until } from './shared/support.ts'

const scope = new AsyncDisposableStack()
const platform = scope.use(await startTestPlatform({ VULCAN_ISOLATIONS: 'isolate,microvm' }))
const { url } = platform

const { available, reason } = await offerOf(url, 'microvm')
/** Why nothing can be run in a microVM here; undefined where it can. */
const unavailable = available ? undefined : `microvm is unavailable: ${reason}`
const noGo = (await findRuntime('go', cacheDirectory(process.env))) === undefined
const under = (name: string, run: () => Promise<void>, why = unavailable) =>
  why === undefined ? test(name, run) : skip(test, name, why)

async function deploy(name: string, body: Record<string, unknown>): Promise<Record<string, unknown>> {
  const answer = await http(`${url}/v1/functions/${name}`, { method: 'PUT', body })
  assert.is(answer.status, 201, JSON.stringify(answer.body))
  assert.equal(
    [answer.body.isolation, answer.body.routing_reason],
    ['microvm', 'auto: an archive runs in a microvm'],
  )
  return answer.body
}

/** Where `auto` has sent it, how it began, and that the receipt names the machine. */
function inMachine(workload: Workload): Workload {
  assert.is(workload.status, 'completed', JSON.stringify(workload))
  assert.is(workload.isolation, 'microvm')
  const { machine, image_digest, walls, usage } = workload.receipt!
  assert.match(machine!.vmm, /^(QEMU|Firecracker) \d+\.\d+.* \((KVM|emulation)\)$/)
  assert.ok(['boot', 'restore', 'pool'].includes(machine!.start), machine!.start)
  assert.match(image_digest!, /^sha256:[0-9a-f]{64}$/)
  assert.ok(walls.length > 0)
  assert.ok(usage.memory_peak_mb! > 0)
  return workload
}

async function invoke(name: string, body: unknown): Promise<Workload> {
  const answer = await http<Workload>(`${url}/v1/functions/${name}/invocations`, { body })
  return inMachine(answer.body)
}

async function upload(bytes: Uint8Array): Promise<string> {
  const headers = { 'content-type': 'application/octet-stream' }
  const answer = await fetch(`${url}/v1/blobs`, { method: 'POST', headers, body: new Uint8Array(bytes) })
  return ((await answer.json()) as { blob: string }).blob
}

under('a Node project with its packages answers JSON and HTTP, and is warm the second time', async () => {
  const deployed = await deploy('app', {
    runtime: 'node',
    files: {
      'package.json': '{"type":"module","dependencies":{"is-number":"7.0.0"}}',
      'index.ts': `import isNumber from 'is-number'
        export default {
          async fetch(request: Request, env: Record<string, string>): Promise<Response> {
            if (new URL(request.url).pathname !== '/stream')
              return Response.json([isNumber(3), env.MODE, await request.text()], { status: 201 })
            let n = 0
            return new Response(new ReadableStream({
              pull(controller) {
                if (n++ === 20) controller.close()
                else controller.enqueue(new Uint8Array(100_000).fill(65))
              },
            }))
          },
        }`,
    },
    env: { MODE: 'test' },
  })
  assert.is(deployed.runtime, 'node')
  const answer = await fetch(`${url}/fn/app/x`, { method: 'POST', body: 'a body' })
  assert.equal([answer.status, await answer.json()], [201, [true, 'test', 'a body']])
  const stream = await fetch(`${url}/fn/app/stream`)
  assert.is((await stream.arrayBuffer()).byteLength, 2_000_000)
  const [second, first] = await until('both ends', async () => {
    const { body } = await http<{ workloads: Workload[] }>(`${url}/v1/workloads?function=app`)
    return body.workloads.every(({ ended_at }) => ended_at !== null) ? body.workloads : undefined
  }).then((both) => both.map((workload) => inMachine(workload).receipt!))
  if (first === undefined || second === undefined) throw new Error('two calls were made')
  assert.equal([second.start, second.machine], ['warm', { vmm: first.machine!.vmm, start: 'pool' }])
})

under('a Python project finds what was vendored with it, as handler and as command', async () => {
  const files = {
    'main.py': 'import greeting\ndef handler(input, ctx):\n    return greeting.hello(input)',
    'vendor/greeting.py': 'def hello(name):\n    return f"hello, {name}"',
    'report.py': 'import greeting, sys\nprint(greeting.hello(sys.stdin.read()))',
  }
  await deploy('greet', { runtime: 'python', files })
  assert.is((await invoke('greet', 'vulcan')).output, 'hello, vulcan')
  await deploy('report', { runtime: 'python', files, entrypoint: ['python3', 'report.py'] })
  assert.is((await invoke('report', 1)).output, 'hello, 1\n')
})

under(
  'a Go program is built and run',
  async () => {
    await deploy('go', {
      runtime: 'go',
      files: {
        'go.mod': 'module example.test/hello\n\ngo 1.21\n',
        'main.go': `package main

import (
	"encoding/json"
	"os"
)

func main() {
	var input struct{ Name string }
	_ = json.NewDecoder(os.Stdin).Decode(&input)
	_ = json.NewEncoder(os.Stdout).Encode(map[string]string{"greeting": "hello, " + input.Name})
}
`,
      },
      limits: { timeout_s: 200 },
    })
    assert.equal((await invoke('go', { name: 'vulcan' })).output, { greeting: 'hello, vulcan' })
  },
  unavailable ?? (noGo ? 'the runtime image of Go is not there (npm run setup -- go)' : undefined),
)

under('an archive that is posted runs its command; lines come while it runs', async () => {
  const blob = await upload(tgzOf({ 'run.sh': 'for i in 1 2 3; do echo "line $i" >&2; sleep 1; done; cat' }))
  const began = Date.now()
  const accepted = await http<Workload>(`${url}/v1/workloads/async`, {
    body: { archive: { blob }, entrypoint: ['sh', 'run.sh'], input: { n: 3 } },
  })
  assert.equal([accepted.status, accepted.body.isolation], [202, 'microvm'])
  assert.is(accepted.body.routing_reason, 'auto: an archive runs in a microvm')
  const stream = await fetch(`${url}/v1/workloads/${accepted.body.id}/logs`, {
    headers: { accept: 'text/event-stream' },
  })
  const heard: { text: string; at: number }[] = []
  for await (const part of stream.body!.pipeThrough(new TextDecoderStream()))
    for (const [, text] of part.matchAll(/"text":"(line \d)"/g)) heard.push({ text: text!, at: Date.now() })
  const ended = Date.now()
  assert.equal(
    heard.map(({ text }) => text),
    ['line 1', 'line 2', 'line 3'],
  )
  assert.ok(ended - heard[0]!.at > 1_500, `the first came ${heard[0]!.at - began} ms in, of ${ended - began}`)
  const { body } = await http<Workload>(`${url}/v1/workloads/${accepted.body.id}`)
  assert.equal(inMachine(body).output, { n: 3 })
  assert.is(body.receipt!.start, 'cold')
})

under('the backend tells what it is, what guards it, and what its limits are', async () => {
  const { available, capabilities, runners } = await backendOf(url, 'microvm')
  assert.equal([available, runners.length], [true, 1])
  const { version, limits, walls, missing, runtimes } = capabilities!
  assert.match(version, /QEMU|Firecracker/)
  assert.ok(walls.length > 0, JSON.stringify(missing))
  assert.ok(runtimes.includes('oci'))
  for (const limit of ['memory', 'cpu', 'pids', 'file_size', 'disk'] as const)
    assert.ok(['enforced', 'not enforced'].includes(limits![limit]!), limit)
  const metrics = await until('its measurements', async () => {
    const [runner] = (await backendOf(url, 'microvm')).runners
    return (runner?.metrics.machines_restored ?? 0) > 0 ? runner!.metrics : undefined
  })
  for (const name of [
    'machines_active',
    'machines_paused',
    'restore_ms_p50',
    'round_trip_ms_p50',
    'pool_idle',
  ])
    assert.ok(metrics[name]! >= 0, `${name}: ${JSON.stringify(metrics)}`)
})

under('auto takes nothing weaker where there is no microVM runner', async () => {
  await using other = await startTestPlatform()
  const answer = await http<{ code: string; detail: string }>(`${other.url}/v1/workloads`, {
    body: { archive: { blob: `sha256:${'0'.repeat(64)}` }, runtime: 'python' },
  })
  assert.equal([answer.status, answer.body.code], [422, 'isolation_unavailable'])
  assert.match(answer.body.detail, 'npm run setup -- microvm')
})

test('everything ends', async () => {
  await scope[Symbol.asyncDispose]()
})

test.run()
