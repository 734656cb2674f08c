// timeout: 240
/** Machines whose own kernel and agent turn on the host: what becomes of the run, and that the next one works. */
import { randomBytes } from 'node:crypto'
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { type CpioEntry, writeCpio } from '../../../rootfs/cpio.ts'
import { findMachineParts, readParts } from '../../../rootfs/parts.ts'
import { assembleRunner } from '../../../runners/container/assemble.ts'
import { findProgram } from '../../../runners/container/images/processes.ts'
import { openImageStore } from '../../../runners/container/images/store.ts'
import { findRuntime } from '../../../runners/container/runtimes/index.ts'
import { MicrovmEngine } from '../../../runners/microvm/engine.ts'
import type { Runner } from '../../../runners/runner.ts'
import { cacheDirectory } from '../../../scripts/cache-directory.ts'
import { encodeMachineFrame, type MachineKind, machineKinds } from '../../../shared/machine.ts'
import type { Cause } from '../../../shared/workload.ts'
import { tgzOf } from '../../gateway/archives.ts'
import { skip } from '../../harness.ts'
import { archive, run } from '../container/jobs.ts'
import { noQemu, openTestDriver } from './support.ts'

const cacheDir = cacheDirectory(process.env)
const base = await findRuntime('base', cacheDir)
const packaged = await readParts(cacheDir, 'packaged')
const busybox = findProgram('busybox')
const missing =
  noQemu() ??
  (packaged === undefined || base === undefined
    ? 'the parts of machines were not prepared (npm run setup -- microvm)'
    : busybox === undefined
      ? 'busybox is not installed'
      : undefined)

/** Brings the machine to where an agent begins: the port to the host is descriptor 3. */
const beginning = `#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
[ -e /modules/order ] && while read name; do /bin/busybox insmod /modules/$name; done < /modules/order
until [ -n "$port" ]; do
  for one in /sys/class/virtio-ports/*; do
    [ "$(/bin/busybox cat $one/name 2>/dev/null)" = vulcan ] && port=/dev/\${one##*/}
  done
done
exec 3<>$port
`
/** A shell command that sends a frame. */
const send = (kind: MachineKind, payload: unknown = {}, stream = 0) => {
  const bytes = payload instanceof Uint8Array ? payload : Buffer.from(JSON.stringify(payload))
  const escaped = [...encodeMachineFrame(kind, bytes, stream)]
    .map((byte) => `\\0${byte.toString(8).padStart(3, '0')}`)
    .join('')
  return `/bin/busybox printf '%b' '${escaped}' >&3`
}
const { ready, configured, started, data, exited, pong, result } = machineKinds
const isReady = send(ready, { protocol: 1, kernel: 'own' })
const usage = { cpu_ms: 1, memory_peak_mb: 1, oom_kills: 0 }
/** Says all that is said up to the start, whatever is asked. */
const began = `${isReady}\n${send(configured)}\n${send(started)}\n`
const forever = 'while :; do /bin/busybox sleep 1; done'

interface Hostile {
  name: string
  script: string
  causes: Cause[]
}

const table: Hostile[] = [
  {
    name: 'random bytes before it is ready',
    script: '/bin/busybox cat /dev/urandom >&3',
    causes: ['backend_unavailable', 'runner_lost'],
  },
  {
    name: 'a frame of 4 GiB',
    script: `${isReady}\n/bin/busybox printf '\\377\\377\\377\\377' >&3\n/bin/busybox cat /dev/zero >&3`,
    causes: ['backend_unavailable', 'runner_lost'],
  },
  {
    name: 'answers that nobody asked for',
    script: `${isReady}\n${isReady}\n${forever}`,
    causes: ['backend_unavailable', 'runner_lost'],
  },
  {
    name: 'a panic when it is configured',
    script: `${isReady}\n/bin/busybox head -c 1 <&3 >/dev/null\nexit 1`,
    causes: ['backend_unavailable', 'runner_lost'],
  },
  {
    name: 'more output than there is room for',
    script: `${began}while :; do ${send(data, Buffer.alloc(16_384, 'x'), 1)}; done`,
    causes: ['backend_unavailable', 'runner_lost'],
  },
  {
    name: 'a result without end',
    script: `${began}while :; do ${send(result, Buffer.alloc(16_384, 'x'))}; done`,
    causes: ['backend_unavailable', 'runner_lost', 'output_too_large'],
  },
  {
    name: 'an end that is none',
    script: `${began}${send(exited, { code: 'zero', oom: 1, usage })}\n${forever}`,
    causes: ['backend_unavailable', 'runner_lost'],
  },
  {
    name: 'a pong of its own',
    script: `${began}${send(pong, Buffer.from('other'))}\n${forever}`,
    causes: ['backend_unavailable', 'runner_lost'],
  },
]

