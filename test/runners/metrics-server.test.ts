import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { descendantsUse } from '../../runners/descendants.ts'
import { RunnerMetrics } from '../../runners/metrics.ts'
import { serveMetrics } from '../../runners/metrics-server.ts'
import { until } from '../shared/support.ts'

test('runners of one host serve their pages beside each other, in the format that is asked for', async () => {
  const [one, two] = ['one', 'two'].map((id) => new RunnerMetrics(id, 'isolate'))
  one!.received(1)
  two!.received(2)
  await using first = await serveMetrics(one!.registry, 0)
  const port = Number(new URL(first.url).port)
  await using second = await serveMetrics(two!.registry, port)
  assert.is.not(second.url, first.url)
  const read = async (url: string, accept = '') => {
    const answer = await fetch(url, { headers: { accept } })
    return [answer.headers.get('content-type')!, await answer.text()] as const
  }
  const [type, text] = await read(second.url)
  assert.match(type, 'text/plain; version=0.0.4')
  const labels = 'delivery="again",service="vulcan-runner",process="two",isolation="isolate"'
  assert.ok(text.includes(`vulcan_deliveries_total{${labels}} 1`))
  const [openType, openText] = await read(first.url, 'application/openmetrics-text; version=1.0.0')
  assert.match(openType, 'application/openmetrics-text')
  assert.match(openText, /# EOF\n$/)
  assert.is((await fetch(first.url.replace('/metrics', '/'))).status, 404)
})

test('what the processes below use is counted with what those used that have ended', async () => {
  const before = (await descendantsUse())!
  const burn = 'const end = process.cpuUsage().user + 300_000; while (process.cpuUsage().user < end);'
  const script = `${burn} console.log('burnt'); setInterval(() => {}, 1000)`
  const child = spawn(process.execPath, ['-e', script], { stdio: ['ignore', 'pipe', 'inherit'] })
  const ended = once(child, 'exit')
  await once(child.stdout, 'data')
  const during = (await descendantsUse())!
  assert.is(during.processes, before.processes + 1)
  assert.ok(during.cpuSeconds - before.cpuSeconds >= 0.25, `${during.cpuSeconds - before.cpuSeconds} s`)
  assert.ok(during.memoryBytes > 4 * 2 ** 20, `${during.memoryBytes} bytes`)
  child.kill('SIGKILL')
  await ended
  const after = await until('it to be gone', async () => {
    const now = (await descendantsUse())!
    return now.processes === before.processes ? now : undefined
  })
  assert.ok(after.cpuSeconds >= during.cpuSeconds, 'and its time is not forgotten')
})

test.run()
