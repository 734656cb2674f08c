import { mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { ImageConfig } from '../../../runners/container/engine.ts'
import {
  blankKey,
  boxLimits,
  codeFile,
  commandArgv,
  commandEnv,
  findUser,
  fitsBlank,
  InvalidPlan,
  programKey,
  routeOf,
  shimArgv,
  warmKey,
  workingDirectory,
} from '../../../runners/container/plan.ts'
import { readInRoot, resolveInRoot, staysInside } from '../../../runners/container/rootfs.ts'
import type { Program, Source } from '../../../runners/runner.ts'
import type { Runtime } from '../../../shared/workload.ts'
import { code, job } from './jobs.ts'

const image: Source = { kind: 'image', reference: 'registry.test/app:1' }
const program = (fields: Partial<Program>): Program => ({ ...job('x'), ...fields })
const config: ImageConfig = {
  entrypoint: ['/app'],
  cmd: ['--serve'],
  env: { PATH: '/opt/bin', MODE: 'image' },
  workingDir: '/srv',
  user: '',
}

test('source is a handler on a runtime image, a command array makes it a command', () => {
  assert.equal(routeOf(program({ runtime: 'typescript' })), {
    kind: 'handler',
    language: 'node',
    base: 'node',
    entry: null,
  })
  assert.equal(routeOf(program({ runtime: 'python', entrypoint: 'app.py' })), {
    kind: 'handler',
    language: 'python',
    base: 'python',
    entry: 'app.py',
  })
  assert.equal(routeOf(program({ runtime: 'python', entrypoint: ['python3', 'x.py'] })), {
    kind: 'command',
    base: 'python',
    argv: ['python3', 'x.py'],
  })
  assert.equal(routeOf(program({ runtime: 'oci', entrypoint: ['ls'] })), {
    kind: 'command',
    base: 'base',
    argv: ['ls'],
  })
  assert.equal(routeOf(program({ runtime: 'go' })), { kind: 'go', entry: null })
  assert.throws(
    () => routeOf(program({ runtime: 'oci' })),
    (error: Error) => error instanceof InvalidPlan,
  )
})

test('an image is a command, or a handler where runtime and file say so', () => {
  const base = { kind: 'reference', reference: 'registry.test/app:1', auth: undefined }
  const of = (fields: Partial<Program>) => routeOf(program({ source: image, runtime: 'oci', ...fields }))
  assert.equal(of({}), { kind: 'command', base, argv: undefined })
  assert.equal(of({ entrypoint: ['a', 'b'] }), { kind: 'command', base, argv: ['a', 'b'] })
  assert.equal(of({ runtime: 'node', entrypoint: '/app/index.js' }), {
    kind: 'handler',
    language: 'node',
    base,
    entry: '/app/index.js',
  })
})

test('what runs: entrypoint and command of the image, or what replaces both', () => {
  assert.equal(commandArgv(undefined, config), ['/app', '--serve'])
  assert.equal(commandArgv(['sh'], config), ['sh'])
  assert.throws(() => commandArgv(undefined, { ...config, entrypoint: [], cmd: [] }), /neither an entrypoint/)
  assert.equal(shimArgv('python', 128).slice(0, 2), ['/bin/sh', '-c'])
})

test('the environment: the job’s wins over the image’s, and VULCAN_RESULT over both', () => {
  const env = commandEnv(config, '/home/x', job('x', { env: { MODE: 'job', VULCAN_RESULT: '/etc/x' } }))
  assert.is(env.PATH, '/opt/bin')
  assert.is(env.MODE, 'job')
  assert.is(env.HOME, '/home/x')
  assert.is(env.VULCAN_RESULT, '/.vulcan/result')
})

test('the working directory: as asked, that of the files, that of the image', () => {
  assert.is(workingDirectory(job('x'), config), '/workspace')
  assert.is(workingDirectory(job(image), config), '/srv')
  assert.is(workingDirectory(job(image, { workingDir: '/data' }), config), '/data')
})

test('users as Docker reads them', () => {
  const passwd = 'root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\nbroken\nx:x:no:1::/:\n'
  const group = 'root:x:0:\nann:x:1000:\nlab:x:2000:ann,bob\n'
  const user = (text: string) => findUser(text, passwd, group)
  assert.equal(user(''), { uid: 0, gid: 0, groups: [], home: '/root' })
  assert.equal(user('ann'), { uid: 1000, gid: 1000, groups: [2000], home: '/home/ann' })
  assert.equal(user('1000'), { uid: 1000, gid: 1000, groups: [2000], home: '/home/ann' })
  assert.equal(user('1234'), { uid: 1234, gid: 0, groups: [], home: '/' })
  assert.equal(user('ann:lab'), { uid: 1000, gid: 2000, groups: [], home: '/home/ann' })
  assert.equal(user('7:8'), { uid: 7, gid: 8, groups: [], home: '/' })
  assert.throws(() => user('bob'), /no user bob/)
  assert.throws(() => user('ann:nobody'), /no group nobody/)
  assert.throws(() => user('4294967295'), /too large/)
})

test('limits: a command’s result fits, a handler’s files are bounded by the disk', () => {
  const limits = { ...job('x').limits, disk_mb: 1, output_mb: 2 }
  assert.is(boxLimits(limits, 'handler').fileBytes, 1_048_576)
  assert.is(boxLimits(limits, 'command').fileBytes, 2 * 1_048_576 + 1)
  // A command’s result lies on the host’s disk, whatever the size of /tmp.
  assert.is(boxLimits({ ...limits, disk_mb: 65_536 }, 'command').fileBytes, 2 ** 30)
})

test('boxes are used again for the same code, limits, environment and user only', () => {
  const key = (options: Parameters<typeof job>[1] = {}, source = code('a')) =>
    warmKey(job(source, options), undefined)
  assert.is(key(), key({ input: 5, limits: { timeout_s: 9, output_mb: 1 } }))
  assert.is(key({ env: { A: '1', B: '2' } }), key({ env: { B: '2', A: '1' } }))
  const others = [
    key(),
    key({ env: { A: '1' } }),
    key({ env: { A: '2' } }),
    key({ user: 'ann' }),
    key({ workingDir: '/tmp' }),
    key({ egress: 'all' }),
    key({ limits: { memory_mb: 64 } }),
    key({ runtime: 'typescript' }),
    key({}, code('b')),
  ]
  assert.is(new Set(others).size, others.length)
  assert.is(programKey(job('a')), programKey(job('a', { env: { A: '1' } })))
  assert.is(fitsBlank(job('a')), true)
  assert.is(fitsBlank(job('a', { egress: 'all' })), false)
  assert.is.not(blankKey('node', job('a').limits), blankKey('python', job('a').limits))
})

test('the file of a source of code', () => {
  const name = (runtime: Runtime, entrypoint?: string | string[], text = 'export default 1') =>
    codeFile({ runtime, entrypoint, source: code(text) })
  assert.is(name('typescript'), 'index.ts')
  assert.is(name('python', 'job.py'), 'job.py')
  assert.is(name('python', '../x.py'), 'main.py')
  assert.is(name('python', ['python3', 'main.py']), 'main.py')
  for (const module of ['export default 1', 'import "node:fs"', 'import.meta.url', 'export { a } from "b"'])
    for (const runtime of ['node', 'javascript'] as const)
      assert.is(name(runtime, undefined, module), 'index.mjs', module)
  const others = [
    'module.exports = () => import("node:fs")',
    '`\nexport default 1\n`; exports.a = 1',
    '/*\nexport default 1 */ exports.a = 1',
    'export default () => {',
  ]
  for (const other of others) assert.is(name('node', undefined, other), 'index.js', other)
  const long = `export default 1 //${'x'.repeat(512 * 1024)}`
  assert.is(name('node', undefined, long), 'index.js', 'what is long is left to Node')
  assert.is(name('node', ['node', 'index.js']), 'index.js')
  assert.is(name('node', 'job.js'), 'job.js')
})

test('links in an image’s root are followed within it', async () => {
  const root = await mkdtemp(join(tmpdir(), 'vulcan-root-'))
  try {
    await mkdir(join(root, 'usr/etc'), { recursive: true })
    await writeFile(join(root, 'usr/etc/passwd'), 'inside')
    await symlink('/usr/etc', join(root, 'etc'))
    await symlink('../../../../../../usr/etc/passwd', join(root, 'usr/climber'))
    await symlink('loop', join(root, 'loop'))
    await symlink('/etc/hostname', join(root, 'usr/etc/outside'))
    assert.is(await readInRoot(root, '/etc/passwd', 100), 'inside')
    assert.is(await readInRoot(root, '/usr/climber', 100), 'inside')
    assert.is(await readInRoot(root, '/etc/passwd', 3), 'ins')
    assert.is(await readInRoot(root, '/loop', 100), undefined)
    assert.is(await readInRoot(root, '/etc/outside', 100), undefined)
    assert.is(await readInRoot(root, '/etc', 100), undefined)
    assert.is((await resolveInRoot(root, '/usr/climber'))?.climbed, true)
    assert.is(await staysInside(root, 'usr/x', '../usr/etc/passwd'), true)
    assert.is(await staysInside(root, 'usr/x', '../../x'), false)
    assert.is(await staysInside(root, 'usr/x', '/usr/etc'), false)
  } finally {
    await rm(root, { recursive: true })
  }
})

test.run()
