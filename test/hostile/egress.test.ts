/** Attempts to reach by fetch what must not be reached, and to smuggle what must not be sent. */
import { createServer, type IncomingMessage } from 'node:http'
import { connect, createServer as createRawServer } from 'node:net'
import { networkInterfaces } from 'node:os'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { EgressDenied, EgressGate, type EgressOptions, type OutgoingRequest } from '../../runners/egress.ts'
import { createIsolateRunner } from '../../runners/isolate/index.ts'
import type { Egress } from '../../shared/workload.ts'
import { call, output, run } from '../runners/isolate/support.ts'

/** A service of the host’s own network, that believes whoever reaches it. */
const asked: IncomingMessage[] = []
const inner = createServer((request, response) => {
  asked.push(request)
  const to = new URL(request.url!, 'http://x').searchParams.get('to')
  if (to !== null) response.writeHead(302, { location: to })
  response.end('inner secret')
})
await new Promise<void>((resolve) => inner.listen(0, '::', resolve))
const { port } = inner.address() as { port: number }

const request = (url: string, over: Partial<OutgoingRequest> = {}): OutgoingRequest => ({
  method: 'GET',
  url,
  headers: [],
  redirect: 'follow',
  body: null,
  signal: AbortSignal.timeout(3_000),
  traceparent: undefined,
  ...over,
})

/** True where the inner service was reached. */
async function reaches(url: string, policy: Egress, options: EgressOptions): Promise<boolean> {
  asked.length = 0
  await using gate = new EgressGate(options)
  try {
    const { body } = await gate.fetch('f', policy, request(url))
    let text = ''
    for await (const piece of body ?? []) text += Buffer.from(piece).toString()
    return text.includes('inner secret')
  } catch (error) {
    assert.ok(error instanceof EgressDenied || error instanceof TypeError, String(error))
    return false
  }
}

const to127 = async () => ['127.0.0.1']
/** Ways to write an address of the host’s own network; the control lets the operator allow it. */
const addresses: Record<
  string,
  { host: string; as?: string; resolve?: (host: string) => Promise<string[]> }
> = {
  'loopback as such': { host: '127.0.0.1' },
  'another address of loopback': { host: '127.9.9.9' },
  'loopback as one decimal number': { host: '2130706433', as: '127.0.0.1' },
  'loopback in hexadecimal': { host: '0x7f000001', as: '127.0.0.1' },
  'loopback in octal': { host: '0177.0.0.01', as: '127.0.0.1' },
  'loopback in short': { host: '127.1', as: '127.0.0.1' },
  'loopback in full-width digits': { host: '１２７.０.０.１', as: '127.0.0.1' },
  'the unspecified address': { host: '0.0.0.0' },
  'IPv6 loopback': { host: '[::1]' },
  'IPv6 loopback in full': { host: '[0:0:0:0:0:0:0:1]', as: '[::1]' },
  'the unspecified IPv6 address': { host: '[::]' },
  'loopback mapped into IPv6': { host: '[::ffff:127.0.0.1]', as: '[::ffff:7f00:1]' },
  localhost: { host: 'localhost' },
  'localhost with a dot at its end': { host: 'localhost.', as: 'localhost' },
  'a public name with a private address': { host: 'wildcard.example.com', resolve: to127 },
  'a public name with a mapped address': {
    host: 'mapped.example.com',
    resolve: async () => ['::ffff:127.0.0.1'],
  },
}
for (const [name, { host, as = host, resolve }] of Object.entries(addresses))
  test(`held: ${name} is reached with egress all`, async () => {
    const url = `http://${host}:${port}/`
    const options = resolve === undefined ? {} : { resolve }
    assert.is(await reaches(url, 'all', options), false)
    assert.is(asked.length, 0)
    assert.is(await reaches(url, 'all', { ...options, allowPrivate: [`${as}:${port}`] }), true)
  })

