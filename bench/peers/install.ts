/** The peers, from npm, into the cache directory: vulcan itself depends on none of them. */
import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { cacheDirectory } from '../../scripts/cache-directory.ts'

/** Package → exact version. */
const packages = {
  workerd: '1.20261117.1',
  '@restatedev/restate-server': '1.7.12',
  '@restatedev/restate-sdk': '1.17.2',
}

/** The folder whose `node_modules` has the peers; installed there if they are missing. Throws where npm cannot. */
export async function installPeers(log: (line: string) => void): Promise<string> {
  const versions = Object.values(packages).join('_')
  const folder = join(cacheDirectory(process.env), `peers-${versions}`)
  const done = join(folder, 'installed')
  if (existsSync(done)) return folder
  log('installing workerd and Restate into the cache directory (once, about 400 MB)')
  await mkdir(folder, { recursive: true })
  await writeFile(join(folder, 'package.json'), JSON.stringify({ private: true, dependencies: packages }))
  const args = ['install', '--ignore-scripts', '--no-audit', '--no-fund', '--no-package-lock']
  await promisify(execFile)('npm', args, { cwd: folder })
  await writeFile(done, '')
  return folder
}
