/** Attempts to get from the code’s own realm to the host’s, or to another’s. */
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { output, run } from '../runners/isolate/support.ts'
import { attempt, closing, inIsolate, inPlainNode, inPlainVm, runner } from './support.ts'

/** Everything that is given to the code, or that it gets from what is given. */
const injected: Record<string, string> = {
  input: 'input',
  'a part of the input': 'input.nested',
  ctx: 'ctx',
  'ctx.log': 'ctx.log',
  'ctx.env': 'ctx.env',
  'ctx.signal': 'ctx.signal',
  'ctx.waitUntil': 'ctx.waitUntil',
  arguments: '(function () { return arguments })(ctx)[0]',
  console: 'console',
  'console.log': 'console.log',
  setTimeout: 'setTimeout',
  'a timer': 'setTimeout(() => {}, 1)',
  queueMicrotask: 'queueMicrotask',
  structuredClone: 'structuredClone',
  'a clone': 'structuredClone(new Map([[1, { a: new Date() }]]))',
  crypto: 'crypto',
  'crypto.subtle': 'crypto.subtle',
  'crypto.randomUUID': 'crypto.randomUUID',
  'a digest': "crypto.subtle.digest('SHA-256', new Uint8Array(3))",
  performance: 'performance',
  URL: 'URL',
  'a URL': "new URL('http://a.test/?b=c').searchParams",
  Headers: "new Headers([['a', 'b']]).entries()",
  'a Request': "new Request('http://a.test/', { method: 'POST', body: 'x' })",
  'a Response': "new Response('x')",
  'the body of a Response': "new Response('x').body",
  'a reader': "new Response('x').body.getReader()",
  fetch: 'fetch',
  TextEncoder: 'new TextEncoder()',
  'TextEncoder’s encode': 'TextEncoder.prototype.encode',
  'a stream': 'new TransformStream().readable',
  'an AbortController': 'new AbortController().signal',
  'a Blob': "new Blob(['x'])",
  'a DOMException': "new DOMException('x')",
  atob: 'atob',
}
for (const [name, expression] of Object.entries(injected))
  attempt(`constructor.constructor of ${name}`, `return leads(${expression})`, inPlainVm)

/** Errors made by the host’s functions. */
const thrown: Record<string, string> = {
  'a bad URL': "new URL('nowhere')",
  'a clone of a function': 'structuredClone(() => {})',
  'bad base64': "atob('*')",
  'a bad header': "new Headers({ 'a b': 'c' })",
  'a timer without a function': 'setTimeout(1)',
}
for (const [name, expression] of Object.entries(thrown))
  attempt(
    `the error of ${name} leads to the host`,
    `try { ${expression}; return false } catch (error) { return leads(error) }`,
    inPlainVm,
  )
attempt(
  'the reason of a rejected fetch leads to the host',
  "try { await fetch('http://127.0.0.1:1/'); return false } catch (error) { return leads(error) || leads(error.cause) }",
  inPlainVm,
)
attempt(
  'the reason of a rejected digest leads to the host',
  "try { await crypto.subtle.digest('MD0', new Uint8Array(1)); return false } catch (error) { return leads(error) }",
  inPlainVm,
)
attempt(
  'a stack overflow inside of a host function throws the host’s error',
  `let found = false
  const dive = () => { try { dive() } catch { } try { structuredClone({ get a() { return 1 } }); new URL('http://a.test') } catch (error) { if (leads(error)) found = true } }
  const overflow = (n) => { try { if (!found) overflow(n + 1) } catch (error) { found ||= leads(error) } try { new URL('bad') } catch (error) { found ||= leads(error) } }
  overflow(0)
  return found`,
  inPlainVm,
)

