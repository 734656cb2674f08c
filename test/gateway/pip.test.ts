// timeout: 180
import { execFileSync } from 'node:child_process'
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { Files } from '../../gateway/build/archive.ts'
import { Builder } from '../../gateway/build/build.ts'
import { requirementsOf } from '../../gateway/build/requirements.ts'
import { Problem } from '../../shared/errors.ts'
import { sha256Hex } from '../../shared/ids.ts'
import { skip } from '../harness.ts'
import { zipOf } from './archives.ts'

const filesOf = (files: Record<string, string>): Files =>
  new Map(Object.entries(files).map(([path, text]) => [path, Buffer.from(text)]))
const required = (text: string) => requirementsOf(filesOf({ 'main.py': '', 'requirements.txt': text }))

function problemIn(run: () => unknown): Problem {
  try {
    run()
  } catch (error) {
    if (error instanceof Problem) return error
    throw error
  }
  throw new Error('nothing was refused')
}

async function rejection(promise: Promise<unknown>): Promise<Problem> {
  try {
    await promise
  } catch (error) {
    if (error instanceof Problem) return error
    throw error
  }
  throw new Error('nothing was refused')
}

/** A package index on loopback that has one wheel, `greeting` in versions 1.0 and 1.1. */
async function startIndex(): Promise<AsyncDisposable & { url: string; asked: string[] }> {
  const wheels = new Map(
    ['1.0', '1.1'].map((version) => {
      const info = `greeting-${version}.dist-info`
      const entries = [
        { path: 'greeting.py', text: `VERSION = '${version}'\n` },
        { path: `${info}/METADATA`, text: `Metadata-Version: 2.1\nName: greeting\nVersion: ${version}\n` },
        {
          path: `${info}/WHEEL`,
          text: 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
        },
        {
          path: `${info}/entry_points.txt`,
          text: '[console_scripts]\ngreet = greeting:main\n',
        },
      ]
      const names = [...entries.map(({ path }) => path), `${info}/RECORD`]
      const record = { path: `${info}/RECORD`, text: names.map((name) => `${name},,\n`).join('') }
      return [`greeting-${version}-py3-none-any.whl`, zipOf([...entries, record])]
    }),
  )
  const asked: string[] = []
  const server = createServer((request, response) => {
    asked.push(request.url!)
    const file = wheels.get(request.url!.slice(1))
    if (file !== undefined) return response.end(file)
    response.setHeader('content-type', 'text/html')
    if (request.url === '/simple/greeting/')
      return response.end(
        [...wheels]
          .map(([name, bytes]) => `<a href="/${name}#sha256=${sha256Hex(bytes)}">${name}</a>`)
          .join(''),
      )
    if (request.url === '/simple/sourceonly/')
      return response.end('<a href="/sourceonly-1.0.tar.gz">sourceonly-1.0.tar.gz</a>')
    response.statusCode = 404
    response.end()
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    asked,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

/** A builder that installs from an index of the test’s own, with nothing kept from before. */
async function builderAt(index: string, over: NodeJS.ProcessEnv = {}) {
  const dir = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  const { PIP_EXTRA_INDEX_URL: _, PIP_FIND_LINKS: __, ...env } = process.env
  const builder = new Builder({
    cacheDir: dir,
    tempDir: tmpdir(),
    env: { ...env, PIP_INDEX_URL: `${index}/simple/`, ...over },
  })
  return {
    dir,
    install: (requirements: string) =>
      builder.dependencies(filesOf({ 'main.py': '', 'requirements.txt': requirements }), 'python'),
    [Symbol.asyncDispose]: () => rm(dir, { recursive: true, force: true }),
  }
}

test('versions from the index are taken, with extras, markers and hashes', () => {
  const hash = `--hash=sha256:${'a'.repeat(64)}`
  for (const line of [
    'six',
    'six==1.17.0',
    'requests[socks]>=2,<3',
    'a ~= 1.2 ; python_version < "3.12" and sys_platform == "linux"',
    `six==1.17.0 ${hash} ${hash}`,
    `six==1.17.0 \\\n  ${hash}`,
    'zope.interface != 5.*',
    'a === 1.0+local',
  ])
    assert.ok(required(`# a comment\n\n${line} # another\n`), line)
  assert.is(required('# nothing\n'), undefined)
  assert.is(requirementsOf(filesOf({ 'main.py': '' })), undefined)
  const vendored = { 'requirements.txt': 'six', 'vendor/six.py': '' }
  assert.is(requirementsOf(filesOf(vendored)), undefined)
})

test('anything else is refused with its line', () => {
  for (const line of [
    '-r other.txt',
    '-c other.txt',
    '-e .',
    '--index-url http://example.com',
    '--find-links /etc',
    'six @ https://example.com/six.whl',
    'six @ file:///etc/six.whl',
    'git+https://example.com/six',
    'https://example.com/six.whl',
    './six',
    '../six.whl',
    '/etc/six.whl',
    'six --global-option=x',
    'six --config-settings=x',
    'six $' + '{HOME}',
    'a; b; $(c)',
  ]) {
    const problem = problemIn(() => required(`six\n${line}\n`))
    assert.equal([problem.code, problem.field], ['build_failed', 'requirements.txt'], line)
    assert.match(problem.message, 'requirements.txt:2')
    assert.match(problem.message, 'vendor')
  }
})

test('what has no fixed version is told', () => {
  assert.equal(required('six==1.17.0\n')!.warnings, [])
  assert.is(required('six==1.17.0\n')!.locked, true)
  for (const loose of ['six', 'six>=1', 'six==1.*', 'six; python_version == "3.11"']) {
    const found = required(`a==1.0\n${loose}\n`)!
    assert.is(found.locked, false, loose)
    assert.match(found.warnings[0]!, loose)
  }
})

test('without pip on the host it is said what to do', async () => {
  await using own = await builderAt('http://127.0.0.1:9', { PATH: '/nowhere' })
  const problem = await rejection(own.install('greeting'))
  assert.is(problem.code, 'build_unavailable')
  assert.match(problem.message, 'python3-pip')
  assert.match(problem.message, 'vendor')
})

function hasPip(): boolean {
  try {
    execFileSync('python3', ['-m', 'pip', '--version'], { stdio: 'ignore' })
    return true
  } catch {
    return false
  }
}

const withPip: [name: string, run: () => Promise<void>][] = [
  [
    'requirements are installed from the host’s index into a folder, and kept by what they say',
    async () => {
      await using index = await startIndex()
      await using own = await builderAt(index.url)
      const { folders, warnings } = await own.install('greeting==1.0\n')
      assert.equal([folders.length, folders[0]!.at, warnings], [1, 'vendor', []])
      const { dir } = folders[0]!
      assert.match(await readFile(join(dir, 'greeting.py'), 'utf8'), "VERSION = '1.0'")
      assert.not((await readdir(dir)).includes('bin'))
      const asked = index.asked.length
      assert.ok(asked > 0)
      assert.is((await own.install('# the same\ngreeting==1.0\n')).folders[0]!.dir, dir)
      assert.is(index.asked.length, asked)
      const newest = await own.install('greeting\n')
      assert.match(await readFile(join(newest.folders[0]!.dir, 'greeting.py'), 'utf8'), "VERSION = '1.1'")
      assert.match(newest.warnings[0]!.message, 'fixed version')
    },
  ],
  [
    'what is not there, has another hash, or would have to be built is refused in pip’s words',
    async () => {
      await using index = await startIndex()
      await using own = await builderAt(index.url)
      for (const [line, words] of [
        ['greeting==9.0', 'greeting==9.0'],
        ['never-heard-of', 'never-heard-of'],
        ['sourceonly==1.0', 'sourceonly'],
        [`greeting==1.0 --hash=sha256:${'0'.repeat(64)}`, 'HASHES'],
      ] as const) {
        const problem = await rejection(own.install(`${line}\n`))
        assert.equal([problem.code, problem.field], ['build_failed', 'requirements.txt'], line)
        assert.match(problem.message, words)
        assert.match(problem.message, 'vendor')
      }
      assert.equal(await readdir(join(own.dir, 'pip')), [])
    },
  ],
]
for (const [name, run] of withPip)
  if (hasPip()) test(name, run)
  else skip(test, name, 'there is no pip on this host (Debian: python3-pip)')

test.run()
