/** The OpenAPI 3.1 document, made from the schemas that the routes parse with. */
import { z } from 'zod'
import { createDocument, type ZodOpenApiOperationObject, type ZodOpenApiPathsObject } from 'zod-openapi'
import { Backend } from '../shared/backends.ts'
import { LogLine, Workload, WorkloadId, WorkloadSpec } from '../shared/workload.ts'
import { functionPaths } from './openapi-functions.ts'
import { answers, json, problem, runHeaders, tracedAnswers, unavailable } from './openapi-parts.ts'

const id = z.object({ id: WorkloadId })
const run = (summary: string, sync: boolean): ZodOpenApiOperationObject => ({
  summary,
  requestParams: { header: runHeaders },
  requestBody: { required: true, content: json(WorkloadSpec) },
  responses: {
    ...(sync
      ? { '200': tracedAnswers('The finished workload, also when it failed or was killed', Workload) }
      : {}),
    '202': tracedAnswers('Accepted; not done yet', Workload),
    '400': problem('Not JSON, or a bad header'),
    '404': problem('No such blob'),
    '409': problem('The idempotency key was used with another body'),
    '413': problem('The body is too large'),
    '415': problem('The body is not declared as JSON'),
    '422': problem('The spec is not acceptable'),
    '503': unavailable,
  },
})

const stop = (summary: string): ZodOpenApiOperationObject => ({
  summary,
  requestParams: { path: id },
  responses: {
    '200': tracedAnswers('The workload, ended', Workload),
    '404': problem('No such workload'),
    '503': unavailable,
  },
})

const paths: ZodOpenApiPathsObject = {
  '/v1/workloads': {
    post: run('Run a workload and wait for its end', true),
    get: {
      summary: 'List workloads, newest first',
      requestParams: {
        query: z.object({
          status: z.string().optional(),
          isolation: z.string().optional(),
          function: z.string().optional(),
          label: z.string().optional().meta({ description: '`name` or `name=value`; may be repeated' }),
          since: z.iso.datetime().optional(),
          limit: z.int().min(1).max(200).optional(),
          cursor: z.string().optional(),
        }),
      },
      responses: {
        '200': answers(
          'A page',
          z.object({
            workloads: z.array(Workload.omit({ output: true })),
            next_cursor: z.string().nullable(),
          }),
        ),
        '400': problem('A bad parameter'),
        '503': unavailable,
      },
    },
  },
  '/v1/workloads/async': { post: run('Run a workload in the background', false) },
  '/v1/workloads/{id}': {
    get: {
      summary: 'The workload now',
      requestParams: { path: id },
      responses: {
        '200': answers('The workload', Workload),
        '404': problem('No such workload'),
        '503': unavailable,
      },
    },
    delete: stop('Stop a workload'),
  },
  '/v1/workloads/{id}/kill': { post: stop('Stop a workload') },
  '/v1/workloads/{id}/rerun': {
    post: {
      summary: 'A new workload from the same spec',
      requestParams: { path: id, header: runHeaders.pick({ prefer: true, traceparent: true }) },
      responses: {
        '200': tracedAnswers('With `Prefer: wait`: the finished workload', Workload),
        '202': tracedAnswers('Accepted', Workload),
        '404': problem('No such workload, or a blob that it needs is no longer stored'),
        '409': problem('Its request was streamed and not kept'),
        '503': unavailable,
      },
    },
  },
  '/v1/workloads/{id}/response': {
    get: {
      summary: 'What an invocation by HTTP answered: its status, headers and body',
      requestParams: { path: id },
      responses: {
        default: { description: 'The response as the function gave it' },
        '404': problem('It has not ended yet, gave no response, or the response was streamed and not kept'),
        '503': unavailable,
      },
    },
  },
  '/v1/workloads/{id}/logs': {
    get: {
      summary: 'Log lines: a stream with `Accept: text/event-stream`, else a page',
      requestParams: {
        path: id,
        header: z.object({ 'last-event-id': z.string().optional() }),
        query: z.object({ limit: z.int().optional(), cursor: z.string().optional() }),
      },
      responses: {
        '200': {
          description: 'Events `log`, `gap` and `end`; or a page',
          content: {
            'text/event-stream': { schema: z.string() },
            'application/json': {
              schema: z.object({
                lines: z.array(LogLine.extend({ id: z.string(), attempt: z.int() })),
                next_cursor: z.string().nullable(),
                complete: z.boolean(),
              }),
            },
          },
        },
        '404': problem('No such workload'),
        '503': unavailable,
      },
    },
  },
  ...functionPaths,
  '/v1/backends': {
    get: {
      summary: 'Isolations, what they can do and who runs them',
      responses: { '200': answers('All isolations', z.object({ backends: z.array(Backend) })) },
    },
  },
  '/v1/stats': {
    get: {
      summary: 'Counts, success rate, durations and queue waits',
      responses: { '200': answers('Statistics', z.looseObject({})), '503': unavailable },
    },
  },
  '/v1/schemas/events': {
    get: {
      summary: 'The public events',
      responses: {
        '200': answers(
          'Kinds and where their schemas are',
          z.object({ schemas: z.array(z.object({ kind: z.string(), url: z.string() })) }),
        ),
      },
    },
  },
  '/v1/schemas/events/{kind}': {
    get: {
      summary: 'JSON Schema of a public event',
      requestParams: { path: z.object({ kind: z.string() }) },
      responses: { '200': answers('The schema', z.looseObject({})), '404': problem('No such event') },
    },
  },
  '/openapi.json': {
    get: { summary: 'This document', responses: { '200': answers('OpenAPI 3.1', z.looseObject({})) } },
  },
  '/metrics': {
    get: {
      summary: 'What the processes on the bus count and measure, for Prometheus',
      requestParams: {
        query: z.object({
          own: z.string().optional().meta({ description: 'given: of this gateway alone' }),
        }),
      },
      responses: {
        '200': {
          description: 'The text format; OpenMetrics, with exemplars, where `Accept` asks for it',
          content: {
            'text/plain': { schema: z.string() },
            'application/openmetrics-text': { schema: z.string() },
          },
        },
      },
    },
  },
  '/healthz': {
    get: { summary: 'Liveness', responses: { '200': answers('Alive', z.object({ ok: z.boolean() })) } },
  },
  '/readyz': {
    get: {
      summary: 'Readiness, part by part',
      responses: {
        '200': answers('Ready', z.looseObject({})),
        '503': answers('Not ready', z.looseObject({})),
      },
    },
  },
}

export const openApiDocument = () =>
  createDocument({
    openapi: '3.1.0',
    info: { title: 'vulcan', version: '1', description: 'Functions and workloads on your own machines' },
    paths,
  })
