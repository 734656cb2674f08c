/** What hostile code tries in a container or a microVM, and what becomes of it; the host serves others all the while. */
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { globSync, readFileSync } from 'node:fs'
import { connect, createServer } from 'node:net'
import { networkInterfaces } from 'node:os'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { Cause, Isolation, Workload } from '../../../shared/workload.ts'
import { skip } from '../../harness.ts'
import { until } from '../../shared/support.ts'
import { descendants } from '../conformance/census.ts'
import { type Fields, Ground } from '../conformance/ground.ts'
import { type Language, node, python, shell } from '../conformance/languages.ts'

export interface Attempt {
  name: string
  language: Language
  program: string
  fields?: Fields
  /** Several where the kernel chooses what gives way first. */
  ends: (Cause | 'completed')[]
  /** What the last words must say: the error, or a line of the log. */
  says?: RegExp
  /** What must hold of the end beside its cause. */
  check?: (ended: Workload, ground: Ground) => void | Promise<void>
}

/** Fits every language, and a host that has little. */
const memory_mb = 96
const quick = { timeout_s: 3, memory_mb }
const patient = { timeout_s: 60, memory_mb }

const forks = `import os, time
def handler(input, ctx):
    made = 0
    while made < 500:
        try:
            pid = os.fork()
        except OSError as error:
            return [made, error.errno]
        if pid == 0:
            time.sleep(600)
            os._exit(0)
        made += 1
    return [made, 0]
`

const forkBomb = `import os
def handler(input, ctx):
    while True:
        try:
            os.fork()
        except OSError:
            pass
`

/** Its parent answers at once; it holds both output streams open and would go on for ever. */
const daemon = `import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            try:
                os.write(1, b'daemon\\n')
            except OSError:
                pass
            time.sleep(0.05)
    os._exit(0)
time.sleep(0.3)
print('"parent"')
`

/** Answers what it could do that nobody in a box may. Opening for writing is enough; nothing is written. */
const reachingOut = `import ctypes, os, stat
libc = ctypes.CDLL(None, use_errno=True)
def opened(path):
    os.close(os.open(path, os.O_WRONLY))
def mounted():
    if libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) != 0:
        raise OSError(ctypes.get_errno())
def device():
    os.mknod('/tmp/disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0))
    os.close(os.open('/tmp/disk', os.O_RDONLY))
attempts = {
    'a device of the host': lambda: os.close(os.open('/dev/sda', os.O_RDONLY)),
    'a new device': device,
    'a mount': mounted,
    'core_pattern': lambda: opened('/proc/sys/kernel/core_pattern'),
    'a control group': lambda: os.mkdir('/sys/fs/cgroup/memory/attempt'),
    'a control group of version 2': lambda: os.mkdir('/sys/fs/cgroup/attempt'),
    'the limits of its own group': lambda: opened('/sys/fs/cgroup/memory.max'),
    'the Docker Engine': lambda: os.stat('/var/run/docker.sock'),
    'the clock': lambda: __import__('time').clock_settime(0, 0),
    'the host name': lambda: __import__('socket').sethostname('attempt'),
    'another root': lambda: os.chroot('/tmp'),
    'more rights': lambda: os.setgroups([0, 1, 2]),
    'more open files': lambda: __import__('resource').setrlimit(7, (1 << 20, 1 << 20)),
}
def handler(input, ctx):
    done = []
    for name, attempt in attempts.items():
        try:
            attempt()
            done.append(name)
        except (OSError, ValueError):
            pass
    return done
`

const EAGAIN = 11