test('held: an address of this host’s own is reached, whatever network it is of', async () => {
  const own = Object.values(networkInterfaces())
    .flat()
    .find((one) => one !== undefined && one.family === 'IPv4' && !one.internal)
  const host = own?.address ?? '127.0.0.1'
  assert.is(await reaches(`http://${host}:${port}/`, 'all', {}), false)
  assert.is(await reaches(`http://${host}:${port}/`, 'all', { allowPrivate: [`${host}:${port}`] }), true)
})

for (const host of [
  '169.254.169.254',
  '[fd00:ec2::254]',
  '[fe80::1]',
  '100.100.100.200',
  '10.0.0.1',
  '192.168.0.1',
  '172.16.0.1',
  '224.0.0.1',
  '[64:ff9b::a9fe:a9fe]',
  '[2002:a9fe:a9fe::1]',
  '[2001:0:a9fe:a9fe::1]',
])
  test(`held: a connection to ${host} is begun`, async () => {
    await using gate = new EgressGate()
    const start = performance.now()
    await gate.fetch('f', 'all', request(`http://${host}/`)).then(
      () => assert.unreachable(),
      (error) => assert.instance(error, EgressDenied),
    )
    assert.ok(performance.now() - start < 1_000)
    // The control: a public address is not denied; whether it answers does not matter.
    const aborted = request('http://[2606:4700::1]:4222/', { signal: AbortSignal.timeout(50) })
    await gate.fetch('f', 'all', aborted).then(
      () => {},
      (error) => assert.not.instance(error, EgressDenied),
    )
  })

test('held: the broker’s address is reached where it is public', async () => {
  // A name is made to lead to a public address; whether anything answers there does not matter.
  const resolve = async () => ['93.184.216.34']
  const denied = async (platform: string[]) => {
    await using gate = new EgressGate({ resolve, platform })
    return await gate
      .fetch('f', 'all', request('http://broker.example.com:4222/', { signal: AbortSignal.timeout(100) }))
      .then(
        () => false,
        (error) => error instanceof EgressDenied,
      )
  }
  assert.is(await denied(['nats.example.com:4222']), true)
  assert.is(await denied([]), false)
})

test('held: a name that changes its address after it was checked leads inside', async () => {
  let asks = 0
  /** Public at first, then loopback: what a hostile DNS server answers. */
  const rebinding = async () => (++asks === 1 ? ['93.184.216.34'] : ['127.0.0.1'])
  await using gate = new EgressGate({ resolve: rebinding })
  asked.length = 0
  const url = `http://rebind.example.com:${port}/`
  for (let i = 0; i < 3; i++)
    await gate.fetch('f', 'all', request(url, { signal: AbortSignal.timeout(200) })).then(
      () => assert.unreachable(),
      () => {},
    )
  assert.is(asked.length, 0)
  // The control: check by one answer, connect by the next.
  asks = 0
  const [checked] = await rebinding()
  assert.is(checked, '93.184.216.34')
  const [used] = await rebinding()
  const reached = await new Promise<boolean>((resolve) => {
    const socket = connect(port, used!, () => resolve(true))
    socket.on('error', () => resolve(false))
    setTimeout(() => socket.destroy(), 100)
  })
  assert.is(reached, true)
})

