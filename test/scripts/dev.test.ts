// timeout: 120
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { archiveKind, unpack } from '../../gateway/build/archive.ts'
import { functionName, pack } from '../../scripts/deploy.ts'
import { startTestPlatform } from '../platform.ts'
import { until } from '../shared/support.ts'

async function folder(files: Record<string, string>): Promise<AsyncDisposable & { path: string }> {
  const path = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
  for (const [name, text] of Object.entries(files)) {
    await mkdir(join(path, name, '..'), { recursive: true })
    await writeFile(join(path, name), text)
  }
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) }
}

test('npm run dev deploys on save, tails logs, and shows errors at the user’s own lines', async () => {
  await using platform = await startTestPlatform()
  await using dir = await folder({
    'index.ts': `import { greet } from './lib/greet.ts'\nexport default { fetch: () => new Response(greet('one')) }\n`,
    'lib/greet.ts': `interface Unused {\n  a: string\n}\n\nexport function greet(name: string): string {\n  console.log('greeting', name)\n  return name\n}\n`,
  })
  const args = ['scripts/dev.ts', dir.path, '--name', 'dev-fn', '--url', platform.url]
  const dev = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] })
  let text = ''
  dev.stdout.setEncoding('utf8').on('data', (part) => {
    text += part
  })
  const shown = (pattern: RegExp) =>
    until(String(pattern), () => pattern.exec(text)?.[0], 30_000).catch((error) => {
      throw new Error(`${error.message}; shown was:\n${text}`)
    })
  try {
    await shown(/^deployed v[0-9a-f]{16} in \d+ ms: \S+\/fn\/dev-fn$/m)
    assert.is(await (await fetch(`${platform.url}/fn/dev-fn/a`)).text(), 'one')
    await shown(/^[0-9a-f]{8} greeting one$/m)
    await shown(/^[0-9a-f]{8} GET \S*\/a 200: completed in \d+ ms v[0-9a-f]{16}$/m)

    await writeFile(
      join(dir.path, 'lib/greet.ts'),
      'export const greet = (name: string) => {\n  let x = ;\n}\n',
    )
    await shown(/^error: lib\/greet\.ts:2:11: Unexpected ";"$/m)
    assert.is(await (await fetch(`${platform.url}/fn/dev-fn`)).text(), 'one')

    text = ''
    const thrower = `type A = string\n\n\nexport function greet(name: A): A {\n  throw new Error('broke for ' + name)\n}\n`
    await writeFile(join(dir.path, 'lib/greet.ts'), thrower)
    await shown(/^deployed v/m)
    await (await fetch(`${platform.url}/fn/dev-fn/b`)).text()
    await shown(/failed \(user_error\)/)
    await shown(/^ {2}Error: broke for one\n\s+at greet \(lib\/greet\.ts:5:9\)\n\s+at .*index\.ts:2:/m)
  } finally {
    const ended = once(dev, 'exit')
    dev.kill('SIGINT')
    assert.equal((await ended)[0], 0)
  }
})

test('a folder is packed without what is made anew from it, or is secret', async () => {
  await using dir = await folder({
    'index.ts': '1',
    'src/a.ts': '2',
    'package.json': '{}',
    'node_modules/x/index.js': '3',
    '.git/config': '4',
    '.env': '5',
    '.env.local': '6',
  })
  const archive = await pack(dir.path)
  assert.is(archiveKind(archive), 'gzip')
  assert.equal([...(await unpack(archive)).keys()].sort(), ['index.ts', 'package.json', 'src/a.ts'])
  await rm(join(dir.path, 'package.json'))
  assert.ok((await unpack(await pack(dir.path))).has('node_modules/x/index.js'))
})

test('a folder’s name becomes one that a function may have', () => {
  for (const [path, name] of [
    ['/a/hello-js', 'hello-js'],
    ['My Function_2/', 'my-function-2'],
    ['--x--', 'x'],
    [`${'a'.repeat(62)}-b`, 'a'.repeat(62)],
  ])
    assert.is(functionName(path!), name)
  assert.throws(() => functionName('/äö'), /--name/)
})

test.run()
