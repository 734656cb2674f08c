/**
 * The process in the jail: reads one job, does it with synchronous calls, answers and ends. It sees nothing of the
 * host but what it is to read and the directory it is to fill.
 */
import { createHash } from 'node:crypto'
import * as fs from 'node:fs'
import { text } from 'node:stream/consumers'
import { Applier } from './apply.ts'
import { decompress } from './decompress.ts'
import type { Answer, LayersJob, Part, SplitJob } from './protocol.ts'
import { Refusal, type TarHandler, TarReader } from './tar.ts'

/** What the kernel says of names, links and numbers that no file system takes: the image’s own doing. */
const strange = new Set([
  'EINVAL',
  'EILSEQ',
  'EMLINK',
  'ENAMETOOLONG',
  'ENOENT',
  'ENOTDIR',
  'EEXIST',
  'EFBIG',
  'EOVERFLOW',
])

async function unpack(job: LayersJob): Promise<Answer> {
  const applier = new Applier(job)
  let left = job.maxBytes
  for (const [index, { file, diffId }] of job.layers.entries()) {
    const layer = index + 1
    applier.startLayer(layer)
    const reader = new TarReader(applier)
    const hash = createHash('sha256')
    try {
      left -= await decompress(file, left, (bytes) => {
        hash.update(bytes)
        reader.write(bytes)
      })
      reader.end()
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException
      if (error instanceof Refusal) return { kind: 'refused', why: error.message, layer }
      if (strange.has(code ?? '')) return { kind: 'refused', why: (error as Error).message, layer }
      throw error
    }
    if (hash.digest('hex') !== diffId)
      return { kind: 'refused', why: 'its bytes are not those of its diff_id', layer, mismatch: true }
  }
  applier.finish()
  return { kind: 'unpacked', ...applier.figures }
}

async function split(job: SplitJob): Promise<Answer> {
  const parts: Part[] = []
  let open:
    | { descriptor: number; path: string; file: string; size: number; hash: ReturnType<typeof createHash> }
    | undefined
  const handler: TarHandler = {
    entry({ path, type, target }) {
      if (parts.length >= job.maxEntries) throw new Refusal(`it has more than ${job.maxEntries} entries`)
      if (type === 'symlink' || type === 'link')
        parts.push({ path, link: type === 'link' ? `/${target}` : target })
      if (type !== 'file') return
      const file = String(parts.length)
      const descriptor = fs.openSync(`${job.into}/${file}`, 'wx', 0o600)
      open = { descriptor, path, file, size: 0, hash: createHash('sha256') }
    },
    data(bytes) {
      if (open === undefined) return
      open.hash.update(bytes)
      open.size += bytes.length
      for (let at = 0; at < bytes.length; ) at += fs.writeSync(open.descriptor, bytes, at)
    },
    end() {
      if (open === undefined) return
      fs.closeSync(open.descriptor)
      const { path, file, size, hash } = open
      parts.push({ path, file, size, digest: hash.digest('hex') })
      open = undefined
    },
  }
  const reader = new TarReader(handler)
  try {
    await decompress(job.archive, job.maxBytes, (bytes) => reader.write(bytes))
    reader.end()
  } catch (error) {
    if (error instanceof Refusal) return { kind: 'refused', why: error.message }
    throw error
  }
  return { kind: 'parts', parts }
}

process.umask(0)
const job = JSON.parse(await text(process.stdin)) as LayersJob | SplitJob
let answer: Answer
try {
  answer = await (job.kind === 'layers' ? unpack(job) : split(job))
} catch (error) {
  const { code, message } = error as NodeJS.ErrnoException
  answer = code === 'ENOSPC' || code === 'EDQUOT' ? { kind: 'full' } : { kind: 'failed', why: message }
}
process.stdout.write(JSON.stringify(answer))
