/** A whole platform of its own for a test or a benchmark: free ports, a new data directory, gone afterwards. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Platform, platformConfig, startPlatform } from '../scripts/platform.ts'

/** `lines`: what its processes have said so far, each line behind the name of who said it. */
export type TestPlatform = Platform & { readonly lines: readonly string[] }

/**
 * `env` goes to every process, over what the caller's environment has. `VULCAN_ISOLATIONS` says which runners are
 * started; that of isolates alone unless given.
 */
export async function startTestPlatform(env: Record<string, string> = {}): Promise<TestPlatform> {
  const dataDir = await mkdtemp(join(tmpdir(), 'vulcan-'))
  const lines: string[] = []
  const config = platformConfig({
    ...process.env,
    NATS_URL: '',
    VULCAN_LOG_LEVEL: 'warn',
    VULCAN_PORT: '0',
    VULCAN_NATS_PORT: '0',
    VULCAN_DISPATCHER_PORT: '0',
    VULCAN_DATABASE_URL: '',
    VULCAN_ISOLATIONS: 'isolate',
    VULCAN_DATA_DIR: dataDir,
    ...env,
  })
  const log = (line: string) => {
    lines.push(line)
    if (process.env.VULCAN_TEST_LOG) console.error(line)
  }
  try {
    const platform = await startPlatform(config, { log })
    return {
      ...platform,
      lines,
      [Symbol.asyncDispose]: async () => {
        await platform.stop()
        await rm(dataDir, { recursive: true, force: true })
      },
    }
  } catch (error) {
    console.error(lines.slice(-50).join('\n'))
    await rm(dataDir, { recursive: true, force: true })
    throw error
  }
}

export interface Answer<T> {
  status: number
  headers: Headers
  body: T
}

/** One JSON request. */
export async function http<T = Record<string, unknown>>(
  url: string,
  options: { method?: string; body?: unknown; headers?: Record<string, string> } = {},
): Promise<Answer<T>> {
  const answer = await fetch(url, {
    method: options.method ?? (options.body === undefined ? 'GET' : 'POST'),
    headers: {
      ...(options.body === undefined ? {} : { 'content-type': 'application/json' }),
      ...options.headers,
    },
    ...(options.body === undefined ? {} : { body: JSON.stringify(options.body) }),
  })
  const text = await answer.text()
  return {
    status: answer.status,
    headers: answer.headers,
    body: (text === '' ? undefined : JSON.parse(text)) as T,
  }
}
