import { createServer, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { gzipSync } from 'node:zlib'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { EgressDenied, EgressGate, isPublic, permits } from '../../../runners/egress.ts'
import { createIsolateRunner } from '../../../runners/isolate/index.ts'
import { call, failure, output, run, sleep } from './support.ts'

interface Web extends AsyncDisposable {
  port: number
  origin: string
  /** What was asked for, as `METHOD path`, with the headers. */
  asked: { line: string; headers: Record<string, unknown>; body: string }[]
  server: Server
}

/** A server on loopback with a few answers. */
async function serve(): Promise<Web> {
  const asked: Web['asked'] = []
  const server = createServer(async (request, response) => {
    const url = new URL(request.url!, 'http://x')
    const parts: Buffer[] = []
    const entry = { line: `${request.method} ${request.url}`, headers: request.headers, body: '' }
    asked.push(entry)
    if (url.pathname === '/early') return response.end('early')
    for await (const part of request) parts.push(part as Buffer)
    entry.body = Buffer.concat(parts).toString()
    switch (url.pathname) {
      case '/redirect':
        response.writeHead(Number(url.searchParams.get('status') ?? 302), {
          location: url.searchParams.get('to')!,
        })
        response.end()
        break
      case '/gzip':
        response.writeHead(200, { 'content-encoding': 'gzip' })
        response.end(gzipSync('unzipped'))
        break
      case '/large':
        response.end(Buffer.alloc(3_000_000, 'y'))
        break
      case '/endless': {
        response.on('close', () => asked.push({ line: 'closed', headers: {}, body: '' }))
        const timer = setInterval(() => response.write('tick '), 10)
        response.on('close', () => clearInterval(timer))
        break
      }
      case '/never':
        response.on('close', () => asked.push({ line: 'closed', headers: {}, body: '' }))
        break
      case '/break':
        response.writeHead(200, { 'content-length': '1000' })
        response.write('part')
        setTimeout(() => response.destroy(), 30)
        break
      default:
        response.setHeader('x-seen', 'yes')
        response.setHeader('set-cookie', ['a=1', 'b=2'])
        response.end(`echo ${entry.body}`)
    }
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  return {
    port,
    origin: `http://127.0.0.1:${port}`,
    asked,
    server,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

const runnerFor = (...webs: Web[]) =>
  createIsolateRunner({
    min: 1,
    egress: { allowPrivate: webs.map(({ port }) => `127.0.0.1:${port}`) },
  })
const here = (...webs: Web[]) => webs.map(({ port }) => `127.0.0.1:${port}`)

test('addresses of the public internet are told from all others', () => {
  for (const address of [
    '1.1.1.1',
    '8.8.8.8',
    '93.184.216.34',
    '172.32.0.1',
    '2606:4700::1111',
    '2a00:1450::1',
  ])
    assert.ok(isPublic(address), address)
  for (const address of [
    ...['0.0.0.0', '10.1.2.3', '100.64.0.1', '127.0.0.1', '127.255.255.254', '169.254.169.254', '172.16.0.1'],
    ...[
      '172.31.255.255',
      '192.168.1.1',
      '192.0.0.8',
      '198.18.0.1',
      '224.0.0.1',
      '255.255.255.255',
      '240.0.0.1',
    ],
    ...['::', '::1', '::ffff:8.8.8.8', '::ffff:127.0.0.1', '::ffff:7f00:1', '::127.0.0.1', '64:ff9b::7f00:1'],
    ...['64:ff9b:1::1', '2002:7f00:1::', '2001::1', '2001:db8::1', 'fc00::1', 'fd00:ec2::254', 'fe80::1'],
    ...[
      'fe80::1%eth0',
      '2606:4700::1%1',
      'fec0::1',
      'ff02::1',
      '100::1',
      '5f00::1',
      'localhost',
      '',
      '1.1.1',
    ],
  ])
    assert.not.ok(isPublic(address), address)
})

test('a policy names hosts with their ports, and what is below a domain', () => {
  const policy = ['api.example.com:443', '*.example.org:8443', '127.0.0.1:80']
  for (const [host, port] of [
    ['api.example.com', 443],
    ['a.example.org', 8443],
    ['a.b.example.org', 8443],
    ['127.0.0.1', 80],
  ] as const)
    assert.ok(permits(policy, host, port), host)
  for (const [host, port] of [
    ['api.example.com', 80],
    ['example.com', 443],
    ['xapi.example.com', 443],
    ['api.example.com.evil.test', 443],
    ['example.org', 8443],
    ['badexample.org', 8443],
  ] as const)
    assert.not.ok(permits(policy, host, port), host)
  assert.ok(permits('all', 'anything', 1))
  assert.not.ok(permits('none', 'api.example.com', 443))
})

test('a fetch sends what it was given and gets status, headers and body', async () => {
  await using web = await serve()
  await using runner = await runnerFor(web)
  const code = `export default async (url) => {
    const response = await fetch(url + '/echo?q', { method: 'POST', body: 'ping', headers: { 'x-a': 'b', cookie: 'c=d' } })
    return [response.status, response.ok, response.url, response.redirected, response.headers.get('x-seen'), await response.text(), response.headers.getSetCookie()]
  }`
  const traceparent = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'
  const options = { input: web.origin, egress: here(web), traceparent }
  const cookies = ['a=1', 'b=2']
  const url = `${web.origin}/echo?q`
  assert.equal(await output(runner, code, options), [200, true, url, false, 'yes', 'echo ping', cookies])
  const { line, headers, body } = web.asked[0]!
  assert.is(line, 'POST /echo?q')
  assert.is(body, 'ping')
  assert.is(headers['x-a'], 'b')
  assert.is(headers.cookie, 'c=d')
  assert.is(headers.traceparent, traceparent)
  assert.is(headers.host, `127.0.0.1:${web.port}`)
})

test('bodies are streamed both ways, and content encodings undone', async () => {
  await using web = await serve()
  await using runner = await runnerFor(web)
  const code = `export default async (url) => {
    const encoder = new TextEncoder()
    let n = 0
    const body = new ReadableStream({ pull(c) { if (n++ === 20) c.close(); else c.enqueue(encoder.encode('x'.repeat(50_000))) } })
    const up = await (await fetch(url + '/echo', { method: 'POST', body, duplex: 'half' })).text()
    const large = await (await fetch(url + '/echo', { method: 'PUT', body: 'z'.repeat(900_000) })).text()
    const down = await (await fetch(url + '/large')).arrayBuffer()
    const zipped = await fetch(url + '/gzip')
    return [up.length, large.length, down.byteLength, await zipped.text(), zipped.headers.get('content-encoding')]
  }`
  const result = await output(runner, code, { input: web.origin, egress: here(web) })
  assert.equal(result, [1_000_005, 900_005, 3_000_000, 'unzipped', null])
})

test('a handler can pass a response on', async () => {
  await using web = await serve()
  await using runner = await runnerFor(web)
  const code = `export default { fetch: (request, env) => fetch(env.URL + '/large') }`
  const { outcome, text } = await call(runner, code, { env: { URL: web.origin }, egress: here(web) })
  assert.is(outcome.status, 'completed', JSON.stringify(outcome))
  assert.is(text.length, 3_000_000)
})

test('a fetch that the policy forbids rejects with a TypeError that says so, and uncaught ends the workload as egress_denied', async () => {
  await using web = await serve()
  await using runner = await runnerFor(web)
  const uncaught = 'export default async (url) => { await fetch(url) }'
  const caught =
    'export default async (url) => { try { await fetch(url) } catch (error) { return [error instanceof TypeError, error.message] } }'
  for (const egress of ['none', ['127.0.0.1:1'], ['example.com:80']] as const) {
    const policy = typeof egress === 'string' ? egress : [...egress]
    const options = { input: web.origin, egress: policy }
    const error = await failure(runner, uncaught, 'egress_denied', options)
    const named = typeof policy === 'string' ? policy : JSON.stringify(policy)
    assert.is(
      error.message,
      `TypeError: fetch to 127.0.0.1:${web.port} is not allowed: network.egress is ${named}`,
    )
    assert.equal(await output(runner, caught, options), [true, error.message.slice('TypeError: '.length)])
  }
  assert.equal(web.asked, [])
  // Saying the same without having been denied is a user’s error.
  await failure(
    runner,
    `export default () => { throw new TypeError('fetch to 127.0.0.1:1 is not allowed: network.egress is none') }`,
    'user_error',
  )
})

test('redirects are followed, each hop under the policy', async () => {
  await using web = await serve()
  await using other = await serve()
  await using runner = await runnerFor(web, other)
  const code = `export default async ({ url, init }) => {
    const response = await fetch(url, init)
    return [response.status, response.redirected, response.url, await response.text()]
  }`
  const to = (target: string, status = 302) =>
    `${web.origin}/redirect?status=${status}&to=${encodeURIComponent(target)}`
  const go = (url: string, init: object = {}, egress = here(web, other)) =>
    output(runner, code, { input: { url, init }, egress })
  assert.equal(await go(to('/end')), [200, true, `${web.origin}/end`, 'echo '])
  const secret = { method: 'POST', body: 'hi', headers: { authorization: 'hush', 'x-b': 'c' } }
  assert.equal(await go(to(`${other.origin}/end`, 307), secret), [
    200,
    true,
    `${other.origin}/end`,
    'echo hi',
  ])
  assert.is(other.asked[0]?.headers.authorization, undefined)
  assert.is(other.asked[0]?.headers['x-b'], 'c')
  await go(to(`${other.origin}/end`, 303), secret)
  assert.is(other.asked[1]?.line, 'GET /end')
  assert.equal(((await go(to('/end'), { redirect: 'manual' })) as unknown[])[1], false)
  const fails = async (url: string, egress = here(web), init: object = {}) =>
    (await run(runner, code, { input: { url, init }, egress })).outcome
  const denied = await fails(to(`${other.origin}/end`))
  assert.is(denied.status === 'failed' && denied.cause, 'egress_denied', JSON.stringify(denied))
  assert.is(other.asked.length, 2)
  for (const outcome of [
    await fails(to('file:///etc/passwd')),
    await fails(to('/end'), here(web), { redirect: 'error' }),
    await fails(to(to('/end').slice(0, 0)), here(web)),
  ])
    assert.is(outcome.status === 'failed' && outcome.cause, 'user_error', JSON.stringify(outcome))
})

test('a fetch can be aborted, and ends with its call', async () => {
  await using web = await serve()
  await using runner = await runnerFor(web)
  const code = `export default async ({ url, what }) => {
    if (what === 'left') { fetch(url + '/never').catch(() => {}); await new Promise((resolve) => setTimeout(resolve, 100)); return 'left' }
    if (what === 'body') { const response = await fetch(url + '/endless'); const reader = response.body.getReader(); await reader.read(); await reader.cancel(); await new Promise((resolve) => setTimeout(resolve, 100)); return 'cancelled' }
    const aborter = new AbortController()
    setTimeout(() => aborter.abort(), 100)
    try { await fetch(url + '/never', { signal: aborter.signal }) } catch (error) { return error.name }
  }`
  for (const [what, result] of [
    ['abort', 'AbortError'],
    ['body', 'cancelled'],
    ['left', 'left'],
  ]) {
    web.asked.length = 0
    assert.is(await output(runner, code, { input: { url: web.origin, what }, egress: here(web) }), result)
    await sleep(100)
    assert.is(web.asked.at(-1)?.line, 'closed', what)
  }
})

test('what cannot be reached, and what breaks off, rejects with a TypeError', async () => {
  await using web = await serve()
  const gone = await serve()
  const closed = here(gone)
  await gone[Symbol.asyncDispose]()
  await using runner = await createIsolateRunner({
    min: 1,
    egress: { allowPrivate: [...here(web), ...closed] },
  })
  const code = `export default async (url) => {
    try { const response = await fetch(url); return await response.text() } catch (error) { return [error instanceof TypeError, error.message] }
  }`
  const ask = async (url: string, egress: string[]) =>
    (await output(runner, code, { input: url, egress })) as unknown[]
  const refused = await ask(gone.origin, closed)
  assert.is(refused[0], true)
  assert.match(String(refused[1]), /^fetch failed: .*ECONNREFUSED/)
  assert.is((await ask(`${web.origin}/break`, here(web)))[0], true)
})

test('many fetches at once are served, and more than the limit refused', async () => {
  await using web = await serve()
  await using runner = await runnerFor(web)
  const code = `export default async (url) => {
    const results = await Promise.allSettled(Array.from({ length: 80 }, (_, i) => fetch(url + '/echo', { method: 'POST', body: String(i) }).then((r) => r.text())))
    return [results.filter((r) => r.status === 'fulfilled').length, results.find((r) => r.status === 'rejected')?.reason.message]
  }`
  const [served, refusal] = (await output(runner, code, { input: web.origin, egress: here(web) })) as [
    number,
    string,
  ]
  assert.is(served, 64)
  assert.match(refusal, /more than 64 at once/)
})

test('a private address needs the operator’s word for it, also where the policy is all', async () => {
  await using web = await serve()
  await using gate = new EgressGate()
  const request = {
    method: 'GET',
    headers: [],
    redirect: 'follow' as const,
    body: null,
    signal: new AbortController().signal,
    traceparent: undefined,
  }
  for (const policy of ['all' as const, here(web)])
    try {
      await gate.fetch('f', policy, { ...request, url: web.origin })
      assert.unreachable()
    } catch (error) {
      assert.instance(error, EgressDenied)
      assert.match((error as Error).message, /not public/)
    }
  await using open = new EgressGate({ allowPrivate: here(web) })
  assert.is((await open.fetch('f', 'all', { ...request, url: web.origin })).status, 200)
})

test.run()
