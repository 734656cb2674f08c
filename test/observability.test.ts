// timeout: 300
/** What is offered for Prometheus and Grafana, held against a real Prometheus that scrapes a real platform. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempDisposable, readFile, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { DispatcherMetrics } from '../dispatcher/metrics.ts'
import { GatewayMetrics } from '../gateway/metrics.ts'
import { RunnerMetrics } from '../runners/metrics.ts'
import { tryPort } from '../scripts/ports.ts'
import { skip } from './harness.ts'
import { http, startTestPlatform } from './platform.ts'
import { checkRules, findPrometheus, type Prometheus, testRules } from './prometheus.ts'
import { until } from './shared/support.ts'

const folder = join(import.meta.dirname, '..', 'observability')
const rulesFile = join(folder, 'alerts.yml')

interface Panel {
  id: number
  title: string
  gridPos: { x: number; y: number; w: number; h: number }
  targets?: { expr: string }[]
}
const dashboard = JSON.parse(await readFile(join(folder, 'grafana', 'vulcan.json'), 'utf8')) as {
  panels: Panel[]
  templating: { list: { query: string | { query: string } }[] }
}
/** As Grafana asks it with everything chosen. */
const queries = dashboard.panels.flatMap(({ title, targets = [] }) =>
  targets.map(({ expr }) => ({
    title,
    query: expr.replaceAll('$__rate_interval', '1m').replaceAll(/\$(isolation|function)/g, '.*'),
  })),
)

interface Rule {
  name: string
  query: string
  labels: Record<string, string>
  annotations: Record<string, string>
}

/** Begins with a trace that is sampled. */
const traceId = '4bf92f3577b34da6a3ce929d0e0e4736'

interface Server extends AsyncDisposable {
  url: string
}

/** Scrapes the gateway every second, and has the alert rules. */
async function startPrometheus({ prometheus }: Prometheus, gateway: string): Promise<Server> {
  await using scope = new AsyncDisposableStack()
  const dir = scope.use(await mkdtempDisposable(join(tmpdir(), 'vulcan-test-')))
  const port = await tryPort('127.0.0.1', 0)
  const { host } = new URL(gateway)
  const config = {
    global: { scrape_interval: '1s', evaluation_interval: '1s' },
    rule_files: [rulesFile],
    scrape_configs: [{ job_name: 'vulcan', static_configs: [{ targets: [host] }] }],
  }
  await writeFile(join(dir.path, 'prometheus.yml'), JSON.stringify(config))
  const child = spawn(
    prometheus,
    [
      `--config.file=${join(dir.path, 'prometheus.yml')}`,
      `--storage.tsdb.path=${join(dir.path, 'data')}`,
      `--web.listen-address=127.0.0.1:${port}`,
      '--enable-feature=exemplar-storage',
      '--log.level=error',
    ],
    { stdio: ['ignore', 'ignore', 'inherit'] },
  )
  const ended = once(child, 'exit')
  scope.defer(async () => {
    child.kill('SIGKILL')
    await ended
  })
  const url = `http://127.0.0.1:${port}`
  await until(
    'Prometheus to be ready',
    async () => (await fetch(`${url}/-/ready`).catch(() => undefined))?.ok || undefined,
    60_000,
  )
  const resources = scope.move()
  return { url, [Symbol.asyncDispose]: () => resources.disposeAsync() }
}

// biome-ignore lint/suspicious/noExplicitAny: answers are looked into field by field.
async function ask(server: Server, path: string, query: Record<string, string> = {}): Promise<any> {
  const { body } = await http(`${server.url}/api/v1/${path}?${new URLSearchParams(query)}`)
  if (body.status !== 'success') throw new Error(`${JSON.stringify(query)}: ${JSON.stringify(body)}`)
  return body.data
}

/** Names of metrics in a query, without what a histogram’s series add to it. */
const metricsIn = (query: string): string[] =>
  [...query.matchAll(/\bvulcan_[a-z_]+/g)].map(([name]) => name.replace(/_(bucket|sum|count)$/, ''))

