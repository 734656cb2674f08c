/** What functions answer by HTTP, on its way to the caller. */
import type { ServerResponse } from 'node:http'
import { Problem } from '../shared/errors.ts'
import type { HttpAnswer } from '../shared/events.ts'
import { type Inflow, StreamBroken } from '../shared/exchange.ts'
import { bodyBytes, unsealHeaders } from '../shared/http.ts'
import type { HeaderList, WorkloadId } from '../shared/workload.ts'
import type { AdmissionContext } from './admission.ts'
import { endToEnd } from './headers.ts'

type Stores = Pick<AdmissionContext, 'blobs' | 'box'>

/** An answer that was kept, whole. */
export interface WholeAnswer {
  status: number
  headers: HeaderList
  body: Uint8Array
}

/** Opens what an end says of a response. Throws `response_not_found` where its body was not kept. */
export async function openAnswer(
  { blobs, box }: Stores,
  id: WorkloadId,
  answer: HttpAnswer,
): Promise<WholeAnswer> {
  if (answer.body === 'live')
    throw new Problem('response_not_found', {
      detail: `the response of ${id} was streamed to its caller and not kept; call with Prefer: respond-async`,
    })
  const body = await bodyBytes(answer.body, (digest) => blobs.get(digest))
  if (body === undefined)
    throw new Problem('response_not_found', {
      detail: `the body of the response of ${id} is no longer stored`,
    })
  return {
    status: answer.status,
    headers: unsealHeaders(answer, box, id),
    body: body ?? new Uint8Array(),
  }
}

/** `GET /v1/workloads/:id/response`: as the function answered. */
export async function keptResponse(
  stores: Stores,
  id: WorkloadId,
  answer: HttpAnswer | null | undefined,
): Promise<Response> {
  if (answer == null)
    throw new Problem('response_not_found', {
      detail: `workload ${id} ended without a response by HTTP; see /v1/workloads/${id}`,
    })
  const { status, headers, body } = await openAnswer(stores, id, answer)
  const out = new Headers({ 'x-vulcan-workload-id': id })
  const empty = status === 204 || status === 205 || status === 304
  try {
    for (const [name, value] of endToEnd(headers, 'response'))
      if (name !== 'content-length') out.append(name, value)
    return new Response(empty ? null : (body as Uint8Array<ArrayBuffer>), { status, headers: out })
  } catch (cause) {
    throw unsendable(id, cause)
  }
}

/** For a status or a header that is none. */
export const unsendable = (id: WorkloadId, cause: unknown): Problem =>
  new Problem('invocation_failed', {
    detail: `the response of workload ${id} cannot be sent by HTTP: ${(cause as Error).message}`,
    cause,
  })

/** Status and headers that can go over the wire: pairs in one flat list, as Node takes them. */
function writeHead(
  outgoing: ServerResponse,
  status: number,
  headers: HeaderList,
  ours: Record<string, string>,
  length: number | undefined,
): void {
  if (status < 200 || status > 599) throw new RangeError(`${status} is no status of a response`)
  const flat: string[] = []
  for (const [name, value] of endToEnd(headers, 'response'))
    if (name !== 'content-length') flat.push(name, value)
  for (const [name, value] of Object.entries(ours)) flat.push(name, value)
  if (length !== undefined) flat.push('content-length', String(length))
  outgoing.writeHead(status, flat)
}

const declaredLength = (headers: HeaderList): number | undefined => {
  const value = headers.find(([name]) => name === 'content-length')?.[1]
  return value !== undefined && /^\d{1,15}$/.test(value) ? Number(value) : undefined
}

const bodiless = (method: string, status: number) =>
  method === 'HEAD' || status === 204 || status === 205 || status === 304

/** Throws before anything is sent where the head is not fit to be sent. */
export function writeWhole(
  outgoing: ServerResponse,
  method: string,
  { status, headers, body }: WholeAnswer,
  ours: Record<string, string>,
): void {
  // Without a body the length is what the function says it would have been.
  const length = bodiless(method, status)
    ? status === 204 || status === 205
      ? undefined
      : (declaredLength(headers) ?? (body.byteLength > 0 ? body.byteLength : undefined))
    : body.byteLength
  writeHead(outgoing, status, headers, ours, length)
  outgoing.end(bodiless(method, status) ? undefined : body)
}

/**
 * Writes a response as it comes, never faster than its caller takes it. Where it does not come to its end, or is of
 * another length than its head says, the connection is broken off: the caller must not take it for whole.
 * Throws before anything is sent where the head is not fit to be sent.
 */
export async function writeStream(
  outgoing: ServerResponse,
  method: string,
  head: { status: number; headers: HeaderList; body: Inflow },
  ours: Record<string, string>,
): Promise<void> {
  const length = declaredLength(head.headers)
  writeHead(outgoing, head.status, head.headers, ours, length)
  outgoing.flushHeaders()
  const empty = bodiless(method, head.status)
  let left = length
  try {
    for await (const bytes of head.body) {
      if (outgoing.destroyed) return
      if (empty) continue
      if (left !== undefined) {
        left -= bytes.byteLength
        if (left < 0) throw new StreamBroken('it is longer than its content-length')
      }
      if (!outgoing.write(bytes)) await drained(outgoing)
    }
    if (!empty && left !== undefined && left > 0)
      throw new StreamBroken('it is shorter than its content-length')
    outgoing.end()
  } catch (error) {
    if (!(error instanceof StreamBroken)) throw error
    outgoing.destroy()
  }
}

/** Settles when more may be written, or never will be. */
function drained(outgoing: ServerResponse): Promise<void> {
  if (outgoing.destroyed || !outgoing.writableNeedDrain) return Promise.resolve()
  return new Promise((resolve) => {
    const settle = () => {
      outgoing.off('drain', settle)
      outgoing.off('close', settle)
      resolve()
    }
    outgoing.on('drain', settle)
    outgoing.on('close', settle)
  })
}
