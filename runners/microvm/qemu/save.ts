/** The stream in which QEMU gives away what it holds, from its socket into a file. */
import { once } from 'node:events'
import { closeSync, openSync } from 'node:fs'
import { chmod, rm, writeFile } from 'node:fs/promises'
import { createServer, type Socket } from 'node:net'
import { Transform } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { descriptors, streamName, type TemplateMemory } from './arguments.ts'
import type { Qmp, QmpEvent } from './qmp.ts'

/** Copying memory of gigabytes takes a while, ms. */
const saveMs = 120_000

/** What memory is in a file need not be copied (`x-ignore-shared`: QEMU’s name for it). */
export const ignoreShared = (state: boolean) => ({ capability: 'x-ignore-shared', state })

/**
 * Writes the state of a paused machine to `file`; with `stream` its memory too. `folder` is what QEMU has as
 * `descriptors.dir`. Throws where QEMU refuses or gives more than `maxBytes`.
 */
export async function saveState(qmp: Qmp, { folder, file, memory, maxBytes }: Save): Promise<void> {
  await using scope = new AsyncDisposableStack()
  const given = new AbortController()
  scope.defer(() => given.abort())
  // By way of a descriptor: paths of sockets are short (unix(7)).
  const directory = openSync(folder, 'r')
  scope.defer(() => closeSync(directory))
  const path = `/proc/self/fd/${directory}/${streamName}`
  const server = createServer()
  scope.defer(async () => {
    server.close()
    await rm(path, { force: true })
  })
  await once(server.listen(path), 'listening')
  // The folder is for QEMU’s user alone.
  await chmod(path, 0o666)
  const connected = once(server, 'connection', { signal: given.signal }) as Promise<[Socket]>
  const signal = AbortSignal.any([given.signal, AbortSignal.timeout(saveMs)])
  const written = connected.then(([stream]) =>
    pipeline(stream, atMost(maxBytes), (chunks) => writeFile(file, chunks, { mode: 0o600 }), { signal }),
  )
  const over = qmp.event(isOver, saveMs, 'the snapshot')
  for (const promise of [written, over]) promise.catch(() => {})
  await qmp.call('migrate-set-capabilities', {
    capabilities: [{ capability: 'events', state: true }, ignoreShared(memory === 'file')],
  })
  await qmp.call('migrate', { uri: `unix:/proc/self/fd/${descriptors.dir}/${streamName}` })
  const { data } = await over
  if (data.status !== 'completed') throw new Error(`the snapshot ${data.status}`)
  await written
}

export interface Save {
  folder: string
  file: string
  memory: TemplateMemory
  maxBytes: number
}

const isOver = ({ name, data }: QmpEvent) =>
  name === 'MIGRATION' && ['completed', 'failed', 'cancelled'].includes(String(data.status))

function atMost(bytes: number): Transform {
  let left = bytes
  return new Transform({
    transform(piece: Buffer, _encoding, done) {
      left -= piece.length
      if (left < 0) done(new Error(`QEMU gives more than ${bytes} bytes`))
      else done(null, piece)
    },
  })
}
