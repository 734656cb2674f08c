/**
 * Makes the bundle of web APIs for the isolates, with esbuild. Runs in the runner, never in a sandbox child: what a
 * child reads is one file of plain text that no user can have written.
 *
 * The bundle is one script for installing and one for each group of APIs. A group is evaluated in an isolate when
 * something of it is first touched there, so that code which touches little starts fast and stays small.
 */
import { execFile } from 'node:child_process'
import { createHash, randomUUID } from 'node:crypto'
import { globSync, readFileSync } from 'node:fs'
import { mkdir, readFile, rename, writeFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { build, type Plugin } from 'esbuild'
import { nodeFlags } from './flags.ts'

const here = fileURLToPath(new URL('.', import.meta.url))
const guest = join(here, 'guest')
const root = join(here, '../../..')
const require = createRequire(import.meta.url)

/** What the file of a bundle holds, as JSON text. */
export interface WebBundle {
  /** A classic script whose completion value is `{ install }`. */
  install: string
  /** By name; each is a classic script whose completion value is a function (host, group) => exports. */
  groups: Record<string, string>
  /** V8’s code by group, `''` for the installing script, in base64: see `precompile.ts`. */
  code?: Record<string, string>
}

/** Globals that library code means when it names them: taken from `host.web`, whatever the user’s code put there. */
const webGlobals = [
  ...['AbortController', 'AbortSignal', 'Blob', 'ByteLengthQueuingStrategy', 'CountQueuingStrategy'],
  ...['CryptoKey', 'CustomEvent', 'DOMException', 'Event', 'EventTarget', 'File', 'FormData', 'Headers'],
  ...['MessageChannel', 'MessagePort', 'ReadableStream', 'Request', 'Response', 'TextDecoder'],
  ...['TextDecoderStream', 'TextEncoder', 'TransformStream', 'URL', 'URLSearchParams', 'WritableStream'],
  ...['Buffer', 'process', 'structuredClone', 'atob', 'btoa'],
]

const define: Record<string, string> = {
  ...Object.fromEntries(webGlobals.map((name) => [name, `host.web.${name}`])),
  // Looked for by libraries that would rather use Node’s; asking for them would load what is being loaded.
  ...Object.fromEntries(
    ['TextDecoder', 'TextEncoder', 'Buffer', 'DOMException', 'atob'].map((name) => [
      `globalThis.${name}`,
      'undefined',
    ]),
  ),
  'globalThis.TransformStream': 'host.web.TransformStream',
  FinalizationRegistry: 'host.NoRegistry',
  setTimeout: 'host.setTimeout',
  clearTimeout: 'host.clearTimeout',
  'process.emitWarning': 'host.warn',
  'process.env.NODE_DEBUG': '""',
  'process.env.NODE_V8_COVERAGE': '""',
  global: 'globalThis',
}

/** One change to a library’s text; the build fails where it does not apply exactly so often. */
interface Patch {
  find: RegExp
  replace: string
  times: number
}
/** By path below node_modules. */
const patches: Record<string, Patch[]> = {
  // They look for a platform that is not there, and would load what they are part of.
  '@exodus/bytes/single-byte.js': [{ find: /= globalThis/g, replace: '= {}', times: 1 }],
  '@exodus/bytes/base64.js': [{ find: /= globalThis /g, replace: '= {} ', times: 1 }],
  '@exodus/bytes/fallback/platform.native.js': [
    { find: /\{ Buffer \} = globalThis/g, replace: '{ Buffer } = {}', times: 1 },
  ],
  // Asking whether something is, say, a ReadableStream must not load streams: nothing is one until they are.
  'undici/lib/web/webidl/index.js': [
    {
      find: /webidl\.util\.MakeTypeAssertion\((ReadableStream|Blob|URLSearchParams|File|URL|AbortSignal|MessagePort)\)/g,
      replace: 'host.isA("$1")',
      times: 7,
    },
    // It takes the order of reads that the standard has for proxies only, because it can tell them.
    { find: /!types\.isProxy\(O\)/g, replace: 'false', times: 1 },
  ],
  'undici/lib/web/fetch/headers.js': [
    {
      find: /if \(getHeadersGuard\(headers\) === 'immutable'\) \{/g,
      replace: `if (getHeadersGuard(headers) === 'request-no-cors' && !noCors.allows(name, combined(getHeadersList(headers), name, value))) return
  $&`,
      times: 1,
    },
    {
      find: /return getHeadersList\(headers\)\.append\(name, value, false\)/g,
      replace: `$&, getHeadersGuard(headers) === 'request-no-cors' && getHeadersList(headers).delete('range', true)`,
      times: 1,
    },
    {
      find: /this\.#headersList\.(delete\(name, false\)|set\(name, value, false\))/g,
      replace: `if (this.#guard === 'request-no-cors') { if (!noCors.$1) return; this.#headersList.delete('range', true) }
    $&`,
      times: 2,
    },
    {
      find: /^'use strict'$/gm,
      replace: `$&
const noCors = require('vulcan:no-cors')
const combined = (list, name, value) => list.contains(name, false) ? list.get(name, false) + ', ' + value : value`,
      times: 1,
    },
  ],
  // Encoders are made where they are used: most handlers need none, and would load the group for nothing.
  'undici/lib/web/fetch/data-url.js': [
    { find: /^const encoder = .*$/gm, replace: '', times: 1 },
    { find: /\bencoder\.encode/g, replace: 'new TextEncoder().encode', times: 1 },
  ],
  'undici/lib/encoding/index.js': [
    { find: /^const textDecoder = .*$/gm, replace: '', times: 1 },
    { find: /\btextDecoder\.decode/g, replace: 'new TextDecoder().decode', times: 1 },
  ],
  // A body that was made from text or bytes becomes a stream only when its stream is asked for.
  'undici/lib/web/fetch/request.js': [
    {
      find: /util\.isDisturbed\(this\.#state\.body\.stream\)/g,
      replace: 'this.#state.body.disturbed',
      times: 1,
    },
    {
      find: /const identityTransform = new TransformStream\(\)\s+inputBody\.stream\.pipeThrough\(identityTransform\)\s+finalBody = \{[^}]*\}/g,
      replace: 'finalBody = inputBody.take()',
      times: 1,
    },
    // What the host gave becomes headers and a signal only when these are asked for: see `GivenRequest`.
    { find: /this\.#signal\b(?=\n|\)\n)/g, replace: 'signalOf(this)', times: 2 },
    { find: /(?<=signal = )input\.#signal/g, replace: 'signalOf(input)', times: 1 },
    { find: /(?<=return |getHeadersGuard\()this\.#headers\b/g, replace: 'headersOf(this)', times: 2 },
    { find: /^let patchMethodWarning/gm, replace: 'let signalOf, headersOf\n$&', times: 1 },
    {
      find: /static \{/g,
      replace: `$&
    signalOf = (request) => request.#signal ??= request.#state.makeSignal()
    headersOf = (request) => {
      if (request.#headers === undefined) {
        request.#headers = new Headers(kConstruct)
        setHeadersList(request.#headers, request.#state.headersList)
        setHeadersGuard(request.#headers, 'immutable')
      }
      return request.#headers
    }`,
      times: 1,
    },
    {
      find: /setRequestState\(request, innerRequest\)/g,
      replace: '$&\n  if (signal === undefined) return request',
      times: 1,
    },
    {
      find: /makeRequest\(\{ \.\.\.request, body: null \}\)/g,
      replace: 'makeRequest(request)\n  newRequest.body = null',
      times: 1,
    },
  ],
  'undici/lib/web/fetch/response.js': [
    // Without `init` there is nothing to convert.
    {
      find: /webidl\.converters\.ResponseInit\(init\)/g,
      replace: `init === undefined ? { status: 200, statusText: '' } : $&`,
      times: 2,
    },
    // Text stays text.
    { find: /textEncoder\.encode\(\s*serialize/g, replace: '(serialize', times: 1 },
    { find: /^const textEncoder = .*$/gm, replace: '', times: 1 },
    {
      find: /util\.isDisturbed\(this\.#state\.body\.stream\)/g,
      replace: 'this.#state.body.disturbed',
      times: 1,
    },
    {
      find: /(innerResponse|this\.#state)\.urlList\.length !== 0 && \1\.body\?\.stream/g,
      replace: 'false',
      times: 2,
    },
  ],
}

/** By importing package and specifier: what stands in for modules that a bare context does not have. */
const replaced: { importer: RegExp; specifier: RegExp; file: string }[] = [
  { importer: /\/undici\//, specifier: /^\.\/body$/, file: 'shims/undici-body.ts' },
  { importer: /\/undici\//, specifier: /^\.\.?\/.*core\/util$/, file: 'shims/undici-util.ts' },
  { importer: /\/undici\//, specifier: /^node:(?!assert$)/, file: 'shims/undici-node.ts' },
  { importer: /\/undici\//, specifier: /^\.\.?\/.*runtime-features\.js$/, file: 'shims/undici-node.ts' },
  { importer: /\/undici\//, specifier: /^vulcan:no-cors$/, file: 'shims/no-cors.ts' },
  { importer: /\/whatwg-url\//, specifier: /^tr46$/, file: 'shims/tr46.ts' },
  {
    importer: /\/whatwg-url\//,
    specifier: /^@exodus\/bytes\/(encoding|whatwg)\.js$/,
    file: 'shims/bytes-whatwg.ts',
  },
  { importer: /\/@exodus\/bytes\//, specifier: /platform\.js$/, file: 'shims/bytes-platform.ts' },
]

/** `node:` modules that libraries import: they get the group, so that there is one Buffer. */
const grouped: Record<string, string> = {
  buffer: 'node_buffer',
  'buffer/': 'node_buffer',
  'safe-buffer': 'node_buffer',
  util: 'node_util',
  'util/': 'node_util',
}

/** As a library asserts about itself. */
const assertShim = `module.exports = (value, message) => { if (!value) throw new Error(message ?? 'assertion failed') }`

const plugin: Plugin = {
  name: 'web',
  setup({ onLoad, onResolve, resolve }) {
    onResolve({ filter: /^node:assert$/ }, () => ({ path: 'assert', namespace: 'assert' }))
    onLoad({ filter: /./, namespace: 'assert' }, () => ({ contents: assertShim }))
    // Its first choice is Node's util, which is built on it here.
    onResolve({ filter: /^inherits$/ }, ({ path, resolveDir, kind }) =>
      resolve(`${path}/inherits_browser.js`, { resolveDir, kind }),
    )
    onResolve({ filter: /^(safe-buffer|(buffer|util)\/?)$/ }, ({ path, importer }) =>
      importer.startsWith(guest) ? undefined : { path: grouped[path]!, namespace: 'group' },
    )
    onLoad({ filter: /./, namespace: 'group' }, ({ path }) => ({
      contents: `module.exports = group(${JSON.stringify(path)}).exports`,
    }))
    // Not among the package’s exports: the encodings without the large tables of some.
    onResolve({ filter: /^@exodus\/bytes\/fallback\// }, ({ path }) => ({
      path: join(dirname(require.resolve('@exodus/bytes/encoding.js')), path.slice('@exodus/bytes/'.length)),
    }))
    onResolve({ filter: /./ }, ({ path, importer }) => {
      const found = replaced.find((entry) => entry.importer.test(importer) && entry.specifier.test(path))
      return found === undefined ? undefined : { path: join(guest, found.file) }
    })
    onLoad({ filter: /\/node_modules\/(undici\/lib|@exodus\/bytes)\/.*\.js$/ }, async ({ path }) => {
      let contents = await readFile(path, 'utf8')
      for (const { find, replace, times } of patches[path.split('/node_modules/').at(-1)!] ?? []) {
        const count = contents.match(find)?.length ?? 0
        if (count !== times) throw new Error(`${path}: ${find} matches ${count} times, expected ${times}`)
        contents = contents.replace(find, replace)
      }
      return { contents, loader: 'js' }
    })
  },
}

const wrap = (parameters: string, body: string) =>
  `(function(${parameters}){"use strict";var module={exports:{}},exports=module.exports;${body}\nreturn module.exports})`

async function bundle(): Promise<WebBundle> {
  const groups = globSync('groups/*.ts', { cwd: guest }).sort()
  const result = await build({
    absWorkingDir: guest,
    entryPoints: ['install.ts', ...groups],
    outdir: '/',
    bundle: true,
    write: false,
    format: 'cjs',
    platform: 'neutral',
    mainFields: ['module', 'main'],
    target: 'esnext',
    // Nothing else is minified: the names of classes and functions are part of the APIs.
    minifyWhitespace: true,
    legalComments: 'none',
    // Strings of one byte a character take half the memory.
    charset: 'ascii',
    define,
    plugins: [plugin],
    logLevel: 'silent',
    tsconfigRaw: { compilerOptions: { target: 'esnext', useDefineForClassFields: true } },
  })
  const made: WebBundle = { install: '', groups: {} }
  for (const { path, text } of result.outputFiles) {
    const name = path.split('/').at(-1)!.replace(/\.js$/, '')
    if (name === 'install') made.install = `${wrap('', text)}()`
    else made.groups[name] = wrap('host,group', text)
  }
  return made
}

/** Hex sha256 of all that the bundle is made from. */
function inputsHash(): string {
  const hash = createHash('sha256')
  for (const file of globSync(['*.ts', 'guest/**/*.ts'], { cwd: here }).sort())
    hash.update(`${file}\0`).update(readFileSync(join(here, file)))
  hash.update(readFileSync(join(root, 'package-lock.json'))).update(process.version)
  return hash.digest('hex')
}

let made: Promise<{ path: string }> | undefined

/**
 * The path of the bundle’s file, a `WebBundle` as JSON text; made where `cacheDir` does not have it yet (1 s), and
 * kept there under the hash of what it is made from.
 */
export function webBundle(
  cacheDir = join(dirname(require.resolve('esbuild/package.json')), '../.cache/vulcan-web'),
): Promise<{ path: string }> {
  made ??= (async () => {
    const path = join(cacheDir, `web-${inputsHash().slice(0, 32)}.json`)
    try {
      await readFile(path)
    } catch {
      await mkdir(cacheDir, { recursive: true })
      const part = `${path}.${randomUUID()}`
      await writeFile(part, JSON.stringify(await bundle()), { mode: 0o644 })
      // Under the flags of a child, which V8’s code is bound to.
      const helper = [...nodeFlags, join(here, 'precompile.ts'), part, part]
      await promisify(execFile)(process.execPath, helper, { env: {} }).catch((error) => {
        // A line of the bundle is not for reading.
        const lines = String(error.stderr).split('\n')
        throw new Error(lines.filter((line) => line.length < 500).join('\n'))
      })
      await rename(part, path)
    }
    return { path }
  })()
  return made
}