const registries = [new GatewayMetrics('x'), new RunnerMetrics('x', 'microvm', async () => undefined)]
const declared = new Set(
  registries.flatMap(({ registry }) => registry.getMetricsAsArray().map(({ name }) => name as string)),
)
for (const { name } of new DispatcherMetrics('x').registry.getMetricsAsArray()) declared.add(name as string)

test('panels have ids of their own, and do not lie over each other', () => {
  const { panels } = dashboard
  assert.is(new Set(panels.map(({ id }) => id)).size, panels.length)
  const cells = new Set<string>()
  for (const { title, gridPos } of panels)
    for (let x = gridPos.x; x < gridPos.x + gridPos.w; x++)
      for (let y = gridPos.y; y < gridPos.y + gridPos.h; y++) {
        assert.ok(x < 24 && !cells.has(`${x} ${y}`), `${title} at ${x} ${y}`)
        cells.add(`${x} ${y}`)
      }
})

const found = await findPrometheus().catch((error: Error) => error.message)
if (typeof found === 'string') skip(test, 'alerts and dashboard in a real Prometheus', `not there: ${found}`)
else {
  test('promtool takes the rules, and each says what is wrong and what to do', async () => {
    assert.is(await checkRules(found, rulesFile), '')
  })

  test('alerts fire when they should, and only then', async () => {
    assert.is(await testRules(found, join(import.meta.dirname, 'alerts.yml')), '')
  })

  test('a real Prometheus scrapes a gateway, with exemplars, and every query of alerts and dashboard is about something', async () => {
    await using platform = await startTestPlatform()
    await using server = await startPrometheus(found, platform.url)
    const run = () =>
      http(`${platform.url}/v1/workloads`, {
        body: { code: 'export default () => 1' },
        headers: { traceparent: `00-${traceId}-00f067aa0ba902b7-01` },
      })
    await run()
    const target = await until('a scrape', async () => {
      const [one] = (await ask(server, 'targets')).activeTargets
      return one === undefined || one.health === 'unknown' ? undefined : one
    })
    assert.equal([target.health, target.lastError], ['up', ''])

    const { groups } = await ask(server, 'rules')
    const rules = groups.flatMap((group: { rules: Rule[] }) => group.rules) as Rule[]
    assert.is(new Set(rules.map(({ name }) => name)).size, rules.length)
    for (const { name, labels, annotations } of rules) {
      assert.ok(['critical', 'warning', 'info'].includes(labels.severity!), name)
      assert.ok(annotations.summary!.length > 10 && annotations.action!.length > 20, name)
    }

    const names = (await ask(server, 'label/__name__/values')) as string[]
    for (const name of names) if (name.startsWith('vulcan_')) declared.add(metricsIn(name)[0]!)
    for (const { query } of [...rules, ...queries])
      for (const metric of metricsIn(query)) assert.ok(declared.has(metric), `${metric} in ${query}`)
    for (const { title, query } of queries)
      await ask(server, 'query', { query }).catch((error) => assert.unreachable(`${title}: ${error}`))

    await until('work to be seen', async () => {
      await run()
      const query =
        'histogram_quantile(0.95, sum by (le, isolation) (rate(vulcan_run_duration_seconds_bucket[1m])))'
      const { result } = await ask(server, 'query', { query })
      return Number(result[0]?.value[1]) > 0 || undefined
    })
    await until('its trace', async () => {
      const query = {
        query: 'vulcan_run_duration_seconds_bucket',
        start: '0',
        end: String(Date.now() / 1_000),
      }
      const series = await ask(server, 'query_exemplars', query)
      const [first] = series.flatMap((one: { exemplars: { labels: object }[] }) => one.exemplars)
      if (first !== undefined) assert.equal(first.labels, { trace_id: traceId })
      return first
    })
    const firing = (await ask(server, 'alerts')).alerts.filter(
      (alert: { state: string }) => alert.state === 'firing',
    )
    assert.equal(firing, [], 'nothing is wrong')
  })
}

test.run()
