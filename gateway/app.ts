/** The gateway’s HTTP surface, put together. */
import type { IncomingMessage, ServerResponse } from 'node:http'
import type { Http2Bindings, HttpBindings } from '@hono/node-server'
import { Hono } from 'hono'
import type { ContentfulStatusCode } from 'hono/utils/http-status'
import { BusUnavailable, MessageTooLarge, Problem, StreamFull } from '../shared/errors.ts'
import { eventJsonSchemas } from '../shared/events.ts'
import type { Logger } from '../shared/process.ts'
import { type BlobRoutes, blobRoutes } from './blobs.ts'
import { type FunctionRoutes, functionRoutes } from './functions.ts'
import { type InvokeContext, invocationRoutes, invoker, isInvocation } from './invoke.ts'
import { openApiDocument } from './openapi.ts'
import { type Bindings, pathOf, type RequestWatch, RequestWatcher, type Watched } from './requests.ts'
import { scrapeRoutes } from './scrape.ts'
import { type SecretRoutes, secretRoutes } from './secrets.ts'
import { workloadRoutes } from './workloads.ts'

export type AppOptions = InvokeContext &
  FunctionRoutes &
  SecretRoutes &
  BlobRoutes &
  Watched & { log: Logger }

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
  if (error instanceof MessageTooLarge)
    return new Problem('payload_too_large', {
      detail: 'the request and its spec do not fit into a message',
      cause: error,
    })
  return new Problem('internal', {
    detail: 'the request failed inside vulcan; see the gateway’s log',
    cause: error,
  })
}

function problemAnswer(error: Error, path: string, watch: RequestWatch, { log, metrics }: AppOptions) {
  const problem = asProblem(error)
  metrics?.refused(problem.code)
  if (problem.code === 'internal') log.error({ err: error, path, ...watch.fields }, 'request failed')
  const headers: Record<string, string> = {
    'Content-Type': 'application/problem+json',
    traceparent: watch.span.traceparent,
  }
  if (problem.retryAfterS !== undefined) headers['Retry-After'] = String(problem.retryAfterS)
  return { body: JSON.stringify(problem), status: problem.status, headers }
}

/** All that a gateway answers: calls of functions by HTTP, and everything else by its router. */
export function gatewayFetch(
  options: AppOptions,
): (request: Request, env: HttpBindings | Http2Bindings) => Response | Promise<Response> {
  const app = gatewayApp(options)
  const invoke = invoker(options)
  const watcher = new RequestWatcher(options)

  /** As it is declared; empty: there is none. */
  const routeOf = ({ method = 'GET', url = '/' }: IncomingMessage): string => {
    const asked = method === 'HEAD' ? 'GET' : method
    const [handlers] = app.router.match(asked, pathOf(url))
    return handlers.findLast(([[, route]]) => route.method === asked)?.[0][1].path ?? ''
  }

  return (request, env) => {
    // Only HTTP/1.1 is listened to.
    const incoming = env.incoming as IncomingMessage
    const outgoing = env.outgoing as ServerResponse
    if (!isInvocation(incoming)) {
      const watch = watcher.begin(incoming, outgoing, routeOf(incoming))
      return app.fetch(request, { incoming, outgoing, watch })
    }
    const watch = watcher.begin(incoming, outgoing, '/fn/:name')
    return invoke(request, { incoming, outgoing, watch }).catch((error) => {
      const { body, ...init } = problemAnswer(error, '/fn', watch, options)
      return new Response(body, init)
    })
  }
}

export function gatewayApp(options: AppOptions): Hono<{ Bindings: Bindings }> {
  const { bus, roster, reads, metrics, gatewayId } = options
  const app = new Hono<{ Bindings: Bindings }>()

  app.onError((error, c) => {
    const { body, status, headers } = problemAnswer(error, c.req.path, c.env.watch, options)
    return c.body(body, status as ContentfulStatusCode, headers)
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
  app.route('/v1/functions', invocationRoutes(options))
  app.route('/v1/functions', functionRoutes(options))
  app.route('/v1/blobs', blobRoutes(options))
  app.route('/v1/secrets', secretRoutes(options))
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

  if (metrics !== undefined) app.route('/metrics', scrapeRoutes({ bus, gatewayId, roster, metrics }))
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
