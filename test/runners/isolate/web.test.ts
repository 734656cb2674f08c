/** The web and `node:` APIs inside a real isolate, with a real host on the other side. */
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { underFlags } from '../../conformance/flags.ts'

underFlags(import.meta.filename)
const { test } = await import('uvu')
const assert = await import('uvu/assert')
const { Realm, webCode } = await import('../../conformance/realm.ts')

const code = await webCode()
type Context = InstanceType<typeof Realm>

async function inRealm(check: (realm: Context, lines: string[]) => Promise<void>): Promise<void> {
  const lines: string[] = []
  using realm = new Realm(code, { log: (_level, text) => lines.push(text) })
  await check(realm, lines)
}
/** A test whose code runs in an isolate and returns what is expected. */
const holds = (name: string, body: string, expected: unknown) =>
  test(name, () =>
    inRealm(async (realm) => {
      assert.equal(await realm.evaluate(body), expected)
    }),
  )

holds(
  'URL and URLSearchParams parse, resolve and serialize',
  `const url = new URL('../b?x=1#h', 'https://EXAMPLE.com:443/a/c/')
   url.searchParams.append('y', 'ü')
   return [url.href, url.origin, URL.canParse('nope'), new URL('https://bücher.example/').host]`,
  ['https://example.com/a/b?x=1&y=%C3%BC#h', 'https://example.com', false, 'xn--bcher-kva.example'],
)
holds(
  'URLPattern matches',
  `return new URLPattern({ pathname: '/users/:id' }).exec('https://a.example/users/7').pathname.groups`,
  { id: '7' },
)
holds(
  'TextEncoder and TextDecoder know UTF-8, long and short, and the legacy encodings',
  `const long = 'ü€😀'.repeat(3000)
   return [
     new TextDecoder().decode(new TextEncoder().encode(long)) === long,
     new TextDecoder().decode(new Uint8Array([0xef, 0xbb, 0xbf, 0x61])),
     new TextDecoder('shift_jis').decode(new Uint8Array([0x82, 0xa0])),
     [...new TextEncoder().encode('\\ud800')],
   ]`,
  [true, 'a', 'あ', [239, 191, 189]],
)
holds(
  'a body piped through streams comes out whole',
  `const upper = new TransformStream({ transform: (text, c) => c.enqueue(text.toUpperCase()) })
   const source = ReadableStream.from(['a', 'b', 'c'])
   return new Response(source.pipeThrough(upper).pipeThrough(new TextEncoderStream())).text()`,
  'ABC',
)
holds(
  'a BYOB reader fills the buffer it brings',
  `const reader = new Blob(['abcdef']).stream().getReader({ mode: 'byob' })
   const { value } = await reader.read(new Uint8Array(4))
   return new TextDecoder().decode(value)`,
  'abcd',
)
holds(
  'what was compressed comes back',
  `const through = (stream, kind) => stream.pipeThrough(new kind('gzip'))
   const text = 'hello '.repeat(100)
   const packed = await new Response(through(new Blob([text]).stream(), CompressionStream)).bytes()
   return [packed.length < 100, await new Response(through(new Blob([packed]).stream(), DecompressionStream)).text() === text]`,
  [true, true],
)
holds(
  'Headers keep several cookies apart and combine the rest',
  `const headers = new Headers([['a', '1'], ['A', '2'], ['Set-Cookie', 'x=1'], ['set-cookie', 'y=2']])
   return [headers.get('a'), headers.getSetCookie(), [...headers.keys()]]`,
  ['1, 2', ['x=1', 'y=2'], ['a', 'set-cookie', 'set-cookie']],
)
holds(
  'a form goes through a Request and comes back',
  `const form = new FormData()
   form.append('a', '1')
   form.append('f', new File(['content'], 'n.txt', { type: 'text/plain' }))
   const request = new Request('https://a.example/', { method: 'POST', body: form })
   const back = await request.formData()
   const file = back.get('f')
   return [back.get('a'), file.name, file.type, await file.text(), request.bodyUsed]`,
  ['1', 'n.txt', 'text/plain', 'content', true],
)
holds(
  'a Response can be cloned and read twice, and not read twice without',
  `const one = new Response('text')
   const two = one.clone()
   const texts = [await one.text(), await two.text()]
   return [...texts, await one.text().catch((error) => error.name)]`,
  ['text', 'text', 'TypeError'],
)
holds(
  'Response.json, redirect and error',
  `const json = Response.json({ a: 1 }, { status: 201 })
   const away = Response.redirect('https://a.example/', 303)
   return [json.status, json.headers.get('content-type'), await json.json(), away.status, away.headers.get('location'), Response.error().type]`,
  [201, 'application/json', { a: 1 }, 303, 'https://a.example/', 'error'],
)
holds(
  'events reach their listeners, once where asked, and an aborted signal removes them',
  `const heard = []
   const target = new EventTarget()
   const controller = new AbortController()
   target.addEventListener('a', (event) => heard.push(event.detail), { once: true })
   target.addEventListener('a', () => heard.push('signal'), { signal: controller.signal })
   target.dispatchEvent(new CustomEvent('a', { detail: 1 }))
   controller.abort()
   target.dispatchEvent(new CustomEvent('a', { detail: 2 }))
   return heard`,
  [1, 'signal'],
)
holds(
  'AbortSignal.any follows the first, AbortSignal.timeout fires',
  `const late = AbortSignal.timeout(1)
   const any = AbortSignal.any([new AbortController().signal, late])
   await new Promise((resolve) => any.addEventListener('abort', resolve))
   return [any.reason.name, any.reason === late.reason]`,
  ['TimeoutError', true],
)
holds(
  'structuredClone copies deeply, keeps cycles, moves buffers and refuses functions',
  `const value = { map: new Map([[1, new Set([2])]]), date: new Date(3) }
   value.self = value
   const copy = structuredClone(value)
   const buffer = new ArrayBuffer(8)
   const moved = structuredClone(buffer, { transfer: [buffer] })
   let refused
   try { structuredClone(() => {}) } catch (error) { refused = [error.name, error.code] }
   return [copy !== value, copy.self === copy, copy.map.get(1).has(2), +copy.date, buffer.byteLength, moved.byteLength, refused]`,
  [true, true, true, 3, 0, 8, ['DataCloneError', 25]],
)
holds(
  'a DOMException is an error of the language',
  `const error = new DOMException('text', 'AbortError')
   return [error instanceof Error, Error.isError(error), error.code, String(error), /^\\w*Error: text\\n/.test(error.stack)]`,
  [true, true, 20, 'AbortError: text', true],
)
holds(
  'atob and btoa',
  `let refused
   try { atob('*') } catch (error) { refused = error.name }
   return [btoa('hello'), atob('aGVsbG8'), refused]`,
  ['aGVsbG8=', 'hello', 'InvalidCharacterError'],
)
holds(
  'random values differ',
  `const uuids = new Set(Array.from({ length: 300 }, () => crypto.randomUUID()))
   return [uuids.size, /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/.test([...uuids][0]), crypto.getRandomValues(new Uint8Array(100)).some((byte) => byte > 0)]`,
  [300, true, true],
)
holds(
  'digests and HMAC are those of the standards',
  `const hex = (buffer) => new Uint8Array(buffer).toHex()
   const bytes = new TextEncoder().encode('abc')
   const key = await crypto.subtle.importKey('raw', bytes, { name: 'HMAC', hash: 'SHA-256' }, false, ['sign', 'verify'])
   const signature = await crypto.subtle.sign('HMAC', key, bytes)
   return [hex(await crypto.subtle.digest('SHA-256', bytes)), await crypto.subtle.verify('HMAC', key, signature, bytes), key.extractable, await crypto.subtle.exportKey('raw', key).catch((error) => error.name)]`,
  ['ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad', true, false, 'InvalidAccessError'],
)
holds(
  'keys of RSA, elliptic curves and AES do their work',
  `const bytes = new TextEncoder().encode('secret')
   const aes = await crypto.subtle.generateKey({ name: 'AES-GCM', length: 256 }, true, ['encrypt', 'decrypt'])
   const iv = new Uint8Array(12)
   const sealed = await crypto.subtle.encrypt({ name: 'AES-GCM', iv }, aes, bytes)
   const opened = await crypto.subtle.decrypt({ name: 'AES-GCM', iv }, aes, sealed)
   const ec = await crypto.subtle.generateKey({ name: 'ECDSA', namedCurve: 'P-256' }, false, ['sign', 'verify'])
   const how = { name: 'ECDSA', hash: 'SHA-256' }
   const jwk = await crypto.subtle.exportKey('jwk', ec.publicKey)
   const again = await crypto.subtle.importKey('jwk', jwk, how.name && { name: 'ECDSA', namedCurve: 'P-256' }, true, ['verify'])
   const rsa = await crypto.subtle.generateKey({ name: 'RSASSA-PKCS1-v1_5', hash: 'SHA-256', modulusLength: 2048, publicExponent: new Uint8Array([1, 0, 1]) }, false, ['sign', 'verify'])
   return [
     new TextDecoder().decode(opened),
     await crypto.subtle.verify(how, again, await crypto.subtle.sign(how, ec.privateKey, bytes), bytes),
     await crypto.subtle.verify('RSASSA-PKCS1-v1_5', rsa.publicKey, await crypto.subtle.sign('RSASSA-PKCS1-v1_5', rsa.privateKey, bytes), bytes),
     rsa.publicKey.extractable, rsa.privateKey.extractable,
   ]`,
  ['secret', true, true, true, false],
)
holds(
  'ports of a MessageChannel carry clones',
  `const { port1, port2 } = new MessageChannel()
   const heard = new Promise((resolve) => { port2.onmessage = (event) => resolve(event.data) })
   port1.postMessage({ a: [1] })
   return heard`,
  { a: [1] },
)
holds(
  'performance goes forward and navigator has a name',
  `const before = performance.now()
   return [before > 0, performance.now() >= before, Math.abs(performance.timeOrigin + performance.now() - Date.now()) < 5000, navigator.userAgent]`,
  [true, true, true, 'vulcan'],
)