attempt(
  'Error.prepareStackTrace sees a function or receiver of the host',
  `let found = false
  const { prepareStackTrace } = Error
  Error.prepareStackTrace = (error, sites) => {
    for (const site of sites) {
      const values = [site.getThis?.(), site.getFunction?.()]
      for (const value of values) if (value !== undefined && value !== null && leads(value)) found = true
    }
    return ''
  }
  const look = () => { try { null.x } catch (error) { void error.stack } void new Error('x').stack }
  console.log({ get x() { look(); return 1 } })
  try { structuredClone({ get x() { look(); return 1 } }) } catch {}
  await { then(resolve) { look(); resolve() } }
  try { new URL({ toString() { look(); return 'bad' } }) } catch (error) { void error.stack }
  Error.prepareStackTrace = prepareStackTrace
  return found`,
  inPlainVm,
)
attempt(
  'a getter or toString that a host function calls sees its caller',
  `let found = false
  const spy = new Function('leads', 'seen', 'return function spy() { try { const { caller } = spy; if (caller && leads(caller)) seen() } catch {} return "x" }')(leads, () => { found = true })
  for (const use of [() => new URL({ toString: spy }), () => console.log({ toString: spy }, '%s', { toString: spy }), () => atob({ toString: spy }), () => structuredClone({ get a() { return spy() } })])
    try { use() } catch (error) { found ||= leads(error) }
  found ||= leads(new URL({ toString: () => 'http://a.test' }))
  return found`,
  inPlainVm,
)
attempt(
  'a thenable is handed a resolving function of the host',
  `let found = false
  await { then(resolve, reject) { found = leads(resolve); resolve() } }
  const thenable = { then(resolve) { found ||= leads(resolve); resolve('x') } }
  const stream = new ReadableStream({ pull(controller) { found ||= leads(controller); controller.close(); return thenable } })
  for await (const part of stream) void part
  return found`,
  inPlainVm,
)
attempt(
  'a Proxy in place of options is told of the host by its traps',
  `let found = false
  const trap = new Proxy(function () {}, { get: (target, key, receiver) => { found ||= leads(receiver); return undefined }, apply: (target, self, args) => { for (const one of [self, ...args]) found ||= leads(one) } })
  for (const use of [() => new Request('http://a.test', trap), () => console.log(trap), () => new Response(null, trap), () => new Headers(trap), () => queueMicrotask(trap), () => new EventTarget().addEventListener('x', trap), () => new ReadableStream({ start: trap })])
    try { use() } catch (error) { found ||= leads(error) }
  await null
  await new Promise((resolve) => setTimeout(resolve, 1))
  return found`,
  inPlainVm,
)
attempt(
  'a replaced Promise, Array or Symbol.species is used by the host with its own values',
  `let found = false
  class Mine extends Array { static get [Symbol.species]() { return function (...args) { for (const one of args) found ||= leads(one); return [] } } }
  const { then } = Promise.prototype
  Promise.prototype.then = function (a, b) { found ||= leads(a) || leads(b) || leads(this); return then.call(this, a, b) }
  const { push } = Array.prototype
  Array.prototype.push = function (...args) { for (const one of args) found ||= leads(one); return push.apply(this, args) }
  try { await new Response('x').text(); console.log(new Mine()); await fetch('http://127.0.0.1:1').catch((error) => { found ||= leads(error) }) } catch {}
  Promise.prototype.then = then
  Array.prototype.push = push
  return found`,
  inPlainVm,
)
attempt(
  'a setter on Object.prototype catches what the host makes',
  `let found = false
  for (const key of ['status', 'headers', 'body', 'url', 'id', 'bytes', 'callback', '__vulcan_loaded', '__vulcan_module'])
    Object.defineProperty(Object.prototype, key, { configurable: true, set(value) { found ||= leads(value) || leads(this); Object.defineProperty(this, key, { value, writable: true, configurable: true, enumerable: true }) } })
  try { const response = new Response('x', { headers: { a: 'b' } }); found ||= leads(response); await response.text() } catch (error) { found ||= leads(error) }
  return found`,
  inPlainVm,
)

const root = new URL('../..', import.meta.url).pathname.replace(/\/$/, '')
/** What only Node has. */
const node: Record<string, string> = {
  'process is there': 'return isHost(globalThis.process)',
  'process.binding is there': "return typeof globalThis.process?.binding === 'function'",
  'process.getBuiltinModule gives fs':
    "return typeof globalThis.process?.getBuiltinModule?.('fs')?.readFileSync === 'function'",
  'require is made':
    "return typeof (globalThis.process?.getBuiltinModule?.('module')?.createRequire('/')) === 'function'",
  'import() of node:fs': "return typeof (await import('node:fs')).readFileSync === 'function'",
  'import() of a file': `for (const root of ['/vulcan', ${JSON.stringify(root)}]) try { return typeof (await import('file://' + root + '/shared/frames.ts')).FrameError === 'function' } catch {}`,
  'import() of a data URL': "return (await import('data:text/javascript,export default 5')).default === 5",
  'import() made by eval': "return typeof (await (0, eval)('import(\"node:os\")')).hostname === 'function'",
  'import() made by Function':
    "return typeof (await new Function('return import(\"node:os\")')()).hostname === 'function'",
  'the environment of the process':
    'return Object.keys(globalThis.process?.env ?? {}).some((name) => /^(VULCAN_HOST_SECRET|PWD|PATH)$/.test(name))',
  'a file of the host':
    "return globalThis.process?.getBuiltinModule?.('fs').readFileSync('/etc/passwd', 'utf8').length > 0",
  'a socket': "return typeof globalThis.process?.getBuiltinModule?.('net').connect === 'function'",
  'a child process':
    "return typeof globalThis.process?.getBuiltinModule?.('child_process').spawn === 'function'",
  'a finalizer that runs when no call does': "return typeof FinalizationRegistry === 'function'",
  'Atomics.waitAsync, which wakes when no call is under way':
    "return typeof Atomics.waitAsync === 'function'",
  'a fine clock': `let finest = Infinity
    for (let i = 0, last = performance.now(); i < 200000; i++) { const now = performance.now(); if (now > last && now - last < finest) finest = now - last; last = now }
    return finest < 0.05`,
  'a clock by a thread that counts in shared memory':
    "return typeof Worker === 'function' || typeof (await import('node:worker_threads')).Worker === 'function'",
}
for (const [name, body] of Object.entries(node)) attempt(name, body, (code) => inPlainNode(code))

