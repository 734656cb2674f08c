/**
 * Entry of a helper process: compiles the bundle with the flags of a sandbox child and keeps V8’s code for what was
 * used, so that isolates need not compile it again. It runs our own code only. Arguments: path of the bundle, path to
 * write it to with the code.
 */
import { readFileSync, writeFileSync } from 'node:fs'
import { setFlagsFromString } from 'node:v8'
import { createContext, Script } from 'node:vm'
import type { GuestServices, Install, WebGuest } from './bridge.ts'
import type { WebBundle } from './bundle.ts'
import { isolateFlags } from './flags.ts'

setFlagsFromString(isolateFlags)

/** What most code uses. Evaluated in the context; `guest` is in scope. */
const usual = `(async () => {
  const { signal } = guest.makeAbort()
  const head = { method: 'POST', url: 'https://example.com/a?b=c', headers: [['content-type', 'application/json']] }
  const request = guest.makeRequest(() => head, '{"a":1}', () => signal)
  request.signal.aborted
  const url = new URL(request.url)
  url.searchParams.get('b')
  url.searchParams.set('d', 'e')
  String(new URLSearchParams({ a: 'b' }))
  request.headers.get('content-type')
  await request.json()
  const answers = [
    new Response('text', { status: 201, headers: { 'x-a': 'b' } }),
    Response.json({ a: 1 }),
    new Response(new Uint8Array(3), { headers: [['a', 'b']] }),
    new Response(null, { status: 204, headers: new Headers({ a: 'b' }) }),
    Response.redirect('https://example.com/'),
  ]
  for (const answer of answers) guest.readResponse(answer)
  for (const [name, value] of new Headers({ a: 'b' })) name + value
  new Request('https://example.com/', { method: 'PUT', body: 'x' }).clone()
  const source = new ReadableStream({
    start(controller) {
      controller.enqueue(new TextEncoder().encode('piece'))
      controller.close()
    },
  })
  const streamed = guest.readResponse(new Response(source.pipeThrough(new TransformStream()))).body
  while ((await streamed.read()) !== null);
  await new Response('text').clone().text()
  new TextDecoder().decode(new TextEncoder().encode('text ü'))
  crypto.randomUUID()
  crypto.getRandomValues(new Uint8Array(8))
  crypto.subtle.digest('SHA-256', new Uint8Array(1))
  const target = new EventTarget()
  target.addEventListener('a', () => {}, { once: true })
  target.dispatchEvent(new Event('a'))
  const controller = new AbortController()
  AbortSignal.any([controller.signal, AbortSignal.timeout(1)]).addEventListener('abort', () => {})
  controller.abort()
  await new Blob(['a']).text()
  const form = new FormData()
  form.append('a', new File(['b'], 'c'))
  await new Response(form).formData()
  structuredClone({ a: [new Map([[1, new Date()]])] })
  btoa(atob('YQ=='))
  performance.now() + navigator.userAgent
  fetch('https://example.com/', { method: 'POST', body: 'x', signal }).catch(() => {})
  new URLPattern({ pathname: '/:a' }).exec('https://example.com/b')
  for (const specifier of guest.specifiers) guest.module(specifier)
  Buffer_(guest.module('node:buffer').Buffer)
  new (guest.module('node:events').EventEmitter)().on('a', () => {}).emit('a')
  guest.module('node:util').inspect({ a: [1] })
  guest.module('node:util').format('%s %o', 1, {})
  guest.module('node:path').join('a', '..', 'b')
})().catch((error) => fail(error))
function Buffer_(Buffer) { Buffer.from(Buffer.from('a').toString('base64'), 'base64').toString('hex') }`

const [, , from, to] = process.argv
const bundle: WebBundle = JSON.parse(readFileSync(from!, 'utf8'))
const scripts = new Map<string, Script>()
const context = createContext({ console: undefined })
const compile = (name: string, source: string) => {
  const script = new Script(source, { filename: `vulcan:web/${name}` })
  scripts.set(name, script)
  return script.runInContext(context)
}
const nothing = () => {}
const { install } = compile('', bundle.install) as { install: Install }
const guest: WebGuest = install(
  {
    load: (group: string) => compile(group, bundle.groups[group]!),
    now: () => Date.now(),
    random: (bytes: number) => new ArrayBuffer(bytes),
    encode: (text: string) => new TextEncoder().encode(text).buffer,
    decode: (bytes: Uint8Array) => new TextDecoder().decode(bytes),
    ...{ crypto: nothing, fetchOpen: nothing, fetchSend: nothing, fetchEnd: nothing },
    ...{ fetchPull: nothing, fetchAbort: nothing },
  },
  {
    ...{ setTimeout: () => 0, clearTimeout: nothing, uncaught: nothing, log: nothing },
    inspect: (value) => String(value),
    env: () => ({}),
  } satisfies GuestServices,
)
Object.assign(context, {
  guest,
  fail(error: unknown) {
    throw error
  },
})
await new Script(usual).runInContext(context)
const code: Record<string, string> = {}
for (const [name, script] of scripts) code[name] = script.createCachedData().toString('base64')
writeFileSync(to!, JSON.stringify({ ...bundle, code } satisfies WebBundle))