test('reportError reaches whoever hears uncaught errors', () =>
  inRealm(async (realm, lines) => {
    await realm.evaluate(`reportError(new Error('reported'))`)
    assert.match(lines.join('\n'), 'reported')
  }))

test('fetch sends and receives, whole and streamed', () =>
  inRealm(async (realm) => {
    const server = createServer(async (request, response) => {
      const chunks: Buffer[] = []
      for await (const chunk of request) chunks.push(chunk)
      response.writeHead(request.url === '/gone' ? 410 : 200, {
        'x-method': request.method!,
        'set-cookie': ['a=1', 'b=2'],
      })
      response.write(`got ${Buffer.concat(chunks)}`)
      response.end('.')
    })
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    const origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
    try {
      const found = await realm.evaluate(
        `const [origin] = args
         const whole = await fetch(origin, { method: 'POST', body: 'text' })
         const streamed = await fetch(origin, {
           method: 'PUT', duplex: 'half',
           body: ReadableStream.from(['a', 'b']).pipeThrough(new TextEncoderStream()),
         })
         const pieces = []
         for await (const piece of streamed.body) pieces.push(new TextDecoder().decode(piece))
         const gone = await fetch(new Request(origin + '/gone'))
         return [
           await whole.text(), whole.url === origin + '/', whole.headers.get('x-method'), whole.headers.getSetCookie(),
           pieces.join(''), streamed.headers.get('x-method'), gone.status, gone.ok, await gone.text(),
         ]`,
        origin,
      )
      assert.equal(found, ['got text.', true, 'POST', ['a=1', 'b=2'], 'got ab.', 'PUT', 410, false, 'got .'])
      const aborted = `const controller = new AbortController()
        const pending = fetch(args[0], { signal: controller.signal })
        controller.abort()
        return pending.then(() => 'answered', (error) => error.name)`
      assert.is(await realm.evaluate(aborted, origin), 'AbortError')
    } finally {
      server.closeAllConnections()
      server.close()
    }
    const refused = `return fetch(args[0]).catch((error) => [error.name, /ECONNREFUSED/.test(error.message), error.cause.code])`
    assert.equal(await realm.evaluate(refused, origin), ['TypeError', true, 'ECONNREFUSED'])
  }))

