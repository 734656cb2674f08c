/**
 * Runs inside the sandbox: bundles the project in `/project` to one ES module and answers on standard output as
 * JSON. No code of the project is ever executed. Imports nothing of ours but `builtins.ts`.
 */
import { readFileSync, writeSync } from 'node:fs'
import { type BuildOptions, build, type Message, type Plugin, stop } from 'esbuild'
import { offeredBuiltins } from './builtins.ts'

const project = '/project'
const request = JSON.parse(readFileSync(0, 'utf8')) as { entry: string }

const offered = new RegExp(`^(node:)?(${offeredBuiltins.join('|')})$`)

/** Leaves what the runtime has as an import of it; `require` of it becomes one. */
const builtins: Plugin = {
  name: 'builtins',
  setup({ onResolve, onLoad }) {
    onResolve({ filter: offered }, ({ path, kind, namespace }) => {
      const name = offered.exec(path)![2]!
      if (namespace === 'builtin') return { path: `node:${name}`, external: true, sideEffects: false }
      return kind === 'require-call' || kind === 'require-resolve'
        ? { path: name, namespace: 'required' }
        : { path: `node:${name}`, external: true, sideEffects: false }
    })
    onResolve({ filter: /^builtin:/ }, ({ path }) => ({ path: path.slice(8), namespace: 'builtin' }))
    onLoad({ filter: /.*/, namespace: 'required' }, ({ path }) => ({
      contents: `const all = require('builtin:${path}'); module.exports = all.default ?? all`,
      loader: 'js',
    }))
    onLoad({ filter: /.*/, namespace: 'builtin' }, ({ path }) => ({
      contents: `export * from 'node:${path}'; export { default } from 'node:${path}'`,
      loader: 'js',
    }))
  },
}

/** WebAssembly becomes a compiled module and other bytes an ArrayBuffer, as on Cloudflare Workers. */
const bytes: Plugin = {
  name: 'bytes',
  setup({ onResolve, onLoad, resolve }) {
    onResolve(
      { filter: /\.(wasm(\?module)?|bin)$/ },
      async ({ path, importer, resolveDir, kind, namespace }) => {
        if (namespace !== 'file') return undefined
        const file = path.replace(/\?module$/, '')
        const found = await resolve(file, { importer, resolveDir, kind, namespace: 'bytes-of' })
        if (found.errors.length > 0) return { errors: found.errors }
        return { path: found.path, namespace: file.endsWith('.wasm') ? 'wasm' : 'bin' }
      },
    )
    onResolve({ filter: /^bytes:/ }, ({ path }) => ({ path: path.slice(6), namespace: 'raw' }))
    onLoad({ filter: /.*/, namespace: 'raw' }, ({ path }) => {
      checkInside(path)
      return { contents: readFileSync(path), loader: 'binary' }
    })
    onLoad({ filter: /.*/, namespace: 'wasm' }, ({ path }) => ({
      contents: `import bytes from ${JSON.stringify(`bytes:${path}`)}; export default new WebAssembly.Module(bytes)`,
      resolveDir: project,
    }))
    onLoad({ filter: /.*/, namespace: 'bin' }, ({ path }) => ({
      contents: `import bytes from ${JSON.stringify(`bytes:${path}`)}; export default bytes.buffer`,
      resolveDir: project,
    }))
  },
}

function checkInside(path: string): void {
  if (!path.startsWith(`${project}/`)) throw new Error(`${path} is outside of the project`)
}

/** A second wall: there is nothing of the host to read here anyway. */
const onlyTheProject: Plugin = {
  name: 'only-the-project',
  setup({ onLoad }) {
    onLoad({ filter: /.*/, namespace: 'file' }, ({ path }) =>
      path.startsWith(`${project}/`)
        ? undefined
        : { errors: [{ text: `${path} is outside of the project` }] },
    )
  },
}

const options: BuildOptions = {
  absWorkingDir: project,
  entryPoints: [`./${request.entry}`],
  outfile: `${project}/function.js`,
  bundle: true,
  write: false,
  format: 'esm',
  platform: 'neutral',
  target: `node${process.versions.node}`,
  conditions: ['workerd', 'worker', 'browser'],
  mainFields: ['browser', 'module', 'main'],
  loader: { '.txt': 'text', '.html': 'text', '.sql': 'text', '.md': 'text' },
  define: { 'process.env.NODE_ENV': '"production"', global: 'globalThis' },
  sourcemap: 'external',
  sourcesContent: true,
  legalComments: 'none',
  charset: 'utf8',
  metafile: true,
  logLevel: 'silent',
  logLimit: 50,
  plugins: [builtins, bytes, onlyTheProject],
}

/** A context of AsyncLocalStorage is carried along promises made in JavaScript; native `await` would lose it. */
const lowered: BuildOptions = {
  supported: { 'async-await': false, 'async-generator': false, 'for-await': false },
}

const plain = ({ text, location, notes }: Message) => ({
  message: [text, ...notes.map((note) => note.text)].join(' '),
  file: location === null ? null : location.file,
  line: location === null ? null : location.line,
  column: location === null ? null : location.column + 1,
})

async function run() {
  let result = await build({ ...options, metafile: true, write: false })
  const output = () =>
    Object.values(result.metafile.outputs).find(({ entryPoint }) => entryPoint !== undefined)!
  const imports = output().imports.map(({ path }) => path)
  if (imports.includes('node:async_hooks'))
    result = await build({ ...options, ...lowered, metafile: true, write: false })
  const text = (end: string) => result.outputFiles.find(({ path }) => path.endsWith(end))!.text
  return {
    code: text('.js'),
    map: text('.js.map'),
    exports: output().exports,
    warnings: result.warnings.map(plain),
  }
}

const answer = await run().catch((error) => {
  if (!Array.isArray(error.errors)) throw error
  return { errors: error.errors.map(plain), warnings: error.warnings.map(plain) }
})
await stop()
let rest = Buffer.from(JSON.stringify(answer))
while (rest.byteLength > 0) rest = rest.subarray(writeSync(1, rest))
