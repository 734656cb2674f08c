/** What user code can reach from inside: nothing of the host’s, and nothing that breaks more than its own run. */
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { createIsolateRunner } from '../../../runners/isolate/index.ts'
import { output, run } from './support.ts'

/** Walks everything reachable from `roots`, and collects what does not belong to this isolate. */
const explorer = `
  const foreign = []
  const names = new Set(['Reference', 'ExternalCopy', 'Callback', 'Isolate', 'Context', 'Module', 'Script', 'Dereference'])
  const visited = new Set()
  const realFunction = (() => {}).constructor
  const walk = (value, path) => {
    if (value === null || (typeof value !== 'object' && typeof value !== 'function') || visited.has(value)) return
    visited.add(value)
    if (visited.size > 20000) return
    if (!(value instanceof Object) && Object.getPrototypeOf(value) !== null && value !== Object.prototype) {
      let proto = value
      while (Object.getPrototypeOf(proto) !== null) proto = Object.getPrototypeOf(proto)
      if (proto !== Object.prototype) foreign.push(path + ' has a foreign prototype')
    }
    if (typeof value === 'function') {
      if (names.has(value.name) && value !== WebAssembly.Module) foreign.push(path + ' is ' + value.name)
      let made
      try { made = value.constructor('return typeof process + typeof require + typeof globalThis.process')() } catch {}
      if (made !== undefined && made !== 'undefinedundefinedundefined' && typeof made === 'string') foreign.push(path + ' makes ' + made)
      try { if (value.caller) foreign.push(path + ' tells its caller') } catch {}
    }
    for (const key of Reflect.ownKeys(value)) {
      const own = Reflect.getOwnPropertyDescriptor(value, key)
      for (const part of ['value', 'get', 'set']) walk(own[part], path + '.' + String(key))
      if (own.get) { try { walk(value[key], path + '.' + String(key) + '()') } catch {} }
    }
    walk(Object.getPrototypeOf(value), path + '.__proto__')
  }`

test('nothing reachable from the globals, ctx, its signal or a thrown error belongs to the host', async () => {
  await using runner = await createIsolateRunner()
  const code = `${explorer}
    export default function (input, ctx) {
      walk(globalThis, 'globalThis'); walk(ctx, 'ctx'); walk(input, 'input'); walk(arguments, 'arguments')
      for (const attempt of [() => setTimeout(1), () => ctx.signal.constructor(), () => new ctx.signal.constructor(), () => queueMicrotask(1),
        () => import('node:fs'), () => console.log({ get x() { throw 1 } }), () => { for (let i = 0; i < 20000; i++) setTimeout(() => {}, 1e6) }])
        try { walk(attempt(), 'result') } catch (error) { walk(error, 'error') }
      return { foreign, seen: visited.size > 500 }
    }`
  assert.equal(await output(runner, code, { input: { a: [1] } }), { foreign: [], seen: true })
})

test('the stack seen by Error.prepareStackTrace gives no function and no receiver of ours', async () => {
  await using runner = await createIsolateRunner()
  const code = `
    const found = []
    Error.prepareStackTrace = (error, sites) => {
      for (const site of sites) {
        const file = site.getFileName()
        if (file === 'index.js') continue
        for (const what of ['getFunction', 'getThis']) if (site[what]?.() !== undefined && site[what]() !== null && site[what]() !== globalThis) found.push(file + ' ' + what + ' ' + typeof site[what]())
      }
      return 'trace'
    }
    const look = () => { try { null.x } catch (error) { void error.stack } void new Error('x').stack }
    export default async (input, ctx) => {
      look()
      console.log({ get x() { look() } }, new Proxy({}, { ownKeys() { look(); return [] } }), { toString() { look(); return '' } })
      await { then(resolve) { look(); resolve() } }
      await new Promise((resolve) => setTimeout(() => { look(); resolve() }, { valueOf() { look(); return 1 } }))
      ctx.signal.addEventListener('abort', { get handleEvent() { look(); return () => {} } }, { get once() { look() } })
      return { toJSON() { look(); return { found } } }
    }`
  assert.equal(await output(runner, code), { found: [] })
})

test('callers and arguments of our functions stay hidden', async () => {
  await using runner = await createIsolateRunner()
  const code = `
    function sloppy() { return new Function('f', 'try { return String(f.caller) } catch (e) { return "denied" }')(arguments.callee ?? sloppy) }
    export default () => {
      const seen = []
      const spy = new Function('seen', 'return function spy() { let c; try { c = spy.caller } catch { c = "denied" } seen.push(c === null ? "null" : typeof c); try { seen.push(typeof spy.arguments) } catch {} return 1 }')(seen)
      console.log({ toString: spy }, '%s', { toString: spy }); setTimeout(() => {}, { valueOf: spy }); JSON.stringify({ toJSON: spy })
      return seen.filter((what) => what === 'function')
    }`
  assert.equal(await output(runner, code.replace(/^ {4}function sloppy.*$/m, '')), [])
})