test('a handler’s request and response cross without a stream where they are whole', () =>
  inRealm(async (realm) => {
    const found = await realm.guest(`async (guest) => {
      const { signal, abort } = guest.makeAbort()
      const head = { method: 'POST', url: 'https://a.example/p?q=1', headers: [['content-type', 'application/json'], ['x-a', 'b']] }
      const request = guest.makeRequest(() => head, '{"n":2}', () => signal)
      const { n } = await request.json()
      const answer = guest.readResponse(Response.json({ n, url: request.url, a: request.headers.get('x-a') }, { headers: [['set-cookie', 'a=1'], ['set-cookie', 'b=2']] }))
      let piece = 0
      const pulled = guest.makeRequest(() => ({ ...head, headers: [] }), async () => (piece++ < 2 ? new Uint8Array([65 + piece]) : null), () => signal)
      const stream = guest.readResponse(new Response(pulled.body))
      const text = []
      for (let chunk; (chunk = await stream.body.read()) !== null; ) text.push(...chunk)
      const bytes = guest.readResponse(new Response(new Uint8Array([1, 2]))).body
      const refused = []
      for (const wrong of [undefined, {}, Response.error()]) {
        try { guest.readResponse(wrong) } catch (error) { refused.push(error.name) }
      }
      abort(new Error('gone'))
      return [answer, text, [...bytes], refused, request.signal.aborted, request.signal.reason.message]
    }`)
    assert.equal(found, [
      {
        status: 200,
        headers: [
          ['content-type', 'application/json'],
          ['set-cookie', 'a=1'],
          ['set-cookie', 'b=2'],
        ],
        body: '{"n":2,"url":"https://a.example/p?q=1","a":"b"}',
      },
      [66, 67],
      [1, 2],
      ['TypeError', 'TypeError', 'TypeError'],
      true,
      'gone',
    ])
  }))

