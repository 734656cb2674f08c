import { existsSync, globSync, readFileSync } from 'node:fs'
import { dirname, join, normalize } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'

const root = join(import.meta.dirname, '..')
const product = ['gateway', 'dispatcher', 'runners', 'shared', 'guest-agent', 'rootfs']

/** file → what it imports: paths from the root for our own files, else the specifier. */
type Graph = Map<string, string[]>

/** The specifiers in a file: static, type-only and dynamic imports and re-exports. */
export function importsOf(source: string): string[] {
  const code = source.replace(/\/\*[\s\S]*?\*\//g, '').replace(/^\s*\/\/.*$/gm, '')
  const pattern =
    /^\s*(?:import|export)\s(?:[^'"`;]*?\sfrom\s*)?['"]([^'"]+)['"]|\bimport\s*\(\s*['"]([^'"]+)['"]/gm
  return [...code.matchAll(pattern)].map(([, fixed, dynamic]) => (fixed ?? dynamic)!)
}

function readGraph(): Graph {
  const files = globSync(
    product.map((folder) => `${folder}/**/*.{ts,mts,js,mjs}`),
    { cwd: root, exclude: ['**/node_modules/**'] },
  )
  return new Map(
    files.map((file) => [
      file,
      importsOf(readFileSync(join(root, file), 'utf8')).map((specifier) =>
        specifier.startsWith('.') ? normalize(join(dirname(file), specifier)) : specifier,
      ),
    ]),
  )
}

const isOurs = (target: string) => target.includes('/') && existsSync(join(root, target))
const graph = readGraph()
const edges = [...graph].flatMap(([from, targets]) => targets.map((to) => ({ from, to })))
const ours = edges.filter(({ to }) => isOurs(to))
const top = (path: string) => path.split('/')[0]!
/** The bus (connection, streams and consumers, work queue, followed streams, KV buckets, streamed bodies), the blobs. */
const natsFiles = ['bus', 'topology', 'queue', 'follow', 'bucket', 'meters', 'blobs', 'exchange'].map(
  (name) => `shared/${name}.ts`,
)
const isNats = (target: string) => target.startsWith('@nats-io/')

/** Everything a file reaches, packages included. */
function reach(file: string, seen = new Set<string>()): Set<string> {
  for (const target of graph.get(file) ?? []) {
    if (seen.has(target)) continue
    seen.add(target)
    reach(target, seen)
  }
  return seen
}

/** No edge of the graph may match; the message lists those that do. */
function forbid(rule: string, matches: (edge: { from: string; to: string }) => boolean, among = edges) {
  const found = among.filter(matches).map(({ from, to }) => `${from} → ${to}`)
  assert.is(found.length, 0, `${rule}:\n${found.join('\n')}`)
}

test('imports of every form are seen', () => {
  const source = [
    "import a from './a.ts'",
    "import type { B } from './b.ts'",
    "import {\n  c,\n  d,\n} from './c.ts'",
    "import './e.ts'",
    "export * from './f.ts'",
    "const g = await import('./g.ts')",
    "// import './comment.ts'",
    "/* import './comment.ts' */",
    "export const text = 'x'",
  ].join('\n')
  assert.equal(importsOf(source), ['./a.ts', './b.ts', './c.ts', './e.ts', './f.ts', './g.ts'])
})

test('every import of a file leads to a file', () => {
  const paths = edges.filter(({ to }) => product.includes(top(to)) && to.includes('/'))
  forbid('missing file', ({ to }) => !existsSync(join(root, to)), paths)
})

test('shared imports nothing of ours', () => {
  forbid('shared stands alone', ({ from, to }) => top(from) === 'shared' && top(to) !== 'shared', ours)
})

test('gateway, dispatcher and runners import shared, never each other', () => {
  const parts = ['gateway', 'dispatcher', 'runners']
  forbid(
    'only shared and its own folder, and microVMs what they are made of',
    ({ from, to }) =>
      parts.includes(top(from)) &&
      ![top(from), 'shared'].includes(top(to)) &&
      !(from.startsWith('runners/microvm/') && top(to) === 'rootfs'),
    ours,
  )
})

test('what machines are made of knows images and nothing of who runs them', () => {
  forbid(
    'rootfs',
    ({ from, to }) =>
      top(from) === 'rootfs' &&
      !['rootfs', 'shared', 'scripts', 'guest-agent'].includes(top(to)) &&
      !to.startsWith('runners/container/'),
    ours,
  )
})

test("the guest agent imports only shared's frame codec and what its engine has", () => {
  forbid(
    'guest-agent',
    ({ from, to }) =>
      top(from) === 'guest-agent' &&
      top(to) !== 'guest-agent' &&
      !/^(quickjs|vulcan):/.test(to) &&
      to !== 'shared/machine.ts',
  )
})

test("an isolation imports the runner interface, egress, its own folder and shared's pure files", () => {
  const isolation = (path: string) => /^runners\/([^/]+)\//.exec(path)?.[1]
  const isPure = (path: string) => ![path, ...reach(path)].some(isNats)
  forbid('the bus', ({ from, to }) => isolation(from) !== undefined && isNats(to))
  forbid(
    'runners/<isolation>/',
    ({ from, to }) =>
      isolation(from) !== undefined &&
      isolation(to) !== isolation(from) &&
      !['runners/runner.ts', 'runners/egress.ts', 'runners/metrics.ts'].includes(to) &&
      isolation(to) !== 'guest' &&
      // A microVM is one more box of containers, made of what rootfs builds.
      !(isolation(from) === 'microvm' && (isolation(to) === 'container' || top(to) === 'rootfs')) &&
      !(top(to) === 'shared' && isPure(to)),
    ours,
  )
})

test('only the dispatcher imports drizzle and libSQL', () => {
  forbid(
    'database',
    ({ from, to }) => top(from) !== 'dispatcher' && /^(drizzle-orm|@libsql|libsql)(\/|$)/.test(to),
  )
})

test("only shared's bus and blob files import the NATS client", () => {
  forbid('NATS client', ({ from, to }) => isNats(to) && !natsFiles.includes(from))
})

test('only the telemetry imports OpenTelemetry, and only the metrics prom-client', () => {
  forbid(
    'OpenTelemetry',
    ({ from, to }) => to.startsWith('@opentelemetry/') && from !== 'shared/telemetry.ts',
  )
  const metrics = ['shared', 'gateway', 'dispatcher', 'runners'].map((part) => `${part}/metrics.ts`)
  forbid('prom-client', ({ from, to }) => to === 'prom-client' && !metrics.includes(from))
  const eager = readFileSync(join(root, 'shared/telemetry.ts'), 'utf8')
  assert.not.match(eager, /^import (?!type)[^\n]*@opentelemetry/m)
})

test('nothing imports a main.ts', () => {
  forbid('main.ts', ({ to }) => /(^|\/)main\.ts$/.test(to))
})

test('there are no import cycles', () => {
  const inCycle = [...graph.keys()].filter((file) => reach(file).has(file))
  assert.equal(inCycle, [])
})

test.run()