const table: Attempt[] = [
  {
    name: 'a fork bomb in sh',
    language: shell,
    program: 'bomb() { bomb | bomb & }; bomb; while :; do sleep 1; done\n',
    fields: { limits: { ...quick, pids: 32 } },
    ends: ['timeout', 'exit_code'],
  },
  {
    name: 'a fork bomb in Python',
    language: python,
    program: forkBomb,
    fields: { limits: { ...quick, pids: 32 } },
    ends: ['timeout', 'oom'],
  },
  {
    name: 'more processes than its limit',
    language: python,
    program: forks,
    fields: { limits: { ...patient, memory_mb: 512, pids: 32 } },
    ends: ['completed'],
    check({ output }) {
      const [made, errno] = output as [number, number]
      assert.is(errno, EAGAIN, `${made} were made`)
      assert.ok(made > 4 && made <= 32, `${made} were made`)
    },
  },
  {
    name: 'a memory bomb in Node',
    language: node,
    program: node.programs.grows,
    fields: { limits: patient },
    ends: ['oom'],
  },
  {
    name: 'a memory bomb in V8’s own heap',
    language: node,
    program: 'export default () => { const all = []; for (;;) all.push({ n: all.length }) }',
    fields: { limits: patient },
    ends: ['oom'],
  },
  {
    name: 'a memory bomb in Python',
    language: python,
    program: python.programs.grows,
    fields: { limits: patient },
    ends: ['oom'],
  },
  {
    name: 'a memory bomb in sh',
    language: shell,
    program: shell.programs.grows,
    fields: { limits: patient },
    ends: ['oom'],
  },
  {
    name: 'a memory bomb in a grandchild',
    language: shell,
    program: '(tail /dev/zero); exit 1\n',
    fields: { limits: patient },
    ends: ['oom'],
  },
  {
    name: 'filling /tmp',
    language: shell,
    program: `i=0; while head -c 4M /dev/zero > /tmp/$i; do i=$((i+1)); done
rm /tmp/0 && echo room again > /tmp/small && exit 3
`,
    fields: { limits: { ...patient, memory_mb: 256, disk_mb: 16 } },
    ends: ['exit_code'],
    says: /No space left/,
    check: ({ exit_code }) => assert.is(exit_code, 3),
  },
  {
    name: 'one file as large as the host’s disk',
    language: shell,
    program: 'head -c 10T /dev/zero > /tmp/full\n',
    fields: { limits: { ...patient, memory_mb: 256, disk_mb: 16 } },
    ends: ['exit_code'],
    says: /File size limit exceeded|No space left/,
  },
  {
    name: 'filling /tmp with more than its memory',
    language: shell,
    program: 'head -c 1G /dev/zero > /tmp/full\n',
    fields: { limits: { ...patient, disk_mb: 2_000 } },
    ends: ['oom'],
  },
  {
    name: 'filling /tmp with empty files',
    language: python,
    program: `import os
def handler(input, ctx):
    n = 0
    while True:
        open(f'/tmp/{n}', 'w').close()
        n += 1
`,
    fields: { limits: quick },
    ends: ['timeout', 'oom', 'user_error'],
  },
  {
    name: 'filling /dev/shm',
    language: shell,
    program: 'head -c 1G /dev/zero > /dev/shm/full\n',
    fields: { limits: patient },
    ends: ['exit_code', 'oom'],
  },
  {
    name: 'filling /run and /var/tmp',
    language: shell,
    program: 'head -c 1G /dev/zero > /run/full; head -c 1G /dev/zero > /var/tmp/full\n',
    fields: { limits: patient },
    ends: ['exit_code', 'oom'],
  },
  {
    name: 'filling the result file',
    language: shell,
    program: 'head -c 2G /dev/zero > "$VULCAN_RESULT"\n',
    fields: { limits: { ...patient, output_mb: 2 } },
    ends: ['output_too_large'],
  },
  {
    name: 'writing to the root',
    language: shell,
    fields: { user: 'root' },
    program:
      'for at in / /etc /usr /usr/bin /workspace /.vulcan; do echo x > $at/new 2>/dev/null && exit 9; done; echo x > /new\n',
    ends: ['exit_code'],
    says: /Read-only file system/,
    check: ({ exit_code }) => assert.is.not(exit_code, 9),
  },
  {
    name: 'reaching out of the box as root',
    language: python,
    program: reachingOut,
    fields: { user: 'root' },
    ends: ['completed'],
    check: ({ output }) => assert.equal(output, []),
  },
  {
    name: 'a flood of lines',
    language: shell,
    program: 'yes "a line of a flood" >&2\n',
    fields: { limits: quick },
    ends: ['timeout'],
    async check({ id }, ground) {
      const { lines, lost } = await ground.log(id)
      assert.is(lines.length, 10_000)
      assert.ok(lost > 0, 'what was dropped is said')
    },
  },
  {
    name: 'a flood without a line’s end',
    language: shell,
    program: 'tr "\\0" x < /dev/zero >&2\n',
    fields: { limits: quick },
    ends: ['timeout'],
    async check({ id }, ground) {
      const { lines } = await ground.log(id)
      for (const { text } of lines) assert.ok(text.length < 70_000, `a line of ${text.length} characters`)
    },
  },
  {
    name: 'a flood on stdout, which is the result',
    language: shell,
    program: 'yes "a line of a flood"\n',
    fields: { limits: quick },
    ends: ['timeout', 'output_too_large'],
  },
  {
    name: 'ignoring SIGTERM',
    language: shell,
    program: shell.programs.deaf!,
    fields: { limits: quick },
    ends: ['timeout'],
  },
  {
    name: 'stopping itself and all its group',
    language: shell,
    program: 'kill -STOP 0\nsleep 600\n',
    fields: { limits: quick },
    ends: ['timeout'],
  },
  {
    name: 'killing everything it can see',
    language: shell,
    program: 'kill -9 -1\nsleep 1\nkill -9 1\nsleep 600\n',
    fields: { limits: quick },
    ends: ['timeout', 'exit_code'],
  },
]

