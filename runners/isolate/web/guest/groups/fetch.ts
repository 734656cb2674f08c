/** Headers, Request, Response and FormData, by undici; and fetch, which the host carries out. */
// First: request.js takes a converter that this one makes.
import 'undici/lib/web/fetch/response.js'

import { FormData } from 'undici/lib/web/fetch/formdata.js'
import { Headers, HeadersList } from 'undici/lib/web/fetch/headers.js'
import {
  fromInnerRequest,
  getRequestState,
  makeRequest as innerRequest,
  Request,
} from 'undici/lib/web/fetch/request.js'
import { fromInnerResponse, getResponseState, makeResponse, Response } from 'undici/lib/web/fetch/response.js'
import { webidl } from 'undici/lib/web/webidl/index.js'
import type {
  BodyReader,
  FetchAnswer,
  FetchHead,
  HeaderPairs,
  Puller,
  ReadResponse,
  RequestHead,
} from '../../bridge.ts'
import { type Body, bytesBody, pulledBody, textBody } from '../shims/undici-body.ts'

type Bytes = Uint8Array<ArrayBuffer>

/** URLs that already are as the URL parser would write them; of all others it is not said. */
const octet = '(?:25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)'
const label = '[a-z0-9](?:[a-z0-9-]*[a-z0-9])?'
const name = `(?![^/]*xn--)(?:${label}\\.)*[a-z](?:[a-z0-9-]*[a-z0-9])?`
const path = '(?!\\.|[^?]*/\\.|[^?]*%2[eE])[\\w!$&()*+,./:;=@~%-]*'
const plainUrl = new RegExp(
  `^https?://(?:${name}|(?:${octet}\\.){3}${octet})(?::[1-9]\\d{3,4})?/${path}(?:\\?[\\w!$&()*+,./:;=@~%?-]*)?$`,
)

/** A URL as far as undici’s classes ask for it; parsed when they do, and only where that changes it. */
class GivenUrl {
  readonly href: string
  constructor(text: string) {
    this.href = plainUrl.test(text) ? text : new URL(text).href
  }
  get hash() {
    const at = this.href.indexOf('#')
    return at < 0 || at === this.href.length - 1 ? '' : this.href.slice(at)
  }
  toString() {
    return this.href
  }
}

