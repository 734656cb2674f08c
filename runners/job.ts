/** From an accepted event to what a runner is given: code, archive or image, secrets, request. */
import { setTimeout as delay } from 'node:timers/promises'
import type { Blobs } from '../shared/blobs.ts'
import type { Bus } from '../shared/bus.ts'
import type { AcceptedEvent, HttpCall } from '../shared/events.ts'
import { RunnerExchange } from '../shared/exchange.ts'
import { bodyBytes, unsealHeaders } from '../shared/http.ts'
import type { SecretBox, Secrets } from '../shared/secrets.ts'
import type { Digest } from '../shared/workload.ts'
import type { Bundles } from './bundles.ts'
import type { RunnerMetrics } from './metrics.ts'
import { type Redact, redactor } from './redact.ts'
import type { HttpRequest, Job, Runner } from './runner.ts'
import { type ProgramSpec, programOf, Refusal, timed, unlessGone } from './source.ts'
import type { AttemptSpans } from './spans.ts'

/** Milliseconds that a secret put a moment ago is given to get here. */
const secretDelayMs = 300

export interface JobContext {
  bus: Bus
  blobs: Blobs
  bundles: Bundles
  secrets: Pick<Secrets, 'values'>
  box: SecretBox
  runner: Runner
  metrics: RunnerMetrics | undefined
}

/** A job with what is needed around it. */
export interface Assignment {
  job: Job
  /** Hides the values of its secrets. */
  redact: Redact | undefined
  /** Set where a gateway’s caller waits for the response as it comes. */
  exchange: RunnerExchange | undefined
  /** The caller is gone. */
  leave(): void
}

/**
 * Throws `Refusal` for what cannot run, `BusUnavailable` where trying again can help. `spans`, where the attempt is
 * traced, are told of what had to be fetched.
 */
export async function toJob(
  context: JobContext,
  accepted: AcceptedEvent,
  attempt: number,
  spans?: AttemptSpans,
): Promise<Assignment> {
  const { spec, bundle, http: call } = accepted.data
  let { code, input } = spec
  if (accepted.data.payload !== null) {
    const { blob } = accepted.data.payload
    const bytes = await timed('fetch payload', blobOf(context, blob, 'payload'), spans?.phase)
    const payload = JSON.parse(Buffer.from(bytes).toString()) as { code?: string; input?: unknown }
    code = payload.code ?? code
    if ('input' in payload) input = payload.input
  }
  const secrets = spec.secrets.length === 0 ? undefined : await secretsOf(context, spec.secrets)
  const auth = spec.image_auth === undefined ? undefined : await secretsOf(context, [spec.image_auth])
  const whole: ProgramSpec = { ...spec, code, bundle, registryUser: auth?.[spec.image_auth!] }
  const traceparent = spans?.runTraceparent ?? accepted.traceparent
  const program = await programOf(context, whole, (phase) => {
    spans?.phase(phase)
    context.metrics?.phase('fetch bundle', (phase.end - phase.start) / 1_000, traceparent)
  })
  const exchange =
    call == null || call.gateway === null
      ? undefined
      : new RunnerExchange(context.bus, call.gateway, accepted.subject)
  const gone = new AbortController()
  return {
    job: {
      id: accepted.subject,
      attempt,
      ...program,
      input: input === undefined ? undefined : JSON.stringify(input),
      http:
        call == null
          ? undefined
          : await requestOf(context, accepted, call, exchange, gone.signal, traceparent),
      env: secrets === undefined ? spec.env : { ...spec.env, ...secrets },
      function: accepted.data.function ?? undefined,
      traceparent,
      traced: spans !== undefined,
    },
    redact: secrets === undefined && auth === undefined ? undefined : redactor(hidden(secrets, auth)),
    exchange,
    leave() {
      gone.abort(new DOMException('The caller is gone', 'AbortError'))
      exchange?.leave()
    },
  }
}

/** Every value that is not to be seen; of a registry’s user the password by itself too. */
const hidden = (
  secrets: Record<string, string> = {},
  auth: Record<string, string> = {},
): Record<string, string> => ({
  ...secrets,
  ...auth,
  ...Object.fromEntries(
    Object.entries(auth).map(([name, value]) => [`${name} password`, value.slice(value.indexOf(':') + 1)]),
  ),
})

async function secretsOf({ secrets }: JobContext, names: string[]): Promise<Record<string, string>> {
  try {
    return secrets.values(names)
  } catch {
    await delay(secretDelayMs)
  }
  try {
    return secrets.values(names)
  } catch (cause) {
    throw new Refusal('invalid_workload', (cause as Error).message, { cause })
  }
}

async function requestOf(
  context: JobContext,
  accepted: AcceptedEvent,
  call: HttpCall,
  exchange: RunnerExchange | undefined,
  gone: AbortSignal,
  traceparent: string | undefined,
): Promise<HttpRequest> {
  let { headers } = call
  try {
    headers = unsealHeaders(call, context.box, accepted.subject)
  } catch (cause) {
    throw new Refusal('internal', 'its credential headers were encrypted with another key', { cause })
  }
  if (traceparent !== undefined) headers = [...headers, ['traceparent', traceparent]]
  const { body } = call
  if (body === 'live' && exchange === undefined)
    throw new Refusal('internal', 'the body of its request was not kept')
  return {
    method: call.method,
    url: withoutPrefix(call.url),
    headers,
    body:
      body === 'live'
        ? exchange!.body()
        : await bodyBytes(body, (digest) => blobOf(context, digest, 'request body')),
    gone,
  }
}

/** `http://host/fn/name@ref/rest?query` without `/fn/name@ref`. */
export function withoutPrefix(url: string): string {
  const path = url.indexOf('/', url.indexOf('//') + 2)
  const prefix = /^\/fn\/[^/?#]*/.exec(url.slice(path))?.[0].length ?? 0
  const rest = url.slice(path + prefix)
  return `${url.slice(0, path)}${rest.startsWith('/') ? '' : '/'}${rest}`
}

async function blobOf({ blobs }: JobContext, digest: Digest, what: string): Promise<Uint8Array> {
  const bytes = await unlessGone(blobs.get(digest), `its ${what} ${digest}`)
  if (bytes === undefined) throw new Refusal('internal', `its ${what} ${digest} is no longer stored`)
  return bytes
}
