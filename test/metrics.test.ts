// timeout: 900
/**
 * Every metric is seen moving by doing what it counts, on a whole platform, as a gateway’s `/metrics` tells it; and
 * promtool has nothing to say about the page. The last test knows which metrics there are, and that none was left out.
 */
import { randomBytes } from 'node:crypto'
import { mkdtempDisposable } from 'node:fs/promises'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createClient } from '@libsql/client'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { DispatcherMetrics } from '../dispatcher/metrics.ts'
import { GatewayMetrics } from '../gateway/metrics.ts'
import { RunnerMetrics } from '../runners/metrics.ts'
import type { Platform } from '../scripts/platform.ts'
import type { Backend } from '../shared/backends.ts'
import { Bus } from '../shared/bus.ts'
import { makeEvent } from '../shared/events.ts'
import { newWorkloadId } from '../shared/ids.ts'
import { countProcess } from '../shared/process-metrics.ts'
import { eventSubject, lateSubject, logSubject } from '../shared/subjects.ts'
import { WORK } from '../shared/topology.ts'
import type { Isolation, Workload } from '../shared/workload.ts'
import { tgzOf } from './gateway/archives.ts'
import { skip } from './harness.ts'
import { parsePage, scrape, sumOf } from './metrics-page.ts'
import { offerOf } from './offers.ts'
import { http, startTestPlatform } from './platform.ts'
import { checkMetrics, findPrometheus } from './prometheus.ts'
import { hostFile, startRegistry, writeLayout } from './registry.ts'
import { until } from './shared/support.ts'

type Labels = Record<string, string>

const patienceMs = 60_000

/** Names of the metrics that were seen moving, and of those that cannot move here. */
const seen = new Set<string>()
const cannotMove = new Set<string>()

/** Names of series of a histogram end differently from its own. */
const familyOf = (series: string) => series.replace(/_(count|sum|bucket)$/, '')

/** `act` makes the sum over these series grow by `by` or more. */
async function moves(
  url: string,
  act: () => Promise<unknown>,
  expected: readonly [name: string, labels?: Labels, by?: number][],
): Promise<void> {
  const before = await scrape(url)
  await act()
  for (const [name, labels = {}, by = 1] of expected) {
    const goal = (sumOf(before, name, labels) ?? 0) + by
    let now: number | undefined
    await until(
      `${name} ${JSON.stringify(labels)} grows to ${goal}`,
      async () => {
        now = sumOf(await scrape(url), name, labels)
        return (now !== undefined && now >= goal) || undefined
      },
      patienceMs,
    ).catch((error) => {
      throw new Error(`${(error as Error).message}: it is ${now}`)
    })
    seen.add(familyOf(name))
  }
}

/** A figure becomes what `isSo` says. */
async function becomes(
  url: string,
  name: string,
  labels: Labels,
  isSo: (value: number) => boolean,
): Promise<void> {
  let now: number | undefined
  await until(
    `${name} ${JSON.stringify(labels)}`,
    async () => {
      now = sumOf(await scrape(url), name, labels)
      return (now !== undefined && isSo(now)) || undefined
    },
    patienceMs,
  ).catch((error) => {
    throw new Error(`${(error as Error).message}: it is ${now}`)
  })
  seen.add(familyOf(name))
}

async function run(url: string, spec: Record<string, unknown>): Promise<Workload> {
  const { body } = await http<Workload>(`${url}/v1/workloads`, { body: spec })
  if (body.status === undefined) throw new Error(JSON.stringify(body))
  return body
}
const start = async (url: string, spec: Record<string, unknown>): Promise<string> =>
  (await http<Workload>(`${url}/v1/workloads/async`, { body: spec })).body.id
const untilStatus = (url: string, id: string, status: string) =>
  until(
    `${id} is ${status}`,
    async () =>
      (await http<Workload>(`${url}/v1/workloads/${id}`)).body.status === status ? true : undefined,
    60_000,
  )

const one = 'export default () => 1'
const forever = 'export default () => new Promise(() => {})'

const web = createServer((_request, response) => response.end('x'.repeat(50_000)))
await new Promise<void>((resolve) => web.listen(0, '127.0.0.1', resolve))
const webPort = (web.address() as AddressInfo).port
const scope = new AsyncDisposableStack()
scope.defer(() => void web.close())
const platform = scope.use(
  await startTestPlatform({
    VULCAN_SLOTS: '4',
    VULCAN_LOG_LINES: '10',
    VULCAN_ACK_WAIT_MS: '2000',
    VULCAN_EGRESS_ALLOW_PRIVATE: `127.0.0.1:${webPort}`,
    // Seven seconds: what tests write to logs is gone before they end.
    VULCAN_KEEP_LOGS_H: '0.002',
    VULCAN_RETENTION_EVERY_S: '2',
  }),
)
const { url } = platform

