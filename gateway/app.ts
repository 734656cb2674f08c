/** The gateway’s HTTP surface, put together. */
import type { HttpBindings } from '@hono/node-server'
import { Hono } from 'hono'
import type { ContentfulStatusCode } from 'hono/utils/http-status'
import { BusUnavailable, Problem, StreamFull } from '../shared/errors.ts'
import { eventJsonSchemas } from '../shared/events.ts'
import type { Logger } from '../shared/process.ts'
import { openApiDocument } from './openapi.ts'
import { type WorkloadRoutes, workloadRoutes } from './workloads.ts'

export interface AppOptions extends WorkloadRoutes {
  log: Logger
}

const methods = ['GET', 'POST', 'PUT', 'PATCH', 'DELETE']

function asProblem(error: Error): Problem {
  if (error instanceof Problem) return error
  if (error instanceof BusUnavailable)
    return new Problem('bus_unavailable', {
      detail: `${error.message}; with an Idempotency-Key it is safe to send again`,
      retryAfterS: 1,
      cause: error,
    })
  if (error instanceof StreamFull)
    return new Problem('storage_full', { detail: error.message, retryAfterS: 10, cause: error })
  return new Problem('internal', {
    detail: 'the request failed inside vulcan; see the gateway’s log',
    cause: error,
  })
}

export function gatewayApp(options: AppOptions): Hono<{ Bindings: HttpBindings }> {
  const { bus, roster, reads, log } = options
  const app = new Hono<{ Bindings: HttpBindings }>()

  app.onError((error, c) => {
    const problem = asProblem(error)
    if (problem.status >= 500 && problem.code === 'internal')
      log.error({ err: error, path: c.req.path }, 'request failed')
    if (problem.retryAfterS !== undefined) c.header('Retry-After', String(problem.retryAfterS))
    return c.body(JSON.stringify(problem), problem.status as ContentfulStatusCode, {
      'Content-Type': 'application/problem+json',
    })
  })
  app.notFound((c) => {
    const allowed = methods.filter((method) =>
      app.router.match(method, c.req.path)[0].some(([[, route]]) => route.method === method),
    )
    if (allowed.length > 0) {
      c.header('Allow', allowed.join(', '))
      throw new Problem('method_not_allowed', { detail: `${c.req.path} takes ${allowed.join(', ')}` })
    }
    throw new Problem('not_found', { detail: `there is no ${c.req.method} ${c.req.path}; see /openapi.json` })
  })

  app.route('/v1/workloads', workloadRoutes(options))
  app.get('/v1/stats', (c) => reads.forward(c))
  app.get('/v1/backends', (c) => c.json({ backends: roster.backends() }))

  const schemas = eventJsonSchemas()
  app.get('/v1/schemas/events', (c) =>
    c.json({ schemas: Object.keys(schemas).map((kind) => ({ kind, url: `/v1/schemas/events/${kind}` })) }),
  )
  app.get('/v1/schemas/events/:kind', (c) => {
    const schema = schemas[c.req.param('kind')]
    if (schema === undefined)
      throw new Problem('not_found', { detail: `there is no event ${c.req.param('kind')}` })
    return c.body(JSON.stringify(schema), 200, { 'Content-Type': 'application/schema+json' })
  })

  let openapi: string | undefined
  app.get('/openapi.json', (c) => {
    openapi ??= JSON.stringify(openApiDocument())
    return c.body(openapi, 200, { 'Content-Type': 'application/json' })
  })

  app.get('/healthz', (c) => c.json({ ok: true }))
  app.get('/readyz', async (c) => {
    const dispatcher = await reads.readiness()
    const runners = roster.backends().reduce((sum, backend) => sum + backend.runners.length, 0)
    const parts = {
      bus: bus.connected ? 'ok' : 'the message bus cannot be reached',
      database: dispatcher.ready ? 'ok' : dispatcher.reason,
      runners: runners > 0 ? 'ok' : 'no runner is alive',
    }
    const ready = Object.values(parts).every((part) => part === 'ok')
    if (!ready) c.header('Retry-After', '1')
    return c.json({ ready, parts }, ready ? 200 : 503)
  })
  return app
}
