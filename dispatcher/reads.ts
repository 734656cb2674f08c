/**
 * What the dispatcher answers over HTTP: the public forms, which the gateway hands on byte by byte, and
 * `/internal/workloads/:id` for the gateway itself.
 */
import { Hono } from 'hono'
import { Problem } from '../shared/errors.ts'
import { toWorkload } from '../shared/lifecycle.ts'
import { familiesOf, metricsPage, type Registry } from '../shared/metrics.ts'
import type { Logger } from '../shared/process.ts'
import {
  type DispatcherReadiness,
  ListQuery,
  LogQuery,
  lastEventId,
  logStart,
  parseQuery,
  StatsQuery,
} from '../shared/reads.ts'
import type { TraceLink } from '../shared/trace.ts'
import { type FoundRow, freshRow } from './find.ts'
import { toRecord } from './fold.ts'
import { listWorkloads } from './list.ts'
import type { Live } from './live.ts'
import { logPage } from './logreads.ts'
import { partsOf } from './readiness.ts'
import { logStream } from './sse.ts'
import { readStats } from './stats.ts'

/** Milliseconds that statistics are answered from memory. */
const statsFreshMs = 2_000
/** Statistics look back this far (ms) unless told. */
const statsWindowMs = 24 * 3_600_000

export interface ReadsOptions {
  live: Live
  logsKeptMs: number
  traceUrl: TraceLink
  /** Of what the dispatcher counts. */
  registry: Registry
  log: Logger
  /** Ends open log streams. */
  stop: AbortSignal
}

export function readsApp({ live, logsKeptMs, traceUrl, registry, log, stop }: ReadsOptions): Hono {
  const app = new Hono()
  let stats: { window: string; until: number; body: Promise<string> } | undefined

  app.get('/v1/workloads', async (c) => {
    const query = parseQuery(ListQuery, new URL(c.req.url).searchParams)
    return c.json(await live.read((database) => listWorkloads(database, query, traceUrl)))
  })

  app.get('/v1/workloads/:id', async (c) => {
    const row = await freshRow(live, c.req.param('id'))
    return json(await workloadJson(live, row, traceUrl))
  })

  app.get('/internal/workloads/:id', async (c) => c.json(toRecord(await freshRow(live, c.req.param('id')))))

  app.get('/v1/workloads/:id/logs', async (c) => {
    const query = parseQuery(LogQuery, new URL(c.req.url).searchParams)
    const id = c.req.param('id')
    if (c.req.header('accept')?.includes('text/event-stream')) {
      const header = c.req.header('last-event-id')
      const from = header ? lastEventId(header) : (query.last_event_id ?? query.cursor ?? logStart)
      await freshRow(live, id)
      return new Response(logStream(live, id, { from, logsKeptMs, stop }), {
        headers: {
          'content-type': 'text/event-stream',
          'cache-control': 'no-cache, no-transform',
          'x-accel-buffering': 'no',
        },
      })
    }
    const row = await freshRow(live, id)
    return c.json(await logPage(live, id, row, query.cursor, query.limit, logsKeptMs, c.req.raw.signal))
  })

  app.get('/v1/stats', async (c) => {
    const { since } = parseQuery(StatsQuery, new URL(c.req.url).searchParams)
    const window = since ?? ''
    if (stats === undefined || stats.window !== window || stats.until < Date.now()) {
      const from = since === undefined ? new Date(Date.now() - statsWindowMs) : new Date(since)
      const body = live.read((database) => readStats(database, from)).then((answer) => JSON.stringify(answer))
      stats = { window, until: Date.now() + statsFreshMs, body }
      body.catch(() => {
        stats = undefined
      })
    }
    return json(await stats.body)
  })

  app.get('/healthz', (c) => c.json({ alive: true }))

  app.get('/readyz', (c) => {
    const parts = partsOf(live)
    const ready = parts.bus.ready && parts.database.ready && parts.fold.ready
    return c.json({ ready, parts } satisfies DispatcherReadiness, ready ? 200 : 503)
  })

  app.get('/metrics', async (c) => {
    const { body, contentType } = await metricsPage(await familiesOf(registry), c.req.header('accept'))
    return new Response(body, { headers: { 'content-type': contentType } })
  })

  app.notFound((c) =>
    problemResponse(new Problem('not_found', { detail: `there is no ${c.req.method} ${c.req.path}` })),
  )
  app.onError((error) => {
    if (error instanceof Problem) return problemResponse(error)
    log.error({ err: error }, 'a request failed')
    return problemResponse(new Problem('internal', { detail: 'the dispatcher could not answer' }))
  })
  return app
}

const json = (body: string | Uint8Array<ArrayBuffer>) =>
  new Response(body, { headers: { 'content-type': 'application/json' } })

/** The public answer as JSON. An output is put in as it was stored, without being parsed: it can be 64 MB. */
async function workloadJson(
  live: Live,
  row: FoundRow,
  traceUrl: TraceLink,
): Promise<string | Uint8Array<ArrayBuffer>> {
  const record = toRecord({ record: row.record, output: null, response: null, spec: 'null' })
  const { output: _, ...rest } = toWorkload(record, null, traceUrl)
  const head = `${JSON.stringify(rest).slice(0, -1)},"output":`
  if (record.output_blob === null) return `${head}${row.output ?? 'null'}}`
  if (live.connectedBus === undefined || live.blobs === undefined)
    throw new Problem('bus_unavailable', {
      detail: 'the output is in the object store, which cannot be reached',
      retryAfterS: 1,
    })
  const output = await live.blobs.get(record.output_blob.blob).catch((cause) => {
    throw new Problem('bus_unavailable', { detail: 'the output could not be read', retryAfterS: 1, cause })
  })
  return Buffer.concat([Buffer.from(head), output ?? Buffer.from('null'), Buffer.from('}')])
}

function problemResponse(problem: Problem): Response {
  const headers = new Headers({ 'content-type': 'application/problem+json' })
  if (problem.retryAfterS !== undefined) headers.set('retry-after', String(problem.retryAfterS))
  return new Response(JSON.stringify(problem), { status: problem.status, headers })
}
