/** Images from a real registry, from directories and from archives; and what is said where there is none. */
import { execFile } from 'node:child_process'
import {
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { gzipSync, zstdCompressSync } from 'node:zlib'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { isLoopback, parseReference } from '../../../runners/container/images/references.ts'
import { openImageStore } from '../../../runners/container/images/store.ts'
import {
  type BuiltImage,
  buildImage,
  digestOf,
  dockerSave,
  indexOf,
  layoutFiles,
  reader,
  startRegistry,
  tar,
  writeFiles,
  writeLayout,
} from '../../registry.ts'
import { archiveSource, errorOf, file, storeOptions, workbench } from './images-support.ts'

const execute = promisify(execFile)
const read = async (image: { root(): Promise<string> }, path: string) =>
  readFileSync(join(await image.root(), path), 'utf8')
const host = { os: 'linux', architecture: process.arch === 'x64' ? 'amd64' : process.arch }
const other = { os: 'linux', architecture: host.architecture === 's390x' ? 'amd64' : 's390x' }

test('references are read as everywhere in the field', () => {
  const hex = 'a'.repeat(64)
  const of = (reference: string) => {
    const parsed = parseReference(reference)
    return parsed.kind === 'registry'
      ? [parsed.host, parsed.name, parsed.tag ?? parsed.digest]
      : [parsed.path, parsed.tag]
  }
  assert.equal(of('busybox'), ['docker.io', 'docker.io/library/busybox', 'latest'])
  assert.equal(of('user/name:1.0'), ['docker.io', 'docker.io/user/name', '1.0'])
  assert.equal(of('localhost/name'), ['localhost', 'localhost/name', 'latest'])
  assert.equal(of('host:5000/a/b-c__d:T_1'), ['host:5000', 'host:5000/a/b-c__d', 'T_1'])
  assert.equal(of('[::1]:5000/a'), ['[::1]:5000', '[::1]:5000/a', 'latest'])
  assert.equal(of(`ghcr.io/a/b:tag@sha256:${hex}`), ['ghcr.io', 'ghcr.io/a/b', `sha256:${hex}`])
  assert.equal(of('oci:/srv/images/a'), ['/srv/images/a', undefined])
  assert.equal(of('oci:/srv/images/a:v1'), ['/srv/images/a', 'v1'])
  const wrong = [
    '',
    'Upper',
    'host.io/Upper',
    'a b',
    '-rf',
    '--all',
    'a:',
    'a:b:c',
    'a@sha256:12',
    'a@md5:0',
    'host.io/',
    '/a',
    'a//b',
  ]
  wrong.push(
    'oci:relative',
    'oci:/a:b:c',
    'oci:',
    'docker://a',
    'a\nb',
    'ho_st.io/a',
    `a/${'b'.repeat(300)}`,
    `a:${'t'.repeat(129)}`,
  )
  for (const reference of wrong)
    assert.throws(() => parseReference(reference), /is not an image reference/, reference)
  assert.equal(
    ['localhost', 'localhost:5000', '127.0.0.1:80', '127.9.9.9', '[::1]:5'].filter(isLoopback).length,
    5,
  )
  assert.equal(
    ['localhost.evil.io', '128.0.0.1', '127.0.0.1.nip.io', 'host:127', '[::2]'].filter(isLoopback),
    [],
  )
})

test('an image is fetched by tag and by digest, with what it says of itself', async () => {
  await using bench = await workbench()
  await using registry = await startRegistry()
  const config = {
    Entrypoint: ['/bin/tool'],
    Cmd: ['-v'],
    Env: ['A=1', 'B=x=y', 'EMPTY=', '__proto__=odd'],
    WorkingDir: '/srv/app',
    User: '1000:staff',
  }
  await writeLayout(join(bench.dir, 'made'), { layers: [[file('etc/name', 'one')]], config })
  const { reference, digest } = await registry.push(join(bench.dir, 'made'), 'team/app:v1')
  using image = await bench.get(reference)
  assert.is(image.digest, digest)
  assert.equal(image.config.entrypoint, ['/bin/tool'])
  assert.equal(
    [image.config.cmd, image.config.workingDir, image.config.user],
    [['-v'], '/srv/app', '1000:staff'],
  )
  assert.equal(Object.entries(image.config.env), [
    ['A', '1'],
    ['B', 'x=y'],
    ['EMPTY', ''],
    ['__proto__', 'odd'],
  ])
  assert.is(await read(image, 'etc/name'), 'one')

  const asked = await registry.requests(/manifests/)
  const pinned = `${registry.host}/team/app@${digest}`
  using first = await bench.get(pinned)
  assert.is(first.digest, digest)
  assert.ok((await registry.requests(/manifests/)) > asked)
  // From here on nobody needs the registry: digests are not asked again, not even by another process.
  await registry.stop()
  using again = await bench.get(pinned)
  assert.is(await read(again, 'etc/name'), 'one')
  await using second = await openImageStore(storeOptions(bench.dir))
  using later = await second.get({ kind: 'reference', reference: pinned }, AbortSignal.timeout(60_000))
  assert.is(await later.root(), await image.root())
})

test('a tag is asked again after a while, a moved one leads to its new image, and only new layers are fetched', async () => {
  await using bench = await workbench({ tagMs: 1_500 })
  await using registry = await startRegistry()
  const shared = [file('base', 'x'.repeat(10_000))]
  await writeLayout(join(bench.dir, 'one'), { layers: [shared, [file('v', '1')]] })
  const two = await writeLayout(join(bench.dir, 'two'), { layers: [shared, [file('v', '2')]] })
  const { reference } = await registry.push(join(bench.dir, 'one'), 'app:live')
  using before = await bench.get(reference)
  assert.is(await read(before, 'v'), '1')
  const asked = await registry.requests(/"(GET|HEAD) [^"]*manifests/)
  for (let i = 0; i < 5; i++) (await bench.get(reference))[Symbol.dispose]()
  assert.is(await registry.requests(/"(GET|HEAD) [^"]*manifests/), asked)

  await registry.push(join(bench.dir, 'two'), 'app:live')
  await new Promise((resolve) => setTimeout(resolve, 1_600))
  const blobs = await registry.requests(/"GET [^"]*\/blobs\//)
  using after = await bench.get(reference)
  assert.is(after.digest, two.digest)
  assert.is(await read(after, 'v'), '2')
  assert.is(await read(before, 'v'), '1')
  // Config and one layer.
  assert.is((await registry.requests(/"GET [^"]*\/blobs\//)) - blobs, 2)
})

test('an image in Docker’s format keeps its digest and config', async () => {
  await using bench = await workbench()
  await using registry = await startRegistry()
  const image = buildImage({
    layers: [[file('a')], { entries: [file('b')], compression: 'none' }],
    docker: true,
    config: { Cmd: ['x'] },
  })
  await writeFiles(join(bench.dir, 'made'), layoutFiles([{ image }]))
  await registry.push(join(bench.dir, 'made'), 'app:docker')
  using got = await bench.get(`${registry.host}/app@${image.digest}`)
  assert.is(got.digest, image.digest)
  assert.equal(got.config.cmd, ['x'])
  assert.is(await read(got, 'b'), 'b')
  // What engines with stores of their own are given is a layout that other tools read.
  const { stdout } = await execute('skopeo', ['inspect', '--raw', `oci:${got.layout}`])
  assert.is(digestOf(Buffer.from(stdout)), image.digest)
  await execute('skopeo', [
    'copy',
    '-q',
    '--insecure-policy',
    `oci:${got.layout}`,
    `docker-archive:${join(bench.dir, 'out.tar')}`,
  ])
})

test('of a list the image for this host is taken, by tag and by the list’s own digest', async () => {
  await using bench = await workbench()
  await using registry = await startRegistry()
  const mine = buildImage({ layers: [[file('for', 'this host')]] })
  const theirs = buildImage({ layers: [[file('for', 'another')]], architecture: other.architecture })
  for (const [tag, image] of [
    ['mine', mine],
    ['theirs', theirs],
  ] as const) {
    await writeFiles(join(bench.dir, tag), layoutFiles([{ image }]))
    await registry.push(join(bench.dir, tag), `app:${tag}`)
  }
  const type = 'application/vnd.oci.image.index.v1+json'
  const list = indexOf([
    { image: theirs, platform: other },
    { image: mine, platform: host },
  ])
  const digest = await registry.put('app', 'both', list, type)
  for (const reference of [`${registry.host}/app:both`, `${registry.host}/app@${digest}`]) {
    using image = await bench.get(reference)
    assert.is(image.digest, mine.digest)
    assert.is(await read(image, 'for'), 'this host')
  }
  await registry.put('app', 'foreign', indexOf([{ image: theirs, platform: other }]), type)
  const absent = await errorOf(bench.get(`${registry.host}/app:foreign`))
  assert.is(absent.reason, 'image_not_found')
  assert.match(
    absent.message,
    new RegExp(`not there for linux/${host.architecture}.*linux/${other.architecture}`),
  )
  const wrong = await errorOf(bench.get(`${registry.host}/app:theirs`))
  assert.is(wrong.reason, 'invalid_workload')
  assert.match(wrong.message, new RegExp(`is for linux/${other.architecture}`))
})

test('what is not there, and a registry that is not there, are told apart', async () => {
  await using bench = await workbench()
  await using registry = await startRegistry()
  await writeLayout(join(bench.dir, 'made'), { layers: [[file('a')]] })
  const { reference } = await registry.push(join(bench.dir, 'made'), 'app:v1')
  const none = `sha256:${'0'.repeat(64)}`
  for (const name of ['app:v2', 'other:v1', `app@${none}`]) {
    const error = await errorOf(bench.get(`${registry.host}/${name}`))
    assert.is(error.reason, 'image_not_found', error.message)
    assert.match(error.message, `${registry.host}/${name}`)
  }
  await registry.stop()
  const error = await errorOf(bench.get(reference))
  assert.is(error.reason, 'backend_unavailable', error.message)
  assert.match(error.message, reference)
})

test('credentials come from the file of the runner or from the source, and never stand on a command line', async () => {
  await using registry = await startRegistry({ credentials: true })
  const dir = mkdtempSync(join(tmpdir(), 'vulcan-test-auth-'))
  try {
    const authFile = join(dir, 'config.json')
    const auth = Buffer.from(`${reader.username}:${reader.password}`).toString('base64')
    writeFileSync(authFile, JSON.stringify({ auths: { [registry.host]: { auth } } }))
    // Stands in for skopeo, and tells what it was given.
    const spy = join(dir, 'spy')
    const log = join(dir, 'log')
    writeFileSync(spy, `#!/bin/sh\n{ echo "$@"; env; ls -l "$HOME"; } >> ${log}\nexec skopeo "$@"\n`, {
      mode: 0o755,
    })
    await writeLayout(join(dir, 'made'), { layers: [[file('a', 'secret')]] })
    const { reference, digest } = await registry.push(join(dir, 'made'), 'private/app:v1')

    await using open = await workbench({ skopeo: spy })
    const refused = await errorOf(open.get(reference))
    assert.is(refused.reason, 'image_not_found')
    assert.match(refused.message, /may not be read.*credentials.*VULCAN_REGISTRY_AUTH_FILE/)
    const wrong = { username: reader.username, password: 'guess' }
    const source = { kind: 'reference' as const, reference }
    assert.is((await errorOf(open.get({ ...source, auth: wrong }))).reason, 'image_not_found')
    using byAuth = await open.get({ ...source, auth: reader })
    assert.is(await read(byAuth, 'a'), 'secret')
    // Who brings none is not shown what they have fetched, by tag or digest, though it is here.
    assert.is((await errorOf(open.get(reference))).reason, 'image_not_found')
    assert.is((await errorOf(open.get(`${registry.host}/private/app@${digest}`))).reason, 'image_not_found')

    const told = readFileSync(log, 'utf8')
    assert.match(told, /-rw------- .* auth\.json/)
    for (const secret of [reader.password, auth, 'guess']) assert.not.ok(told.includes(secret))
    assert.equal(readdirSync(join(open.dir, 'store/tmp')), [])

    await using configured = await workbench({ authFile })
    using byFile = await configured.get(reference)
    assert.is(await read(byFile, 'a'), 'secret')
  } finally {
    rmSync(dir, { recursive: true, force: true })
  }
})

/** Of a manifest that is to be spoiled. */
interface Fields {
  config: Record<string, unknown>
  layers: Record<string, unknown>[]
}

/** A registry that serves what it is told, whatever that is. */
async function forger(
  image: BuiltImage,
  blob: (hex: string, bytes: Buffer) => Buffer | 'endless',
  manifest = image.manifest,
) {
  const server = createServer((request, response) => {
    const [, kind, name = ''] = /\/(manifests|blobs)\/(.*)$/.exec(request.url ?? '') ?? []
    if (kind === undefined) return void response.end('{}')
    if (kind === 'manifests') return void response.setHeader('content-type', image.mediaType).end(manifest)
    const bytes = image.blobs.get(name.replace('sha256:', ''))
    if (!bytes) return void response.writeHead(404).end()
    const forged = blob(name.replace('sha256:', ''), bytes)
    if (forged !== 'endless') return void response.end(forged)
    const piece = Buffer.alloc(1024 * 1024)
    const more = () => {
      while (!response.destroyed && response.write(piece));
    }
    response.on('drain', more)
    more()
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  return {
    reference: `127.0.0.1:${port}/app:v1`,
    pinned: `127.0.0.1:${port}/app@${image.digest}`,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

test('bytes that are not those of their digest are refused, and a layer without end fills no disk', async () => {
  await using bench = await workbench()
  const image = buildImage({ layers: [[file('a', 'real')]] })
  const layer = image.layers[0]!.digest.slice(7)
  {
    await using honest = await forger(image, (_, bytes) => bytes)
    await using apart = await workbench()
    using got = await apart.get(honest.pinned)
    assert.is(await read(got, 'a'), 'real')
  }
  {
    await using lying = await forger(image, (name, bytes) =>
      name === layer ? Buffer.from(bytes).fill(1, 20, 21) : bytes,
    )
    const error = await errorOf(bench.get(lying.reference))
    assert.is(error.reason, 'invalid_workload', error.message)
    assert.match(error.message, /other bytes|not those of its digest/)
  }
  {
    const another = Buffer.from(`${image.manifest.toString()} `)
    await using lying = await forger(image, (_, bytes) => bytes, another)
    const error = await errorOf(bench.get(lying.pinned))
    assert.is(error.reason, 'invalid_workload', error.message)
  }
  {
    await using endless = await forger(image, (name, bytes) => (name === layer ? 'endless' : bytes))
    const error = await errorOf(bench.get(endless.reference))
    assert.is(error.reason, 'invalid_workload', error.message)
  }
  assert.equal(readdirSync(join(bench.dir, 'store/blobs/sha256')), [])
  assert.equal(readdirSync(join(bench.dir, 'store/tmp')), [])
})

test('an aborted fetch ends at once and leaves nothing', async () => {
  await using bench = await workbench()
  const image = buildImage({
    layers: [{ entries: [file('a', 'x'.repeat(50_000_000))], compression: 'none' }],
  })
  const layer = image.layers[0]!.digest.slice(7)
  // The layer begins and never goes on.
  const server = createServer((request, response) => {
    if (request.url?.includes('/manifests/'))
      return void response.setHeader('content-type', image.mediaType).end(image.manifest)
    const name = /sha256:(.*)$/.exec(request.url ?? '')?.[1]
    if (name === undefined) return void response.end('{}')
    if (name === layer)
      return void response.writeHead(200, { 'content-length': 50_000_000 }).write('x'.repeat(1_000))
    response.end(image.blobs.get(name))
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  const stop = new AbortController()
  setTimeout(() => stop.abort(new Error('killed by its user')), 1_000)
  const error = await errorOf(bench.get(`127.0.0.1:${port}/app:v1`, stop.signal))
  server.closeAllConnections()
  server.close()
  assert.is(error.message, 'killed by its user')
  for (let i = 0; i < 100 && readdirSync(join(bench.dir, 'store/tmp')).length > 0; i++)
    await new Promise((resolve) => setTimeout(resolve, 50))
  assert.equal(readdirSync(join(bench.dir, 'store/tmp')), [])
})

test('a layout directory is read only where it is listed, by tag where it has several', async () => {
  await using bench = await workbench()
  const [v1, v2] = ['1', '2'].map((v) => buildImage({ layers: [[file('v', v)]] })) as [BuiltImage, BuiltImage]
  const both = join(bench.layouts, 'team/both')
  await writeFiles(
    both,
    layoutFiles([
      { image: v1, tag: 'v1' },
      { image: v2, tag: 'v2' },
    ]),
  )
  using second = await bench.get(`oci:${both}:v2`)
  assert.is(await read(second, 'v'), '2')
  assert.match((await errorOf(bench.get(`oci:${both}:v3`))).message, /has no tag v3: it has v1, v2/)
  assert.match((await errorOf(bench.get(`oci:${both}`))).message, /say which/)

  const elsewhere = join(bench.dir, 'elsewhere')
  await writeFiles(elsewhere, layoutFiles([{ image: v1 }]))
  symlinkSync(elsewhere, join(bench.layouts, 'way-out'))
  const outside = [
    elsewhere,
    join(bench.layouts, 'way-out'),
    `${bench.layouts}/../elsewhere`,
    '/etc',
    join(bench.dir, 'nowhere'),
  ]
  for (const path of outside) {
    const error = await errorOf(bench.get(`oci:${path}`))
    assert.is(error.reason, 'image_not_found')
    assert.is(
      error.message,
      `oci:${path} is no image that may be run here: put it below a directory that VULCAN_IMAGE_DIRECTORIES lists`,
    )
  }
  const blob = v1.layers[0]!.digest.slice(7)
  for (const [name, spoil] of [
    ['missing', (path: string) => rmSync(path)],
    [
      'link',
      (path: string) => {
        rmSync(path)
        symlinkSync('/etc/passwd', path)
      },
    ],
    ['other', (path: string) => writeFileSync(path, Buffer.alloc(v1.layers[0]!.size))],
    ['longer', (path: string) => writeFileSync(path, Buffer.alloc(10_000_000))],
  ] as const) {
    const place = join(bench.layouts, name)
    await writeFiles(place, layoutFiles([{ image: v1 }]))
    spoil(join(place, 'blobs/sha256', blob))
    const error = await errorOf(bench.get(`oci:${place}`))
    assert.ok(['image_not_found', 'invalid_workload'].includes(error.reason), error.message)
  }
  mkdirSync(join(bench.layouts, 'empty'))
  assert.match((await errorOf(bench.get(`oci:${bench.layouts}/empty`))).message, /no index\.json/)
  await writeFiles(join(bench.layouts, 'whole'), layoutFiles([{ image: v1 }]))
  using whole = await bench.get(`oci:${bench.layouts}/whole`)
  assert.is(await read(whole, 'v'), '1')
})

test('an archive is an image: OCI or docker save, plain, gzip or zstd, by the digest of its bytes', async () => {
  await using bench = await workbench()
  const oci = (image: BuiltImage, prefix = '') =>
    tar([...layoutFiles([{ image }])].map(([path, content]) => ({ path: `${prefix}${path}`, content })))
  let count = 0
  const fresh = () =>
    buildImage({
      layers: [[file('n', String(count))], { entries: [file('m', `m${count++}`)], compression: 'none' }],
    })
  const forms: [string, (image: BuiltImage) => Buffer][] = [
    ['OCI', (image) => oci(image)],
    ['OCI with ./', (image) => oci(image, './')],
    ['OCI gzip', (image) => gzipSync(oci(image))],
    ['OCI zstd', (image) => zstdCompressSync(oci(image))],
    ['docker save', dockerSave],
    ['docker save gzip', (image) => gzipSync(dockerSave(image))],
  ]
  for (const [name, pack] of forms) {
    const image = fresh()
    using got = await bench.get(archiveSource(pack(image)))
    assert.is(await read(got, 'n'), String(count - 1), name)
    assert.is(await read(got, 'm'), `m${count - 1}`, name)
    if (name.startsWith('OCI')) assert.is(got.digest, image.digest)
  }
  // Those that skopeo writes, which everybody’s tools write alike.
  await writeLayout(join(bench.dir, 'made'), { layers: [[file('by', 'skopeo')]] })
  for (const transport of ['oci-archive', 'docker-archive']) {
    const path = join(bench.dir, transport)
    await execute('skopeo', [
      'copy',
      '-q',
      '--insecure-policy',
      `oci:${join(bench.dir, 'made')}`,
      `${transport}:${path}`,
    ])
    using got = await bench.get(archiveSource(readFileSync(path)))
    assert.is(await read(got, 'by'), 'skopeo', transport)
  }
})

test('an archive that is here is not opened again', async () => {
  await using bench = await workbench()
  const source = archiveSource(dockerSave(buildImage({ layers: [[file('a')]] })))
  if (source.kind !== 'archive') throw new Error('unreachable')
  let opened = 0
  const counted = {
    ...source,
    open: () => {
      opened++
      return source.open()
    },
  }
  const images = await Promise.all([1, 2, 3].map(() => bench.get(counted)))
  images.push(await bench.get(counted))
  assert.is(opened, 1)
  assert.is(new Set(images.map(({ digest }) => digest)).size, 1)
  for (const image of images) image[Symbol.dispose]()
})

test('hostile and broken archives are refused, and leave nothing', async () => {
  await using bench = await workbench({ maxBytes: 4 * 2 ** 20 })
  const image = buildImage({ layers: [[file('a')]] })
  const files = layoutFiles([{ image }])
  const entries = [...files].map(([path, content]) => ({ path, content }))
  const refused = async (bytes: Buffer, said: RegExp) => {
    const error = await errorOf(bench.get(archiveSource(bytes)))
    assert.is(error.reason, 'invalid_workload', error.message)
    assert.match(error.message, said)
    assert.equal(readdirSync(join(bench.dir, 'store/tmp')), [])
  }
  await refused(tar([file('hello')]), /neither index\.json nor manifest\.json/)
  await refused(Buffer.from('not an archive'.repeat(100)), /not a tar archive/)
  await refused(
    tar(entries.filter(({ path }) => !path.includes(image.layers[0]!.digest.slice(7)))),
    /has no sha256/,
  )
  await refused(
    gzipSync(tar([...entries, { path: 'big', content: Buffer.alloc(5 * 2 ** 20) }])),
    /larger than 4 MiB/,
  )
  await refused(
    tar([file('manifest.json', '[{"Config":"../../etc/passwd","Layers":[]}]')]),
    /has no \.\.\/\.\.\/etc\/passwd/,
  )
  const links = [
    file('manifest.json', '[{"Config":"c","Layers":[]}]'),
    { path: 'c', type: 'symlink' as const, target: '/etc/passwd' },
  ]
  await refused(tar(links), /has no c/)
  const forged = entries.map((one) =>
    one.path.endsWith(image.layers[0]!.digest.slice(7)) ? { ...one, content: Buffer.from('x') } : one,
  )
  await refused(tar(forged), /has no sha256/)
  // Another file came than the one that was named.
  const { digest } = archiveSource(tar(entries)) as { digest: `sha256:${string}` }
  const swapped = { ...archiveSource(tar(links)), digest }
  assert.match((await errorOf(bench.get(swapped))).message, /came as other bytes/)
  // Names that climb out do no harm: they are only compared.
  const climbing = tar([file('../../../../tmp/vulcan-test-escaped'), ...entries])
  using got = await bench.get(archiveSource(climbing))
  assert.is(got.digest, image.digest)
  assert.not.ok(readdirSync('/tmp').includes('vulcan-test-escaped'))
})

test('an archive of too many files is refused', async () => {
  await using bench = await workbench()
  const many = Array.from({ length: 10_001 }, (_, i) => file(`${i}`, ''))
  const error = await errorOf(bench.get(archiveSource(tar(many))))
  assert.match(error.message, /more than 10000 entries/)
})

test('what is no container image is told so', async () => {
  await using bench = await workbench()
  const image = buildImage({ layers: [[file('a')]] })
  const change = (edit: (manifest: Fields) => void) => {
    const manifest = JSON.parse(image.manifest.toString())
    edit(manifest)
    const bytes = Buffer.from(JSON.stringify(manifest))
    return { ...image, manifest: bytes, digest: digestOf(bytes) }
  }
  const withConfig = (fields: object) => change((manifest) => Object.assign(manifest.config, fields))
  const withLayer = (fields: object) => change((manifest) => Object.assign(manifest.layers[0]!, fields))
  const cases: [RegExp, BuiltImage][] = [
    [/not a container image/, withConfig({ mediaType: 'application/vnd.cncf.helm.config.v1+json' })],
    [/layer of type/, withLayer({ mediaType: 'application/vnd.oci.image.layer.v1.tar+gzip+encrypted' })],
    [/broken manifest/, withLayer({ digest: 'sha256:../../etc' })],
    [/broken manifest/, withLayer({ size: -1 })],
    [/diff_ids/, change(({ layers }) => layers.push(layers[0]!))],
    [/bytes of layers/, withLayer({ size: 20 * 2 ** 30 })],
  ]
  await using roomy = await openImageStore(storeOptions(bench.dir, { budgetMb: 100 * 1_024 }))
  for (const [index, [said, broken]] of cases.entries()) {
    const place = join(bench.layouts, String(index))
    await writeFiles(place, layoutFiles([{ image: broken }]))
    const error = await errorOf(
      roomy.get({ kind: 'reference', reference: `oci:${place}` }, AbortSignal.timeout(60_000)),
    )
    assert.is(error.reason, 'invalid_workload', error.message)
    assert.match(error.message, said)
  }
})

test('without skopeo the error says what to install', async () => {
  const dir = mkdtempSync(join(tmpdir(), 'vulcan-test-images-'))
  try {
    const error = (await errorOf(
      openImageStore(storeOptions(dir, { skopeo: '/nowhere/skopeo' })),
    )) as Error & { fix?: string }
    assert.match(error.fix ?? '', /apt-get install skopeo/)
  } finally {
    rmSync(dir, { recursive: true, force: true })
  }
})

test.run()