/** Tries each `host:port`; answers what came of it. */
const reaching = `import { connect } from 'node:net'
const attempt = (target) => new Promise((resolve) => {
  const at = target.lastIndexOf(':')
  const socket = connect({ host: target.slice(0, at), port: Number(target.slice(at + 1)) })
  const end = (word) => { socket.destroy(); resolve(word) }
  socket.once('error', (error) => end(error.code))
  socket.once('data', (data) => end('heard ' + data))
  setTimeout(end, 4_000, 'silence')
})
export default async (targets) => Object.fromEntries(await Promise.all(targets.map(async (one) => [one, await attempt(one)])))`

/** Listens everywhere, calls itself, says where it can be found, and answers when told that it is over. */
const listening = `import { connect, createServer } from 'node:net'
import { networkInterfaces } from 'node:os'
export default async () => {
  const server = createServer((socket) => socket.end('neighbour'))
  await new Promise((resolve) => server.listen(7000, '0.0.0.0', resolve))
  const own = Object.values(networkInterfaces()).flat().filter(({ family, internal }) => family === 'IPv4' && !internal)
  const [{ address }] = own
  const heard = await new Promise((resolve, reject) =>
    connect(7000, address).once('data', (data) => resolve(String(data))).once('error', reject))
  console.log('at ' + address + ' ' + heard)
  await new Promise((resolve) => setTimeout(resolve, 60_000))
}`

/** Processes of the host that have this among their arguments. */
const processesWith = (word: string): string[] =>
  globSync('/proc/[0-9]*/cmdline').filter((path) => {
    try {
      return readFileSync(path, 'latin1').includes(word)
    } catch {
      return false
    }
  })

/** One of the shells that stand ready for gVisor’s boxes to come: they are replaced, and belong to none yet. */
function waitsForBox(pid: number): boolean {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'latin1').includes('read -r sockets')
  } catch {
    return true
  }
}

/** The first words that a server says to who connects from the host itself. */
async function answerOf(target: string): Promise<string> {
  const at = target.lastIndexOf(':')
  const socket = connect({ host: target.slice(0, at), port: Number(target.slice(at + 1)) })
  const [data] = await once(socket, 'data')
  socket.destroy()
  return String(data)
}

/** An address of this host that others could reach it by. */
const hostAddress = Object.values(networkInterfaces())
  .flat()
  .find((one) => one?.family === 'IPv4' && !one.internal)?.address