test('a workload: requests, accepts, deliveries, attempts, ends, how long each part took and what it used', async () => {
  const isolate = { isolation: 'isolate' }
  const calls = { function: 'add', ...isolate }
  const deploy = () =>
    http(`${url}/v1/functions/add`, { method: 'PUT', body: { code: 'export default (n) => n + 1' } })
  await moves(url, deploy, [['vulcan_http_requests_total', { method: 'PUT', status: '201' }]])
  const call = async () => {
    for (let n = 0; n < 3; n++) {
      const { body } = await http<Workload>(`${url}/v1/functions/add/invocations`, { body: n })
      assert.is(body.output, n + 1)
    }
  }
  await moves(url, call, [
    ['vulcan_http_requests_total', { method: 'POST', status: '200' }, 3],
    ['vulcan_http_request_duration_seconds_count', { method: 'POST' }, 3],
    ['vulcan_accepts_total', calls, 3],
    ['vulcan_deliveries_total', { delivery: 'first', ...isolate }, 3],
    ['vulcan_attempts_total', { status: 'completed', cause: '', ...calls }, 3],
    ['vulcan_starts_total', { start: 'warm', ...isolate }, 2],
    ['vulcan_cold_start_seconds_count', calls],
    ['vulcan_cold_start_phase_seconds_count', { phase: 'create isolate' }],
    ['vulcan_cold_start_phase_seconds_count', { phase: 'compile' }],
    ['vulcan_workload_cpu_seconds_count', calls, 3],
    ['vulcan_workload_memory_peak_bytes_sum', calls, 1_000],
    ['vulcan_ends_total', { status: 'completed', ...calls }, 3],
    ['vulcan_run_duration_seconds_count', calls, 3],
    ['vulcan_queue_wait_seconds_count', calls, 3],
    ['vulcan_fold_batch_messages_sum', { stream: 'VULCAN_EVENTS' }, 9],
    ['vulcan_fold_plan_seconds_count', { stream: 'VULCAN_EVENTS' }],
    ['vulcan_fold_delay_seconds_count', { stream: 'VULCAN_EVENTS' }],
    ['vulcan_database_seconds_count', { operation: 'fold events' }],
    ['vulcan_stream_messages', { stream: 'VULCAN_EVENTS' }, 9],
    ['vulcan_stream_bytes', { stream: 'VULCAN_EVENTS' }, 1_000],
  ])
  await becomes(url, 'vulcan_stream_max_bytes', { stream: 'VULCAN_EVENTS' }, (bytes) => bytes > 2 ** 20)
  await becomes(url, 'vulcan_success_ratio', calls, (ratio) => ratio === 1)
  const page = await scrape(url)
  const took = sumOf(page, 'vulcan_run_duration_seconds_sum', calls)!
  assert.ok(took > 0 && took < 5, `three calls took ${took} s`)
})

test('functions called by HTTP are told apart by their route, and callers who left by the word gone', async () => {
  const code =
    'export default { fetch: (request) => new Promise((resolve) => request.signal.addEventListener("abort", resolve)) }'
  await http(`${url}/v1/functions/slow`, { method: 'PUT', body: { code } })
  const route = { route: '/fn/:name' }
  const leave = async () => {
    const gone = new AbortController()
    const asked = fetch(`${url}/fn/slow`, { signal: gone.signal }).catch(() => {})
    await becomes(url, 'vulcan_waiting_callers', {}, (waiting) => waiting > 0)
    gone.abort()
    await asked
  }
  await moves(url, leave, [
    ['vulcan_http_requests_total', { status: 'gone', ...route }],
    ['vulcan_http_request_duration_seconds_count', route],
  ])
})

test('what is refused is counted by its code', async () => {
  const refuse = () => http(`${url}/v1/workloads`, { body: { nonsense: 1 } })
  await moves(url, refuse, [
    ['vulcan_refusals_total', { code: 'invalid_field' }],
    ['vulcan_http_requests_total', { status: String((await refuse()).status) }],
  ])
})