/** The state of a request from the host: of what was given, only what somebody looks at is made anything of. */
class GivenRequest {
  body: Body | null
  readonly #head: () => RequestHead
  readonly #signal: () => object
  #headersList: unknown
  #urlList: GivenUrl[] | undefined
  constructor(head: () => RequestHead, body: Body | null, signal: () => object) {
    this.#head = head
    this.body = body
    this.#signal = signal
  }
  get method() {
    return this.#head().method
  }
  get headersList() {
    if (this.#headersList === undefined) {
      const list = new HeadersList()
      for (const [name, value] of this.#head().headers) list.append(name, value, true)
      this.#headersList = list
    }
    return this.#headersList
  }
  get urlList() {
    this.#urlList ??= [new GivenUrl(this.#head().url)]
    return this.#urlList
  }
  get url() {
    return this.urlList[0]
  }
  /** Asked for once. */
  makeSignal() {
    return this.#signal()
  }
}
// All else is as in any request.
Object.setPrototypeOf(GivenRequest.prototype, innerRequest({ urlList: [], mode: 'cors' }))

export function makeRequest(
  head: () => RequestHead,
  body: null | string | Bytes | Puller,
  signal: () => object,
) {
  const held =
    body === null
      ? null
      : typeof body === 'string'
        ? textBody(body)
        : typeof body === 'function'
          ? pulledBody(body, () => {})
          : bytesBody(body)
  return fromInnerRequest(new GivenRequest(head, held, signal))
}

export function readResponse(response: unknown): ReadResponse {
  if (!webidl.is.Response(response)) throw new TypeError('The handler did not return a Response')
  const state = getResponseState(response)
  const { status } = state
  if (status === 0) throw new TypeError('The handler returned a network error (Response.error())')
  const headers = pairsOf(state.headersList)
  const body = state.body as Body | null | undefined
  if (body == null) return { status, headers, body: null }
  if (body.unusable) throw new TypeError('The body of the Response is already used')
  return { status, headers, body: body.whole() ?? (body.reader() as BodyReader) }
}

/** Each cookie by itself, behind all others. */
function pairsOf({ headersMap, cookies }: any): HeaderPairs {
  const pairs: HeaderPairs = []
  if (headersMap === undefined) return pairs
  for (const { 0: name, 1: header } of headersMap)
    if (name !== 'set-cookie') pairs[pairs.length] = [name, header.value]
  if (cookies !== null) for (const cookie of cookies) pairs[pairs.length] = ['set-cookie', cookie]
  return pairs
}

const noop = () => {}
const named = (error: Error & { code?: string }, code: string) => {
  if (code !== '') error.code = code
  return error
}

/** Redirects and content encodings are the host’s; so is whether it goes out at all. */
export function fetch(input: unknown, init: unknown = undefined): Promise<unknown> {
  let request: any
  try {
    if (arguments.length === 0) throw new TypeError('fetch: 1 argument required, but only 0 present')
    request = new Request(input, init)
  } catch (error) {
    return Promise.reject(error)
  }
  const { signal } = request
  if (signal.aborted) {
    getRequestState(request).body?.stream.cancel(signal.reason).catch(noop)
    return Promise.reject(signal.reason)
  }
  return new Promise((resolve, reject) => start(getRequestState(request), signal, resolve, reject))
}

function start(
  request: any,
  signal: any,
  resolve: (response: unknown) => void,
  reject: (error: unknown) => void,
) {
  const url = request.urlList[0].href as string
  const hash = url.indexOf('#')
  const target = hash < 0 ? url : url.slice(0, hash)
  const scheme = target.slice(0, target.indexOf(':'))
  if (scheme === 'data') {
    const response = dataResponse(target)
    if (response === undefined)
      reject(new TypeError('fetch failed', { cause: new Error('invalid data: URL') }))
    else resolve(response)
    return
  }
  if (scheme !== 'http' && scheme !== 'https')
    return reject(new TypeError('fetch failed', { cause: new Error(`unknown scheme: ${scheme}:`) }))
  const body = request.body as Body | null
  const whole = body?.whole()
  const headers = pairsOf(request.headersList)
  const add = (name: string, value: string) => {
    if (!request.headersList.contains(name, true)) headers.push([name, value])
  }
  add('accept', '*/*')
  add('accept-language', '*')
  add('user-agent', 'vulcan')
  const head: FetchHead = {
    method: request.method,
    url: target,
    headers,
    body: body === null ? 'none' : whole === undefined ? 'stream' : 'whole',
    redirect: request.redirect,
  }

  let done = false
  let pulling: { resolve(chunk: Bytes | null): void; reject(error: unknown): void } | undefined
  let answered = false
  let failure: { error: unknown } | undefined
  let sender: { read: Puller; cancel(reason?: unknown): Promise<void> } | undefined

  const finish = () => {
    done = true
    host.forget(id)
  }
  const breakOff = (error: unknown) => {
    if (done) return
    finish()
    failure = { error }
    sender?.cancel(error).catch(noop)
    if (!answered) reject(error)
    else if (pulling !== undefined) {
      pulling.reject(error)
      pulling = undefined
    } else responseBody?.fail(error)
  }
  const pull = () =>
    new Promise<Bytes | null>((resolve, reject) => {
      if (failure !== undefined) return reject(failure.error)
      if (done) return resolve(null)
      pulling = { resolve, reject }
      host.fetchPull(id)
    })
  const cancel = () => {
    if (done) return
    finish()
    host.fetchAbort(id)
    sender?.cancel().catch(noop)
  }
  let responseBody: Body | undefined

  const id = host.fetchOpen(
    (kind, a, b) => {
      switch (kind) {
        case 'head': {
          answered = true
          const answer = JSON.parse(a as string) as FetchAnswer
          if (request.redirect === 'manual' && redirectStatus.has(answer.status)) {
            finish()
            host.fetchAbort(id)
            resolve(
              fromInnerResponse(
                makeResponse({ type: 'opaqueredirect', status: 0, urlList: [new URL(url)], body: null }),
                'immutable',
              ),
            )
            return
          }
          responseBody = answer.body ? pulledBody(pull, cancel) : undefined
          const headersList = new HeadersList()
          for (const [name, value] of answer.headers) headersList.append(name, value, false)
          const inner = makeResponse({
            type: 'basic',
            status: answer.status,
            statusText: answer.statusText,
            urlList: answer.redirected ? [new URL(url), new URL(answer.url)] : [new URL(answer.url)],
            body: responseBody ?? null,
          })
          inner.headersList = headersList
          if (!answer.body) finish()
          resolve(fromInnerResponse(inner, 'immutable'))
          break
        }
        case 'chunk': {
          const waiting = pulling
          pulling = undefined
          waiting?.resolve(new Uint8Array(a as ArrayBuffer))
          break
        }
        case 'end': {
          finish()
          const waiting = pulling
          pulling = undefined
          waiting?.resolve(null)
          break
        }
        case 'drain':
          void sendNext()
          break
        case 'failed':
          breakOff(
            new TypeError(a as string, {
              cause: named(new Error(a as string), (b as string | undefined) ?? ''),
            }),
          )
      }
    },
    JSON.stringify(head),
    whole === undefined ? undefined : typeof whole === 'string' ? new TextEncoder().encode(whole) : whole,
  )
  const sendNext = async () => {
    try {
      let chunk = await sender!.read()
      while (chunk !== null && chunk.length === 0) chunk = await sender!.read()
      if (done) return
      if (chunk === null) host.fetchEnd(id)
      else host.fetchSend(id, chunk)
    } catch (error) {
      if (done) return
      host.fetchAbort(id)
      breakOff(error)
    }
  }
  group('events').onAbort(signal, () => {
    if (done) return
    host.fetchAbort(id)
    breakOff(signal.reason)
  })
  if (head.body === 'stream') {
    sender = body!.reader()
    void sendNext()
  }
}

const redirectStatus = new Set([301, 302, 303, 307, 308])

function dataResponse(url: string): unknown {
  const { dataURLProcessor, serializeAMimeType } = require('undici/lib/web/fetch/data-url.js')
  const data = dataURLProcessor(new URL(url))
  if (data === 'failure') return undefined
  const inner = makeResponse({
    type: 'basic',
    statusText: 'OK',
    urlList: [new URL(url)],
    body: bytesBody(data.body),
  })
  inner.headersList.append('content-type', serializeAMimeType(data.mimeType), false)
  return fromInnerResponse(inner, 'immutable')
}

export { FormData, Headers, Request, Response }
export const is = {
  FormData: webidl.is.FormData,
  Headers: webidl.is.Headers,
  Request: webidl.is.Request,
  Response: webidl.is.Response,
}
