// timeout: 240
import { mkdir, mkdtemp, readdir, readFile, rm, symlink, utimes, writeFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { gzipSync, zstdCompressSync } from 'node:zlib'
import { build as esbuild } from 'esbuild'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { archiveLimits, type Files, packed, unpack } from '../../gateway/build/archive.ts'
import { Builder, type Built } from '../../gateway/build/build.ts'
import { offeredBuiltins } from '../../gateway/build/builtins.ts'
import { installOf } from '../../gateway/build/manifest.ts'
import { cacheDirectory } from '../../scripts/cache-directory.ts'
import { Problem } from '../../shared/errors.ts'
import { until } from '../shared/support.ts'
import { tarOf, tgzOf, zipOf } from './archives.ts'

const newBuilder = (over: Partial<ConstructorParameters<typeof Builder>[0]> = {}) =>
  new Builder({ cacheDir: cacheDirectory(process.env), tempDir: tmpdir(), env: process.env, ...over })
const builder = newBuilder()

const filesOf = (files: Record<string, string | Uint8Array>): Files =>
  new Map(Object.entries(files).map(([path, text]) => [path, Buffer.from(text)]))
const build = (files: Record<string, string | Uint8Array>, entry = 'index.ts') =>
  builder.build(filesOf(files), entry)

async function problemOf(promise: Promise<unknown>): Promise<Problem> {
  try {
    await promise
  } catch (error) {
    if (error instanceof Problem) return error
    throw error
  }
  throw new Error('nothing was refused')
}

async function folder(): Promise<AsyncDisposable & { path: string }> {
  const path = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) }
}

/** Runs a bundle here; only for what this file has written itself. */
const loaded = async ({ code }: Built) =>
  (await import(`data:text/javascript;base64,${code.toString('base64')}`)) as { default: unknown }

test('TypeScript, JSX and several files become one module with a map to the sources', async () => {
  const built = await build({
    'index.ts': `import { twice } from './lib/twice.ts'\nexport default (n: number): number => twice(n)\n`,
    'lib/twice.ts': 'export const twice = (n: number) => n * 2\n',
  })
  assert.is(((await loaded(built)).default as (n: number) => number)(21), 42)
  const map = JSON.parse(built.map.toString())
  assert.equal(map.sources, ['lib/twice.ts', 'index.ts'])
  assert.match(map.sourcesContent[1], 'n: number): number')
  const jsx = await build(
    { 'index.tsx': 'const h = (tag: string) => tag\n/** @jsx h */\nexport default () => <b />' },
    'index.tsx',
  )
  assert.is(((await loaded(jsx)).default as () => string)(), 'b')
})

test('the same input gives the same bytes, wherever and whenever it is built', async () => {
  const files = { 'index.ts': 'import a from "./a.json"; export default () => a.x', 'a.json': '{"x":1}' }
  const first = await build(files)
  const second = await newBuilder({ cacheDir: join(tmpdir(), 'elsewhere') }).build(
    new Map([...filesOf(files)].reverse()),
    'index.ts',
  )
  assert.is(Buffer.compare(first.code, second.code), 0)
  assert.is(Buffer.compare(first.map, second.map), 0)
})

test('an error has its file, line and column', async () => {
  const problem = await problemOf(
    build({ 'index.ts': `import './src/b.ts'\nexport default 1`, 'src/b.ts': 'let a = 1\nlet  b = ;\n' }),
  )
  assert.is(problem.code, 'build_failed')
  assert.match(problem.message, 'src/b.ts:2:10: ')
  assert.equal(problem.errors, [{ detail: 'Unexpected ";"', file: 'src/b.ts', line: 2, column: 10 }])
})

test('what has no default export is refused; a warning is passed on', async () => {
  assert.match((await problemOf(build({ 'index.ts': 'export const a = 1' }))).message, 'no default export')
  const { warnings } = await build({ 'index.ts': 'export default () => ({ a: 1, a: 2 })' })
  assert.is(warnings.length, 1)
  assert.equal([warnings[0]!.file, warnings[0]!.line], ['index.ts', 1])
})