test('failures and retries are counted by cause, and the success ratio falls', async () => {
  const code = 'export default () => { throw new Error("no") }'
  await http(`${url}/v1/functions/broken`, { method: 'PUT', body: { code } })
  const broken = { function: 'broken' }
  const failing = () => http(`${url}/v1/functions/broken/invocations`, { body: 1 })
  await moves(url, failing, [
    ['vulcan_attempts_total', { status: 'failed', cause: 'user_error', ...broken }],
    ['vulcan_ends_total', { status: 'failed', cause: 'user_error', ...broken }],
  ])
  await becomes(url, 'vulcan_success_ratio', broken, (ratio) => ratio === 0)
  const retry = { max_attempts: 2, on: ['user_error'], backoff: 'none' }
  await moves(url, () => run(url, { code, retry }), [
    ['vulcan_attempts_total', { status: 'retrying', cause: 'user_error' }],
    ['vulcan_retries_total', { cause: 'user_error' }],
  ])
})

test('log lines within and beyond the limit', async () => {
  const code = 'export default () => { for (let n = 0; n < 25; n++) console.log(n) }'
  await moves(url, () => run(url, { code }), [
    ['vulcan_log_lines_total', {}, 10],
    ['vulcan_log_lines_dropped_total', {}, 15],
    ['vulcan_stored_log_lines_total', {}, 10],
    ['vulcan_stored_log_lines_dropped_total', { by: 'runner' }, 15],
    ['vulcan_removed_total', { kind: 'log_batches' }],
  ])
})

test('what code fetches: sent, denied, and the bytes', async () => {
  const code = `export default async (url) => (await (await fetch(url)).text()).length`
  const input = `http://127.0.0.1:${webPort}/`
  const spec = { code, input, network: { egress: [`127.0.0.1:${webPort}`] } }
  const sent = async () => assert.is((await run(url, spec)).output, 50_000)
  await moves(url, sent, [
    ['vulcan_egress_requests_total', { result: 'sent' }],
    ['vulcan_workload_network_bytes_sum', { direction: 'receive' }, 50_000],
    ['vulcan_workload_network_bytes_count', { direction: 'transmit' }],
  ])
  await moves(url, () => run(url, { code, input }), [['vulcan_egress_requests_total', { result: 'denied' }]])
})

test('sandboxes: those that run and stand ready, and those that die', async () => {
  const id = await start(url, { code: forever, limits: { timeout_s: 60 } })
  await becomes(url, 'vulcan_pool_sandboxes', { state: 'running' }, (running) => running === 1)
  await http(`${url}/v1/workloads/${id}/kill`, { method: 'POST' })
  await becomes(url, 'vulcan_pool_sandboxes', { state: 'idle' }, (idle) => idle > 0)
  const greedy = `export default () => { const all = []; for (;;) all.push(new Uint8Array(2 ** 24).fill(1)) }`
  const dying = async () =>
    assert.is((await run(url, { code: greedy, limits: { memory_mb: 32 } })).cause, 'oom')
  await moves(url, dying, [['vulcan_sandbox_failures_total', { cause: 'oom' }]])
})

test('the queue: how many wait in it, for how long, and what the streams hold', async () => {
  const spec = { code: forever, limits: { timeout_s: 100 } }
  const ids = await Promise.all(Array.from({ length: 7 }, () => start(url, spec)))
  const common = { isolation: 'isolate' }
  await becomes(url, 'vulcan_queue_depth', common, (depth) => depth >= 3)
  await becomes(url, 'vulcan_queue_oldest_age_seconds', common, (age) => age > 1)
  await becomes(url, 'vulcan_queue_delivered', common, (delivered) => delivered === 4)
  await becomes(url, 'vulcan_runner_active', common, (active) => active === 4)
  await becomes(url, 'vulcan_runner_slots', common, (slots) => slots === 4)
  await Promise.all(ids.map((id) => http(`${url}/v1/workloads/${id}/kill`, { method: 'POST' })))
  await becomes(url, 'vulcan_queue_depth', common, (depth) => depth === 0)
})