/** With the policy naming only `allowed.test`, which leads to the inner service with the operator’s word. */
const only = [`allowed.test:${port}`]
const named: EgressOptions = { resolve: to127, allowPrivate: [`allowed.test:${port}`] }
const detours: Record<string, string> = {
  'a user name that looks like the allowed host': `http://allowed.test:${port}@127.0.0.1:${port}/`,
  'a backslash before the real host': `http://127.0.0.1:${port}\\@allowed.test:${port}/`,
  'a fragment before the real host': `http://127.0.0.1:${port}#@allowed.test:${port}/`,
  'a name that begins with the allowed one': `http://allowed.test.evil.test:${port}/`,
  'a name that ends with the allowed one': `http://evilallowed.test:${port}/`,
  'another port of the allowed host': `http://allowed.test:${port + 1}/`,
  'a redirect to loopback': `http://allowed.test:${port}/?to=http://127.0.0.1:${port}/`,
  'a redirect to another name': `http://allowed.test:${port}/?to=http://other.test:${port}/`,
  'a redirect to a file': `http://allowed.test:${port}/?to=file:///etc/passwd`,
  'a redirect without a scheme': `http://allowed.test:${port}/?to=//127.0.0.1:${port}/`,
  'a file': 'file:///etc/passwd',
  'a data URL': 'data:text/plain,inner secret',
}
for (const [name, url] of Object.entries(detours))
  test(`held: ${name}`, async () => {
    assert.is(await reaches(url, only, named), false)
    assert.ok(asked.every((one) => one.headers.host === `allowed.test:${port}`))
    // The control: what the policy names is reached.
    assert.is(await reaches(`http://ALLOWED.test.:${port}/x`, only, named), true)
  })

/** What came in on one connection, as bytes. */
async function raw(headers: [string, string][], over: Partial<OutgoingRequest> = {}): Promise<string> {
  let seen = ''
  const server = createRawServer((socket) => {
    socket.on('error', () => {})
    socket.on('data', (chunk) => {
      seen += chunk.toString('latin1')
    })
    setTimeout(() => socket.end('HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n'), 60)
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const at = `127.0.0.1:${(server.address() as { port: number }).port}`
  await using gate = new EgressGate({ allowPrivate: [at] })
  try {
    await gate.fetch('f', 'all', request(`http://${at}/`, { headers, ...over }))
  } catch (error) {
    assert.instance(error, TypeError)
  } finally {
    server.close()
  }
  return seen
}

const smuggling: Record<
  string,
  { headers: [string, string][]; over?: Partial<OutgoingRequest>; sign: RegExp }
> = {
  'a line break in a header value': { headers: [['a', 'b\r\nx-injected: 1']], sign: /x-injected/ },
  'a line break in a header name': { headers: [['a: b\r\nx-injected', '1']], sign: /x-injected/ },
  'a bare line feed in a value': { headers: [['a', 'b\nx-injected: 1']], sign: /x-injected/ },
  'a second length': {
    headers: [['content-length', '3']],
    over: { method: 'POST', body: Buffer.from('12345GET / HTTP/1.1') },
    sign: /content-length: 3\r/i,
  },
  'a transfer encoding beside a length': {
    headers: [['transfer-encoding', 'chunked']],
    over: { method: 'POST', body: Buffer.from('0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n') },
    sign: /transfer-encoding/i,
  },
  'another host': { headers: [['host', 'x-injected']], sign: /x-injected/ },
  'an upgrade': {
    headers: [
      ['upgrade', 'x-injected'],
      ['connection', 'upgrade'],
    ],
    sign: /x-injected/,
  },
  'a line break in the method': {
    headers: [],
    over: { method: 'GET / HTTP/1.1\r\nx-injected: 1\r\n\r\nGET' },
    sign: /x-injected/,
  },
}
for (const [name, { headers, over, sign }] of Object.entries(smuggling))
  test(`held: ${name} of an outgoing request`, async () => {
    assert.not.match(await raw(headers, over), sign)
    // The control: written as they were given, they stand on the wire.
    const method = over?.method ?? 'GET'
    const written = `${method} / HTTP/1.1\r\n${headers.map(([key, value]) => `${key}: ${value}\r\n`).join('')}\r\n`
    assert.match(written, sign)
    assert.match(await raw([['x-plain', '1']]), /x-plain: 1\r\n/)
  })

test('held: proxies and credentials of the host are used', async () => {
  const names = ['http_proxy', 'HTTP_PROXY', 'NODE_USE_ENV_PROXY']
  for (const name of names)
    process.env[name] = name === 'NODE_USE_ENV_PROXY' ? '1' : `http://user:hush@127.0.0.1:${port}`
  try {
    assert.is(
      await reaches('http://proxied.example.com:4222/', 'all', {
        resolve: async () => ['93.184.216.34'],
      }),
      false,
    )
    assert.is(asked.length, 0)
  } finally {
    for (const name of names) delete process.env[name]
  }
  // The control: the proxy would have answered.
  assert.is(await reaches(`http://127.0.0.1:${port}/`, 'all', { allowPrivate: [`127.0.0.1:${port}`] }), true)
})

test('held: a response of the code’s sets headers of its choice by line breaks', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 2 })
  const attempts = [
    `new Response('', { headers: { a: 'b\\r\\nx-injected: 1' } })`,
    `new Response('', { headers: [['a\\r\\nx-injected', '1']] })`,
    `(() => { const r = new Response(''); r.headers.set('a', 'b\\nx-injected: 1'); return r })()`,
    `new Response('', { status: 200, statusText: 'OK\\r\\nx-injected: 1' })`,
    `({ status: 200, headers: new Map([['x-injected', '1']]), body: null })`,
    `Object.create(Response.prototype, { status: { value: 200 }, headers: { value: [['x-injected', '1\\r\\n']] } })`,
    `new Proxy(new Response(''), { get: (t, k) => k === 'headers' ? [['x-injected', '1\\r\\n']] : t[k] })`,
    `Response.redirect('http://a.test/\\r\\nx-injected: 1')`,
  ]
  for (const expression of attempts) {
    const { response } = await call(runner, `export default { fetch: () => ${expression} }`)
    assert.not.match(JSON.stringify(response?.headers ?? []), /\\r|\\n|"x-injected"/, expression)
  }
  // The control: a header that may be sent is.
  const { response } = await call(
    runner,
    `export default { fetch: () => new Response('', { headers: { 'x-injected': '1' } }) }`,
  )
  assert.ok(response?.headers.some(([name]: [string, string]) => name === 'x-injected'))
})