test('the node: modules that are offered stay imports, however they are asked for', async () => {
  const built = await build({
    'index.ts': `
      import { EventEmitter } from 'events'
      import { Buffer } from 'node:buffer'
      import old from './old.cjs'
      export default () => [new EventEmitter() instanceof old.EventEmitter, Buffer.from('a').toString('hex'), old.same]`,
    'old.cjs': `exports.EventEmitter = require('events'); exports.same = require('node:util').inspect === require('util').inspect`,
  })
  for (const name of ['node:events', 'node:buffer', 'node:util'])
    assert.match(built.code.toString(), `from "${name}"`)
  assert.not.match(built.code.toString(), 'Dynamic require')
  assert.equal(((await loaded(built)).default as () => unknown)(), [true, '61', true])
})

test('what the build leaves to the runtime is what the runtime has', async () => {
  const install = await readFile(
    new URL('../../runners/isolate/web/guest/install.ts', import.meta.url),
    'utf8',
  )
  const table = /const modules: Record<string, string> = \{([^}]*)\}/.exec(install)![1]!
  const names = [...table.matchAll(/^\s*(?:'([^']+)'|(\w+)):/gm)].map(([, quoted, bare]) => quoted ?? bare!)
  assert.equal(names.sort(), [...offeredBuiltins].sort())
})

test('another node: module is an error that names it and what there is', async () => {
  for (const name of ['node:fs', 'fs', 'node:child_process', 'worker_threads']) {
    const problem = await problemOf(build({ 'index.ts': `import x from '${name}'; export default x` }))
    assert.is(problem.code, 'build_failed')
    assert.match(problem.message, `index.ts:1:15: ${name} is not offered`)
    assert.match(problem.message, 'node:async_hooks, node:buffer')
  }
  const missing = await problemOf(build({ 'index.ts': `import x from 'left-pad'; export default x` }))
  assert.match(missing.message, 'name it under dependencies')
})