for (const specifier of [
  'node:fs',
  '/etc/passwd',
  'file:///etc/passwd',
  'https://example.com/x.js',
  'vulcan:hook',
  'vulcan:user',
])
  test(`held: a static import of ${specifier}`, async () => {
    const { outcome } = await run(
      await runner(),
      `import * as x from ${JSON.stringify(specifier)}; export default () => 1`,
    )
    assert.is(outcome.status === 'failed' && outcome.cause, 'invalid_workload')
    // The control: a module that is offered can be imported the same way.
    assert.is(await output(await runner(), 'import * as x from "node:path"; export default () => 1'), 1)
  })

test('held: what another function left in memory is seen in fresh buffers', async () => {
  const mark = 'SECRETSECRET'
  const fill = `const all = []; for (let i = 0; i < 200; i++) { const b = new Uint8Array(65536); for (let j = 0; j < b.length; j++) b[j] = '${mark}'.charCodeAt(j % 12); all.push(b) }; return true`
  const look = `const seen = (bytes) => { for (let i = 0; i + 3 < bytes.length; i++) if (bytes[i] === 83 && bytes[i + 1] === 69 && bytes[i + 2] === 67) return true; return false }
    const make = typeof Buffer === 'function' ? (n) => Buffer.allocUnsafe(n) : (n) => new Uint8Array(n)
    for (let i = 0; i < 400; i++) if (seen(make(4000)) || seen(new Uint8Array(new WebAssembly.Memory({ initial: 1 }).buffer))) return true
    return false`
  assert.ok(await inIsolate(fill))
  assert.not.ok(await inIsolate(look))
  // The control: memory that one process hands out again without clearing it.
  assert.ok(
    await inPlainNode(
      `for (let i = 0; i < 2000; i++) Buffer.allocUnsafeSlow(20000).fill('${mark}'); gc()
      for (let i = 0; i < 2000; i++) if (Buffer.allocUnsafeSlow(20000).includes('${mark}')) return true`,
      ['--expose-gc'],
    ),
  )
})

test('held: globals poisoned by one function reach another', async () => {
  const poison = `globalThis.leak = 1; Object.prototype.polluted = 1; JSON.parse = () => ({ poisoned: true }); Array.prototype.map = () => 'poisoned'; Promise.prototype.then = null; return true`
  const look =
    'return typeof leak !== "undefined" || {}.polluted === 1 || JSON.parse("{}").poisoned === true || [1].map((x) => x) === "poisoned"'
  assert.ok(await inIsolate(poison))
  assert.not.ok(await inIsolate(look))
  // The control: in one realm the second sees what the first did.
  assert.ok(await inPlainNode(`(() => { ${poison} })(); ${look}`).catch(() => true))
})

test('held: globals poisoned by one call change what the host reads or writes in the next', async () => {
  const code = `export default async (input, ctx) => {
    if (input === 'poison') {
      JSON.stringify = () => '"poisoned"'; JSON.parse = () => 'poisoned'; Object.prototype.toJSON = undefined
      Object.freeze = () => ({ MODE: 'poisoned' }); Promise.prototype.then = () => {}
      return 'done'
    }
    return [input, ctx.env.MODE]
  }`
  const one = await runner()
  await run(one, code, { input: 'poison' })
  assert.equal(await output(one, code, { input: 'clean', env: { MODE: 'test' } }), ['clean', 'test'])
  // The control: whoever reads by the name in that realm is deceived.
  const deceived = `export default (input) => { if (input === 'poison') { JSON.stringify = () => '"poisoned"'; return } return JSON.parse(JSON.stringify('clean')) }`
  await run(one, deceived, { input: 'poison' })
  assert.is(await output(one, deceived), 'poisoned')
})

test('held: one call keeps the input, env or signal of another', async () => {
  const code = `let kept
    export default (input, ctx) => { const before = kept && (kept.ctx.env.SECRET ?? kept.same); kept ??= { ctx: { env: {} }, same: ctx.signal }; return before === ctx.signal }`
  const one = await runner()
  await output(one, code, { env: { SECRET: 'hush' } })
  assert.is(await output(one, code), false)
  // The control: module state does last from call to call.
  assert.equal(
    await output(one, 'let n = 0; export default () => ++n').then(() =>
      output(one, 'let n = 0; export default () => ++n'),
    ),
    2,
  )
})

closing()
test.run()