test('the streams: results that come too late, messages that are no events, gaps between log lines', async () => {
  await using bus = await Bus.connect({ url: platform.natsUrl, name: 'test' })
  const id = newWorkloadId()
  const origin = { source: '/vulcan/test' }
  const data = { attempt: 1, runner: 'isolate-x', status: 'completed' as const, cause: null }
  const late = makeEvent('late', id, 1, data, origin)
  await moves(url, () => bus.publishRecord(lateSubject(id), late, `${id}.late`), [
    ['vulcan_late_events_total', { status: 'completed' }],
  ])
  await moves(url, () => bus.publishRecord(eventSubject(id, 'started'), late, `${id}.no`), [
    ['vulcan_refused_messages_total', { stream: 'VULCAN_EVENTS' }],
  ])
  const { id: known } = await run(url, { code: one })
  const second = makeEvent('log', known, '1.2', { attempt: 1, n: 2, lines: [], dropped: 0 }, origin)
  await moves(url, () => bus.publishRecord(logSubject(known), second, `${known}.2`), [
    ['vulcan_log_batches_missing_total'],
  ])
})

test('the database: what it does not do, and how far the fold is behind then', async () => {
  const page = await scrape(url)
  assert.ok(sumOf(page, 'vulcan_database_bytes')! > 4_096)
  seen.add('vulcan_database_bytes')
  const events = { stream: 'VULCAN_EVENTS' }
  await becomes(url, 'vulcan_fold_lag_messages', events, (messages) => messages === 0)
  await becomes(url, 'vulcan_dispatcher_ready', {}, (parts) => parts >= 2)
  const client = createClient({ url: `file:${join(platform.dataDir, 'vulcan.db')}` })
  const locking = async () => {
    const lock = await client.transaction('write')
    try {
      await start(url, { code: one })
      await becomes(url, 'vulcan_fold_lag_messages', events, (messages) => messages > 0)
      await becomes(url, 'vulcan_fold_lag_seconds', events, (seconds) => seconds > 1)
      await becomes(url, 'vulcan_dispatcher_ready', { part: 'database' }, (ready) => ready === 0)
    } finally {
      await lock.rollback()
      client.close()
    }
  }
  await moves(url, locking, [['vulcan_database_failures_total', { operation: 'fold events' }]])
  await becomes(url, 'vulcan_dispatcher_ready', { part: 'database' }, (ready) => ready === 1)
})

test('processes: time, memory, loop, and of the sandboxes together', async () => {
  const burn = 'export default () => { const end = Date.now() + 1500; while (Date.now() < end); }'
  await moves(url, () => run(url, { code: burn }), [
    ['vulcan_sandboxes_cpu_seconds_total', {}, 0.05],
    ['vulcan_process_cpu_seconds_total', { service: 'vulcan-dispatcher' }, 0.001],
    ['vulcan_process_cpu_seconds_total', { service: 'vulcan-gateway' }, 0.001],
    ['vulcan_process_cpu_seconds_total', { service: 'vulcan-runner' }, 0.001],
    ['vulcan_process_loop_busy_seconds_total', {}, 0.001],
  ])
  const page = await scrape(url)
  for (const service of ['vulcan-gateway', 'vulcan-dispatcher', 'vulcan-runner']) {
    const began = sumOf(page, 'vulcan_process_start_time_seconds', { service })!
    assert.ok(Math.abs(Date.now() / 1_000 - began) < 300, service)
    assert.ok(sumOf(page, 'vulcan_process_memory_bytes', { service, kind: 'resident' })! > 2 ** 24, service)
  }
  if (sumOf(page, 'vulcan_process_cgroup_memory_bytes') === undefined)
    cannotMove.add('vulcan_process_cgroup_memory_bytes')
  for (const name of [
    'vulcan_sandboxes_memory_bytes',
    'vulcan_sandboxes_processes',
    'vulcan_process_start_time_seconds',
    'vulcan_process_memory_bytes',
    'vulcan_process_cgroup_memory_bytes',
  ])
    seen.add(name)
  assert.ok(sumOf(page, 'vulcan_sandboxes_memory_bytes')! > 2 ** 24)
  assert.ok(sumOf(page, 'vulcan_sandboxes_processes')! >= 2)
})

test('every process serves its own page', async () => {
  const { body } = await http<{ backends: Backend[] }>(`${url}/v1/backends`)
  const own = body.backends.flatMap(({ runners }) => runners.map((runner) => runner.metrics_url!))
  assert.is(own.length, 1)
  const services = async (page: string) =>
    new Set(parsePage(await (await fetch(page)).text()).map(({ labels }) => labels.service))
  assert.equal([...(await services(own[0]!))], ['vulcan-runner'])
  assert.equal([...(await services(`${url}/metrics?own`))], ['vulcan-gateway'])
  assert.equal([...(await services(`${url}/metrics`))].sort(), [
    'vulcan-dispatcher',
    'vulcan-gateway',
    'vulcan-runner',
  ])
  assert.is((await fetch(own[0]!.replace('metrics', 'x'))).status, 404)
})

