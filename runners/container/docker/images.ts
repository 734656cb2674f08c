/**
 * Images in the engine’s own store: loaded once per digest from the layout that holds them, tagged by their digest,
 * and removed when they were not used for a while.
 */
import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { createReadStream } from 'node:fs'
import { mkdir, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { Readable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Digest } from '../../../shared/workload.ts'
import { BoxError, type Image, ImageError } from '../engine.ts'
import { type Phases, unmeasured } from '../phases.ts'
import { type Api, ApiError } from './api.ts'

export const repository = 'vulcan.local/image'
/** Converting and loading a large image, ms. */
const loadMs = 300_000
/** What was looked for so many ms ago may have been removed since; the engine is asked again, and told of the use. */
const knownMs = 10 * 60_000
/** Unused for so long (ms), an image is removed; it is loaded again from the layout when it is wanted. */
export const keepMs = 24 * 3_600_000
/** Of those that are kept: the ones used last. */
const keepImages = 64
/** Loaded at once, for disk and cores. */
const loadsAtOnce = 2

/** OCI image specification, descriptor.md. */
interface Descriptor {
  mediaType: string
  digest: string
  size: number
}
interface Manifest {
  mediaType?: string
  config: Descriptor
  layers: Descriptor[]
}

const hexOf = (digest: string) => {
  if (!/^sha256:[0-9a-f]{64}$/.test(digest))
    throw new ImageError('invalid_workload', `${digest} is no sha256 digest`)
  return digest.slice('sha256:'.length)
}

export class Images {
  readonly #api: Api
  /** For what lies there for a moment. */
  readonly #directory: string
  readonly #known = new Map<Digest, { ref: Promise<string>; at: number }>()
  #loading = 0

  constructor(api: Api, directory: string) {
    this.#api = api
    this.#directory = directory
  }

  /** The name by which the engine knows it. Throws `ImageError` or `BoxError`. */
  ensure(image: Pick<Image, 'digest' | 'layout'>, phases = unmeasured): Promise<string> {
    const { digest } = image
    const known = this.#known.get(digest)
    if (known !== undefined && performance.now() - known.at < knownMs) return known.ref
    const ref = this.#ensure(image, phases)
    this.#known.set(digest, { ref, at: performance.now() })
    ref.catch(() => this.#known.delete(digest))
    return ref
  }

  /** It turned out not to be there. */
  forget(digest: Digest): void {
    this.#known.delete(digest)
  }

  /** Removes what nobody has used for `ms`, and the longest unused beyond a number; never what a container uses. */
  async evict(ms = keepMs): Promise<void> {
    const images = await this.#api.call('list images', (abortSignal) =>
      this.#api.docker.listImages({ filters: { reference: [repository] }, abortSignal }),
    )
    const refs = images
      .flatMap(({ RepoTags }) => RepoTags ?? [])
      .filter((ref) => ref.startsWith(`${repository}:`))
    const used = await Promise.all(refs.map(async (ref) => ({ ref, at: await this.#usedAt(ref) })))
    const before = Date.now() - ms
    for (const [index, { ref, at }] of used.sort((a, b) => b.at - a.at).entries()) {
      if (at === 0 || (at >= before && index < keepImages)) continue
      // Without force: one that a container uses stays.
      await this.#api
        .call('remove an image', (abortSignal) => this.#api.docker.getImage(ref).remove({ abortSignal }))
        .catch(() => {})
    }
  }

  /** Milliseconds since the epoch; 0: not known. Tagging is what counts as use. */
  async #usedAt(ref: string): Promise<number> {
    const found = await this.#inspect(ref).catch(() => undefined)
    const at = Date.parse(
      (found as { Metadata?: { LastTagTime?: string } } | undefined)?.Metadata?.LastTagTime ?? '',
    )
    return at > 0 ? at : 0
  }

  /** Undefined: there is none of this name. */
  async #inspect(ref: string) {
    try {
      return await this.#api.call('look for an image', (abortSignal) =>
        this.#api.docker.getImage(ref).inspect({ ...{ abortSignal } } as object),
      )
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) return undefined
      throw error
    }
  }

  async #ensure({ digest, layout }: Pick<Image, 'digest' | 'layout'>, phases: Phases): Promise<string> {
    const tag = hexOf(digest)
    const ref = `${repository}:${tag}`
    if (await this.#touch(ref, tag)) return ref
    while (this.#loading >= loadsAtOnce) await sleep(20)
    this.#loading++
    try {
      await phases.measure('unpack image', () => this.#load(digest, layout, ref))
    } finally {
      this.#loading--
    }
    return ref
  }

  /** Tags it again, so that its last use is known to all who share the engine. False: it is not there. */
  async #touch(ref: string, tag: string): Promise<boolean> {
    try {
      await this.#api.call('tag an image', (abortSignal) =>
        this.#api.docker.getImage(ref).tag({ repo: repository, tag, ...{ abortSignal } }),
      )
      return true
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) return false
      throw error
    }
  }

  async #load(digest: Digest, layout: string, ref: string): Promise<void> {
    await mkdir(this.#directory, { recursive: true })
    const directory = await mkdtemp(join(this.#directory, 'load-'))
    try {
      await writeBareLayout(layout, digest, join(directory, 'layout'))
      const archive = join(directory, 'image.tar')
      await convert(join(directory, 'layout'), archive, ref, directory)
      await loadArchive(this.#api, archive)
      if ((await this.#inspect(ref)) === undefined)
        throw new BoxError('engine', `image ${digest} was loaded, but the Docker Engine does not know it`)
    } catch (error) {
      if (/no space left on device|ENOSPC/.test(String(error)))
        throw new ImageError('disk_full', `image ${digest}: there is no room for it`, { cause: error })
      throw error
    } finally {
      await rm(directory, { recursive: true, force: true })
    }
  }
}

/**
 * A layout with the same layers and a config that says nothing but what they are. What a box is told comes from its
 * spec; an image’s own volumes would be writable places without a limit, its health check a process of its own.
 */
async function writeBareLayout(layout: string, digest: Digest, target: string): Promise<void> {
  const source = (of: string) => join(layout, 'blobs', 'sha256', hexOf(of))
  const blobs = join(target, 'blobs', 'sha256')
  await mkdir(blobs, { recursive: true })
  const manifest = JSON.parse(await readFile(source(digest), 'utf8')) as Manifest
  const config = JSON.parse(await readFile(source(manifest.config.digest), 'utf8'))
  const put = async (mediaType: string, content: unknown): Promise<Descriptor> => {
    const bytes = Buffer.from(JSON.stringify(content))
    const hex = createHash('sha256').update(bytes).digest('hex')
    await writeFile(join(blobs, hex), bytes)
    return { mediaType, digest: `sha256:${hex}`, size: bytes.length }
  }
  for (const of of new Set(manifest.layers.map((layer) => layer.digest)))
    await symlink(source(of), join(blobs, hexOf(of)))
  const { architecture, os, variant, rootfs } = config
  // The author sets apart two images with the same layers: the engine would take them for one with two names, and
  // then lets go of a name although a container uses it.
  const author = `vulcan ${digest}`
  const bare = await put(manifest.config.mediaType, { author, architecture, os, variant, rootfs, config: {} })
  const descriptor = await put(manifest.mediaType ?? 'application/vnd.oci.image.manifest.v1+json', {
    ...manifest,
    annotations: undefined,
    config: bare,
  })
  await writeFile(join(target, 'oci-layout'), JSON.stringify({ imageLayoutVersion: '1.0.0' }))
  await writeFile(join(target, 'index.json'), JSON.stringify({ schemaVersion: 2, manifests: [descriptor] }))
}

/** Writes an archive that the engine loads, with its layers unpacked from whatever they are compressed with. */
async function convert(layout: string, archive: string, ref: string, directory: string): Promise<void> {
  const args = ['--insecure-policy', 'copy', '--quiet', `oci:${layout}`, `docker-archive:${archive}:${ref}`]
  const child = spawn('skopeo', args, {
    stdio: ['ignore', 'ignore', 'pipe'],
    env: { PATH: '/usr/local/bin:/usr/bin:/bin', HOME: directory, TMPDIR: directory },
    timeout: loadMs,
    killSignal: 'SIGKILL',
  })
  let said = ''
  child.stderr.setEncoding('utf8').on('data', (text) => {
    said = (said + text).slice(-2_000)
  })
  let code: number | null
  try {
    ;[code] = await once(child, 'close')
  } catch (cause) {
    throw new BoxError('engine', 'skopeo could not be started: apt-get install skopeo', { cause })
  }
  if (code !== 0) throw new BoxError('engine', `skopeo could not convert image ${ref}: ${said.trim()}`)
}

async function loadArchive(api: Api, archive: string): Promise<void> {
  await api.call(
    'load an image',
    async (abortSignal) => {
      const answer: unknown = await api.docker.loadImage(createReadStream(archive), {
        quiet: true,
        abortSignal,
      } as never)
      await checkProgress(answer as Readable)
    },
    loadMs,
  )
}

/** The engine answers 200 before it is done; what went wrong is in a line of the answer. */
export async function checkProgress(answer: Readable): Promise<string> {
  let text = ''
  for await (const chunk of answer) text = (text + chunk).slice(-64_000)
  const wrong = /"error":\s*("(?:[^"\\]|\\.)*")/.exec(text)
  if (wrong !== null) throw new Error(JSON.parse(wrong[1]!))
  return text
}
