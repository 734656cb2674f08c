/** Images for the container runner: fetched, verified, kept, unpacked. See `shelf.ts` for what lies where. */
import { existsSync, linkSync, mkdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Digest } from '../../../shared/workload.ts'
import type { RunnerMetrics } from '../../metrics.ts'
import type { RegistryAuth } from '../../runner.ts'
import { type Image, ImageError, type ImageSource, type ImageStore } from '../engine.ts'
import { type Phases, unmeasured } from '../phases.ts'
import { openArchive } from './archive.ts'
import { sha256, sha256OfFile } from './blobs.ts'
import { findManifest, manifestOf, openLayout } from './directory.ts'
import { Flights, Turns } from './flights.ts'
import { inJail, noBubblewrap } from './jail.ts'
import { type Descriptor, type ParsedConfig, parseConfig } from './manifests.ts'
import { findProgram } from './processes.ts'
import { parseReference, type RegistryReference } from './references.ts'
import { hexOf, Shelf } from './shelf.ts'
import { installSkopeo, nameOf, Registries } from './skopeo.ts'

/** Paths are absolute. */
export interface ImageStoreOptions {
  /** Of the store; all runner processes of the host may share it. */
  dir: string
  /** `host` or `host:port` of registries without TLS, or with certificates that nobody vouches for; loopback is always one. */
  insecureRegistries: string[]
  /** `oci:` references may name these and what is below them. */
  imageDirectories: string[]
  /** Docker’s config.json: credentials where a source brings none. */
  authFile?: string | undefined
  /** What all images may take on disk, MiB: what is held counts, and stays. */
  budgetMb: number
  /** Path of skopeo, where it is not among the usual ones. */
  skopeo?: string | undefined
  /** `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` for skopeo, which is given nothing else of the environment. */
  proxy?: Record<string, string> | undefined
  /** The most that one image may be, unpacked: bytes of its layers (16 GiB, and never more than the budget). */
  maxBytes?: number
  /** Entries of its layers together (1,000,000). */
  maxEntries?: number
  metrics?: RunnerMetrics | undefined
  /** How long a tag’s digest is believed before the registry is asked again, ms (5,000). */
  tagMs?: number
}

/** What images need of the host is not there; `fix` brings it. */
export class ImageToolsMissing extends Error {
  override name = 'ImageToolsMissing'
  readonly fix: string
  constructor(program: string, fix: string) {
    super(`images need ${program}, which is not on this host`)
    this.fix = fix
  }
}

/** Throws `ImageToolsMissing`. */
export function requireImageTools(skopeo = 'skopeo'): void {
  for (const [program, fix] of [
    [skopeo, installSkopeo],
    ['bwrap', noBubblewrap],
  ] as const)
    if (findProgram(program) === undefined) throw new ImageToolsMissing(program, fix)
}

/** From the first byte of an image to the last, ms; and for its unpacking. */
const fetchMs = 15 * 60_000
const unpackMs = 10 * 60_000
/** At once, in this process. */
const fetches = 4
const unpacks = 2
/** Of refusals and configs that are remembered; any number that bounds memory. */
const remembered = 1_000
/** Of a config, bytes: nearly all have a few KiB. */
const rememberedBytes = 64 * 1_024

/** Brings blobs that are not here yet into files of their hex digests. They need not be verified. */
type Supply = (missing: Descriptor[], into: Incoming, signal: AbortSignal) => Promise<void>

interface Incoming {
  /** An OCI layout in the making, and its folder of blobs. */
  layout: string
  blobs: string
  /** For anything else. */
  scratch: string
}

/** An image that somebody asked for. */
interface Brought {
  hex: string
  /** That were fetched for it; 0: all of it was here. */
  bytes: number
}

/** Throws `ImageToolsMissing`. */
export async function openImageStore(options: ImageStoreOptions): Promise<ImageStore> {
  requireImageTools(options.skopeo)
  const store = new Store(options)
  await store.shelf.tidy()
  await store.shelf.evict(store.budget)
  return store
}

