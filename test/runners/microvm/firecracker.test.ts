import { once } from 'node:events'
import { constants } from 'node:fs'
import { chmod, mkdir, mkdtemp, readFile, rm, stat, symlink, writeFile } from 'node:fs/promises'
import { createServer as createHttpServer, type RequestListener } from 'node:http'
import { createServer, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { MachineShape } from '../../../runners/microvm/driver.ts'
import { Api, FirecrackerError, type Request, resources } from '../../../runners/microvm/firecracker/api.ts'
import {
  drawIdentity,
  Held,
  jailOf,
  launchArgs,
  placeJobDrive,
  SharedFiles,
} from '../../../runners/microvm/firecracker/jailer.ts'
import {
  bootRequests,
  restoreRequests,
  snapshotRequests,
  trialRequests,
} from '../../../runners/microvm/firecracker/requests.ts'
import { VsockChannel } from '../../../runners/microvm/firecracker/vsock.ts'
import { skip } from '../../harness.ts'
import { checkRequest } from './firecracker-schema.ts'

const shape: MachineShape = {
  kernel: '/parts/vmlinux',
  initramfs: '/parts/initramfs',
  root: '/parts/root.ext4',
  memoryMb: 256,
  vcpus: 2,
  network: true,
}
const unlimited = { disk: undefined, network: undefined }
const limited = { disk: 20e6, network: 5e6 }
const tap = 'vm0011aabb0'

const pathsOf = (requests: Request[]) => requests.map(({ method, path }) => `${method} ${path}`)
const bodyOf = (requests: Request[], path: string) =>
  requests.find((request) => request.path === path)?.body as Record<string, unknown>

async function scratch(scope: AsyncDisposableStack): Promise<string> {
  const dir = await mkdtemp(join(tmpdir(), 'vulcan-test-firecracker-'))
  scope.defer(() => rm(dir, { recursive: true, force: true }))
  return dir
}

test('every request of a boot, a snapshot and a restore is one of the documented API', () => {
  const all = [undefined, tap].flatMap((name) =>
    [unlimited, limited].flatMap((rates) => [
      ...bootRequests(shape, name, rates),
      ...restoreRequests(name, rates),
    ]),
  )
  all.push(...snapshotRequests(), ...trialRequests(shape))
  all.push(resources.instance(), resources.state('Resumed'), resources.action('FlushMetrics'))
  for (const request of all) checkRequest(request)
  assert.ok(all.length > 50)
})

test('what checks requests refuses one that is not documented', () => {
  assert.throws(() => checkRequest({ method: 'PUT', path: '/balloons', body: {} }), /no operation/)
  assert.throws(() => checkRequest({ method: 'PATCH', path: '/entropy', body: {} }), /no operation/)
  assert.throws(() => checkRequest(resources.vsock({ guest_cid: 2, uds_path: '/v.sock' })))
  const request = {
    method: 'PUT' as const,
    path: '/drives/a',
    body: { drive_id: 'b', is_root_device: false },
  }
  assert.throws(() => checkRequest(request), /the path says a/)
  const more = { ...resources.entropy(), body: { source: '/dev/random' } }
  assert.throws(() => checkRequest(more), /source/)
})

test('a boot configures everything before it starts, and neither a balloon nor metadata', () => {
  const paths = pathsOf(bootRequests(shape, tap, limited))
  assert.equal(paths, [
    'PUT /logger',
    'PUT /metrics',
    'PUT /machine-config',
    'PUT /boot-source',
    'PUT /drives/root',
    'PUT /drives/job',
    'PUT /network-interfaces/eth0',
    'PUT /vsock',
    'PUT /entropy',
    'PUT /actions',
  ])
})

test('drives are read-only, and only what is the job’s own is limited', () => {
  const requests = bootRequests(shape, tap, limited)
  const [root, job] = [bodyOf(requests, '/drives/root'), bodyOf(requests, '/drives/job')]
  assert.is(root.is_read_only, true)
  assert.is(job.is_read_only, true)
  assert.is(root.rate_limiter, undefined)
  assert.equal(job.rate_limiter, { bandwidth: { size: 20e6, refill_time: 1_000 } })
  const network = bodyOf(requests, '/network-interfaces/eth0')
  assert.equal(network.rx_rate_limiter, { bandwidth: { size: 5e6, refill_time: 1_000 } })
  assert.equal(network.tx_rate_limiter, network.rx_rate_limiter)
  assert.is(bodyOf(bootRequests(shape, tap, unlimited), '/drives/job').rate_limiter, undefined)
})

test('a machine without a network has no interface, restored or booted', () => {
  assert.not.ok(pathsOf(bootRequests(shape, undefined, limited)).some((path) => path.includes('network')))
  assert.is(bodyOf(restoreRequests(undefined, unlimited), '/snapshot/load').network_overrides, undefined)
})

test('a restore takes the tap of now, and runs at once unless the disk is to be limited before', () => {
  const plain = restoreRequests(tap, unlimited)
  assert.equal(pathsOf(plain), ['PUT /logger', 'PUT /metrics', 'PUT /snapshot/load'])
  const load = bodyOf(plain, '/snapshot/load')
  assert.is(load.resume_vm, true)
  assert.equal(load.mem_backend, { backend_type: 'File', backend_path: '/template/memory' })
  assert.equal(load.network_overrides, [{ iface_id: 'eth0', host_dev_name: tap }])
  const slow = restoreRequests(tap, limited)
  assert.is(bodyOf(slow, '/snapshot/load').resume_vm, false)
  assert.equal(pathsOf(slow).slice(-2), ['PATCH /drives/job', 'PATCH /vm'])
})

const launch = {
  jailer: '/usr/bin/jailer',
  firecracker: '/state/me/firecracker',
  id: 'm7',
  base: '/state/me/jails',
  netns: '/proc/12/fd/20',
  fileBytes: 2 ** 28,
  uid: 1_879_050_000,
  gid: 1_879_050_000,
}

for (const [what, expected] of [
  ['the binary and the id', ['--id', 'm7', '--exec-file', '/state/me/firecracker']],
  ['a user and group of its own', ['--uid', '1879050000', '--gid', '1879050000']],
  ['a root directory', ['--chroot-base-dir', '/state/me/jails']],
  ['a network namespace', ['--netns', '/proc/12/fd/20']],
  ['a pid namespace of its own', ['--new-pid-ns']],
  ['a bound of open files', ['--resource-limit', 'no-file=256']],
  ['a bound of written files', ['--resource-limit', 'fsize=268435456']],
  ['the API’s socket, as Firecracker’s argument', ['--', '--api-sock', '/api.sock']],
  ['an end with the runner’s', ['--pdeathsig', 'KILL']],
] as const)
  test(`the jailer is told ${what}`, () => {
    const args = launchArgs(launch)
    const at = args.findIndex((_, i) => expected.every((value, j) => args[i + j] === value))
    assert.ok(at >= 0, args.join(' '))
  })

test('nothing turns seccomp off, makes it a daemon or leaves it to other control groups', () => {
  const args = launchArgs(launch).join(' ')
  for (const word of ['seccomp', 'daemonize', 'cgroup', 'mmds']) assert.not.match(args, word)
  assert.is(jailOf(launch), '/state/me/jails/firecracker/m7')
})

test('machines have users of their own, out of a range that nobody has', () => {
  const ids = Array.from({ length: 50 }, drawIdentity)
  for (const { uid, gid } of ids) {
    assert.is(uid, gid)
    assert.ok(uid >= 0x7000_0000 && uid < 0x7100_0000)
  }
  assert.ok(new Set(ids.map(({ uid }) => uid)).size > 45)
})

test('files that all may read are linked into a jail, others are copied once', async () => {
  await using scope = new AsyncDisposableStack()
  const dir = await scratch(scope)
  const [open, closed] = [join(dir, 'open'), join(dir, 'closed')]
  await writeFile(open, 'open')
  await writeFile(closed, 'closed')
  await chmod(open, 0o644)
  await chmod(closed, 0o600)
  const files = new SharedFiles(join(dir, 'copies'))
  for (const jail of ['a', 'b']) {
    await mkdir(join(dir, jail))
    await files.place(open, join(dir, jail, 'open'))
    await files.place(closed, join(dir, jail, 'closed'))
  }
  const ino = async (...path: string[]) => (await stat(join(dir, ...path))).ino
  assert.is(await ino('a', 'open'), await ino('open'))
  assert.is.not(await ino('a', 'closed'), await ino('closed'))
  assert.is(await ino('a', 'closed'), await ino('b', 'closed'))
  assert.is((await stat(join(dir, 'a', 'closed'))).mode & 0o777, 0o444)
  assert.is((await stat(closed)).mode & 0o777, 0o600)
  assert.is(await readFile(join(dir, 'b', 'closed'), 'utf8'), 'closed')
})

if (process.getuid?.() !== 0) skip(test, 'the job’s drive is the VMM’s to read only', 'needs root')
else
  test('the job’s drive is the VMM’s to read only', async () => {
    await using scope = new AsyncDisposableStack()
    const dir = await scratch(scope)
    const drive = join(dir, 'drive')
    await writeFile(drive, 'old')
    const identity = drawIdentity()
    await placeJobDrive(drive, join(dir, 'job.img'), identity)
    const { uid, gid, mode } = await stat(join(dir, 'job.img'))
    assert.equal({ uid, gid, mode: mode & 0o777 }, { uid: 0, gid: identity.gid, mode: 0o640 })
    await writeFile(drive, 'new')
    assert.is(await readFile(join(dir, 'job.img'), 'utf8'), 'new')
  })

/** An HTTP server on a Unix socket. */
async function serve(scope: AsyncDisposableStack, answer: RequestListener): Promise<Api> {
  const path = join(await scratch(scope), 'api.sock')
  const server = createHttpServer(answer)
  await once(server.listen(path), 'listening')
  scope.defer(() => {
    server.closeAllConnections()
    server.close()
  })
  return scope.use(new Api(path))
}

const errorOf = (promise: Promise<unknown>) =>
  promise.then(
    () => undefined,
    (error: unknown) => error as FirecrackerError,
  )

test('a request goes out as JSON, an answer without content is nothing', async () => {
  await using scope = new AsyncDisposableStack()
  const seen: unknown[] = []
  const api = await serve(scope, async (request, answer) => {
    seen.push([request.method, request.url, request.headers['content-type'], JSON.parse(await text(request))])
    answer.writeHead(204).end()
  })
  assert.is(await api.send(resources.state('Paused')), undefined)
  assert.equal(seen, [['PATCH', '/vm', 'application/json', { state: 'Paused' }]])
})

test('an answer is parsed', async () => {
  await using scope = new AsyncDisposableStack()
  const api = await serve(scope, (_, answer) => answer.end('{"state":"Running"}'))
  assert.equal(await api.send(resources.instance()), { state: 'Running' })
})

test('a refusal carries Firecracker’s fault message and status', async () => {
  await using scope = new AsyncDisposableStack()
  const api = await serve(scope, (_, answer) =>
    answer.writeHead(400).end('{"fault_message":"Invalid kernel path."}'),
  )
  const error = await errorOf(api.send(resources.action('InstanceStart')))
  assert.instance(error, FirecrackerError)
  assert.is(error?.message, 'Firecracker, PUT /actions: Invalid kernel path.')
  assert.is(error?.status, 400)
})

test('an answer that is no JSON is an error with its status', async () => {
  await using scope = new AsyncDisposableStack()
  const api = await serve(scope, (_, answer) => answer.writeHead(500).end('<html>'))
  assert.match((await errorOf(api.send(resources.entropy())))?.message ?? '', 'status 500')
})

test('what does not answer is given up', async () => {
  await using scope = new AsyncDisposableStack()
  const api = await serve(scope, () => {})
  const error = await errorOf(api.send(resources.instance(), 100))
  assert.is(error?.message, 'Firecracker, GET /: no answer within 100 ms')
  assert.is(error?.status, undefined)
})

test('an endless answer is refused', async () => {
  await using scope = new AsyncDisposableStack()
  const api = await serve(scope, (_, answer) => {
    const piece = Buffer.alloc(16_384, 'x')
    const more = () => {
      while (!answer.destroyed && answer.write(piece));
    }
    answer.on('drain', more)
    more()
  })
  assert.match((await errorOf(api.send(resources.instance())))?.message ?? '', 'more than 262144 bytes')
})

test('nobody there is an error', async () => {
  using api = new Api('/nowhere/api.sock')
  assert.match((await errorOf(api.send(resources.instance())))?.message ?? '', 'ENOENT')
})

test('a link in place of a file of the jail is not opened', async () => {
  await using scope = new AsyncDisposableStack()
  const dir = await scratch(scope)
  await writeFile(join(dir, 'secret'), 'of the host')
  await symlink('secret', join(dir, 'metrics'))
  assert.throws(() => new Held(join(dir, 'metrics'), constants.O_RDONLY), /ELOOP/)
  assert.throws(() => new Held(join(dir, 'metrics')), /symbolic link/)
  using file = new Held(join(dir, 'secret'))
  assert.is(await readFile(file.path, 'utf8'), 'of the host')
})

/** A Unix socket that says to each connection what `answer` makes of its first line. */
async function listen(scope: AsyncDisposableStack, answer: (line: string, socket: Socket) => void) {
  const path = join(await scratch(scope), 'v.sock')
  const sockets = new Set<Socket>()
  const server = createServer((socket) => {
    sockets.add(socket)
    socket.on('error', () => {})
    socket.once('data', (data) => answer(data.toString(), socket))
  })
  await once(server.listen(path), 'listening')
  scope.defer(() => {
    for (const socket of sockets) socket.destroy()
    server.close()
  })
  return path
}

const never = new Promise<void>(() => {})

test('the channel is the guest’s once it has taken the connection', async () => {
  await using scope = new AsyncDisposableStack()
  const lines: string[] = []
  const path = await listen(scope, (line, socket) => {
    lines.push(line)
    // What the guest says may come with the answer.
    socket.write('OK 1073741824\nready')
    socket.on('data', (data) => socket.end(`heard ${data}`))
  })
  using held = new Held(path)
  const channel = new VsockChannel(held.path, 1024, never)
  channel.write('hello')
  assert.is(await text(channel), 'readyheard hello')
  assert.equal(lines, ['CONNECT 1024\n'])
})

test('where nobody listens in the guest yet it is tried again, and what was written waits', async () => {
  await using scope = new AsyncDisposableStack()
  let tries = 0
  const path = await listen(scope, (_, socket) => {
    if (++tries < 4) return socket.end(tries === 2 ? 'what?\n' : '')
    socket.write('OK 1\n')
    return socket.on('data', (data) => socket.end(data))
  })
  const channel = new VsockChannel(path, 1024, never)
  channel.write('kept')
  assert.is(await text(channel), 'kept')
  assert.is(tries, 4)
})

test('where the machine ends before that, so does the channel', async () => {
  await using scope = new AsyncDisposableStack()
  const path = await listen(scope, (_, socket) => socket.end())
  const gone = Promise.withResolvers<void>()
  const channel = new VsockChannel(path, 1024, gone.promise)
  setTimeout(gone.resolve, 100)
  assert.is(await text(channel), '')
})

test('a guest that takes nothing holds up who writes, not what comes', async () => {
  await using scope = new AsyncDisposableStack()
  const path = await listen(scope, (_, socket) => {
    socket.pause()
    socket.write('OK 1\n')
    socket.write('still here')
  })
  const channel = new VsockChannel(path, 1024, never)
  scope.defer(() => void channel.destroy())
  const piece = Buffer.alloc(65_536)
  let written = 0
  while (written < 100 && channel.write(piece)) written++
  assert.ok(written < 100)
  const [said] = (await once(channel, 'data')) as [Buffer]
  assert.is(said.toString(), 'still here')
})

test.run()
