/** Finds what processes of vulcan that have ended left in the engine and in the state directory, and only that. */
import { mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Api, ApiError } from './api.ts'
import { isAbandoned, isDead, namePrefix, ownerLabel, ownProcess, processLabel } from './identity.ts'

/** Removing takes that long (ms) where a disk is slow. */
const removeMs = 30_000
const removalsAtOnce = 8
/** In a directory of the state, who uses it. */
const recordName = 'process'

/** Removes containers whose owner has ended; what resists stays for the next time. Throws `ApiError`. */
export async function removeAbandoned(api: Api): Promise<void> {
  const containers = await api.call('list containers', (abortSignal) =>
    api.docker.listContainers({ all: true, filters: { label: [ownerLabel, processLabel] }, abortSignal }),
  )
  const ids = containers
    .filter(
      ({ Names, Labels }) => Names.some((name) => name.startsWith(`/${namePrefix}`)) && isAbandoned(Labels),
    )
    .map(({ Id }) => Id)
  await removeAll(api, ids).catch(() => {})
}

/** Removes containers whatever they do. Throws the first error when all were tried. */
export async function removeAll(api: Api, ids: string[]): Promise<void> {
  const errors: unknown[] = []
  const queue = [...ids]
  const worker = async () => {
    for (let id = queue.pop(); id !== undefined; id = queue.pop())
      await removeContainer(api, id).catch((error) => errors.push(error))
  }
  await Promise.all(Array.from({ length: removalsAtOnce }, worker))
  if (errors.length > 0) throw errors[0]
}

/** Settles when it is no longer there. Throws `ApiError`. */
export async function removeContainer(api: Api, id: string): Promise<void> {
  const until = performance.now() + removeMs
  for (;;) {
    try {
      await api.call(
        'remove a container',
        (abortSignal) => api.docker.getContainer(id).remove({ force: true, v: true, abortSignal }),
        removeMs,
      )
      return
    } catch (error) {
      const status = error instanceof ApiError ? error.status : undefined
      if (status === 404) return
      // 409: somebody else removes it; 500: something of it was busy.
      if ((status !== 409 && status !== 500) || performance.now() > until) throw error
      await sleep(100)
    }
  }
}

/** A directory for this process. Those of processes that have ended are removed. */
export async function ownDirectory(stateDir: string, owner: string): Promise<string> {
  await mkdir(stateDir, { recursive: true, mode: 0o700 })
  for (const name of await readdir(stateDir)) {
    const record = await readFile(join(stateDir, name, recordName), 'utf8').catch(() => '')
    if (isDead(record)) await rm(join(stateDir, name), { recursive: true, force: true })
  }
  const own = join(stateDir, owner)
  await mkdir(own, { recursive: true, mode: 0o700 })
  await writeFile(join(own, recordName), ownProcess())
  return own
}