test('copies of a handler’s request have what it was given, and follow its signal', () =>
  inRealm(async (realm) => {
    const found = await realm.guest(`async (guest) => {
      const { signal, abort } = guest.makeAbort()
      const head = { method: 'PUT', url: 'http://127.0.0.1:8080/p', headers: [['content-type', 'text/plain'], ['x-a', 'b'], ['x-a', 'c']] }
      const request = guest.makeRequest(() => head, 'text', () => signal)
      const clone = request.clone()
      const made = new Request(request, { headers: { 'x-d': 'e' } })
      const told = []
      for (const one of [clone, made]) one.signal.addEventListener('abort', () => told.push(one.method))
      let refused
      try { clone.headers.set('x-a', 'd') } catch (error) { refused = error.name }
      abort()
      return [
        ...[request, clone, made].map((one) => [one.method, one.url, one.mode, [...one.headers].join()]), refused,
        request.bodyUsed, await clone.text(), await made.text(), told, request.signal === request.signal,
      ]
    }`)
    const [url, headers] = ['http://127.0.0.1:8080/p', 'content-type,text/plain,x-a,b, c']
    assert.equal(found, [
      ['PUT', url, 'cors', headers],
      ['PUT', url, 'cors', headers],
      ['PUT', url, 'cors', 'x-d,e'],
      'TypeError',
      true,
      'text',
      'text',
      ['PUT', 'PUT'],
      true,
    ])
  }))

test('the URL of a request is as the URL parser has it', () =>
  inRealm(async (realm) => {
    const urls = [
      'https://A.example/',
      'https://a.example/b/../c',
      'http://1.2.3/',
      'http://127.0.0.1:8080/a?b=1',
      'http://127.0.0.01/',
      'http://0x7f.1/',
      'http://a.0x7f.b/',
      'http://faß.example/',
      'http://a.example:80/',
      'https://a.example/ä?b#c',
    ]
    const found = await realm.guest(
      `async (guest, urls) => urls.map((url) => guest.makeRequest(() => ({ method: 'GET', url, headers: [] }), null, () => guest.makeAbort().signal).url)`,
      urls,
    )
    assert.equal(
      found,
      urls.map((url) => new URL(url).href),
    )
  }))

test('the node: modules are there, by either name', () =>
  inRealm(async (realm) => {
    const found = await realm.guest(`async (guest) => {
      const { Buffer } = guest.module('node:buffer')
      const { EventEmitter, once } = guest.module('events')
      const util = guest.module('node:util')
      const path = guest.module('node:path')
      const assert = guest.module('node:assert').default
      const emitter = new EventEmitter()
      const heard = once(emitter, 'a')
      emitter.emit('a', 5)
      let failed
      try { assert.deepStrictEqual({ a: 1 }, { a: 2 }) } catch (error) { failed = error.name }
      assert(true)
      let missing
      try { guest.module('node:fs') } catch (error) { missing = error.message }
      return [
        Buffer.from('aGk=', 'base64').toString(), await heard, util.format('%s-%d', 'a', 1),
        await util.promisify((done) => done(null, 7))(), util.isDeepStrictEqual([1], [1]), path.join('/a', '../b'), failed,
        guest.module('node:process').env.MODE, new (guest.module('node:string_decoder').StringDecoder)('utf8').write(Buffer.from('x')),
        guest.module('node:url').fileURLToPath('file:///a%20b'), missing, guest.module('path') === guest.module('node:path'),
        guest.specifiers.every((specifier) => 'default' in guest.module(specifier)),
      ]
    }`)
    assert.equal(found, [
      ...['hi', [5], 'a-1', 7, true, '/b', 'AssertionError', 'test', 'x', '/a b'],
      ...['an isolate has no module node:fs', true, true],
    ])
  }))