const scope = new AsyncDisposableStack()
const dir = await mkdtemp(join(tmpdir(), 'vulcan-test-hostile-'))
scope.defer(() => rm(dir, { recursive: true, force: true }))

/** The modules of the kernel that machines really start with, and a script in place of the agent. */
async function initramfsOf(script: string): Promise<string> {
  const { kernel } = packaged!
  const parts = await findMachineParts(cacheDir, { kernelFormat: 'either' })
  const modules = parts?.kernel === kernel.vmlinux ? kernel.modules : undefined
  const folders = ['bin', 'dev', 'proc', 'root', 'run', 'sys', 'tmp'].map((path) => ({ path, mode: 0o40755 }))
  const entries: CpioEntry[] = [
    ...folders,
    { path: 'dev/console', mode: 0o20600, device: { major: 5, minor: 1 } },
    { path: 'bin/busybox', mode: 0o100755, content: await readFile(busybox!) },
    { path: 'init', mode: 0o100755, content: Buffer.from(`${beginning}${script}\n`) },
  ]
  if (modules !== undefined) {
    const order = await readFile(join(modules, 'order'), 'utf8')
    entries.push({ path: 'modules', mode: 0o40755 })
    for (const name of ['order', ...order.split('\n').filter(Boolean)])
      entries.push({
        path: `modules/${name}`,
        mode: 0o100644,
        content: await readFile(join(modules, name)),
      })
  }
  const file = join(dir, `${randomBytes(6).toString('hex')}.cpio`)
  await writeFile(file, writeCpio(entries))
  return file
}

/** A runner with nothing ready, whose machines begin with this initramfs; the agent’s own unless given. */
async function runnerWith(initramfs?: string): Promise<Runner> {
  await using parts = new AsyncDisposableStack()
  const own = join(dir, randomBytes(6).toString('hex'))
  await mkdir(own)
  const { driver, owner, stateDir } = await openTestDriver(own)
  const found = (await findMachineParts(cacheDir, { kernelFormat: driver.kernelFormat }))!
  const engine = parts.use(
    await MicrovmEngine.open({
      driver,
      parts: { kernel: found.kernel, initramfs: initramfs ?? found.initramfs },
      dir: join(stateDir, owner),
      owner,
      cacheDir,
      budgetMb: 4_096,
      snapshots: false,
    }),
  )
  const images = parts.use(
    await openImageStore({
      dir: join(cacheDir, 'images'),
      insecureRegistries: [],
      imageDirectories: [join(cacheDir, 'runtimes')],
      budgetMb: 20_480,
    }),
  )
  parts.move()
  return await assembleRunner({
    isolation: 'microvm',
    owner,
    engine,
    images,
    networks: undefined,
    noNetworks: { reason: 'of no use here', fix: 'none' },
    findRuntime: async (name) => (name === 'base' ? base : undefined),
    filesDir: join(own, 'files'),
    cacheDir,
    budgetMb: 20_480,
    slots: 2,
  })
}

const command = archive(tgzOf({ 'main.sh': 'echo hello' }))
const options = { runtime: 'oci' as const, entrypoint: ['sh', 'main.sh'] }

for (const { name, script, causes } of table) {
  const title = `${name}: ${causes.join(' or ')}`
  if (missing !== undefined) skip(test, title, missing)
  else
    test(title, async () => {
      await using hostile = await runnerWith(await initramfsOf(script))
      const before = process.memoryUsage().rss
      const { outcome, ms } = await run(hostile, command, { ...options, timeoutMs: 60_000 })
      assert.is(outcome.status, 'failed', JSON.stringify(outcome))
      if (outcome.status === 'failed') assert.ok(causes.includes(outcome.cause), JSON.stringify(outcome))
      assert.ok(ms < 55_000, `${ms} ms`)
      assert.ok(process.memoryUsage().rss - before < 200 * 2 ** 20, 'it made the host hold little')
      assert.equal(hostile.pids(), [], 'its VMM is gone')
    })
}

if (missing !== undefined) skip(test, 'the next run works', missing)
else
  test('the next run works', async () => {
    await using runner = await runnerWith()
    const { outcome } = await run(runner, command, options)
    assert.is(outcome.status, 'completed', JSON.stringify(outcome))
    assert.is(outcome.machine?.start, 'boot')
  })

test('nothing is left', async () => {
  await scope[Symbol.asyncDispose]()
})

test.run()
