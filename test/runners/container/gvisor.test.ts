import { randomBytes } from 'node:crypto'
import { existsSync, readdirSync } from 'node:fs'
import { mkdir, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { connect } from 'node:net'
import { join } from 'node:path'
import { buffer, text } from 'node:stream/consumers'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { BoxError } from '../../../runners/container/engine.ts'
import { busyboxRoot, finish, gvisorTests, runIn, running, sh, specOf, traces } from './gvisor-support.ts'

const boxTest = await gvisorTests()

boxTest('5 MB go in and come back on both streams, byte for byte', async (it) => {
  const input = randomBytes(5 * 2 ** 20)
  const box = await it.engine.create(specOf(it.image, sh('tee /dev/stderr')))
  try {
    const [stdout, stderr] = [buffer(box.stdout), buffer(box.stderr)]
    await box.start()
    box.stdin.end(input)
    assert.equal({ ...(await box.exited) }, { code: 0, oom: false })
    assert.ok((await stdout).equals(input))
    assert.ok((await stderr).equals(input))
  } finally {
    await box.remove()
  }
})

boxTest('standard streams can be opened by their paths, as with any pipe', async (it) => {
  const ran = await runIn(it, sh('echo out >/dev/stdout; echo err >/proc/self/fd/2; cat /dev/stdin'), {
    input: 'in',
  })
  assert.is(ran.stdout, 'out\nin')
  assert.is(ran.stderr, 'err\n')
})

boxTest('output comes while it runs', async (it) => {
  const box = await running(it, 'echo first; read -r line; echo "$line"')
  try {
    const rest = text(box.stdout)
    box.stdin.end('second\n')
    assert.is(await rest, 'second\n')
    assert.is((await box.exited).code, 0)
  } finally {
    await box.remove()
  }
})

for (const [what, script, code] of [
  ['an exit code', 'exit 7', 7],
  ['the exit code that runsc’s own failures have', 'exit 128', 128],
  ['a signal that ended it', 'kill -TERM $$; sleep 9', 128 + 15],
  ['a kill by itself', 'kill -KILL $$; sleep 9', 128 + 9],
] as const)
  boxTest(`${what} is told as a shell would`, async (it) => {
    const { stdout, stderr, ...exit } = await runIn(it, sh(script))
    assert.equal({ ...exit }, { code, oom: false })
    assert.is(stdout + stderr, '')
  })

boxTest('it gets its environment, directory, user and groups, and nothing of the host’s', async (it) => {
  const ran = await runIn(it, sh('env; pwd; id; hostname; ls -l /proc/self/fd | wc -l'), {
    env: { PATH: '/bin', NAME: 'with = and "quotes"\nand a line' },
    cwd: '/data',
    user: { uid: 1000, gid: 1001, groups: [5, 6] },
  })
  assert.match(ran.stdout, 'NAME=with = and "quotes"\nand a line\n')
  assert.match(ran.stdout, '\n/data\nuid=1000 gid=1001 groups=5,6\nvulcan\n')
  assert.not.match(ran.stdout, /LC_ALL|VULCAN|npm_/)
  assert.match(ran.stdout, /\n[45]\n$/, 'no descriptors but the three, and the one that ls has')
})

boxTest('a working directory that the image lacks is there, and not in the image', async (it) => {
  const before = tree(it.dir)
  const ran = await runIn(it, sh('pwd; ls -a; touch x; touch /x; cat /data/kept'), { cwd: '/made/for/it' })
  assert.match(ran.stdout, /^\/made\/for\/it\n\.\n\.\.\n/)
  assert.match(ran.stdout, 'of the image')
  assert.match(ran.stderr, /x: Read-only file system[\s\S]*\/x: Read-only file system/)
  assert.equal(tree(it.dir), before)
})

const tree = (dir: string) => readdirSync(join(dir, 'root'), { recursive: true }).sort()

boxTest(
  'files and directories of the host are seen where they are mounted, and only written where they may be',
  async (it) => {
    const source = join(it.dir, 'mounted')
    await mkdir(source)
    await writeFile(join(source, 'file'), 'from the host')
    await writeFile(join(it.dir, 'result'), '')
    const before = tree(it.dir)
    const mounts = [
      { source, target: '/workspace', readonly: true },
      { source: join(it.dir, 'result'), target: '/.vulcan/result', readonly: false },
    ]
    const box = await it.engine.create(
      specOf(it.image, sh('cat file later; echo no >file; echo yes >/.vulcan/result; touch /.vulcan/other'), {
        ...{ mounts, cwd: '/workspace' },
      }),
    )
    try {
      // What is put there after the box was made is seen as well.
      await writeFile(join(source, 'later'), ', later')
      const ran = await finish(box)
      assert.is(ran.stdout, 'from the host, later')
      assert.match(ran.stderr, /file: Read-only[\s\S]*other: Read-only/)
      assert.is(await readFile(join(it.dir, 'result'), 'utf8'), 'yes\n')
      assert.equal(tree(it.dir), before)
    } finally {
      await box.remove()
    }
  },
)

boxTest('the root cannot be written, by root neither; scratch space can, by anybody', async (it) => {
  const places = '/tmp /run /var/tmp /dev/shm'
  for (const uid of [0, 1000]) {
    const ran = await runIn(
      it,
      sh(`for d in / /data /etc /bin /sys /proc; do touch $d/new && echo $d; done 2>/dev/null
        echo x 2>/dev/null >/etc/hosts && echo hosts
        echo x 2>/dev/null >/data/kept && echo kept
        for d in ${places}; do echo x >$d/new && echo $d; done
        mount -o remount,rw / 2>/dev/null && echo remounted
        grep -E "Cap(Prm|Eff|Bnd)" /proc/self/status`),
      { user: { uid, gid: uid, groups: [] } },
    )
    const none = ['Prm', 'Eff', 'Bnd'].map((name) => `Cap${name}:\t${'0'.repeat(16)}`)
    assert.equal(ran.stdout.trim().split('\n'), [...places.split(' '), ...none], ran.stderr)
  }
  assert.is(await readFile(join(it.dir, 'root', 'data', 'kept'), 'utf8'), 'of the image')
})

boxTest('it has hosts and a resolver of its own, and no network', async (it) => {
  const ran = await runIn(
    it,
    sh('cat /etc/hosts; cat /etc/resolv.conf; nc -w 2 127.0.0.1 22 || ping -c 1 -W 1 1.1.1.1'),
  )
  assert.match(ran.stdout, /^127\.0\.0\.1 localhost\n[\s\S]*127\.0\.0\.1 vulcan\nPING/)
  assert.not.match(ran.stdout, 'of the image')
  assert.is.not(ran.code, 0)
})

boxTest('memory is told as it is limited', async (it) => {
  const { stdout } = await runIn(it, sh('head -1 /proc/meminfo'), { limits: { memoryMb: 96 } })
  assert.is(Number(/\d+/.exec(stdout)?.[0]), 96 * 1024)
})

for (const [what, argv, message] of [
  ['a path', ['/bin/nothing'], '"/bin/nothing" is not in the image'],
  ['a name', ['nothing', 'at all'], '"nothing" is not in the image'],
  ['a directory', ['/data'], '"/data" cannot be executed: permission denied'],
  ['a file that may not be executed', ['/bin/notes.txt'], 'cannot be executed: permission denied'],
  ['a file that is no program', ['/bin/junk'], 'cannot be executed: exec format error'],
] as const)
  boxTest(`a command that is ${what} and not there, or no program, is the user’s fault`, async (it) => {
    const box = await it.engine.create(specOf(it.image, [...argv]))
    const output = Promise.all([text(box.stdout), text(box.stderr)])
    try {
      await box.start()
      assert.unreachable()
    } catch (error) {
      assert.instance(error, BoxError)
      assert.is((error as BoxError).fault, 'user')
      assert.match((error as BoxError).message, message)
    } finally {
      await box.remove()
    }
    assert.equal(await output, ['', ''])
    assert.is((await box.exited).code === 0, false)
  })

boxTest('an image that cannot be had is told as it is, and leaves nothing', async (it) => {
  const error = new Error('no such image')
  const image = { ...it.image, root: () => Promise.reject(error) }
  const before = traces(it)
  const failed = await it.engine.create(specOf(image, ['true'])).catch((reason) => reason)
  assert.is(failed, error)
  assert.equal(traces(it), before)
})

boxTest('a root that is not there is the engine’s fault, and leaves nothing', async (it) => {
  const before = traces(it)
  const image = { ...it.image, root: async () => join(it.dir, 'nowhere') }
  const failed = await it.engine.create(specOf(image, ['true'])).catch((reason) => reason)
  assert.instance(failed, BoxError)
  assert.is(failed.fault, 'engine')
  assert.equal(traces(it), before)
})

boxTest('a socket that the box makes where it may is reached from the host', async (it) => {
  const source = join(it.dir, 'sockets')
  await mkdir(source)
  // The programs of this host, for one that can listen.
  const host = ['/usr', '/lib', '/lib64'].filter(existsSync).map((path) => ({ source: path, target: path }))
  const node = { source: process.execPath, target: '/node' }
  const server = `require('node:net').createServer((s) => s.end('hello')).listen('/sockets/s', () => console.log('up'))`
  const box = await running(it, `exec /node -e "${server}"`, {
    mounts: [...host, node].map((mount) => ({ ...mount, readonly: true })),
    limits: { memoryMb: 256 },
    sockets: { source, target: '/sockets' },
  })
  try {
    assert.is(await text(connect(join(source, 's'))), 'hello')
  } finally {
    await box.remove()
  }
})

boxTest(
  'boxes with hostile links where their own files belong get these files, and nothing of the host',
  async (it) => {
    const image = await busyboxRoot(join(it.dir, 'hostile'))
    const root = join(it.dir, 'hostile')
    await writeFile(join(it.dir, 'outside'), 'secret of the host')
    for (const name of ['hosts', 'resolv.conf']) await rm(join(root, 'etc', name))
    await symlink(join(it.dir, 'outside'), join(root, 'etc', 'hosts'))
    await symlink(`../../../../../../../..${join(it.dir, 'outside')}`, join(root, 'etc', 'resolv.conf'))
    await symlink('/', join(root, 'work'))
    const ran = await runIn({ ...it, image }, sh('cat /etc/hosts /etc/resolv.conf; pwd; ls /'), {
      cwd: '/work/new',
    })
    assert.not.match(ran.stdout + ran.stderr, 'secret of the host')
    assert.is(await readFile(join(it.dir, 'outside'), 'utf8'), 'secret of the host')
    assert.not(existsSync('/new'))
    assert.not(existsSync(join(root, 'new')))
  },
)

test.run()