/** `more`: what can only be tried under this isolation. */
export async function attempts(isolation: Isolation, more: Attempt[] = []): Promise<void> {
  const host = createServer((socket) => socket.end('host'))
  await new Promise<void>((resolve) => host.listen(0, '0.0.0.0', resolve))
  const { port } = host.address() as { port: number }
  const allowed = createServer((socket) => socket.end('allowed'))
  await new Promise<void>((resolve) => allowed.listen(0, hostAddress ?? '127.0.0.1', resolve))
  const allowedAt = `${hostAddress}:${(allowed.address() as { port: number }).port}`
  const ground = await Ground.open(isolation, {
    // Where a neighbour on the network would find the broker too.
    VULCAN_NATS_HOST: '0.0.0.0',
    VULCAN_EGRESS_ALLOW_PRIVATE: allowedAt,
  })
  const backend = await ground.backend()
  const unavailable = await ground.obstacle()
  const when = (name: string, why: string | undefined, body: () => Promise<void>) => {
    const obstacle = unavailable ?? why
    if (obstacle === undefined) test(name, body)
    else skip(test, name, obstacle)
  }

  for (const { name, language, program, fields, ends, says, check } of [...table, ...more])
    when(`${name}: ${ends.join(' or ')}`, undefined, async () => {
      const bystander = await ground.begin(shell, shell.programs.sleeps, { input: 1 })
      const ended = await ground.run(language, program, fields)
      const end = ended.status === 'completed' ? ended.status : ended.cause
      assert.ok(ends.includes(end!), `${end}: ${JSON.stringify(ended.error)}`)
      if (says !== undefined) {
        const { lines } = await ground.log(ended.id)
        const words = [ended.error?.message, ...lines.map(({ text }) => text)].join('\n')
        assert.match(words, says)
      }
      await check?.(ended, ground)
      const other = await ground.ended(bystander)
      assert.is(other.output, 'woke', JSON.stringify(other.error))
    })

  when('a daemonised grandchild does not outlive the first process', undefined, async () => {
    const file = `daemon-${randomUUID()}.py`
    const spec = {
      isolation,
      runtime: 'python',
      archive: { blob: await ground.archive({ [file]: daemon }) },
      entrypoint: ['python3', file],
      limits: { timeout_s: 60, memory_mb },
    }
    const runner = await ground.runnerPid()
    const before = new Set(descendants(runner))
    const began = Date.now()
    const ended = await ground.finish(spec)
    assert.is(ended.status, 'completed', JSON.stringify(ended.error))
    assert.match(JSON.stringify(ended.output), 'parent')
    assert.ok(Date.now() - began < 30_000, 'it was not waited for')
    const left = () => [
      ...descendants(runner).filter((pid) => !before.has(pid) && !waitsForBox(pid)),
      ...processesWith(file),
    ]
    await until('the end of the grandchild', () => (left().length === 0 ? true : undefined))
    assert.is(await ground.runnerPid(), runner, 'the runner is the same')
  })

  const noNetwork =
    hostAddress === undefined
      ? 'this host has no address but its loopback’s'
      : backend.capabilities?.egress.includes('all') === false
        ? `${isolation} offers no egress here: ${JSON.stringify(backend.capabilities.missing)}`
        : undefined
  const natsPort = new URL(ground.platform.natsUrl).port
  const forbidden = [
    '169.254.169.254:80',
    `127.0.0.1:${port}`,
    `${hostAddress}:${port}`,
    `127.0.0.1:${natsPort}`,
    `${hostAddress}:${natsPort}`,
    `${hostAddress}:${new URL(ground.url).port}`,
  ]
  const reach = async (targets: string[], egress: unknown) => {
    const ended = await ground.run(node, reaching, { input: targets, network: { egress } })
    assert.is(ended.status, 'completed', JSON.stringify(ended.error))
    return ended.output as Record<string, string>
  }
  const heardOf = (answers: Record<string, string>) =>
    Object.entries(answers).filter(([, word]) => word.startsWith('heard'))

  when('the test’s own servers and the broker are there to be reached', noNetwork, async () => {
    const heard = await Promise.all(
      [`127.0.0.1:${port}`, `${hostAddress}:${port}`, `${hostAddress}:${natsPort}`, allowedAt].map(answerOf),
    )
    assert.equal(heard.slice(0, 2), ['host', 'host'])
    assert.match(heard[2]!, /^INFO/)
    assert.is(heard[3], 'allowed')
  })

  when('without egress nothing is reached', noNetwork, async () => {
    assert.equal(heardOf(await reach([...forbidden, allowedAt], 'none')), [])
  })

  when(
    'under egress all the allowed test address is reached; metadata, loopback, the host and the broker are not',
    noNetwork,
    async () => {
      const answers = await reach([...forbidden, allowedAt], 'all')
      assert.equal(heardOf(answers), [[allowedAt, 'heard allowed']], JSON.stringify(answers))
    },
  )

  when('a handler that fails because it was refused ends as egress_denied', noNetwork, async () => {
    const program = `import { connect } from 'node:net'
export default (target) => new Promise((resolve, reject) =>
  connect({ host: target, port: 80 }).once('connect', resolve).once('error', reject))`
    const fields = { input: '169.254.169.254', network: { egress: 'all' } }
    const ended = await ground.run(node, program, fields)
    assert.is(ended.cause, 'egress_denied', JSON.stringify(ended.error))
  })

  when('under an allowlist the test address on it is reached, and nothing else', noNetwork, async () => {
    const answers = await reach([...forbidden, allowedAt], [allowedAt])
    assert.equal(heardOf(answers), [[allowedAt, 'heard allowed']], JSON.stringify(answers))
  })

  when('a neighbour is not reached', noNetwork, async () => {
    const neighbour = await ground.begin(node, listening, { network: { egress: 'all' } })
    const line = await ground.said(neighbour, 'at ')
    const [, address, heard] = line.split(' ')
    assert.is(heard, 'neighbour', 'it can be called at that address')
    assert.equal(heardOf(await reach([`${address}:7000`], 'all')), [])
    await ground.kill(neighbour)
  })

  test('nothing is left behind', async () => {
    try {
      assert.equal(await ground.leftovers(), [])
    } finally {
      await ground[Symbol.asyncDispose]()
      host.close()
      allowed.close()
    }
  })
  test.run()
}