test('a runner that is killed: its restart, its work come again, and that it was missed', async () => {
  const spec = { code: 'export default () => new Promise((resolve) => setTimeout(resolve, 3_000))' }
  const id = await start(url, spec)
  await untilStatus(url, id, 'running')
  const again = async () => {
    process.kill(platform.supervisor.pid('runner')!, 'SIGKILL')
    await becomes(url, 'vulcan_metrics_processes', { state: 'missing' }, (missing) => missing === 1)
    await becomes(url, 'vulcan_queue_redelivered', {}, (again) => again === 1)
    await untilStatus(url, id, 'completed')
  }
  await moves(url, again, [
    ['vulcan_deliveries_total', { delivery: 'again' }],
    ['vulcan_process_restarts_total', { service: 'vulcan-runner' }],
    ['vulcan_retries_total', { cause: 'runner_lost' }],
  ])
  await becomes(url, 'vulcan_metrics_processes', { state: 'answered' }, (answered) => answered === 3)
})

const prometheus = await findPrometheus().catch((error: Error) => error.message)
if (typeof prometheus === 'string') skip(test, 'promtool takes the page', `no promtool: ${prometheus}`)
else
  test('promtool takes the page', async () => {
    const page = await (await fetch(`${url}/metrics`)).text()
    assert.is(await checkMetrics(prometheus, page), '')
    assert.is.not(await checkMetrics(prometheus, `${page}\nx{`), '')
  })

test('a queue that delivers nothing is made anew', async () => {
  await using bus = await Bus.connect({ url: platform.natsUrl, name: 'test' })
  await bus.jsm.consumers.pause(WORK, 'isolate', new Date(Date.now() + 100_000))
  const id = await start(url, { code: one })
  await becomes(url, 'vulcan_stalled_queues_total', { isolation: 'isolate' }, (stalled) => stalled === 1)
  await untilStatus(url, id, 'completed')
})

test('a runner that is gone for good: it is down, and its work is put to an end', async () => {
  const { id } = (
    await http<Workload>(`${url}/v1/workloads/async`, {
      body: { code: forever, limits: { timeout_s: 200 }, retry: { max_attempts: 1 } },
    })
  ).body
  await untilStatus(url, id, 'running')
  for (const name of ['vulcan_runner_up', 'vulcan_runner_available'])
    await becomes(url, name, { isolation: 'isolate' }, (up) => up >= 1)
  await platform.supervisor.abandon('runner')
  await becomes(url, 'vulcan_runner_silent_seconds', {}, (seconds) => seconds > 5)
  await becomes(url, 'vulcan_lost_workloads_total', { status: 'failed' }, (lost) => lost === 1)
  await becomes(url, 'vulcan_runner_up', {}, (up) => up === 0)
  await becomes(url, 'vulcan_ends_total', { cause: 'runner_lost' }, (ends) => ends === 1)
})

/** What of containers and machines is counted, and cannot be where there are none. */
const ofImages = [
  'vulcan_image_pull_seconds',
  'vulcan_image_pulled_bytes_total',
  'vulcan_image_cache_requests_total',
  'vulcan_cache_bytes',
  'vulcan_workload_disk_bytes',
] as const
const ofMachines = [
  'vulcan_machine_boot_seconds',
  'vulcan_machine_restore_seconds',
  'vulcan_machine_channel_seconds',
  'vulcan_template_requests_total',
] as const

/** A platform that runs this isolation beside isolates, or why that cannot be here. */
async function platformWith(
  isolation: Isolation,
  env: Record<string, string> = {},
): Promise<Platform | string> {
  await using starting = new AsyncDisposableStack()
  const other = starting.use(await startTestPlatform({ VULCAN_ISOLATIONS: `isolate,${isolation}`, ...env }))
  const { available, reason } = await offerOf(other.url, isolation)
  if (!available) return `${isolation} is unavailable: ${reason}`
  scope.use(starting.move())
  return other
}

