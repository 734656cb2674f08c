/**
 * What the pack shares. An attempt is a piece of code that gives something true where it got through. It is made
 * twice: behind our walls, where it must not, and as a control with a wall taken away, where it must: an attempt
 * that fails everywhere would prove nothing.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { Console } from 'node:console'
import { Writable } from 'node:stream'
import { createContext, runInContext } from 'node:vm'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { createIsolateRunner } from '../../runners/isolate/index.ts'
import type { Runner } from '../../runners/runner.ts'
import { run } from '../runners/isolate/support.ts'

let made: Promise<Runner> | undefined
/** One runner for all attempts of a file. Without bubblewrap and seccomp the pack fails rather than skip. */
export const runner = (): Promise<Runner> => {
  made ??= createIsolateRunner({ min: 2, max: 6 }).then((one) => {
    for (const wall of ['bubblewrap', 'seccomp', 'node-permissions', 'rlimits'])
      assert.ok(one.capabilities.walls.includes(wall), `the pack needs ${wall}`)
    return one
  })
  return made
}

/** To be registered last in a file. */
export const closing = () =>
  test('the runner of this file closes', async () => {
    await (await runner())[Symbol.asyncDispose]()
  })

/** In every attempt: whether a function, by its constructor, gives the process of the host. */
const helpers = `
  const isHost = (value) => typeof value?.dlopen === 'function'
  const gives = (make) => { try { return isHost(make('return globalThis.process')()) } catch { return false } }
  const leads = (value) => {
    for (let at = value, hops = 0; at !== null && at !== undefined && hops < 10; at = Object.getPrototypeOf(at), hops++) {
      let own
      try { own = at.constructor } catch { continue }
      if (typeof own === 'function' && (gives(own.constructor) || gives(own))) return true
      for (const key of Reflect.ownKeys(Object(at))) {
        const { value: one, get, set } = Reflect.getOwnPropertyDescriptor(Object(at), key) ?? {}
        for (const fn of [one, get, set]) if (typeof fn === 'function' && gives(fn.constructor)) return true
      }
    }
    return false
  }`

const handlerOf = (body: string) => `async (input, ctx) => { ${helpers}\n${body} }`
const input = { a: [1], nested: { b: 2 } }

/** What the attempt gives behind our walls; a failure of its call is a failure of the attempt. */
export async function inIsolate(body: string, over: object = {}): Promise<unknown> {
  const { outcome } = await run(await runner(), `export default ${handlerOf(body)}`, {
    input,
    timeoutMs: 2_000,
    ...over,
  })
  return outcome.status === 'completed' ? JSON.parse(outcome.output) : undefined
}

/** The same where objects of ours are handed to the code as they are, and no isolate is around it. */
export async function inPlainVm(body: string): Promise<unknown> {
  const { signal } = new AbortController()
  const env = { MODE: 'test' }
  const ctx = { id: 'id', env, signal, log: () => {}, waitUntil: () => {}, traceparent: null, attempt: 1 }
  const context = createContext({ ...hostGlobals() })
  const handler = runInContext(`(${handlerOf(body)})`, context) as (
    input: unknown,
    ctx: unknown,
  ) => Promise<unknown>
  return await handler(input, ctx)
}

/** Globals of this realm by name, as a careless host would lend them. */
function hostGlobals(): Record<string, unknown> {
  const names = [
    ...['AbortController', 'AbortSignal', 'Blob', 'DOMException', 'Event', 'EventTarget', 'FormData'],
    ...['Headers', 'ReadableStream', 'Request', 'Response', 'TextDecoder', 'TextEncoder', 'TransformStream'],
    ...['URL', 'URLSearchParams', 'WebAssembly', 'WritableStream', 'atob', 'btoa', 'console', 'crypto'],
    ...['fetch', 'performance', 'queueMicrotask', 'setInterval', 'setTimeout', 'structuredClone', 'Error'],
  ]
  const quiet = new Console(new Writable({ write: (_chunk, _encoding, done) => done() }))
  const globals = names.map((name) => [name, (globalThis as Record<string, unknown>)[name]])
  return { ...Object.fromEntries(globals), console: quiet }
}

/** The same as a module of its own in a Node without any wall; `flags` are of Node. */
export async function inPlainNode(body: string, flags: string[] = []): Promise<unknown> {
  const source = `const handler = ${handlerOf(body)}
    const result = await handler(${JSON.stringify(input)}, { env: {}, id: 'id' })
    process.stdout.write(JSON.stringify(result ?? null), () => process.exit(0))`
  const text = await outputOf(process.execPath, [...flags, '--input-type=module', '-e', source])
  return text === '' ? undefined : JSON.parse(text)
}

/** Standard output of a process; killed after 10 s. */
export function outputOf(file: string, args: string[], extra?: Buffer): Promise<string> {
  return new Promise((resolve, reject) => {
    const stdio: ('ignore' | 'pipe')[] = ['ignore', 'pipe', 'pipe']
    if (extra !== undefined) stdio.push('pipe')
    const env = { VULCAN_HOST_SECRET: 'hush' } as NodeJS.ProcessEnv
    const child: ChildProcess = spawn(file, args, { stdio, env, cwd: '/' })
    const timer = setTimeout(() => child.kill('SIGKILL'), 10_000)
    const pipe = child.stdio[3] as NodeJS.WritableStream | null | undefined
    pipe?.on('error', () => {})
    if (extra !== undefined) pipe?.end(extra)
    let text = ''
    child.stdout!.on('data', (chunk) => {
      text += chunk
    })
    let errors = ''
    child.stderr!.on('data', (chunk) => {
      errors += chunk
    })
    child.on('error', reject)
    child.on('close', () => {
      clearTimeout(timer)
      if (text === '' && process.env.VULCAN_TEST_LOG !== undefined) console.error(errors)
      resolve(text)
    })
  })
}

/** Registers an attempt with its control. */
export function attempt(
  name: string,
  body: string,
  control: (body: string) => Promise<unknown>,
  over?: object,
): void {
  test(`held: ${name}`, async () => {
    assert.not.ok(await inIsolate(body, over), 'it got through')
    assert.ok(await control(body), 'the control did not get through: the attempt proves nothing')
  })
}