test('AsyncLocalStorage follows promises, timers and microtasks, and not into other contexts', () =>
  inRealm(async (realm) => {
    const found = await realm.guest(`async (guest) => {
      const { AsyncLocalStorage, AsyncResource } = guest.module('node:async_hooks')
      const storage = new AsyncLocalStorage()
      const look = () => storage.getStore()
      // As code is compiled that imports the module: an await is a then.
      const branch = (name) => storage.run(name, () => Promise.resolve().then(look).then((seen) =>
        new Promise((resolve) => setTimeout(() => queueMicrotask(() => resolve([seen, look()])), 1))))
      const both = await Promise.all([branch('a'), branch('b')])
      const resource = storage.run('r', () => new AsyncResource('X'))
      const bound = storage.run('bound', () => AsyncLocalStorage.bind(look))
      storage.enterWith('left over')
      guest.reset()
      return [both, resource.runInAsyncScope(look), bound(), storage.run(1, () => storage.exit(look)) ?? 'none', look() ?? 'none']
    }`)
    assert.equal(found, [
      [
        ['a', 'a'],
        ['b', 'b'],
      ],
      ...['r', 'bound', 'none', 'none'],
    ])
  }))

test('the globals look like those of a web runtime', () =>
  inRealm(async (realm) => {
    const found = await realm.evaluate(`
      const untouched = Object.getOwnPropertyDescriptor(globalThis, 'URL')
      void URL
      const { value, ...rest } = Object.getOwnPropertyDescriptor(globalThis, 'URL')
      globalThis.Blob = 1
      return [
        untouched.enumerable, untouched.configurable, value === URL, rest, Object.keys(globalThis), Blob,
        [new Headers(), new Event('a'), new AbortController(), new ReadableStream(), new File([], 'a'), crypto.subtle].map(String),
        [URL, Request, Response, Headers, FormData, TextDecoder, EventTarget, File, DOMException, fetch, structuredClone].map((f) => f.name),
        self === globalThis, typeof process, typeof Buffer, typeof require,
      ]`)
    assert.equal(found, [
      ...[false, true, true, { writable: true, enumerable: false, configurable: true }, [], 1],
      [
        ...['[object Headers]', '[object Event]', '[object AbortController]', '[object ReadableStream]'],
        ...['[object File]', '[object SubtleCrypto]'],
      ],
      [
        ...['URL', 'Request', 'Response', 'Headers', 'FormData', 'TextDecoder', 'EventTarget', 'File'],
        ...['DOMException', 'fetch', 'structuredClone'],
      ],
      ...[true, 'undefined', 'undefined', 'undefined'],
    ])
  }))

/**
 * Before any group is loaded every hook that user code can set on the language is set, and keeps what it sees. A
 * function of the host’s would be seen as native code with no name, and none of ours.
 */
const poison = `
  const seen = new Set()
  const keep = (value) => {
    if ((typeof value === 'object' || typeof value === 'function') && value !== null) seen.add(value)
  }
  const { apply, getOwnPropertyDescriptor, ownKeys, getPrototypeOf } = Reflect
  const define = Object.defineProperty
  const spy = (object, key) => {
    const original = object[key]
    define(object, key, {
      configurable: true, writable: true,
      value: function (...args) {
        keep(this)
        args.forEach.call === undefined || each(args)
        return apply(original, this, args)
      },
    })
  }
  const each = (list) => { for (let i = 0; i < list.length; i++) keep(list[i]) }
  for (const key of ['random', 'now', 'load', 'crypto', 'fetchOpen', 'fetchSend', 'fetchPull', 'fetchAbort', 'fetchEnd', 'encode', 'decode', 'log', 'setTimeout', 'receive', 'module', 'exports', 'web'])
    define(Object.prototype, key, { configurable: true, get() { keep(this); return undefined }, set(value) { keep(this); keep(value); define(this, key, { value, writable: true, enumerable: true, configurable: true }) } })
  for (const [object, keys] of [
    [Function.prototype, ['call', 'apply', 'bind']], [Object, ['defineProperty', 'assign', 'keys', 'entries', 'fromEntries', 'create']],
    [Array.prototype, ['push', 'map', 'forEach', 'slice']], [Map.prototype, ['get', 'set']], [WeakMap.prototype, ['get', 'set']],
    [Promise.prototype, ['then']], [JSON, ['parse', 'stringify']], [Reflect, ['apply', 'construct']],
  ]) for (const key of keys) spy(object, key)`