const poisons: Record<string, string> = {
  'Array.prototype':
    'for (const k of ["push", "map", "forEach", "join", "slice", "indexOf"]) Array.prototype[k] = () => { throw new Error("poison") }; Array.prototype[Symbol.iterator] = () => { throw new Error("poison") }',
  JSON: 'JSON.stringify = () => "{"; JSON.parse = () => { throw 1 }',
  Promise:
    'Promise.prototype.then = () => { throw 1 }; Promise.resolve = () => { throw 1 }; globalThis.Promise = undefined',
  'Map and Reflect':
    'Map.prototype.get = Map.prototype.set = Map.prototype.clear = () => { throw 1 }; Reflect.apply = Reflect.ownKeys = () => { throw 1 }',
  'String and Object':
    'String.prototype.slice = String.prototype.indexOf = () => { throw 1 }; Object.freeze = Object.keys = Object.defineProperty = () => { throw 1 }',
  'Function.prototype':
    'Function.prototype.call = Function.prototype.apply = Function.prototype.bind = () => { throw 1 }',
  Error:
    'Error.prototype.toString = () => { throw 1 }; Error.captureStackTrace = () => { throw 1 }; Error.stackTraceLimit = 1e6',
  'all globals':
    'for (const k of Object.getOwnPropertyNames(globalThis)) { try { delete globalThis[k] } catch {} }',
}

for (const [name, poison] of Object.entries(poisons)) {
  test(`a poisoned ${name} does not keep results, lines and timers from working`, async () => {
    await using runner = await createIsolateRunner({ min: 1, max: 1 })
    const code = `const { console, setTimeout, Promise } = globalThis; ${poison}
      export default async (input, ctx) => {
        console.log('a %s', 'b', { x: [1, 2] }); ctx.log.warn('w')
        await new Promise((resolve) => setTimeout(resolve, 2))
        if (input === 'throw') throw { message: 'thrown', stack: 'mine', name: 'E' }
        return { ok: true }
      }`
    for (let round = 0; round < 2; round++) {
      const { outcome, lines } = await run(runner, code, { timeoutMs: 2_000 })
      assert.is(outcome.status === 'completed' && outcome.output, '{"ok":true}', JSON.stringify(outcome))
      assert.equal(
        lines.map((line) => line.text),
        ['a b { x: [ 1, 2 ] }', 'w'],
      )
    }
    const { outcome } = await run(runner, code, { input: 'throw', timeoutMs: 2_000 })
    assert.is(outcome.status === 'failed' && outcome.error.message, 'E: thrown')
    assert.is(await output(runner, 'export default () => "next"'), 'next')
  })
}

test('poison that does reach a run breaks only that run', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  for (const poison of [
    'Object.prototype.toJSON = () => { throw new Error("x") }',
    'Object.defineProperty(Object.prototype, "then", { get() { throw new Error("x") } })',
    'Object.defineProperty(Array.prototype, "0", { set() { throw new Error("x") } })',
    'for (const k of ["value", "get", "set", "enumerable", "configurable"]) Object.defineProperty(Object.prototype, k, { get() { throw new Error(k) }, configurable: true })',
  ]) {
    const code = `export default (input, ctx) => { ${poison}; console.log({ a: [1] }); return { a: [1] } }`
    const { outcome } = await run(runner, code, { timeoutMs: 1_000 })
    if (outcome.status === 'failed')
      assert.ok(['user_error', 'output_invalid'].includes(outcome.cause), JSON.stringify(outcome))
    assert.is(await output(runner, 'export default () => "next"'), 'next')
  }
})

test('proxies and getters in console arguments run nothing outside of their own run', async () => {
  await using runner = await createIsolateRunner({ min: 1, max: 1 })
  const code = `export default () => {
    const traps = new Proxy({}, { get(t, trap) { return () => { throw new Error(trap) } } })
    for (const target of [{}, [], () => {}, new Map(), new Error('x'), new Date()]) {
      console.log(new Proxy(target, traps), new Proxy(target, {}))
      console.log('%s %d %j %o', new Proxy(target, traps), new Proxy(target, traps), new Proxy(target, traps), new Proxy(target, traps))
    }
    console.log(Object.defineProperty({}, Symbol.toStringTag, { get() { throw 1 } }), { constructor: { name: {} } }, { constructor: null })
    return 'done'
  }`
  const { outcome, lines } = await run(runner, code)
  assert.is(outcome.status === 'completed' && outcome.output, '"done"', JSON.stringify(outcome))
  assert.is(lines.length, 13)
})

test('a value with millions of parts is cut, not written out', async () => {
  await using runner = await createIsolateRunner()
  const code = `const long = 'x'.repeat(100); export default () => {
    console.log(new Array(1e6).fill('item'), Object.fromEntries(Array.from({ length: 1e5 }, (_, i) => ['k' + i, i])))
    console.log(Array.from({ length: 100 }, () => Array.from({ length: 100 }, () => Array.from({ length: 100 }, () => long))))
    const deep = {}; let at = deep; for (let i = 0; i < 1e5; i++) at = at.next = {}
    console.log(deep)
  }`
  const { outcome, lines, ms } = await run(runner, code)
  assert.is(outcome.status, 'completed', JSON.stringify(outcome))
  assert.ok(lines.every((line) => line.text.length < 66_000))
  assert.ok(ms < 5_000)
})

test.run()
