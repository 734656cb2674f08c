import { homedir } from 'node:os'
import { join, resolve } from 'node:path'

/** Where downloads are kept: `VULCAN_CACHE_DIR`, else `vulcan` in the user's cache directory. */
export function cacheDirectory(env: NodeJS.ProcessEnv): string {
  return resolve(env.VULCAN_CACHE_DIR || join(env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'vulcan'))
}
