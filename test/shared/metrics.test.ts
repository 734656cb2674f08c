import { setTimeout as delay } from 'node:timers/promises'
import { Histogram } from 'prom-client'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Bus } from '../../shared/bus.ts'
import {
  BoundedLabel,
  byteBuckets,
  Count,
  createRegistry,
  Distribution,
  type Family,
  familiesOf,
  metricsPage,
  Reading,
} from '../../shared/metrics.ts'
import { answerMetrics, MetricsGatherer } from '../../shared/metrics-answer.ts'
import { metricsSubject } from '../../shared/subjects.ts'
import { startNats } from '../nats.ts'

const openMetrics = 'application/openmetrics-text;version=1.0.0,text/plain;q=0.5'
const trace = '0123456789abcdef0123456789abcdef'

const linesOf = async (families: Family[], accept?: string) =>
  (await metricsPage(families, accept)).body.split('\n')

test('a label has no more values than its bound, and the first keep theirs', () => {
  const label = new BoundedLabel(2)
  assert.equal(
    ['a', 'b', 'c', 'a', undefined, null].map((name) => label.of(name)),
    ['a', 'b', '_other', 'a', '', ''],
  )
})

test('what several processes count stands under one name, each with its own labels', async () => {
  const families = []
  for (const process of ['one', 'two']) {
    const registry = createRegistry('vulcan-runner', process, { isolation: 'isolate' })
    const count = new Count({ name: 'vulcan_x_total', help: 'x', labels: ['a', 'b'], registry })
    count.add(1, 'p', 'q')
    count.add(2, 'p', 'q')
    count.add(1, 'q', 'p')
    new Count({ name: 'vulcan_never_total', help: 'y', labels: ['a'], registry })
    families.push(...(await familiesOf(registry)))
  }
  const series = (process: string) => `service="vulcan-runner",process="${process}",isolation="isolate"`
  assert.equal(
    (await linesOf(families)).filter(Boolean),
    [
      '# HELP vulcan_x_total x',
      '# TYPE vulcan_x_total counter',
      ...['one', 'two'].flatMap((process) => [
        `vulcan_x_total{a="p",b="q",${series(process)}} 3`,
        `vulcan_x_total{a="q",b="p",${series(process)}} 1`,
      ]),
    ],
    'and what was never counted is left out',
  )
})

test('label values that hold anything cannot break the page', async () => {
  const registry = createRegistry('vulcan-gateway', 'g')
  new Count({ name: 'vulcan_x_total', help: 'x', labels: ['a'], registry }).add(1, 'say "\\n"\nx 1')
  const lines = await linesOf(await familiesOf(registry))
  assert.ok(
    lines.includes('vulcan_x_total{a="say \\"\\\\n\\"\\nx 1",service="vulcan-gateway",process="g"} 1'),
  )
})

test('a measurement of a sampled trace leads to it, in OpenMetrics alone', async () => {
  const registry = createRegistry('vulcan-gateway', 'g')
  const took = new Distribution({ name: 'vulcan_took_seconds', help: 't', labels: ['a'], registry })
  took.add(0.3, `00-${trace}-0123456789abcdef-01`, 'sampled')
  took.add(0.3, `00-${trace}-0123456789abcdef-00`, 'not')
  took.add(Number.NaN, undefined, 'no number')
  const families = await familiesOf(registry)
  const plain = await linesOf(families)
  assert.not.match(plain.join('\n'), 'trace_id')
  assert.is(plain.filter((line) => line.startsWith('vulcan_took_seconds_count')).length, 2)
  const lines = await linesOf(families, openMetrics)
  const exemplars = lines.filter((line) => line.includes('trace_id'))
  assert.is(exemplars.length, 1)
  assert.match(
    exemplars[0]!,
    new RegExp(
      `^vulcan_took_seconds_bucket{le="0.5",a="sampled",.*} 1 # {trace_id="${trace}"} 0.3 \\d+(\\.\\d+)?$`,
    ),
  )
  assert.is(lines.at(-2), '# EOF')
})

