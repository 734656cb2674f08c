/**
 * Calls by HTTP of what only knows JSON, a command or a Python handler: the body is the input, the output is the
 * answer, as `callJson` of the isolate has it.
 */
import { queryOf } from '../guest/heads.ts'
import {
  type HttpRequest,
  type HttpResponse,
  inlineResponseBytes,
  type Outcome,
  type RunEvents,
} from '../runner.ts'

/** Of a request’s body, bytes. */
const maxBodyBytes = 64 * 1_048_576

/** The input, or the answer where there is none: the caller’s mistake, not the code’s. */
export type Entered = { input: string | undefined } | { status: number; title: string; detail: string }

export async function inputOf({ method, url, body }: HttpRequest): Promise<Entered> {
  const bytes = await collect(body)
  if (bytes === undefined)
    return {
      status: 413,
      title: 'The body is too large',
      detail: `the body has more than ${maxBodyBytes} bytes`,
    }
  const reads = method === 'GET' || method === 'HEAD'
  if (bytes.length === 0) return { input: reads ? queryOf(url) : undefined }
  const input = bytes.toString()
  try {
    JSON.parse(input)
  } catch (error) {
    const detail = `the body is not JSON: ${(error as Error).message}`
    return { status: 400, title: 'The body is not JSON', detail }
  }
  return { input }
}

async function collect(body: HttpRequest['body']): Promise<Buffer | undefined> {
  if (body === null) return Buffer.alloc(0)
  if (body instanceof Uint8Array) return Buffer.from(body)
  const pieces: Uint8Array[] = []
  let size = 0
  for await (const piece of body) {
    size += piece.length
    if (size > maxBodyBytes) return undefined
    pieces.push(piece)
  }
  return Buffer.concat(pieces)
}

export const problem = ({ status, title, detail }: Exclude<Entered, { input: unknown }>) => ({
  status,
  headers: [['content-type', 'application/problem+json']] satisfies HttpResponse['headers'],
  body: Buffer.from(JSON.stringify({ title, status, detail })),
})

const head: HttpResponse = { status: 200, headers: [['content-type', 'application/json']] }

/** An outcome with its output as the answer. */
export async function answered(outcome: Outcome, events: RunEvents, signal: AbortSignal): Promise<Outcome> {
  if (outcome.status !== 'completed') return outcome
  const body = Buffer.from(outcome.output)
  const done = { ...outcome, output: 'null' }
  if (body.length <= inlineResponseBytes) return { ...done, response: { ...head, body } }
  const sink = events.respond(head)
  const { usage, start } = outcome
  try {
    const gaveUp = new Promise<never>((_, reject) => {
      if (signal.aborted) reject(new Error('the call was stopped'))
      signal.addEventListener('abort', () => reject(new Error('the call was stopped')), { once: true })
    })
    await Promise.race([sink.write(body), gaveUp])
    sink.end()
  } catch (error) {
    // Also where nobody takes it any more: then it is harmless.
    sink.fail((error as Error).message)
    if (signal.aborted) return { status: 'stopped', usage, start }
  }
  return done
}