/**
 * Looks for the host’s functions in all that can be reached from a value: own properties of every kind, prototypes, and
 * entries of collections. With the language as it was before: evaluated first, and run by the guest’s own code.
 */
const prepareSearch = `{
  const { apply, getOwnPropertyDescriptor, ownKeys, getPrototypeOf } = Reflect
  const { has, add } = Set.prototype
  globalThis.search = (root, lent) => {
    const visited = new Set()
    const found = []
    const pending = [[root, '', 0]]
    for (let i = 0; i < pending.length; i++) {
      const [value, path, depth] = pending[i]
      if ((typeof value !== 'object' && typeof value !== 'function') || value === null || apply(has, visited, [value])) continue
      apply(add, visited, [value])
      for (let k = 0; k < lent.length; k++) if (value === lent[k]) found[found.length] = path
      if (depth === 12 || value === lent) continue
      const keys = ownKeys(value)
      for (let k = 0; k < keys.length; k++) {
        const descriptor = getOwnPropertyDescriptor(value, keys[k])
        if (descriptor === undefined) continue
        const at = path + '.' + (typeof keys[k] === 'symbol' ? 'symbol' : keys[k])
        pending[pending.length] = [descriptor.value, at, depth + 1]
        pending[pending.length] = [descriptor.get, at, depth + 1]
        pending[pending.length] = [descriptor.set, at, depth + 1]
      }
      pending[pending.length] = [getPrototypeOf(value), path + '.__proto__', depth + 1]
    }
    return [pending.length > 1000, found]
  }
}`

const useEverything = `
  for (const name of Object.getOwnPropertyNames(globalThis)) void globalThis[name]
  crypto.randomUUID()
  crypto.getRandomValues(new Uint8Array(200))
  performance.now()
  await crypto.subtle.digest('SHA-256', new Uint8Array(1)).catch(() => {})
  await new Response(new Blob(['a']).stream()).text().catch(() => {})
  AbortSignal.timeout(1)
  new TextDecoder().decode(new TextEncoder().encode('a'.repeat(9000)))
  fetch('http://127.0.0.1:9/', { method: 'POST', body: 'a' }).catch(() => {})
  await new Promise((resolve) => setTimeout(resolve, 20))`

test('no function of the host is seen by code that poisons the language before the groups load', () =>
  inRealm(async (realm) => {
    await realm.evaluate(`${prepareSearch}
      ${poison}
      globalThis.seen = seen
      try { ${useEverything} } catch {}
      globalThis.seen = [...seen]`)
    assert.equal(await realm.guest(`() => search(seen, lent)`), [true, []])
  }))

test('the search finds a function of the host that is there', () =>
  inRealm(async (realm) => {
    await realm.evaluate(prepareSearch)
    const found = `() => search({ all: Object.values(globalThis), deep: new (class { #a; b = [{ get c() {} }, lent[3]] })() }, lent)[1]`
    assert.equal(await realm.guest(found), ['.deep.b.1'])
  }))

test('no function of the host can be reached from the globals or from what the APIs give', () =>
  inRealm(async (realm) => {
    await realm.evaluate(`${prepareSearch}
      ${useEverything}
      globalThis.things = [
        new Request('https://a.example/', { method: 'POST', body: 'a' }), new Response('a'), new ReadableStream(), new Headers(),
        new AbortController(), new Event('a'), new Blob(['a']), new FormData(), new URL('https://a.example/'), new MessageChannel(),
        new TextDecoder(), await crypto.subtle.generateKey({ name: 'AES-GCM', length: 128 }, true, ['encrypt']),
        fetch('http://127.0.0.1:9/').catch((error) => { things.push(error) }),
      ]
      await new Promise((resolve) => setTimeout(resolve, 50))`)
    const modules = `(guest) => { globalThis.modules = guest.specifiers.map((specifier) => guest.module(specifier)); return search(globalThis, lent) }`
    assert.equal(await realm.guest(modules), [true, []])
  }))

test('V8 takes the code that comes with the bundle', () =>
  inRealm(async (realm) => {
    await realm.evaluate(`for (const name of Object.getOwnPropertyNames(globalThis)) void globalThis[name]`)
    assert.is(code.rejected, 0)
  }))

test.run()