test('held: toJSON on a prototype changes the head of a response to one that splits it', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 2 })
  const poison = (headers: string) => `
    Object.prototype.toJSON = function () { return 'status' in this ? { __proto__: null, status: 201, headers: ${headers} } : this }
    export default { fetch: () => new Response('x', { headers: { a: 'b' } }) }`
  const { outcome, response } = await call(runner, poison(`[['x', 'a\\r\\nb: c']]`))
  assert.is(response, undefined)
  assert.is(outcome.status === 'failed' && outcome.cause, 'user_error', JSON.stringify(outcome))
  // The control: where it makes a head that may be sent, that is sent.
  assert.equal((await call(runner, poison(`[['x', 'y']]`))).response?.headers, [['x', 'y']])
})

test('held: a function with no egress reaches anything, by whatever it writes as a URL', async () => {
  await using runner = await createIsolateRunner({
    min: 1,
    max: 2,
    egress: { allowPrivate: [`127.0.0.1:${port}`] },
  })
  const code = `export default async (url) => { try { return await (await fetch(url)).text() } catch (error) { return error instanceof TypeError } }`
  asked.length = 0
  const urls = [
    `http://127.0.0.1:${port}/`,
    `http://2130706433:${port}`,
    `http://[::1]:${port}`,
    'file:///etc/passwd',
    'http://localhost:4222',
    'ws://127.0.0.1/',
    'ftp://127.0.0.1/',
  ]
  for (const input of urls) assert.is(await output(runner, code, { input, egress: 'none' }), true, input)
  assert.is(asked.length, 0)
  assert.is(await output(runner, code, { input: urls[0], egress: [`127.0.0.1:${port}`] }), 'inner secret')
  const { outcome } = await run(runner, 'export default (url) => fetch(url)', { input: urls[0] })
  assert.is(outcome.status === 'failed' && outcome.cause, 'egress_denied')
})

test('the server of this file closes', () => {
  inner.closeAllConnections()
  inner.close()
})

test.run()