const gvisor = await platformWith('gvisor')
if (typeof gvisor === 'string') {
  skip(test, 'containers: images, sandboxes, disk and clean-up', gvisor)
  for (const name of ofImages) cannotMove.add(name)
} else
  test('containers: images, sandboxes, disk and clean-up', async () => {
    const { url } = gvisor
    const isolation = { isolation: 'gvisor' }
    await using registry = await startRegistry()
    await using folder = await mkdtempDisposable(join(tmpdir(), 'vulcan-test-'))
    // Bytes that no cache has.
    const content = randomBytes(100_000)
    const layers = [[hostFile('/bin/busybox', 'bin/sh'), { path: 'own', content }]]
    await writeLayout(folder.path, { layers })
    const { reference } = await registry.push(folder.path, 'team/metrics:1')
    const spec = {
      image: reference,
      entrypoint: ['/bin/sh', '-c', 'dd if=/dev/zero of=/dev/null bs=1k count=1; cat /own | wc -c'],
    }
    const runs = async () => {
      for (let n = 0; n < 2; n++) {
        const { status, output, error } = await run(url, spec)
        assert.equal([status, output], ['completed', 100_000], error?.message)
      }
    }
    await moves(url, runs, [
      ['vulcan_image_cache_requests_total', { result: 'miss', ...isolation }],
      ['vulcan_image_cache_requests_total', { result: 'hit', ...isolation }],
      ['vulcan_image_pull_seconds_count', { result: 'ok', ...isolation }],
      ['vulcan_image_pulled_bytes_total', isolation, 100_000],
      ['vulcan_cache_bytes', { cache: 'images', ...isolation }, 100_000],
      ['vulcan_cold_start_seconds_count', isolation, 2],
      ['vulcan_cold_start_phase_seconds_count', { phase: 'pull image', ...isolation }],
      ['vulcan_cold_start_phase_seconds_count', { phase: 'unpack image', ...isolation }],
      ['vulcan_cold_start_phase_seconds_count', { phase: 'create container', ...isolation }],
      ['vulcan_workload_disk_bytes_count', { direction: 'write', ...isolation }, 2],
      ['vulcan_workload_cpu_seconds_sum', isolation, 0.001],
      ['vulcan_sandbox_cleanup_seconds_count', isolation, 2],
    ])
    const missing = () =>
      run(url, { image: reference.replace('metrics', 'nothing'), retry: { max_attempts: 1 } })
    await moves(url, missing, [['vulcan_image_pull_seconds_count', { result: 'failed', ...isolation }]])
    await gvisor.stop()
  })

const microvm = await platformWith('microvm')
if (typeof microvm === 'string') {
  skip(test, 'microVMs: boot, restore, channel, templates and clean-up', microvm)
  for (const name of ofMachines) cannotMove.add(name)
} else
  test('microVMs: boot, restore, channel, templates and clean-up', async () => {
    const isolation = { isolation: 'microvm' }
    const body = new Uint8Array(tgzOf({ 'run.sh': 'echo 1' }))
    const completes = async (url: string) => {
      const headers = { 'content-type': 'application/octet-stream' }
      const { blob } = (await (await fetch(`${url}/v1/blobs`, { method: 'POST', headers, body })).json()) as {
        blob: string
      }
      const spec = { isolation: 'microvm', archive: { blob }, entrypoint: ['sh', 'run.sh'] }
      const { status, error } = await run(url, spec)
      assert.is(status, 'completed', error?.message)
    }
    await moves(microvm.url, () => completes(microvm.url), [
      ['vulcan_template_requests_total', isolation],
      ['vulcan_machine_restore_seconds_count', isolation],
      ['vulcan_sandbox_cleanup_seconds_count', isolation],
      ['vulcan_cold_start_seconds_count', isolation],
    ])
    await becomes(microvm.url, 'vulcan_machine_channel_seconds_count', isolation, (asked) => asked > 0)
    await microvm.stop()
    const booting = await platformWith('microvm', {
      VULCAN_MICROVM_SNAPSHOTS: 'off',
      VULCAN_MICROVM_POOL: '0',
    })
    if (typeof booting === 'string') throw new Error(booting)
    await moves(booting.url, () => completes(booting.url), [['vulcan_machine_boot_seconds_count', isolation]])
  })

test('all that was declared was seen', async () => {
  const registries = [new GatewayMetrics('x'), new DispatcherMetrics('x'), new RunnerMetrics('x', 'microvm')]
  const declared = registries.flatMap(({ registry }) => {
    countProcess(registry, 0)
    return registry.getMetricsAsArray().map(({ name }) => name as string)
  })
  // Some are declared only when there is something to read.
  const told = (await scrape(url)).map(({ name }) => familyOf(name))
  const missed = [...new Set([...declared, ...told])].filter(
    (name) => !seen.has(name) && !cannotMove.has(name),
  )
  assert.equal(missed, [])
})

test.after(async () => {
  await scope[Symbol.asyncDispose]()
})

test.run()