class Store implements ImageStore {
  readonly shelf: Shelf
  /** Bytes. */
  readonly budget: number
  readonly #options: ImageStoreOptions
  readonly #registries: Registries
  readonly #maxBytes: number
  readonly #closing = new AbortController()
  readonly #looks = new Flights<Brought>()
  readonly #archives = new Flights<Brought>()
  readonly #layouts = new Flights<Brought>()
  readonly #imports = new Flights<number>()
  readonly #roots = new Flights<void>()
  readonly #fetchTurns = new Turns(fetches)
  readonly #unpackTurns = new Turns(unpacks)
  /** Tags lately looked up, and the images they lead to. */
  readonly #tags = new Map<string, { hex: string; until: number }>()
  readonly #configs = new Map<string, ParsedConfig>()
  /** Images that cannot be unpacked, for good. */
  readonly #refused = new Map<string, string>()

  constructor(options: ImageStoreOptions) {
    this.#options = options
    this.#registries = new Registries(options)
    this.budget = options.budgetMb * 2 ** 20
    this.#maxBytes = Math.min(options.maxBytes ?? 16 * 2 ** 30, this.budget)
    this.shelf = new Shelf(options.dir)
    options.metrics?.cache('images', () => this.shelf.bytes)
  }

  async get(source: ImageSource, signal: AbortSignal, phases = unmeasured): Promise<Image> {
    const any = AbortSignal.any([signal, this.#closing.signal])
    if (source.kind === 'archive') {
      const label = `the image archive ${source.digest}`
      return await this.#roomFor(label, () => this.#fromArchive(source, label, any, phases))
    }
    const at = parseReference(source.reference)
    const label = source.reference
    return await this.#roomFor(label, () =>
      at.kind === 'registry'
        ? this.#fromRegistry(at, source.auth, label, any, phases)
        : this.#fromLayout(at, label, any, phases),
    )
  }

  /** Where the disk is full, half of what is here makes room for the next try. */
  async #roomFor<T>(label: string, work: () => Promise<T>): Promise<T> {
    try {
      return await work()
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException
      const isFull = code === 'ENOSPC' || code === 'EDQUOT'
      if (!isFull && !(error instanceof ImageError && error.reason === 'disk_full')) throw error
      await this.shelf.evict((total) => total / 2)
      const { message } = error as Error
      if (!isFull && message.includes(label)) throw error
      throw new ImageError('disk_full', `there is no room on the disk of the runner for ${label}`, {
        cause: error,
      })
    }
  }

