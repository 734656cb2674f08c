/** `GET /metrics`: what all processes on the bus count, as one page; with `?own` what this gateway counts alone. */
import { Hono } from 'hono'
import type { Bus } from '../shared/bus.ts'
import { familiesOf, metricsPage } from '../shared/metrics.ts'
import { MetricsGatherer } from '../shared/metrics-answer.ts'
import type { GatewayMetrics } from './metrics.ts'
import type { Roster } from './roster.ts'

export interface ScrapeOptions {
  bus: Bus
  gatewayId: string
  roster: Pick<Roster, 'backends'>
  metrics: GatewayMetrics
}

export function scrapeRoutes({ bus, gatewayId, roster, metrics }: ScrapeOptions): Hono {
  const app = new Hono()
  const runners = () => roster.backends().flatMap((backend) => backend.runners.map(({ runner }) => runner))
  const gatherer = new MetricsGatherer(bus, gatewayId, runners)

  app.get('/', async (c) => {
    const others = c.req.query('own') === undefined ? await gatherer.gather() : undefined
    if (others !== undefined) metrics.gathered(others)
    const own = await familiesOf(metrics.registry)
    const { body, contentType } = await metricsPage(
      [...own, ...(others?.families ?? [])],
      c.req.header('accept'),
    )
    return c.body(body, 200, { 'Content-Type': contentType, 'Cache-Control': 'no-store' })
  })
  return app
}