test('with async_hooks async functions are lowered, so that contexts follow promises', async () => {
  const source = `import { AsyncLocalStorage } from 'node:async_hooks'
    export default async () => { const s = new AsyncLocalStorage(); return s.run(1, async () => { await 0; for await (const x of [1]) {} return s.getStore() }) }`
  const built = await build({ 'index.ts': source })
  assert.not.match(built.code.toString(), /\basync (\(|function)|\bawait\b/)
  assert.is(await ((await loaded(built)).default as () => Promise<number>)(), 1)
  assert.match(
    (await build({ 'index.ts': 'export default async () => { await 0 }' })).code.toString(),
    'await 0',
  )
})

test('JSON, text, bytes and WebAssembly are imported as on Cloudflare Workers', async () => {
  // An empty module.
  const wasm = Buffer.from([0, 0x61, 0x73, 0x6d, 1, 0, 0, 0])
  const built = await build({
    'index.ts': `import json from './a.json'; import text from './a.txt'; import bin from './a.bin'; import wasm from './a.wasm'; import other from './a.wasm?module'
      export default () => [json.x, text, new Uint8Array(bin)[1], wasm instanceof WebAssembly.Module, other === wasm]`,
    'a.json': '{"x":1}',
    'a.txt': 'hello',
    'a.bin': Buffer.from([7, 8]),
    'a.wasm': wasm,
  })
  assert.equal(((await loaded(built)).default as () => unknown)(), [1, 'hello', 8, true, true])
})

/** Ways to name a file; `secret` lies on the host, outside of the project. */
const reaches: Record<string, (secret: string) => Record<string, string>> = {
  'an absolute import': (secret) => ({ 'index.ts': `import x from '${secret}'; export default x` }),
  'a relative import': (secret) => ({
    'index.ts': `import x from '${'../'.repeat(12)}${secret.slice(1)}'; export default x`,
  }),
  'an import with a type': (secret) => ({
    'index.ts': `import x from '${secret}' with { type: 'text' }; export default x`,
  }),
  'a require': (secret) => ({ 'index.js': `module.exports = require('${secret}')` }),
  'an import(…)': (secret) => ({ 'index.ts': `export default () => import('${secret}')` }),
  'paths of a tsconfig': (secret) => ({
    'tsconfig.json': JSON.stringify({ compilerOptions: { baseUrl: '.', paths: { '@x': [secret] } } }),
    'index.ts': `import x from '@x'; export default x`,
  }),
  'a browser field': (secret) => ({
    'package.json': JSON.stringify({ browser: { './a.js': `./${'../'.repeat(12)}${secret.slice(1)}` } }),
    'a.js': 'export default 1',
    'index.ts': `import x from './a.js'; export default x`,
  }),
  'main of a vendored package': (secret) => ({
    'node_modules/evil/package.json': JSON.stringify({ main: `../../../../../../../..${secret}` }),
    'index.ts': `import x from 'evil'; export default x`,
  }),
}

for (const [way, filesFor] of Object.entries(reaches))
  test(`a file of the host is not read by ${way}; without the sandbox it is`, async () => {
    await using dir = await folder()
    const secret = join(dir.path, 'secret.txt')
    await writeFile(secret, 'host-only-text')
    const files = filesFor(secret)
    const entry = 'index.js' in files ? 'index.js' : 'index.ts'

    const refusal = await builder.build(filesOf(files), entry).then(
      ({ code }) => code.toString(),
      (error: Problem) => `${error.code} ${error.message} ${JSON.stringify(error.errors)}`,
    )
    assert.not.match(refusal, 'host-only-text')

    const project = join(dir.path, 'a/b/c/project')
    for (const [path, text] of Object.entries(files)) {
      await mkdir(dirname(join(project, path)), { recursive: true })
      await writeFile(join(project, path), text)
    }
    const { outputFiles } = await esbuild({
      absWorkingDir: project,
      entryPoints: [`./${entry}`],
      bundle: true,
      write: false,
      format: 'esm',
      mainFields: ['browser', 'module', 'main'],
      outfile: join(project, 'out.js'),
      logLevel: 'silent',
    })
    assert.match(outputFiles[0]!.text, 'host-only-text')
  })

test('a tsconfig cannot extend, and so show, a file of the host', async () => {
  await using dir = await folder()
  const secret = join(dir.path, 'tsconfig.secret.json')
  await writeFile(secret, '{ "compilerOptions": { "jsxFactory": "hostOnlyName" , "jsx": "react" } }')
  const files = {
    'tsconfig.json': JSON.stringify({ extends: secret }),
    'index.tsx': 'export default () => <b />',
  }
  const said = await build(files, 'index.tsx').then(
    ({ code, warnings }) => `${code} ${JSON.stringify(warnings)}`,
    (error: Problem) => JSON.stringify(error),
  )
  assert.not.match(said, 'hostOnlyName(')
  await mkdir(join(dir.path, 'project'))
  for (const [path, text] of Object.entries(files)) await writeFile(join(dir.path, 'project', path), text)
  const { outputFiles } = await esbuild({
    absWorkingDir: join(dir.path, 'project'),
    entryPoints: ['./index.tsx'],
    write: false,
    logLevel: 'silent',
  })
  assert.match(outputFiles[0]!.text, 'hostOnlyName(')
})

test('nothing of the sandbox itself can be bundled', async () => {
  for (const path of [
    '/vulcan/package.json',
    '/etc/passwd',
    '/proc/self/environ',
    '/vulcan/gateway/build/builtins.ts',
    'bytes:/vulcan/package.json',
    'builtin:fs',
    '/dev/zero',
  ])
    assert.is(
      (
        await problemOf(
          build({ 'index.ts': `import x from '${path}' with { type: 'text' }; export default x` }),
        )
      ).code,
      'build_failed',
      path,
    )
})

test('a project without end is stopped, and its build leaves nothing behind', async () => {
  await using dir = await folder()
  const stop = new AbortController()
  const own = newBuilder({ tempDir: dir.path })
  const building = own.build(filesOf({ 'index.ts': 'export default 1' }), 'index.ts', stop.signal)
  setTimeout(() => stop.abort(new Error('given up')), 20)
  const end = await building.then(
    () => 'built',
    (error) => error.message,
  )
  assert.is(end, 'given up')
  assert.equal(await readdir(dir.path), [])
})

test('what a killed gateway left is removed by the next, and nothing else', async () => {
  await using dir = await folder()
  const old = new Date(Date.now() - 2 * 3_600_000)
  for (const name of ['vulcan-build-old', 'vulcan-build-new', 'other']) await mkdir(join(dir.path, name))
  for (const name of ['vulcan-build-old', 'other']) await utimes(join(dir.path, name), old, old)
  newBuilder({ tempDir: dir.path })
  await until('the old one to be gone', async () => (await readdir(dir.path)).length === 2 || undefined)
  assert.equal((await readdir(dir.path)).sort(), ['other', 'vulcan-build-new'])
})

test('without bubblewrap nothing is built, and it is said what to install', async () => {
  for (const bwrap of ['/nowhere/bwrap', 'false']) {
    const problem = await problemOf(
      newBuilder({ bwrap }).build(filesOf({ 'index.ts': 'export default 1' }), 'index.ts'),
    )
    assert.is(problem.code, bwrap === 'false' ? 'build_failed' : 'build_unavailable')
    if (bwrap !== 'false') assert.match(problem.message, 'apt-get install bubblewrap')
  }
})

test('dependencies are installed from the registry, by the lock where there is one, and bundled', async () => {
  const source = `import ms from 'ms'; export default () => ms('2 days')`
  const free = await build({
    'package.json': JSON.stringify({ dependencies: { ms: '~2.1.0' } }),
    'index.ts': source,
  })
  assert.is(((await loaded(free)).default as () => number)(), 172_800_000)
  assert.match(free.warnings[0]!.message, 'no package-lock.json')

  const lock = {
    lockfileVersion: 3,
    packages: {
      '': { dependencies: { ms: '~2.1.0' } },
      'node_modules/ms': {
        version: '2.1.2',
        resolved: 'http://127.0.0.1:9/evil.tgz',
        integrity:
          'sha512-sGkPx+VjMtmA6MX27oA4FBFELFCZZ4S4XqeGOXCv68tT+jb3vk/RyaKWP0PTKyWtmLSM0b+adUTEvbs1PEaH2w==',
      },
    },
  }
  const files = {
    'package.json': JSON.stringify({ dependencies: { ms: '~2.1.0' } }),
    'package-lock.json': JSON.stringify(lock),
    'index.ts': `import p from 'ms/package.json'; import ms from 'ms'; export default () => [p.version, ms('1s')]`,
  }
  const locked = await build(files)
  assert.equal(((await loaded(locked)).default as () => unknown)(), ['2.1.2', 1_000])
  assert.equal(locked.warnings, [])

  lock.packages['node_modules/ms'].integrity = `sha512-${'A'.repeat(86)}==`
  const wrong = await problemOf(build({ ...files, 'package-lock.json': JSON.stringify(lock) }))
  assert.is(wrong.code, 'build_failed')
  assert.match(wrong.message, /integrity|EINTEGRITY|sha512/i)
})

test('an install runs no script, and what the project says to npm is not heard', async () => {
  await using dir = await folder()
  const mark = join(dir.path, 'ran')
  const files = {
    'package.json': JSON.stringify({
      dependencies: { ms: '2.1.3' },
      scripts: { preinstall: `touch ${mark}`, postinstall: `touch ${mark}`, prepare: `touch ${mark}` },
    }),
    '.npmrc': 'registry=http://127.0.0.1:9/\nignore-scripts=false\nscript-shell=/bin/sh\n',
    'index.ts': `import ms from 'ms'; export default ms`,
  }
  assert.ok(await build(files))
  assert.equal(await readdir(dir.path), [])
})

test('the host’s registry is asked, and said to be out of reach where it is', async () => {
  await using dir = await folder()
  const asked: string[] = []
  const registry = createServer((request, response) => {
    asked.push(request.url!)
    response.writeHead(404).end('{}')
  })
  await new Promise<void>((resolve) => registry.listen(0, '127.0.0.1', resolve))
  const { port } = registry.address() as AddressInfo
  const files = filesOf({ 'package.json': '{"dependencies":{"ms":"2.1.3"}}', 'index.ts': 'export default 1' })
  const env = { ...process.env, NPM_CONFIG_REGISTRY: `http://127.0.0.1:${port}/` }
  const own = newBuilder({ cacheDir: dir.path, env })
  assert.match((await problemOf(own.build(files, 'index.ts'))).message, 'ms')
  assert.equal([...new Set(asked)], ['/ms'])
  registry.closeAllConnections()
  await new Promise((resolve) => registry.close(resolve))
  const problem = await problemOf(own.build(files, 'index.ts'))
  assert.is(problem.code, 'build_failed')
  assert.match(problem.message, 'ECONNREFUSED')
})

test('without npm on the host it is said what to do', async () => {
  await using dir = await folder()
  const files = filesOf({ 'package.json': '{"dependencies":{"ms":"2.1.3"}}', 'index.ts': 'export default 1' })
  const own = newBuilder({ cacheDir: dir.path, env: { PATH: '/nowhere' } })
  const problem = await problemOf(own.build(files, 'index.ts'))
  assert.is(problem.code, 'build_unavailable')
  assert.match(problem.message, 'npm was not found')
})

test('a package that does not exist is named', async () => {
  const problem = await problemOf(
    build({
      'package.json': JSON.stringify({ dependencies: { ms: '99.0.0' } }),
      'index.ts': 'export default 1',
    }),
  )
  assert.is(problem.code, 'build_failed')
  assert.match(problem.message, 'ms@99.0.0')
})

for (const specifier of [
  'git+https://host.example/a.git',
  'git@host.example:a/b.git',
  'github:a/b',
  'a/b',
  'http://127.0.0.1:4222/a.tgz',
  'https://host.example/a.tgz',
  'file:../../../etc',
  'file:/etc',
  'link:../x',
  './x',
  '../x',
  '/etc',
  '~/x',
  '..',
  'a.tgz',
  'workspace:*',
  'npm:../x',
  'npm:a@file:../x',
  'npm:a@http://127.0.0.1/',
])
  test(`the dependency ${specifier} is refused with its field`, async () => {
    for (const json of [{ dependencies: { a: specifier } }, { optionalDependencies: { a: specifier } }]) {
      const problem = await problemOf(
        build({ 'package.json': JSON.stringify(json), 'index.ts': 'export default 1' }),
      )
      assert.is(problem.code, 'build_failed')
      assert.is(problem.field, `${Object.keys(json)[0]}.a`)
      assert.match(problem.message, 'package.json')
    }
    const nested = { dependencies: { a: '1.0.0' }, overrides: { a: { b: specifier } } }
    assert.is(
      (await problemOf(build({ 'package.json': JSON.stringify(nested), 'index.ts': '' }))).field,
      'overrides.a.b',
    )
  })

test('versions, ranges, tags and other names of the registry are taken', () => {
  for (const specifier of [
    '1.2.3',
    '^1.0.0',
    '>=1 <3 || 5.x',
    '*',
    '',
    'latest',
    'npm:ms@^2.0.0',
    'npm:@a/b@1',
    '1.0.0 - 2.0.0',
  ])
    assert.ok(
      installOf(filesOf({ 'package.json': JSON.stringify({ dependencies: { a: specifier } }) })),
      specifier,
    )
})

test('a lock that leads elsewhere is refused', async () => {
  const locks = [
    { 'node_modules/a': { link: true, resolved: '../../etc' } },
    { '../../etc': { version: '1.0.0' } },
    { 'node_modules/../../etc': { version: '1.0.0' } },
    { 'node_modules/a': { version: 'git+ssh://host.example/a.git' } },
    { 'node_modules/a': { version: 'file:../x' } },
    { 'packages/a': { version: '1.0.0' } },
  ]
  for (const packages of locks) {
    const problem = await problemOf(
      build({
        'package.json': '{"dependencies":{"a":"1.0.0"}}',
        'package-lock.json': JSON.stringify({ lockfileVersion: 3, packages }),
        'index.ts': '',
      }),
    )
    assert.is(problem.code, 'build_failed', JSON.stringify(packages))
    assert.match(problem.message, 'package-lock.json: packages[')
  }
})

test('vendored modules are used as they are, and nothing is installed', async () => {
  const built = await newBuilder({ env: { PATH: '/nowhere' } }).build(
    filesOf({
      'package.json': JSON.stringify({ dependencies: { a: '1.0.0' } }),
      'node_modules/a/index.js': 'export default 5',
      'index.ts': `import a from 'a'; export default () => a`,
    }),
    'index.ts',
  )
  assert.is(((await loaded(built)).default as () => number)(), 5)
})

const names = (files: Files) => [...files.keys()].sort()

test('tar, gzipped tar and zip give the same files; a single folder around them means nothing', async () => {
  const files = { 'index.ts': 'a', 'src/b.ts': 'b', 'package.json': '{}' }
  const entries = Object.entries(files).map(([path, text]) => ({ path, text }))
  const expected = filesOf(files)
  for (const archive of [tarOf(entries), tgzOf(files), zipOf(entries)])
    assert.equal(await unpack(archive), expected)
  const inFolder = entries.map(({ path, text }) => ({ path: `./project/${path}`, text }))
  assert.equal(await unpack(tarOf([{ path: './project/', type: 'Directory' }, ...inFolder])), expected)
  assert.equal(await unpack(packed(expected)), expected)
  const long = filesOf({ [`${'a/'.repeat(120)}${'b'.repeat(200)}.ts`]: 'x' })
  assert.equal(await unpack(packed(long)), long)
})

test('the same files are packed to the same bytes', () => {
  const one = filesOf({ 'b.ts': 'b', 'a.ts': 'a' })
  assert.is(Buffer.compare(packed(one), packed(new Map([...one].reverse()))), 0)
})

for (const path of [
  '../evil.ts',
  '/etc/evil.ts',
  'a/../../evil.ts',
  'a/./b.ts',
  'a\\b.ts',
  'C:\\evil.ts',
  `${'x'.repeat(300)}.ts`,
])
  test(`a path such as ${path.slice(0, 20)} is refused in any archive`, async () => {
    for (const archive of [packed(filesOf({ [path]: 'x' })), zipOf([{ path, text: 'x' }])])
      assert.is((await problemOf(unpack(archive))).code, 'invalid_archive')
  })

test('links and devices are refused; links to programs of packages are left out', async () => {
  for (const type of ['SymbolicLink', 'Link', 'CharacterDevice', 'FIFO'] as const) {
    const problem = await problemOf(
      unpack(
        tarOf([
          { path: 'index.ts', text: 'x' },
          { path: 'evil', type, ...(type.endsWith('Link') ? { linkpath: '/etc/passwd' } : {}) },
        ]),
      ),
    )
    assert.is(problem.code, 'invalid_archive')
    assert.match(problem.message, 'evil')
  }
  const linked = await problemOf(unpack(zipOf([{ path: 'evil', text: '/etc/passwd', mode: 0o120777 }])))
  assert.match(linked.message, 'evil is a link')
  const files = await unpack(
    tarOf([
      { path: 'index.ts', text: 'x' },
      { path: 'node_modules/.bin/tool', type: 'SymbolicLink', linkpath: '../../../../etc/passwd' },
    ]),
  )
  assert.equal(names(files), ['index.ts'])
})

test('a link on the host in place of a file is what the sandbox would have to resolve: it sees nothing', async () => {
  await using dir = await folder()
  await writeFile(join(dir.path, 'secret.txt'), 'host-only-text')
  await mkdir(join(dir.path, 'project'))
  await symlink(join(dir.path, 'secret.txt'), join(dir.path, 'project/linked.txt'))
  await writeFile(join(dir.path, 'project/index.ts'), `import x from './linked.txt'; export default x`)
  const { outputFiles } = await esbuild({
    absWorkingDir: join(dir.path, 'project'),
    entryPoints: ['./index.ts'],
    bundle: true,
    write: false,
    logLevel: 'silent',
  })
  assert.match(outputFiles[0]!.text, 'host-only-text')
  const problem = await problemOf(
    unpack(tarOf([{ path: 'linked.txt', type: 'SymbolicLink', linkpath: join(dir.path, 'secret.txt') }])),
  )
  assert.is(problem.code, 'invalid_archive')
})

test('what unpacks to too much is refused before it is there', async () => {
  const zeros = Buffer.alloc(8 * 1_048_576)
  const limits = { files: 10, bytes: 1_048_576 }
  const bomb = gzipSync(tarOf([{ path: 'zeros.bin', text: zeros }]))
  assert.ok(bomb.byteLength < 100_000)
  assert.match((await problemOf(unpack(bomb, limits))).message, 'unpacks to more than')
  assert.match(
    (await problemOf(unpack(zipOf([{ path: 'z', text: zeros }]), limits))).message,
    'unpacks to more than',
  )
  const lying = await problemOf(unpack(zipOf([{ path: 'z', text: zeros, claims: 10 }]), limits))
  assert.is(lying.code, 'invalid_archive')
  const many = Array.from({ length: 11 }, (_, i) => ({ path: `f${i}`, text: 'x' }))
  for (const archive of [tarOf(many), zipOf(many)])
    assert.match((await problemOf(unpack(archive, limits))).message, 'more than 10 files')
  const all = gzipSync(Buffer.alloc(archiveLimits.bytes + 64 * 1_048_576))
  assert.match((await problemOf(unpack(all))).message, 'unpacks to more than')
})

test('what is compressed a second time, or in another way, is not unpacked at all', async () => {
  const tar = tarOf([{ path: 'index.ts', text: 'x' }])
  const disguised = Buffer.alloc(600)
  disguised.set([0x28, 0xb5, 0x2f, 0xfd])
  disguised.write('ustar', 257)
  for (const bytes of [gzipSync(gzipSync(tar)), gzipSync(zstdCompressSync(tar)), disguised])
    assert.match((await problemOf(unpack(bytes))).message, 'compressed twice')
})

test('what is no archive, or a broken one, is refused', async () => {
  const good = tgzOf({ 'index.ts': 'x'.repeat(5_000) })
  const zip = zipOf([{ path: 'index.ts', text: 'x'.repeat(5_000) }])
  const flipped = Buffer.from(tarOf([{ path: 'index.ts', text: 'x' }]))
  flipped[20]! ^= 1
  for (const bytes of [
    Buffer.from('hello'),
    Buffer.alloc(0),
    good.subarray(0, 30),
    zip.subarray(0, 60),
    flipped,
    Buffer.from([0x1f, 0x8b, 1, 2]),
  ])
    assert.is((await problemOf(unpack(bytes))).code, 'invalid_archive')
  assert.match((await problemOf(unpack(tarOf([{ path: 'a', type: 'Directory' }])))).message, 'no file in it')
  const both = tarOf([
    { path: 'a', text: 'x' },
    { path: 'a/b', text: 'y' },
  ])
  assert.match((await problemOf(unpack(both))).message, 'both a file and a folder')
})

test.run()
