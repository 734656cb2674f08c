import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Image, ImageError, ImageSource, ImageStore } from '../../../runners/container/engine.ts'
import { type ImageStoreOptions, openImageStore } from '../../../runners/container/images/store.ts'
import { digestOf, type Entry, type ImageSpec, writeLayout } from '../../registry.ts'

export interface Workbench extends AsyncDisposable {
  dir: string
  store: ImageStore
  /** Where `oci:` references may point. */
  layouts: string
  get(source: ImageSource | string, signal?: AbortSignal): Promise<Image>
  /** The root of an image of these layers; the image is held until the bench goes. */
  unpack(...layers: ImageSpec['layers']): Promise<string>
  /** How the image is refused. */
  refusal(...layers: ImageSpec['layers']): Promise<ImageError>
}

/** An image store in a directory of its own. */
export async function workbench(options: Partial<ImageStoreOptions> = {}): Promise<Workbench> {
  await using scope = new AsyncDisposableStack()
  const dir = await mkdtemp(join(tmpdir(), 'vulcan-test-images-'))
  scope.defer(() => rm(dir, { recursive: true, force: true, maxRetries: 5 }))
  const layouts = join(dir, 'layouts')
  const store = scope.use(await openImageStore(storeOptions(dir, options)))
  const resources = scope.move()
  let count = 0
  const get: Workbench['get'] = (source, signal = AbortSignal.timeout(60_000)) =>
    store.get(typeof source === 'string' ? { kind: 'reference', reference: source } : source, signal)
  const rootOf = async (layers: ImageSpec['layers']) => {
    const layout = join(layouts, String(count++))
    await writeLayout(layout, { layers })
    const image = await get(`oci:${layout}`)
    resources.defer(() => image[Symbol.dispose]())
    return image.root()
  }
  return {
    dir,
    store,
    layouts,
    get,
    unpack: (...layers) => rootOf(layers),
    async refusal(...layers) {
      return await errorOf(rootOf(layers))
    },
    [Symbol.asyncDispose]: () => resources.disposeAsync(),
  }
}

export const storeOptions = (dir: string, options: Partial<ImageStoreOptions> = {}): ImageStoreOptions => ({
  dir: join(dir, 'store'),
  insecureRegistries: [],
  imageDirectories: [join(dir, 'layouts')],
  budgetMb: 1_024,
  ...options,
})

export async function errorOf(work: Promise<unknown>): Promise<ImageError> {
  try {
    await work
  } catch (error) {
    return error as ImageError
  }
  throw new Error('it was not refused')
}

export const archiveSource = (bytes: Buffer, chunk = 64 * 1024): ImageSource => ({
  kind: 'archive',
  digest: digestOf(bytes),
  async open() {
    return (async function* () {
      for (let at = 0; at < bytes.length; at += chunk) yield bytes.subarray(at, at + chunk)
    })()
  },
})

export const file = (path: string, content = path, more: Partial<Entry> = {}): Entry => ({
  path,
  content,
  ...more,
})
export const directory = (path: string, more: Partial<Entry> = {}): Entry => ({
  path,
  type: 'directory',
  ...more,
})
export const symlink = (path: string, target: string): Entry => ({ path, type: 'symlink', target })
export const link = (path: string, target: string): Entry => ({ path, type: 'link', target })
