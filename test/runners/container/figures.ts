/** What runs in real sandboxes tell of their parts and of what they used, for every engine the same. */
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { findHierarchy } from '../../../runners/container/gvisor/cgroups.ts'
import { RunnerMetrics } from '../../../runners/metrics.ts'
import type { Phase, Runner } from '../../../runners/runner.ts'
import type { Isolation } from '../../../shared/workload.ts'
import { skip } from '../../harness.ts'
import { type RunOptions, run } from './jobs.ts'
import { seriesSum } from './metric-values.ts'

export interface FiguresHost {
  isolation: Isolation
  /** Undefined: there is none here, and why. */
  create: ((metrics: RunnerMetrics) => Promise<Runner>) | string
  /** Of a job that nothing stood ready for; of one with a network, and before it runs. */
  phases: string[]
}

const traceparent = '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01'
const traced: RunOptions = { traced: true, traceparent, timeoutMs: 200_000 }

/** Sends so many datagrams of 1,000 bytes to an address that nobody has (RFC 5737). */
const sender = `import { createSocket } from 'node:dgram'
export default async (count, ctx) => {
  const socket = createSocket('udp4')
  await ctx.span('send', async (span) => {
    span.set({ count })
    for (let n = 0; n < count; n++)
      await new Promise((resolve) => socket.send(Buffer.alloc(1000), 9, '198.51.100.7', () => resolve()))
  })
  // What is still on its way out of a machine is nobody's.
  await new Promise((resolve) => setTimeout(resolve, 500))
  socket.close()
}`

export async function figures({ isolation, create, phases: expected }: FiguresHost): Promise<void> {
  const metrics = new RunnerMetrics('figures', isolation)
  const sum = (name: string, labels?: Record<string, string>) => seriesSum(metrics.registry, name, labels)
  const runner = typeof create === 'string' ? undefined : await create(metrics)
  test.after(async () => runner?.[Symbol.asyncDispose]())
  const boxTest = (name: string, body: (runner: Runner) => Promise<void>) => {
    if (runner !== undefined) test(name, () => body(runner))
    else skip(test, name, String(create))
  }

  boxTest('a cold run tells its parts, a span of its code, and the bytes of its network', async (it) => {
    const hasNetwork = it.capabilities.egress.includes('all')
    const options: RunOptions = { ...traced, ...(hasNetwork ? { egress: 'all' } : {}) }
    const start = performance.timeOrigin + performance.now()
    const cold = await run(it, sender, { ...options, input: 20 })
    const end = performance.timeOrigin + performance.now()
    assert.is(cold.outcome.status, 'completed', JSON.stringify(cold.outcome))
    const names = cold.phases.map(({ name }) => name)
    for (const name of [...expected, ...(hasNetwork ? ['open network'] : []), 'guest', 'send'])
      assert.ok(names.includes(name), `no ${name} among ${names.join(', ')}`)
    for (const phase of cold.phases)
      assert.ok(
        phase.start >= start && phase.start <= phase.end && phase.end <= end,
        `${JSON.stringify(phase)} from ${start} to ${end}`,
      )
    const [guest, send] = ['guest', 'send'].map((name) => cold.phases.find((one) => one.name === name)) as [
      Phase,
      Phase,
    ]
    assert.ok(send.start >= guest.start && send.end <= guest.end)
    assert.equal(send.attributes, { count: 20 })
    const { usage } = cold.outcome
    assert.ok(Number.isInteger(usage.disk_read_bytes) && Number.isInteger(usage.disk_written_bytes))
    if (hasNetwork) assert.ok(usage.network_sent_bytes! >= 15_000, `${usage.network_sent_bytes}`)

    const warm = await run(it, sender, { ...options, input: 5 })
    assert.is(warm.outcome.start, 'warm')
    assert.equal(warm.phases.map(({ name }) => name).sort(), ['guest', 'send'])
    if (hasNetwork) {
      const sent = warm.outcome.usage.network_sent_bytes!
      assert.ok(sent >= 3_000 && sent < 15_000, `${sent}`)
    } else assert.is(usage.network_sent_bytes, 0)
    for (const phase of expected)
      assert.ok((await sum('vulcan_cold_start_phase_seconds_count', { phase })) > 0, phase)
    assert.ok((await sum('vulcan_starts_total', { start: 'cold' })) > 0)
    assert.ok((await sum('vulcan_starts_total', { start: 'warm' })) > 0)
  })

  boxTest('a command tells what it wrote to the disk of the host', async (it) => {
    const { outcome, phases } = await run(it, 'x', {
      ...traced,
      runtime: 'oci',
      // Long enough to be looked at where only what lives can be.
      entrypoint: ['sh', '-c', 'yes | head -c 4000000 > $VULCAN_RESULT; sleep 1'],
    })
    assert.is(outcome.status, 'completed', JSON.stringify(outcome))
    assert.ok(phases.some(({ name }) => name === 'start handler'))
    const written = outcome.usage.disk_written_bytes!
    // Results of machines come by their channel; a disk of version 2 counts when it is written to, which may be later.
    const isCounted = isolation === 'gvisor' && findHierarchy().version === 1
    assert.ok(written >= (isCounted ? 4_000_000 : 0), `${written}`)
    assert.is(outcome.usage.network_sent_bytes, 0)
  })

  boxTest('what becomes of sandboxes is counted', async () => {
    while ((await sum('vulcan_sandbox_cleanup_seconds_count')) === 0)
      await new Promise((resolve) => setTimeout(resolve, 50))
    if (isolation !== 'microvm') return
    assert.ok((await sum('vulcan_machine_restore_seconds_count')) > 0)
    assert.ok((await sum('vulcan_machine_channel_seconds_count')) > 0)
    assert.ok((await sum('vulcan_template_requests_total')) > 0)
    assert.ok((await sum('vulcan_cache_bytes', { cache: 'templates' })) > 0)
  })
}
