/** The part of the OpenAPI document that is about functions, their bytes and their secrets. */
import { z } from 'zod'
import type { ZodOpenApiOperationObject, ZodOpenApiPathsObject } from 'zod-openapi'
import { AliasName, AliasTarget, BuildWarning, FunctionSpec, FunctionVersion } from '../shared/functions.ts'
import { SecretName, SecretValue } from '../shared/secrets.ts'
import { BlobRef, Digest, FunctionName, VersionId, Workload } from '../shared/workload.ts'
import { answers, json, problem, runHeaders, tracedAnswers, unavailable } from './openapi-parts.ts'

const Time = z.iso.datetime()
const Aliases = z.record(z.string(), AliasTarget)

const FunctionSummary = z
  .object({
    name: FunctionName,
    version: VersionId,
    url: z.url(),
    isolation: z.string().nullable(),
    runtime: z.string().nullable(),
    aliases: Aliases,
    versions: z.int().meta({ description: 'How many there are' }),
    created_at: Time,
    updated_at: Time,
    deleted_at: Time.nullable(),
  })
  .meta({ id: 'FunctionSummary' })

const { bundle, source, spec, routing_reason } = FunctionVersion.shape
const DeployedFunction = FunctionSummary.extend({
  routing_reason: routing_reason.nullable(),
  bundle,
  source,
  spec: spec.nullable(),
  warnings: z.array(BuildWarning),
}).meta({ id: 'DeployedFunction' })

const deployedAt = { deployed_at: Time, latest: z.boolean() }
const ListedVersion = z
  .object({
    version: VersionId,
    created_at: Time.nullable(),
    isolation: z.string().nullable(),
    runtime: z.string().nullable(),
    bundle,
    source,
    ...deployedAt,
  })
  .meta({ id: 'ListedVersion' })

const path = z.object({ name: FunctionName })
const aliasPath = z.object({ name: FunctionName, alias: AliasName })
const called = z.string().meta({ description: 'A function’s name, also with @ and an alias or version' })
const noFunction = problem('No such function, version or alias')
const bytes = { schema: z.string().meta({ format: 'binary' }) }

const invocation = (summary: string, sync: boolean): ZodOpenApiOperationObject => ({
  summary,
  requestParams: {
    path: z.object({ name: called }),
    header: runHeaders,
    query: z.object({ ref: z.string().optional().meta({ description: 'Alias or version' }) }),
  },
  requestBody: { description: 'The input itself', content: json(z.unknown()) },
  responses: {
    ...(sync
      ? { '200': tracedAnswers('The finished workload, also when it failed or was killed', Workload) }
      : {}),
    '202': tracedAnswers('Accepted; not done yet', Workload),
    '400': problem('Not JSON, or a bad header'),
    '404': noFunction,
    '409': problem('The idempotency key was used with another body'),
    '413': problem('The body is too large'),
    '415': problem('The body is not declared as JSON'),
    '429': problem('As many invocations wait as may wait; see Retry-After'),
    '503': unavailable,
  },
})

const call: ZodOpenApiOperationObject = {
  summary:
    'Call the function by HTTP: method, path, query, headers and body reach it, its response comes back',
  description:
    'A body of known length up to 256 KiB is kept with the workload; any other is streamed and has no limit but time. With `Prefer: respond-async` request and response are kept whole.',
  requestParams: {
    header: runHeaders.extend({
      prefer: z.string().optional().meta({ description: '`respond-async`: answered 202, fetched later' }),
    }),
  },
  responses: {
    default: {
      description: 'What the function answers',
      headers: z.object({
        'x-vulcan-workload-id': z.string(),
        'x-vulcan-version': VersionId,
        traceparent: z.string(),
      }),
    },
    '202': tracedAnswers('With `Prefer: respond-async`: accepted', Workload),
    '404': noFunction,
    '429': problem('As many invocations wait as may wait; see Retry-After'),
    '501': problem('Connections cannot be upgraded'),
    '502': problem('The function failed before it answered'),
    '503': problem('The function was stopped before it answered, or the bus cannot be reached'),
    '504': problem('The function did not answer in time'),
  },
}

const anyMethod = (params: z.ZodObject) => {
  const operation = { ...call, requestParams: { ...call.requestParams, path: params } }
  const methods = ['get', 'put', 'post', 'delete', 'options', 'head', 'patch', 'trace'] as const
  return Object.fromEntries(methods.map((method) => [method, operation]))
}

