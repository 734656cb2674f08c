// timeout: 600
import { execFile, spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { chmod, mkdir, mkdtemp, readdir, readFile, rm, stat, utimes, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { list, type ReadEntry } from 'tar'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { findRuntime, type Runtime, runtimesDirectory } from '../../../runners/container/runtimes/index.ts'
import { blobFile, layersOf } from '../../../runners/container/runtimes/layout.ts'
import { cacheDirectory } from '../../../scripts/cache-directory.ts'
import { which } from '../../../scripts/host-tools.ts'
import { buildRuntimes } from '../../../scripts/runtimes.ts'
import { skip } from '../../harness.ts'

const execute = promisify(execFile)
const names = ['base', 'node', 'python'] as const
const log = () => {}

const cacheDir = await mkdtemp(join(tmpdir(), 'vulcan-test-runtimes-'))
test.after(() => rm(cacheDir, { recursive: true, force: true }))

test('what was not built is not found', async () => {
  assert.is(await findRuntime('node', cacheDir), undefined)
})

const path = process.env.PATH ?? ''
const isDebian = which('apt-get', path) && which('dpkg-deb', path) && existsSync('/etc/debian_version')
const noDebian = isDebian ? undefined : 'this machine is no Debian'

async function found(name: (typeof names)[number], dir = cacheDir): Promise<Runtime> {
  const runtime = await findRuntime(name, dir)
  assert.ok(runtime, `${name} was not built`)
  return runtime
}

/** A directory with the image's files. */
async function unpacked({ layout }: Runtime, scope: AsyncDisposableStack): Promise<string> {
  const root = await mkdtemp(join(tmpdir(), 'vulcan-test-root-'))
  scope.defer(() => rm(root, { recursive: true, force: true }))
  await chmod(root, 0o755)
  for (const layer of await layersOf(layout))
    await execute('tar', ['--extract', '--no-same-owner', '--file', blobFile(layout, layer), '-C', root])
  return root
}

/** Runs a command in the image, read-only and without a network, as nobody; answers its standard output. */
async function runIn(root: string, env: Record<string, string>, command: string[]): Promise<string> {
  const sets = Object.entries(env).flatMap(([name, value]) => ['--setenv', name, value])
  const mounts = ['--ro-bind', root, '/', '--proc', '/proc', '--dev', '/dev', '--tmpfs', '/tmp']
  const user = ['--unshare-all', '--uid', '65534', '--gid', '65534', '--die-with-parent']
  const { stdout } = await execute('bwrap', [...user, ...mounts, '--clearenv', ...sets, ...command], {
    timeout: 120_000,
    maxBuffer: 16 << 20,
  })
  return stdout.trim()
}

type Config = { config: { User: string; Env: string[]; WorkingDir: string; Labels: Record<string, string> } }

async function configOf({ layout, digest }: Runtime): Promise<Config & { env: Record<string, string> }> {
  const manifest = JSON.parse(await readFile(blobFile(layout, { digest }), 'utf8'))
  const config = JSON.parse(await readFile(blobFile(layout, manifest.config), 'utf8')) as Config
  const env = Object.fromEntries(config.config.Env.map((line) => line.split(/=(.*)/s, 2)))
  return { ...config, env }
}

/** Defined only where images can be built here. */
function whereBuilt(name: string, body: () => Promise<void>): void {
  if (noDebian === undefined) test(name, body)
  else skip(test, name, noDebian)
}

const sandbox = await execute('bwrap', ['--unshare-all', '--ro-bind', '/', '/', 'true']).then(
  () => undefined,
  () => 'bubblewrap does not work here',
)
function whereRun(name: string, body: () => Promise<void>): void {
  if (noDebian === undefined && sandbox === undefined) test(name, body)
  else skip(test, name, noDebian ?? sandbox!)
}

whereBuilt('the same inputs give the same image, wherever and by whomever it is built', async () => {
  await buildRuntimes(names, { cacheDir, log })
  await using scope = new AsyncDisposableStack()
  const other = await mkdtemp(join(tmpdir(), 'vulcan-test-runtimes-elsewhere-'))
  scope.defer(() => rm(other, { recursive: true, force: true }))
  const umask = process.umask(0o077)
  scope.defer(() => void process.umask(umask))
  await buildRuntimes(names, { cacheDir: other, log })
  for (const name of names) assert.is((await found(name, other)).digest, (await found(name)).digest, name)
})

whereBuilt('a layout holds what its digests say, and tells its packages', async () => {
  for (const name of names) {
    const runtime = await found(name)
    const blobs = join(runtime.layout, 'blobs/sha256')
    for (const hex of await readdir(blobs)) {
      const hash = createHash('sha256').update(await readFile(join(blobs, hex)))
      assert.is(hash.digest('hex'), hex)
    }
    const { config } = await configOf(runtime)
    assert.is(config.User, '65534:65534')
    assert.is(config.WorkingDir, '/workspace')
    assert.is(config.Labels['vulcan.runtime'], name)
    assert.match(config.Labels['vulcan.packages']!, /\blibc6=2\.\S+ /)
    const packages = (await readFile(join(runtime.layout, 'packages.txt'), 'utf8')).trim().split('\n')
    assert.ok(packages.length >= 20)
    for (const line of packages) assert.match(line, /^\S+ \S+ [0-9a-f]{64}$/)
  }
})

whereBuilt("all files are root's, none gives rights away, and no path leads out", async () => {
  for (const name of names) {
    const { layout } = await found(name)
    for (const layer of await layersOf(layout)) {
      const entries: ReadEntry[] = []
      await list({ file: blobFile(layout, layer), strict: true, onReadEntry: (entry) => entries.push(entry) })
      assert.ok(entries.length > 1)
      for (const { path, type, mode = 0, uid, gid } of entries) {
        assert.equal([uid, gid], [0, 0], path)
        assert.not.ok(path.startsWith('/') || path.split('/').includes('..'), path)
        assert.ok(['File', 'OldFile', 'Directory', 'SymbolicLink', 'Link'].includes(type), `${path}: ${type}`)
        if (type === 'SymbolicLink') continue
        assert.is(mode & 0o6000, 0, path)
        if (!/^\.\/(var\/)?tmp\/$/.test(path)) assert.is(mode & 0o022, 0, `${path} ${mode.toString(8)}`)
      }
    }
  }
})

whereBuilt('a second build does nothing; newer inputs have an image built beside the old one', async () => {
  const directory = runtimesDirectory(cacheDir)
  const before = await readdir(directory)
  const lines: string[] = []
  // Without programs nothing could be fetched or built.
  const searched = process.env.PATH
  process.env.PATH = '/nowhere'
  try {
    await buildRuntimes(names, { cacheDir, log: (line) => lines.push(line) })
  } finally {
    process.env.PATH = searched
  }
  assert.equal(lines, [])
  assert.equal(await readdir(directory), before)

  const [base] = await Promise.all([found('base')])
  const made = join(base.layout, 'made.json')
  // Looked for too long ago: the packages are the same, so that the image stays.
  await utimes(made, new Date(0), new Date(0))
  await buildRuntimes(['base'], { cacheDir, log })
  assert.equal(await found('base'), base)
  assert.ok(Date.now() - (await stat(made)).mtimeMs < 600_000)

  // As if it had been made by another recipe, from other packages; with what a killed build leaves.
  await mkdir(join(directory, 'base-0123456789abcdef'))
  await mkdir(join(directory, 'tmp-killed'))
  await mkdir(join(directory, 'base-00000000000000ff.tmp-killed'))
  await writeFile(made, '{}')
  await rm(join(base.layout, 'index.json'))
  await execute('mv', [base.layout, join(directory, 'base-fedcba9876543210')])
  await execute('ln', ['-sfn', 'base-fedcba9876543210', join(directory, 'base')])
  await buildRuntimes(['base'], { cacheDir, log })
  assert.equal(await found('base'), base)
  const left = (await readdir(directory)).filter(
    (name) => name.startsWith('base-') || name.startsWith('tmp-'),
  )
  assert.equal(left.sort(), [base.layout.split('/').at(-1)!, 'base-fedcba9876543210'].sort())
})

whereBuilt('a build that is killed leaves what the next one removes', async () => {
  await using scope = new AsyncDisposableStack()
  const other = await mkdtemp(join(tmpdir(), 'vulcan-test-runtimes-killed-'))
  scope.defer(() => rm(other, { recursive: true, force: true }))
  const module = new URL('../../../scripts/runtimes.ts', import.meta.url).href
  const options = `{ cacheDir: ${JSON.stringify(other)}, log: console.log }`
  const code = `import { buildRuntimes } from '${module}'; await buildRuntimes(['base'], ${options})`
  const child = spawn(process.execPath, ['--input-type=module', '-e', code], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const exited = once(child, 'exit')
  const directory = runtimesDirectory(other)
  const entries = () => readdir(directory).catch((): string[] => [])
  while (!(await entries()).some((name) => /^base-.*\.tmp-/.test(name)) && child.exitCode === null)
    await sleep(2)
  child.kill('SIGKILL')
  assert.equal(await exited, [null, 'SIGKILL'])
  assert.is(await findRuntime('base', other), undefined)
  assert.ok((await entries()).some((name) => name.startsWith('tmp-')))

  await buildRuntimes(['base'], { cacheDir: other, log })
  const { layout, digest } = await found('base', other)
  assert.is(digest, (await found('base')).digest)
  assert.equal((await entries()).sort(), ['base', layout.split('/').at(-1)!])
})

whereRun('the base image has a POSIX shell, core programs, certificates and time zones', async () => {
  await using scope = new AsyncDisposableStack()
  const runtime = await found('base')
  const root = await unpacked(runtime, scope)
  const { env } = await configOf(runtime)
  const script = [
    'set -e',
    'id -un; pwd',
    'printf "b\\na\\n" | sort | head -1 | sed s/a/sorted/',
    'echo "1 2" | awk "{ print \\$1 + \\$2 }"',
    'find /etc -name passwd | xargs grep -c nobody',
    'TZ=America/New_York date -d @0 +%H',
    'grep -c BEGIN /etc/ssl/certs/ca-certificates.crt',
    'for name in cat cp env ls mkdir mktemp mv nc ps rm seq sleep sort stat tar tee timeout tr wc wget; do',
    '  command -v $name >/dev/null || echo no $name; done',
    'for dir in .vulcan dev proc run sys tmp var/tmp workspace; do [ -d /$dir ] || echo no /$dir; done',
    'for file in hosts hostname resolv.conf; do [ -f /etc/$file ] || echo no $file; done',
  ]
  const said = await runIn(root, env, ['--chdir', '/workspace', 'sh', '-c', script.join('\n')])
  const [user, cwd, sorted, sum, nobody, hour, certificates, ...rest] = said.split('\n')
  assert.equal([user, cwd, sorted, sum, nobody, hour], ['nobody', '/workspace', 'sorted', '3', '1', '19'])
  assert.ok(Number(certificates) > 100)
  assert.equal(rest, [])
})

whereRun('no program and no library of an image lacks a library', async () => {
  await using scope = new AsyncDisposableStack()
  for (const name of names) {
    const runtime = await found(name)
    const root = await unpacked(runtime, scope)
    const { env } = await configOf(runtime)
    // The loader itself lists what a file needs, and says `not found`. Of what is not dynamic it says nothing.
    const script = [
      'loader=$(echo /lib/*-linux-gnu*/ld-linux-*.so.*); checked=0',
      'for file in $(find /usr -type f \\( -perm -1 -o -name "*.so*" \\)); do',
      '  listed=$($loader --list $file 2>/dev/null) || continue; checked=$((checked + 1))',
      '  case "$listed" in *"not found"*) echo "$file: $listed";; esac',
      'done; echo $checked',
    ]
    const lines = (await runIn(root, env, ['sh', '-c', script.join('\n')])).split('\n')
    assert.ok(Number(lines.pop()) > 50)
    assert.equal(lines, [], name)
  }
})

whereRun("the Node image runs the runners' Node", async () => {
  await using scope = new AsyncDisposableStack()
  const runtime = await found('node')
  const root = await unpacked(runtime, scope)
  const code =
    "console.log(process.version, process.execPath, new Date(0).toLocaleTimeString('de', { timeZone: 'Asia/Tokyo' }))"
  const said = await runIn(root, (await configOf(runtime)).env, ['node', '-e', code])
  assert.is(said, `${process.version} /usr/local/bin/node 09:00:00`)
})

whereRun('the Python image has its standard library, compiled, with certificates', async () => {
  await using scope = new AsyncDisposableStack()
  const runtime = await found('python')
  const root = await unpacked(runtime, scope)
  // Left out: what needs a screen, what other packages bring, what belongs to other systems, tests.
  const code = `
import importlib, json, os, ssl, sys
leftOut = {'antigravity', 'ensurepip', 'idlelib', 'lib2to3', 'nis', 'pydoc_data', 'this', 'tkinter', 'turtle',
  'turtledemo', '_gdbm', '_tkinter'}
elsewhere = {'_msi', '_overlapped', '_scproxy', '_winapi', 'msilib', 'msvcrt', 'nt', 'winreg', 'winsound'}
missing = []
for name in sorted(sys.stdlib_module_names - leftOut - elsewhere):
  try:
    importlib.import_module(name)
  except ImportError as error:
    missing.append(f'{name}: {error}')
cached = [getattr(module, '__cached__', None) for module in list(sys.modules.values())]
uncompiled = [path for path in cached if path and not os.path.exists(path)]
authorities = ssl.create_default_context().cert_store_stats()['x509_ca']
print(json.dumps([sys.executable, missing, len(cached) > 300, uncompiled, authorities > 100]))`
  const said = await runIn(root, (await configOf(runtime)).env, ['python3', '-W', 'ignore', '-c', code])
  assert.equal(JSON.parse(said.split('\n').at(-1)!), ['/usr/bin/python3', [], true, [], true])
})

const go = await findRuntime('go', cacheDirectory(process.env))
const noGo = go === undefined ? 'the go image was not built (npm run setup -- go)' : sandbox
const goTest = 'the Go image builds a program without compiling the standard library again'
if (go === undefined || noGo !== undefined) skip(test, goTest, noGo!)
else
  test(goTest, async () => {
    await using scope = new AsyncDisposableStack()
    const root = await unpacked(go, scope)
    await writeFile(join(root, 'workspace/go.mod'), 'module example.test/hello\n\ngo 1.22\n')
    const code =
      'package main\n\nimport (\n\t"fmt"\n\t"net/http"\n)\n\nfunc main() { fmt.Println(http.StatusText(404)) }\n'
    await writeFile(join(root, 'workspace/main.go'), code)
    const script = 'go build -x -o /tmp/hello . 2>/tmp/steps && /tmp/hello && grep -c /compile /tmp/steps'
    const said = await runIn(root, (await configOf(go)).env, ['--chdir', '/workspace', 'sh', '-c', script])
    assert.equal(said.split('\n'), ['Not Found', '1'])
  })

test.run()
