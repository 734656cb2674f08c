/** Firecracker and its jailer as the project releases them, below the cache directory. */
import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync } from 'node:fs'
import { mkdir, rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { makeOnce, storeOf } from './store.ts'

const execute = promisify(execFile)

const version = 'v1.15.1'
/** Of the archive for each of Node's architectures, as the release has it. */
const releases: Partial<Record<string, { name: string; sha256: string }>> = {
  x64: { name: 'x86_64', sha256: 'd4a32ab2322d887ca1bc4a4e7afa9cc35393e6362dfc2b3becb389d362e4275a' },
  arm64: { name: 'aarch64', sha256: '00654ac1e702a22744121ea9f10a4f792ebd7c3a744cba587dfac9fcb79b41a5' },
}
const programs = ['firecracker', 'jailer']
const downloadTimeoutMs = 120_000
const maxBytes = 64 * 2 ** 20

const place = `tools/firecracker-${version}`

/** The Firecracker that was fetched, with `jailer` beside it; undefined where it was not. */
export function fetchedFirecracker(cacheDir: string): string | undefined {
  const file = join(storeOf(cacheDir), place, 'firecracker')
  return existsSync(file) ? file : undefined
}

/**
 * Fetches them unless they are here.
 *
 * @returns the path of `firecracker`
 * @throws Error where the release cannot be reached, or is not what it was
 */
export async function fetchFirecracker(cacheDir: string, log: (line: string) => void): Promise<string> {
  const directory = await makeOnce(cacheDir, place, async (path) => {
    const release = releases[process.arch]
    if (release === undefined) throw new Error(`there is no Firecracker for ${process.arch}`)
    log(`fetching Firecracker ${version}`)
    const base = `firecracker-${version}-${release.name}`
    const bytes = await download(
      `https://github.com/firecracker-microvm/firecracker/releases/download/${version}/${base}.tgz`,
    )
    const found = createHash('sha256').update(bytes).digest('hex')
    if (found !== release.sha256)
      throw new Error(`${base}.tgz has the sha256 ${found}, not ${release.sha256}`)
    await mkdir(path)
    const file = join(path, 'release.tgz')
    await writeFile(file, bytes)
    const members = programs.map(
      (name) => `release-${version}-${release.name}/${name}-${version}-${release.name}`,
    )
    await execute('tar', [
      ...['--extract', '--gzip', '--no-same-owner', '--strip-components=1'],
      ...['--directory', path, '--file', file, ...members],
    ])
    await rm(file)
    for (const name of programs)
      await rename(join(path, `${name}-${version}-${release.name}`), join(path, name))
  })
  return join(directory, 'firecracker')
}

/** @throws Error that says why it could not be had */
async function download(address: string): Promise<Uint8Array> {
  try {
    const response = await fetch(address, { signal: AbortSignal.timeout(downloadTimeoutMs) })
    if (!response.ok) throw new Error(`${response.status} ${response.statusText}`)
    const parts: Uint8Array[] = []
    let size = 0
    for await (const part of response.body!) {
      size += part.length
      if (size > maxBytes) throw new Error(`it has more than ${maxBytes} bytes`)
      parts.push(part)
    }
    return Buffer.concat(parts)
  } catch (cause) {
    const { message, cause: deeper } = cause as Error
    const why = (deeper as Error | undefined)?.message ?? message
    throw new Error(`${new URL(address).host} cannot be reached: ${why}`, { cause })
  }
}