test('a distribution is told as the library tells its own', async () => {
  const name = 'vulcan_took_seconds'
  const buckets = [0.1, 1, 10]
  const pages = []
  for (const labels of [[], ['a', 'b']] as const) {
    const registries = [createRegistry('vulcan-gateway', 'g'), createRegistry('vulcan-gateway', 'g')] as const
    const ours = new Distribution<readonly string[]>({
      name,
      help: 't',
      labels,
      buckets,
      registry: registries[0],
    })
    const theirs = new Histogram({ name, help: 't', labelNames: labels, buckets, registers: [registries[1]] })
    const page = async () =>
      await Promise.all(
        registries.map(async (registry) => (await metricsPage(await familiesOf(registry), openMetrics)).body),
      )
    pages.push(await page())
    for (const value of [0, 0.1, 0.100001, 5, 10, 10.5, 1e9])
      for (const b of ['p', 'q']) {
        ours.add(value, undefined, ...labels.map((label) => (label === 'a' ? 'x' : b)))
        theirs.observe(Object.fromEntries(labels.map((label) => [label, label === 'a' ? 'x' : b])), value)
      }
    pages.push(await page())
  }
  for (const [ours, theirs] of pages) assert.is(ours, theirs)
})

test('figures are read when somebody asks, and what is not known is left out', async () => {
  const registry = createRegistry('vulcan-gateway', 'g')
  let asked = 0
  const before = async () => void asked++
  const reading = new Reading({ name: 'vulcan_size_bytes', help: 's', labels: ['of'], registry, before })
  reading.from(() => asked * 10, 'a')
  reading.from(() => undefined, 'b')
  const slowly = {
    name: 'vulcan_size_total',
    help: 's',
    labels: [],
    registry,
    before: () => delay(5),
  } as const
  const total = new Reading(slowly)
  total.from(() => 7)
  for (const value of [10, 20]) {
    const [size, grown] = await familiesOf(registry)
    assert.equal(
      size!.values.map(({ value, labels }) => [value, labels.of]),
      [[value, 'a']],
    )
    assert.equal([grown!.type, grown!.values[0]!.value], ['counter', 7])
  }
  const both = await Promise.all([familiesOf(registry), familiesOf(registry)])
  assert.equal(
    both.map(([, grown]) => grown!.values[0]!.value),
    [7, 7],
    'two who ask at once are told the same',
  )
  assert.is(byteBuckets.at(-1), 16 * 2 ** 30)
})

test('a gateway gathers what all processes count, and knows who is missing', async () => {
  await using nats = await startNats()
  await using asking = await Bus.connect({ url: nats.url, name: 'asking' })
  await using bus = await Bus.connect({ url: nats.url, name: 'answering' })
  const registryOf = (process: string) => {
    const registry = createRegistry('vulcan-runner', process)
    new Count({ name: 'vulcan_x_total', help: 'x', labels: [], registry }).add(1)
    return registry
  }
  let expected = ['one']
  const gatherer = new MetricsGatherer(asking, 'asking', () => expected, 1_500)
  assert.equal(await gatherer.gather(), { families: [], answered: [], missing: ['one'] })
  expected = []
  await gatherer.gather()
  await gatherer.gather()

  using _self = answerMetrics(asking, 'asking', registryOf('asking'))
  // It takes its time, and is waited for though nobody expects it the first time.
  const slow = registryOf('one')
  const before = () => delay(300)
  new Reading({ name: 'vulcan_y_bytes', help: 'y', labels: [], registry: slow, before }).from(() => undefined)
  using _one = answerMetrics(bus, 'one', slow)
  const two = answerMetrics(bus, 'two', registryOf('two'))
  // Whoever answers something else harms nobody.
  bus.listen(metricsSubject, (message) => message.respond('{"process":1}'))
  await bus.flush()
  const first = await gatherer.gather()
  assert.equal([first.answered.sort(), first.missing], [['one', 'two'], []])
  const counts = first.families.filter(({ name }) => name === 'vulcan_x_total')
  assert.equal(counts.map(({ values }) => values[0]!.labels.process).sort(), ['one', 'two'])

  two[Symbol.dispose]()
  await bus.flush()
  const rounds = []
  for (let n = 0; n < 4; n++) rounds.push((await gatherer.gather()).missing)
  assert.equal(rounds, [['two'], ['two'], ['two'], []], 'one that is gone is not waited for for ever')
  const [same, other] = await Promise.all([gatherer.gather(), gatherer.gather()])
  assert.is(same, other, 'those who ask at once are answered together')
})

test.run()