export const functionPaths: ZodOpenApiPathsObject = {
  '/fn/{name}': anyMethod(z.object({ name: called })),
  '/fn/{name}/{path}': anyMethod(z.object({ name: called, path: z.string() })),
  '/v1/functions': {
    get: {
      summary: 'All functions, by name',
      requestParams: { query: z.object({ deleted: z.enum(['true', 'false']).optional() }) },
      responses: { '200': answers('The functions', z.object({ functions: z.array(FunctionSummary) })) },
    },
  },
  '/v1/functions/{name}': {
    put: {
      summary: 'Deploy: a version made of the content becomes the latest',
      requestParams: { path },
      requestBody: {
        required: true,
        description:
          'A spec; or a project as tar.gz or zip, its spec in vulcan.json or in the query (`runtime`, `entrypoint`, `env.NAME=value`, `secrets=A,B`)',
        content: {
          ...json(FunctionSpec),
          'application/gzip': bytes,
          'application/zip': bytes,
          'multipart/form-data': {
            schema: z.object({ spec: z.string().optional(), archive: z.string().meta({ format: 'binary' }) }),
          },
        },
      },
      responses: {
        '200': answers(
          'The same content was there already',
          DeployedFunction.extend({ created: z.boolean() }),
        ),
        '201': answers('A new version', DeployedFunction.extend({ created: z.boolean() })),
        '400': problem('Not JSON, or a bad query'),
        '404': problem('No such blob'),
        '409': problem('Changed by others at the same moment, again and again'),
        '413': problem('The body is too large'),
        '415': problem('A body of another type'),
        '422': problem('The spec is not acceptable, or the project cannot be built: see errors'),
        '503': unavailable,
      },
    },
    get: {
      summary: 'The function and its latest version',
      requestParams: { path },
      responses: { '200': answers('The function', DeployedFunction), '404': noFunction },
    },
    delete: {
      summary: 'Take it out of service; its versions and history are kept',
      requestParams: { path },
      responses: { '204': { description: 'Deleted' }, '404': noFunction, '503': unavailable },
    },
  },
  '/v1/functions/{name}/versions': {
    get: {
      summary: 'All versions, the one deployed last first',
      requestParams: { path },
      responses: {
        '200': answers('The versions', z.object({ versions: z.array(ListedVersion) })),
        '404': noFunction,
      },
    },
  },
  '/v1/functions/{name}/versions/{version}': {
    get: {
      summary: 'One version',
      requestParams: { path: path.extend({ version: VersionId }) },
      responses: {
        '200': answers('The version', FunctionVersion.extend(deployedAt).meta({ id: 'DeployedVersion' })),
        '404': noFunction,
      },
    },
  },
  '/v1/functions/{name}/aliases': {
    get: {
      summary: 'All aliases',
      requestParams: { path },
      responses: { '200': answers('By name', z.object({ aliases: Aliases })), '404': noFunction },
    },
  },
  '/v1/functions/{name}/aliases/{alias}': {
    get: {
      summary: 'What an alias stands for',
      requestParams: { path: path.extend({ alias: z.string() }) },
      responses: { '200': answers('The alias', z.looseObject({ alias: z.string() })), '404': noFunction },
    },
    put: {
      summary: 'Point an alias at a version, or split it between several by weight',
      requestParams: { path: aliasPath },
      requestBody: { required: true, content: json(AliasTarget) },
      responses: {
        '200': answers('Moved; `previous` is what it stood for', z.looseObject({ alias: AliasName })),
        '201': answers('Made', z.looseObject({ alias: AliasName })),
        '404': noFunction,
        '415': problem('The body is not declared as JSON'),
        '422': problem('No such target'),
        '503': unavailable,
      },
    },
    delete: {
      summary: 'Remove an alias',
      requestParams: { path: aliasPath },
      responses: { '204': { description: 'Removed' }, '404': noFunction, '503': unavailable },
    },
  },
  '/v1/functions/{name}/invocations': { post: invocation('Invoke with JSON and wait for the end', true) },
  '/v1/functions/{name}/invocations/async': { post: invocation('Invoke with JSON in the background', false) },
  '/v1/blobs': {
    post: {
      summary: 'Upload bytes',
      requestParams: {
        query: z.object({ digest: Digest.optional().meta({ description: 'What the bytes must be' }) }),
      },
      requestBody: { required: true, content: { 'application/octet-stream': bytes } },
      responses: {
        '200': answers('They were there already', BlobRef),
        '201': answers('Stored', BlobRef),
        '413': problem('The body is too large'),
        '422': problem('The bytes are others than the digest says'),
        '503': unavailable,
      },
    },
  },
  '/v1/blobs/{digest}': {
    get: {
      summary: 'The bytes',
      requestParams: { path: z.object({ digest: Digest }) },
      responses: {
        '200': { description: 'The bytes', content: { 'application/octet-stream': bytes } },
        '404': problem('No such blob'),
        '503': unavailable,
      },
    },
  },
  '/v1/secrets': {
    get: {
      summary: 'The names of all secrets',
      responses: {
        '200': answers('Names only', z.object({ secrets: z.array(z.object({ name: SecretName })) })),
      },
    },
  },
  '/v1/secrets/{name}': {
    put: {
      summary: 'Set a secret; its value never comes back',
      requestParams: { path: z.object({ name: SecretName }) },
      requestBody: { required: true, content: json(SecretValue) },
      responses: {
        '200': answers('Replaced', z.object({ name: SecretName })),
        '201': answers('Set', z.object({ name: SecretName })),
        '400': problem('Not JSON'),
        '422': problem('A name or value that is not acceptable'),
        '503': unavailable,
      },
    },
    delete: {
      summary: 'Remove a secret',
      requestParams: { path: z.object({ name: SecretName }) },
      responses: {
        '204': { description: 'Removed' },
        '404': problem('No such secret'),
        '503': unavailable,
      },
    },
  },
}
