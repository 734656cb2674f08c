/** What the store owes those who share it: one fetch, one unpack, images that stay while they are held, no leftovers. */
import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { openImageStore } from '../../../runners/container/images/store.ts'
import { Phases } from '../../../runners/container/phases.ts'
import { RunnerMetrics } from '../../../runners/metrics.ts'
import type { Phase } from '../../../runners/runner.ts'
import { type BuiltImage, buildImage, type Entry, startRegistry, writeLayout } from '../../registry.ts'
import { errorOf, file, storeOptions, workbench } from './images-support.ts'
import { seriesSum } from './metric-values.ts'

const noise = (megabytes: number): Buffer => {
  const bytes = Buffer.alloc(megabytes * 2 ** 20)
  for (let i = 0; i < bytes.length; i += 4) bytes.writeInt32LE((Math.random() * 2 ** 31) | 0, i)
  return bytes
}
/** Sends an image, and of its layer only the beginning until it is told to go on. */
async function stallingRegistry(image: BuiltImage) {
  const layer = image.layers[0]!
  let isStalling = true
  let stalled = false
  const server = createServer((request, response) => {
    if (request.url?.includes('/manifests/'))
      return void response.setHeader('content-type', image.mediaType).end(image.manifest)
    const digest = /sha256:[0-9a-f]+$/.exec(request.url ?? '')?.[0]
    const bytes = image.blobs.get(digest?.slice(7) ?? '')
    if (bytes === undefined) return void response.end('{}')
    if (digest !== layer.digest || !isStalling) return void response.end(bytes)
    stalled = true
    response.writeHead(200, { 'content-length': layer.size }).write(bytes.subarray(0, 1_000))
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  return {
    reference: `127.0.0.1:${port}/app:v1`,
    stalled: () => stalled,
    goOn() {
      isStalling = false
    },
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

const many = (count: number): Entry[] =>
  Array.from({ length: count }, (_, i) => file(`dir${i % 50}/f${i}`, `${i}`))
const list = (...path: string[]) => readdirSync(join(...path)).sort()
const until = async (what: () => boolean, message: string) => {
  for (let tries = 0; tries < 400; tries++) {
    if (what()) return
    await sleep(50)
  }
  throw new Error(message)
}

/** A process that holds an image. */
async function owner(...args: string[]) {
  const script = join(import.meta.dirname, 'images-owner.ts')
  const child = spawn(process.execPath, [script, ...args], { stdio: ['pipe', 'pipe', 'inherit'] })
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]()
  const end = async (signal?: NodeJS.Signals) => {
    if (child.exitCode !== null || child.signalCode !== null) return
    const exit = once(child, 'exit')
    if (signal) child.kill(signal)
    else child.stdin.end()
    await exit
  }
  return {
    pid: child.pid!,
    /** What it has got. */
    async image(): Promise<{ digest: string; root: string }> {
      return JSON.parse((await lines.next()).value ?? 'null')
    },
    end,
    [Symbol.asyncDispose]: () => end('SIGKILL'),
  }
}

test('many that ask for one image at once share one fetch and one unpacking', async () => {
  await using bench = await workbench()
  await using registry = await startRegistry()
  await writeLayout(join(bench.dir, 'made'), { layers: [many(200)] })
  const { reference, digest } = await registry.push(join(bench.dir, 'made'), 'app:v1')
  const pinned = `${registry.host}/app@${digest}`
  const before = await registry.requests(/"GET [^"]*\/blobs\//)
  const images = await Promise.all(
    [reference, reference, pinned, reference, pinned].map((one) => bench.get(one)),
  )
  const inodes = await Promise.all(images.map(async (image) => statSync(await image.root()).ino))
  assert.is(new Set(inodes).size, 1)
  assert.equal(list(bench.dir, 'store/roots'), [digest.slice(7)])
  // The layer, and the config.
  assert.is((await registry.requests(/"GET [^"]*\/blobs\//)) - before, 2)
  for (const image of images) image[Symbol.dispose]()
})

test('one that gives up does not take the image away from the others', async () => {
  await using bench = await workbench()
  const layout = join(bench.layouts, 'a')
  await writeLayout(layout, { layers: [[file('big', ''), { path: 'noise', content: noise(20) }]] })
  const stop = new AbortController()
  const first = errorOf(bench.get(`oci:${layout}`, stop.signal))
  const second = bench.get(`oci:${layout}`)
  setTimeout(() => stop.abort(new Error('enough')), 5)
  assert.is((await first).message, 'enough')
  using image = await second
  assert.ok(existsSync(await image.root()))
})

test('two processes on one store share one fetch and one unpacking', async () => {
  await using bench = await workbench()
  await using registry = await startRegistry()
  await writeLayout(join(bench.dir, 'made'), { layers: [many(3_000)] })
  const { digest } = await registry.push(join(bench.dir, 'made'), 'app:v1')
  const before = await registry.requests(/"GET [^"]*\/blobs\//)
  await using one = await owner(bench.dir, `${registry.host}/app@${digest}`)
  await using two = await owner(bench.dir, `${registry.host}/app@${digest}`)
  assert.equal(await one.image(), await two.image())
  assert.is((await registry.requests(/"GET [^"]*\/blobs\//)) - before, 2)
  assert.is(list(bench.dir, 'store/holds').length, 2)
  await Promise.all([one.end(), two.end()])
  assert.equal([list(bench.dir, 'store/holds'), list(bench.dir, 'store/tmp')], [[], []])
  assert.equal(list(bench.dir, 'store/locks'), [])
})

test('what was asked for, fetched and is kept is counted, and told as a part of a start', async () => {
  const metrics = new RunnerMetrics('images-test', 'gvisor')
  const sum = (name: string, labels?: Record<string, string>) => seriesSum(metrics.registry, name, labels)
  await using bench = await workbench({ metrics })
  await using registry = await startRegistry()
  await writeLayout(join(bench.dir, 'made'), { layers: [[file('big', '', { content: noise(1) })]] })
  const { reference, digest } = await registry.push(join(bench.dir, 'made'), 'app:v1')
  const told: Phase[] = []
  const phases = new Phases({ function: undefined, traceparent: undefined, traced: true }, metrics)
  phases.tell((phase) => told.push(phase))
  const get = (name: string) =>
    bench.store.get({ kind: 'reference', reference: name }, AbortSignal.timeout(60_000), phases)
  const [image, same] = await Promise.all([get(reference), get(reference)])
  await Promise.all([image.root(phases), same.root(phases)])
  const bytes = await sum('vulcan_image_pulled_bytes_total')
  assert.ok(bytes > 2 ** 20 && bytes < 2 * 2 ** 20, `${bytes}`)
  assert.is(await sum('vulcan_image_pull_seconds_count', { result: 'ok' }), 1)
  const names = told.map(({ name }) => name)
  assert.equal(names, ['pull image', 'pull image', 'unpack image', 'unpack image'])
  assert.equal(told[0]!.attributes, {
    'container.image.name': reference,
    'oci.manifest.digest': digest,
    'vulcan.image.pulled_bytes': bytes,
  })
  assert.is(await sum('vulcan_image_cache_requests_total', { result: 'miss' }), 2)
  assert.ok((await sum('vulcan_cache_bytes', { cache: 'images' })) > 2 ** 20)

  using again = await get(reference)
  await again.root(phases)
  assert.is(told.length, 4)
  assert.is(await sum('vulcan_image_cache_requests_total', { result: 'hit' }), 1)

  const { reason } = await errorOf(get(`${registry.host}/none:v1`))
  assert.is(reason, 'image_not_found')
  assert.is(await sum('vulcan_image_pull_seconds_count', { result: 'failed' }), 1)
  assert.match(told[4]!.error!, /none:v1/)
  for (const one of [image, same]) one[Symbol.dispose]()
})

test('images that nobody holds go, least used first, when there is no room; held ones stay', async () => {
  await using bench = await workbench({ budgetMb: 20 })
  const made: BuiltImage[] = []
  const get = async (n: number) => {
    const layout = join(bench.layouts, String(n))
    if (!existsSync(layout))
      made[n] = await writeLayout(layout, {
        layers: [[{ path: 'noise', content: noise(3) }, file('n', String(n))]],
      })
    const image = await bench.get(`oci:${layout}`)
    await image.root()
    return image
  }
  const isHere = (n: number) => existsSync(join(bench.dir, 'store/layouts', made[n]!.digest.slice(7)))
  // Each is some 6 MiB: a layer and a root.
  using first = await get(0)
  for (const n of [1, 2]) (await get(n))[Symbol.dispose]()
  await sleep(20)
  assert.equal([0, 1, 2].map(isHere), [true, true, true])
  using third = await get(3)
  assert.equal([0, 1, 2, 3].map(isHere), [true, false, true, true])
  using fourth = await get(4)
  assert.equal([0, 1, 2, 3, 4].map(isHere), [true, false, false, true, true])
  // All are held: there is more than there should be, and nothing is taken away.
  using fifth = await get(5)
  assert.equal([0, 3, 4, 5].map(isHere), [true, true, true, true])
  for (const [n, image] of [
    [0, first],
    [3, third],
    [4, fourth],
    [5, fifth],
  ] as const)
    assert.is(readFileSync(join(await image.root(), 'n'), 'utf8'), String(n))
  // Blobs go with their images, and what was evicted comes again.
  assert.is(list(bench.dir, 'store/blobs/sha256').length, 4 * 3)
  first[Symbol.dispose]()
  third[Symbol.dispose]()
  using again = await get(1)
  assert.is(readFileSync(join(await again.root(), 'n'), 'utf8'), '1')
  await until(() => list(bench.dir, 'store/tmp').length === 0, 'what was evicted is not removed')
})

test('what another process holds is not evicted while it lives', async () => {
  await using bench = await workbench({ budgetMb: 8 })
  const layout = (name: string) => join(bench.layouts, name)
  const held = await writeLayout(layout('held'), { layers: [[{ path: 'noise', content: noise(3) }]] })
  for (const name of ['a', 'b', 'c'])
    await writeLayout(layout(name), { layers: [[{ path: 'noise', content: noise(3) }]] })
  const isHere = () => existsSync(join(bench.dir, 'store/roots', held.digest.slice(7)))
  await using other = await owner(bench.dir, `oci:${layout('held')}`, '8')
  await other.image()
  for (const name of ['a', 'b']) {
    using image = await bench.get(`oci:${layout(name)}`)
    await image.root()
    assert.ok(isHere())
  }
  await other.end('SIGKILL')
  using image = await bench.get(`oci:${layout('c')}`)
  await image.root()
  assert.not.ok(isHere())
})

test('an image larger than all room is refused with the way out', async () => {
  await using bench = await workbench({ budgetMb: 2 })
  const error = await bench.refusal([{ path: 'noise', content: noise(3) }])
  assert.is(error.reason, 'disk_full')
  assert.match(error.message, /VULCAN_IMAGE_CACHE_MB/)
})

// Without root there is no small disk to be had.
const testAsRoot = process.getuid?.() === 0 ? test : test.skip

testAsRoot('a full disk is told, leaves nothing, and makes room for the next', async () => {
  await using bench = await workbench()
  const small = join(bench.dir, 'small')
  mkdirSync(small)
  execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=12m', 'tmpfs', small])
  try {
    for (const [name, megabytes] of [
      ['a', 2],
      ['b', 5],
      ['c', 8],
      ['d', 13],
    ] as const)
      await writeLayout(join(bench.layouts, name), {
        layers: [[{ path: 'noise', content: noise(megabytes) }]],
      })
    const options = { ...storeOptions(bench.dir), dir: join(small, 'store') }
    await using store = await openImageStore(options)
    const get = async (name: string) => {
      using image = await store.get(
        { kind: 'reference', reference: `oci:${bench.layouts}/${name}` },
        AbortSignal.timeout(60_000),
      )
      return statSync(join(await image.root(), 'noise')).size
    }
    assert.is(await get('a'), 2 * 2 ** 20)
    // With the first here there is no room for the second; without it there is.
    const error = await errorOf(get('b'))
    assert.is(error.reason, 'disk_full', error.message)
    assert.match(error.message, `${bench.layouts}/b`)
    assert.is(await get('b'), 5 * 2 ** 20)
    assert.is((await errorOf(get('c'))).reason, 'disk_full')
    await using registry = await startRegistry()
    const { reference } = await registry.push(join(bench.layouts, 'd'), 'app:v1')
    const fromRegistry = store.get({ kind: 'reference', reference }, AbortSignal.timeout(60_000))
    assert.is((await errorOf(fromRegistry)).reason, 'disk_full')
    await until(() => list(small, 'store/tmp').length === 0, 'something is left')
  } finally {
    execFileSync('umount', [small])
  }
})

/** Processes with this among their arguments. */
const processesOf = (text: string) =>
  readdirSync('/proc').filter((pid) => {
    try {
      return /^\d+$/.test(pid) && readFileSync(`/proc/${pid}/cmdline`, 'utf8').includes(text)
    } catch {
      return false
    }
  })

test('a process killed in the middle of an unpacking leaves only what the next start removes', async () => {
  await using bench = await workbench()
  const layout = join(bench.layouts, 'big')
  await writeLayout(layout, { layers: [many(30_000), [file('last')]] })
  for (let round = 0; round < 3; round++) {
    await using killed = await owner(bench.dir, `oci:${layout}`)
    const mine = () => list(bench.dir, 'store/tmp').filter((name) => name.startsWith(`${killed.pid}-`))
    const isUnpacking = () =>
      mine().some((name) => existsSync(join(bench.dir, 'store/tmp', name, 'root/dir7/f7')))
    await until(isUnpacking, 'it does not unpack')
    await sleep(round * 150)
    await killed.end('SIGKILL')
    assert.ok(mine().length > 0)
    assert.equal(list(bench.dir, 'store/roots'), [])
    // While another process lives on the store, what is its own stays.
    await using other = await openImageStore(storeOptions(bench.dir))
    assert.equal(list(bench.dir, 'store/tmp'), [])
    assert.equal(list(bench.dir, 'store/holds'), [])
    await until(() => processesOf(join(bench.dir, 'store/tmp')).length === 0, 'a process is left')
    assert.ok(other)
  }
  using image = await bench.get(`oci:${layout}`)
  const root = await image.root()
  assert.is(readFileSync(join(root, 'last'), 'utf8'), 'last')
  assert.is(Number(execFileSync('sh', ['-c', 'find . -type f | wc -l'], { cwd: root })), 30_001)
})

test('a process killed in the middle of a fetch leaves no skopeo and nothing that stays', async () => {
  await using bench = await workbench()
  const image = buildImage({ layers: [{ entries: [file('a', 'x'.repeat(1_000_000))], compression: 'none' }] })
  // The layer begins and never goes on.
  await using server = await stallingRegistry(image)
  await using killed = await owner(bench.dir, server.reference)
  await until(() => server.stalled(), 'the layer is not asked for')
  const store = join(bench.dir, 'store')
  assert.ok(processesOf(join(store, 'tmp')).length > 0)
  await killed.end('SIGKILL')
  await until(() => processesOf(join(store, 'tmp')).length === 0, 'skopeo is left')
  await using other = await openImageStore(storeOptions(bench.dir))
  for (const folder of ['tmp', 'holds', 'layouts', 'blobs/sha256']) assert.equal(list(store, folder), [])
  // The lock of the dead is taken over.
  await using second = await owner(bench.dir, server.reference)
  server.goOn()
  assert.is((await second.image()).digest, image.digest)
  assert.ok(other)
})

test('a start leaves alone what belongs to a live process', async () => {
  await using bench = await workbench()
  const layout = join(bench.layouts, 'big')
  await writeLayout(layout, { layers: [many(30_000)] })
  await using working = await owner(bench.dir, `oci:${layout}`)
  await until(
    () => list(bench.dir, 'store/tmp').some((name) => existsSync(join(bench.dir, 'store/tmp', name, 'root'))),
    'it does not unpack',
  )
  await using other = await openImageStore(storeOptions(bench.dir))
  const { root } = await working.image()
  assert.is(Number(execFileSync('sh', ['-c', 'find . -type f | wc -l'], { cwd: root })), 30_000)
  assert.ok(other)
})

test('bytes that the disk has changed are found out and fetched again', async () => {
  await using bench = await workbench()
  const layout = join(bench.layouts, 'a')
  const made = await writeLayout(layout, { layers: [[file('a', 'whole')]] })
  const blob = join(bench.dir, 'store/blobs/sha256', made.layers[0]!.digest.slice(7))
  using image = await bench.get(`oci:${layout}`)
  const bytes = readFileSync(blob)
  bytes[bytes.length - 9]! ^= 0xff
  rmSync(blob)
  writeFileSync(blob, bytes)
  const error = await errorOf(image.root())
  assert.is(error.reason, 'backend_unavailable', error.message)
  assert.match(error.message, /fetched again/)
  image[Symbol.dispose]()
  using again = await bench.get(`oci:${layout}`)
  assert.is(readFileSync(join(await again.root(), 'a'), 'utf8'), 'whole')
  again[Symbol.dispose]()

  // One that is too short, as after a loss of power, goes with the next start.
  await bench.store[Symbol.asyncDispose]()
  writeFileSync(blob, bytes.subarray(0, 10))
  await using later = await openImageStore(storeOptions(bench.dir))
  assert.equal([list(bench.dir, 'store/blobs/sha256'), list(bench.dir, 'store/layouts')], [[], []])
  assert.equal(list(bench.dir, 'store/known'), [])
  assert.ok(later)
})

test('nobody but its owner may look into the store', async () => {
  await using bench = await workbench()
  assert.is(statSync(join(bench.dir, 'store')).mode & 0o777, 0o700)
})

test.run()
