/** Runs one file of the web platform tests in an isolate of its own. */
import { once } from 'node:events'
import { existsSync, readFileSync, statSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join, normalize } from 'node:path'
import type { WebCode } from '../../runners/isolate/web/host.ts'
import { Realm } from './realm.ts'
import type { TestFile } from './tests.ts'

export interface Result {
  passed: number
  /** Name and message of each test that did not. */
  failed: { name: string; message: string }[]
}

/** What a test server gives another file for. */
const aliases: Record<string, string> = { 'resources/WebIDLParser.js': 'resources/webidl2/lib/webidl2.js' }

/** A file that has not ended after this long has hung. */
const fileTimeoutMs = 60_000

/** What the tests find around them in a browser: an address and relative URLs. Text, evaluated before the harness. */
const prelude = (address: string) => `
{
  const location = new URL(${JSON.stringify(address)})
  const define = (name, value) => Object.defineProperty(globalThis, name, { value, writable: true, configurable: true })
  define('location', location)
  define('GLOBAL', { isWindow: () => false, isWorker: () => true, isShadowRealm: () => false })
  // undici's name for the address that relative URLs start from.
  define(Symbol.for('undici.globalOrigin.1'), location)
}
`
const postlude = `
;{
  // For idlharness.js, which asks what kind of global it is in.
  Object.defineProperty(globalThis, 'DedicatedWorkerGlobalScope', {
    value: class { static [Symbol.hasInstance](value) { return value === globalThis } },
    configurable: true,
  })
  const { __report } = globalThis
  add_result_callback((test) => __report(test.status, test.name, String(test.message)))
  add_completion_callback((tests, status) => __report(-1, String(status.status), String(status.message)))
}
`

/** Serves the files of the tests as they are, for those that fetch one. */
export async function serveFiles(folder: string): Promise<{ origin: string; close(): void }> {
  const server = createServer((request, response) => {
    const { pathname } = new URL(request.url!, 'http://localhost')
    const path = join(folder, normalize(decodeURIComponent(pathname)))
    if (!existsSync(path) || !statSync(path).isFile()) return response.writeHead(404).end()
    const type = pathname.endsWith('.json') ? 'application/json' : 'text/plain'
    response.writeHead(200, { 'content-type': type }).end(readFileSync(path))
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  return {
    origin: `http://127.0.0.1:${port}`,
    close() {
      server.close()
      server.closeAllConnections()
    },
  }
}

export interface Source {
  /** Of the tests. */
  folder: string
  /** Where they are served. */
  origin: string
}

export async function runFile(
  code: WebCode,
  { folder, origin }: Source,
  file: TestFile,
  variant: string,
): Promise<Result> {
  const { path, scripts } = file
  const result: Result = { passed: 0, failed: [] }
  const ended = Promise.withResolvers<void>()
  const seen = new Set<string>()
  using realm = new Realm(code, { memoryMb: 512 })
  realm.lend('__report', (status: number, name: string, message: string) => {
    if (status === -1) {
      if (name !== '0') result.failed.push({ name: 'the harness', message })
      ended.resolve()
      return
    }
    seen.add(name)
    if (status === 0) result.passed++
    else result.failed.push({ name, message: message.slice(0, 300) })
  })
  const text = (name: string) => readFileSync(join(folder, aliases[name] ?? name), 'utf8')
  try {
    // One script: the harness thinks that all is loaded as soon as microtasks run.
    const source = [
      prelude(`${origin}/${path}${variant}`),
      text('resources/testharness.js'),
      'setup({ explicit_timeout: true })',
      postlude,
      ...scripts.map(text),
      text(path),
    ].join('\n;')
    realm.script(source, path)
  } catch (error) {
    result.failed.push({ name: 'the script', message: String((error as Error).message).slice(0, 300) })
    return result
  }
  const timer = setTimeout(() => {
    result.failed.push({ name: 'the file', message: `did not end within ${fileTimeoutMs / 1000} s` })
    ended.resolve()
  }, fileTimeoutMs)
  await ended.promise
  clearTimeout(timer)
  return result
}