  async #fromLayout(
    at: Extract<ReturnType<typeof parseReference>, { kind: 'directory' }>,
    label: string,
    signal: AbortSignal,
    phases: Phases,
  ) {
    const layout = await openLayout(at, this.#options.imageDirectories)
    const known = hexOf(sha256(layout.manifest))
    if (await this.shelf.hold(known)) return this.#hit(known, label)
    const supply: Supply = (missing, { blobs }, stop) => layout.copy(missing, blobs, stop)
    return await this.#bring(this.#layouts, known, label, signal, phases, async (stop) => {
      const made = await this.#keep(layout.manifest, label, supply, stop)
      this.shelf.release(made.hex)
      return made
    })
  }

  async #fromArchive(
    source: Extract<ImageSource, { kind: 'archive' }>,
    label: string,
    signal: AbortSignal,
    phases: Phases,
  ) {
    const name = `archive ${source.digest}`
    const known = this.shelf.known(name)
    if (known && (await this.shelf.hold(known))) return this.#hit(known, label)
    return await this.#bring(this.#archives, source.digest, label, signal, phases, async (stop) => {
      using _ = await this.shelf.locks.take(`archive-${hexOf(source.digest)}`, stop)
      const meanwhile = this.shelf.known(name)
      if (meanwhile) return { hex: meanwhile, bytes: 0 }
      await using temporary = this.shelf.temporary()
      const archive = await openArchive({
        ...source,
        scratch: temporary.path,
        maxBytes: this.#maxBytes,
        signal: AbortSignal.any([stop, AbortSignal.timeout(fetchMs)]),
      })
      const made = await this.#keep(
        archive.manifest,
        label,
        (missing, { blobs }) => archive.move(missing, blobs),
        stop,
      )
      this.shelf.remember(name, made.hex)
      // Kept a while longer, and those who wait for it take it at once.
      this.shelf.release(made.hex)
      return made
    })
  }

  async #fromRegistry(
    at: RegistryReference,
    auth: RegistryAuth | undefined,
    label: string,
    signal: AbortSignal,
    phases: Phases,
  ) {
    // Whoever brings other credentials is not shown what these have fetched.
    const name = JSON.stringify([nameOf(at), auth?.username, auth?.password])
    const lately = at.digest ? undefined : this.#tags.get(name)
    const known = at.digest
      ? this.shelf.known(name)
      : lately && lately.until > Date.now()
        ? lately.hex
        : undefined
    if (known && (await this.shelf.hold(known))) return this.#hit(known, label)
    return await this.#bring(this.#looks, name, label, signal, phases, async (stop) => {
      const made = await this.#fetch(at, auth, label, stop)
      if (at.digest) this.shelf.remember(name, made.hex)
      else this.#believe(name, made.hex)
      this.shelf.release(made.hex)
      return made
    })
  }

  /** It was here. Takes over the caller’s hold. */
  #hit(hex: string, label: string): Image {
    this.#options.metrics?.imageAsked('hit')
    return this.#image(hex, label)
  }

  /** What `fetch` brings, for all that want the same meanwhile. */
  async #bring(
    flights: Flights<Brought>,
    key: string,
    label: string,
    signal: AbortSignal,
    phases: Phases,
    fetch: (stop: AbortSignal) => Promise<Brought>,
  ): Promise<Image> {
    const { metrics } = this.#options
    const counted = async (stop: AbortSignal): Promise<Brought> => {
      const began = performance.now()
      const seconds = () => (performance.now() - began) / 1_000
      try {
        const made = await fetch(stop)
        if (made.bytes > 0) metrics?.imagePulled('ok', seconds(), made.bytes)
        return made
      } catch (error) {
        if (!stop.aborted) metrics?.imagePulled('failed', seconds(), 0)
        throw error
      }
    }
    let isHere = false
    try {
      const pull = () => flights.join(key, signal, counted)
      const { hex, bytes } = await phases.measure('pull image', pull, (brought) => ({
        'container.image.name': label,
        'oci.manifest.digest': `sha256:${brought.hex}`,
        'vulcan.image.pulled_bytes': brought.bytes,
      }))
      // A registry was asked what a tag means, and that is here.
      isHere = bytes === 0
      if (await this.shelf.hold(hex)) return this.#image(hex, label)
    } finally {
      metrics?.imageAsked(isHere ? 'hit' : 'miss')
    }
    throw new ImageError(
      'disk_full',
      `${label} was evicted as soon as it was here: raise VULCAN_IMAGE_CACHE_MB`,
    )
  }

  #believe(name: string, hex: string): void {
    const now = Date.now()
    for (const [other, { until }] of this.#tags) if (until <= now) this.#tags.delete(other)
    this.#tags.set(name, { hex, until: now + (this.#options.tagMs ?? 5_000) })
  }

  /** Asks the registry what the reference means, and brings what is not here. Held. */
  async #fetch(
    at: RegistryReference,
    auth: RegistryAuth | undefined,
    label: string,
    signal: AbortSignal,
  ): Promise<Brought> {
    await using temporary = this.shelf.temporary()
    const look = (digest: Digest | undefined) => {
      const one = digest ? { ...at, tag: undefined, digest } : at
      return this.#registries.manifest(one, auth, temporary.path, signal)
    }
    const top = await look(at.digest)
    if (at.digest && sha256(top) !== at.digest)
      throw new ImageError('invalid_workload', `${label}: the registry sends other bytes than that digest’s`)
    const manifest = await findManifest(top, label, async ({ digest }) =>
      existsSync(this.shelf.layout(hexOf(digest))) ? this.shelf.manifest(hexOf(digest)) : look(digest),
    )
    const pinned = { ...at, tag: undefined, digest: sha256(manifest) }
    const { config } = manifestOf(manifest, label)
    const supply: Supply = async (missing, { layout, blobs, scratch }, stop) => {
      const largest = Math.max(...missing.map(({ size }) => size))
      await this.#registries.blobs(pinned, layout, largest, auth, scratch, stop)
      const place = join(blobs, hexOf(config.digest))
      // Of an image in Docker’s format skopeo has written another config than the registry has.
      if (!existsSync(place)) writeFileSync(place, await this.#registries.config(pinned, auth, scratch, stop))
    }
    return await this.#keep(manifest, label, supply, signal)
  }

  /** Sees that the image of a manifest is in the store. Held. */
  async #keep(manifest: Buffer, label: string, supply: Supply, signal: AbortSignal): Promise<Brought> {
    const hex = hexOf(sha256(manifest))
    let bytes = 0
    for (let tries = 0; tries < 3; tries++) {
      if (await this.shelf.hold(hex)) return { hex, bytes }
      bytes = await this.#imports.join(hex, signal, (stop) =>
        this.#import(hex, manifest, label, supply, stop),
      )
    }
    throw new ImageError(
      'disk_full',
      `${label} was evicted as soon as it was here: raise VULCAN_IMAGE_CACHE_MB`,
    )
  }

  /** Bytes that were fetched for it. */
  async #import(
    hex: string,
    manifest: Buffer,
    label: string,
    supply: Supply,
    stop: AbortSignal,
  ): Promise<number> {
    const { config, layers } = manifestOf(manifest, label)
    const wanted = [...new Map([config, ...layers].map((one) => [one.digest, one])).values()]
    const size = wanted.reduce((sum, one) => sum + one.size, 0)
    if (size > this.budget)
      throw new ImageError(
        'disk_full',
        `${label} has ${Math.ceil(size / 2 ** 20)} MiB of layers, and all images may take ${this.#options.budgetMb} MiB here: raise VULCAN_IMAGE_CACHE_MB`,
      )
    if (size > this.#maxBytes)
      throw new ImageError(
        'invalid_workload',
        `${label} has ${size} bytes of layers, and an image may have ${this.#maxBytes}`,
      )
    return await this.#fetchTurns.take(async () => {
      const signal = AbortSignal.any([stop, AbortSignal.timeout(fetchMs)])
      using _ = await this.shelf.locks.take(hex, signal)
      if (existsSync(this.shelf.layout(hex))) return 0
      await using temporary = this.shelf.temporary()
      const layout = join(temporary.path, 'layout')
      const into: Incoming = { layout, blobs: join(layout, 'blobs/sha256'), scratch: temporary.path }
      mkdirSync(into.blobs, { recursive: true })
      const missing = wanted.filter((one) => !this.#linkKnown(one, into.blobs))
      if (missing.length > 0) await this.#named(label, () => supply(missing, into, signal))
      for (const one of missing) await verify(one, join(into.blobs, hexOf(one.digest)), label)
      parseConfig(readFileSync(join(into.blobs, hexOf(config.digest))), { config, layers }, label)
      const blobs = wanted.map(({ digest }) => hexOf(digest))
      await this.shelf.place(hex, manifest, blobs, into.blobs)
      await this.shelf.evict(this.budget)
      this.shelf.release(hex)
      return missing.reduce((sum, one) => sum + one.size, 0)
    })
  }

  async #named<T>(label: string, work: () => Promise<T>): Promise<T> {
    try {
      return await work()
    } catch (error) {
      if ((error as Error).name !== 'TimeoutError') throw error
      throw new ImageError('backend_unavailable', `${label} was not here in ${fetchMs / 60_000} minutes`, {
        cause: error,
      })
    }
  }

  /** A blob that another image has brought; linked, so that it stays though that one is evicted meanwhile. */
  #linkKnown({ digest, size }: Descriptor, into: string): boolean {
    const path = this.shelf.blob(hexOf(digest))
    try {
      if (statSync(path).size !== size) return false
      linkSync(path, join(into, hexOf(digest)))
      return true
    } catch {
      return false
    }
  }

  /** Takes over the caller’s hold. */
  #image(hex: string, label: string): Image {
    const { shelf } = this
    let config: ParsedConfig
    try {
      config = this.#configOf(hex, label)
    } catch (error) {
      shelf.release(hex)
      throw error
    }
    let isHeld = true
    return {
      digest: `sha256:${hex}`,
      config: config.config,
      layout: shelf.layout(hex),
      root: async (phases = unmeasured) => {
        if (!existsSync(shelf.root(hex)))
          await phases.measure('unpack image', () => this.#roomFor(label, () => this.#root(hex, label)))
        return shelf.root(hex)
      },
      [Symbol.dispose]: () => {
        if (isHeld) shelf.release(hex)
        isHeld = false
      },
    }
  }

  #configOf(hex: string, label: string): ParsedConfig {
    const known = this.#configs.get(hex)
    if (known) return known
    const manifest = manifestOf(this.shelf.manifest(hex), label)
    const bytes = readFileSync(this.shelf.blob(hexOf(manifest.config.digest)))
    const config = parseConfig(bytes, manifest, label)
    if (bytes.length <= rememberedBytes) remember(this.#configs, hex, config)
    return config
  }

  #root(hex: string, label: string): Promise<void> {
    const why = this.#refused.get(hex)
    if (why !== undefined) throw new ImageError('invalid_workload', `${label} is refused: ${why}`)
    return this.#roots.join(hex, this.#closing.signal, async (stop) => {
      if (!(await this.shelf.hold(hex)))
        throw new ImageError('backend_unavailable', `${label} has gone from the store meanwhile`)
      try {
        await this.#unpackTurns.take(() => this.#unpack(hex, label, stop))
        await this.shelf.evict(this.budget)
      } finally {
        this.shelf.release(hex)
      }
    })
  }

  async #unpack(hex: string, label: string, stop: AbortSignal): Promise<void> {
    const signal = AbortSignal.any([stop, AbortSignal.timeout(unpackMs)])
    using _ = await this.shelf.locks.take(hex, signal)
    if (existsSync(this.shelf.root(hex))) return
    await using temporary = this.shelf.temporary()
    const target = join(temporary.path, 'root')
    mkdirSync(target)
    const { layers } = manifestOf(this.shelf.manifest(hex), label)
    const answer = await this.#named(label, () =>
      inJail({
        target,
        files: layers.map(({ digest }) => this.shelf.blob(hexOf(digest))),
        job: {
          kind: 'layers',
          diffIds: this.#configOf(hex, label).diffIds.map(hexOf),
          maxBytes: this.#maxBytes,
          maxEntries: this.#options.maxEntries ?? 1_000_000,
        },
        signal,
      }),
    )
    if (answer.kind === 'unpacked') return await this.shelf.placeRoot(hex, target, answer.bytes)
    if (answer.kind !== 'refused') throw new Error(`unpacking was answered with ${answer.kind}`)
    // Bytes that are not what they were when they came: a disk that lies, or one that lost power.
    const layer = layers[(answer.layer ?? 1) - 1]
    if (layer && (await sha256OfFile(this.shelf.blob(hexOf(layer.digest)))) !== layer.digest) {
      await this.shelf.discard(hexOf(layer.digest))
      throw new ImageError(
        'backend_unavailable',
        `${label} was damaged on the disk of the runner: it is fetched again`,
      )
    }
    const why = `layer ${answer.layer}: ${answer.why}`
    remember(this.#refused, hex, why)
    throw new ImageError('invalid_workload', `${label} is refused: ${why}`)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closing.abort(new Error('the image store is closed'))
    for (const flights of [this.#looks, this.#archives, this.#layouts, this.#imports, this.#roots])
      await flights.settled()
    await this.shelf.close()
  }
}

async function verify({ digest, size }: Descriptor, path: string, label: string): Promise<void> {
  const got = statSync(path, { throwIfNoEntry: false })
  if (got === undefined) throw new ImageError('invalid_workload', `${label} has no ${digest}`)
  if (got.size !== size || (await sha256OfFile(path)) !== digest)
    throw new ImageError(
      'invalid_workload',
      `${label} has a blob whose bytes are not those of its digest, ${digest}`,
    )
}

function remember<T>(map: Map<string, T>, key: string, value: T): void {
  if (map.size >= remembered) map.delete(map.keys().next().value!)
  map.set(key, value)
}
