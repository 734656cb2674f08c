/** Each isolation by trying it: as its runner would, in a process of its own, with the same settings. */
import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { promisify } from 'node:util'
import { z } from 'zod'
import { Capabilities } from '../../shared/backends.ts'
import { missingFor, type OfferedIsolation } from '../isolations.ts'
import type { PlatformConfig } from '../platform.ts'
import type { Finding } from './report.ts'

const execute = promisify(execFile)
const runner = resolve(import.meta.dirname, '../../runners/main.ts')

/** Milliseconds for one isolation: a first virtual machine under emulation takes its time. */
const probeMs = 180_000

const Probe = z.discriminatedUnion('available', [
  z.object({ available: z.literal(true), capabilities: Capabilities }),
  z.object({ available: z.literal(false), reason: z.string(), fix: z.string() }),
])
type Probe = z.infer<typeof Probe>

export interface TryOptions {
  config: Pick<PlatformConfig, 'dataDir' | 'cacheDir' | 'env'>
  /** It has to work; else it is only told. */
  wanted: boolean
  /** A script in place of the runner’s, told the isolation and `probe`. */
  script?: string
  signal?: AbortSignal
  /** Default: three minutes. */
  timeoutMs?: number
}

/** Never throws. What it makes is gone when it resolves. */
export async function tryIsolation(isolation: OfferedIsolation, options: TryOptions): Promise<Finding> {
  const { config, wanted } = options
  const setUp = `npm run setup${isolation === 'isolate' ? '' : ` -- ${isolation}`}`
  const missing = missingFor(isolation, config.env)
  if (missing !== undefined && !wanted)
    return { state: 'off', what: isolation, says: missing, fixes: [setUp] }
  const began = performance.now()
  const probe = await ask(isolation, options)
  if (!probe.available) {
    const fixes = probe.fix.includes('npm run setup') ? [probe.fix] : [probe.fix, setUp]
    return { state: wanted ? 'bad' : 'off', what: isolation, says: probe.reason, fixes }
  }
  const { version, walls, runtimes, limits, missing: lacking } = probe.capabilities
  const weak = Object.entries(limits ?? {}).filter(([, verdict]) => verdict === 'not enforced')
  const says = [
    version,
    `walls: ${walls.join(', ') || 'none'}`,
    ...(limits === undefined ? [] : [weak.length === 0 ? 'all limits hold' : `not enforced: ${names(weak)}`]),
    `runs ${runtimes.join(', ')}`,
    `tried in ${((performance.now() - began) / 1_000).toFixed(1)} s`,
  ].join('; ')
  const fixes = lacking.map(({ wall, fix }) => `${wall}: ${fix}`)
  return { state: lacking.length + weak.length > 0 ? 'warn' : 'ok', what: isolation, says, fixes }
}

const names = (entries: [string, unknown][]): string => entries.map(([name]) => name).join(', ')

async function ask(isolation: OfferedIsolation, options: TryOptions): Promise<Probe> {
  const { config, script = runner, signal, timeoutMs = probeMs } = options
  await using scope = new AsyncDisposableStack()
  let { dataDir } = config
  if (!existsSync(dataDir)) {
    const folder = await mkdtemp(join(tmpdir(), 'vulcan-doctor-'))
    scope.defer(() => rm(folder, { recursive: true, force: true }))
    dataDir = folder
  }
  try {
    const asking = execute(process.execPath, [script, isolation, 'probe'], {
      env: {
        ...config.env,
        VULCAN_DATA_DIR: dataDir,
        VULCAN_CACHE_DIR: config.cacheDir,
        VULCAN_LOG_LEVEL: 'silent',
      },
      timeout: timeoutMs,
      killSignal: 'SIGKILL',
      maxBuffer: 16 << 20,
    })
    const stop = () => void asking.child.kill('SIGKILL')
    signal?.addEventListener('abort', stop, { once: true })
    scope.defer(() => signal?.removeEventListener('abort', stop))
    const { stdout } = await asking
    return Probe.parse(JSON.parse(stdout.trim().split('\n').at(-1) ?? ''))
  } catch (error) {
    const { killed, stderr, message } = error as Error & { killed?: boolean; stderr?: string }
    const said = stderr?.trim().slice(-300) || message
    const reason = killed ? `no answer within ${timeoutMs / 1_000} s` : said
    return { available: false, reason, fix: `node runners/main.ts ${isolation} probe shows more` }
  }
}
