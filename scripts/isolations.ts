/** Which isolations a platform starts runners for, and what `npm start` says of them. */
import { type Stats, statSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fetchedFirecracker } from '../rootfs/firecracker.ts'
import { partsKinds, partsPlace } from '../rootfs/parts.ts'
import { storeOf } from '../rootfs/store.ts'
import { cacheDirectory } from './cache-directory.ts'
import { which } from './host-tools.ts'

/** Those that this version has a runner for, the lightest first. */
export const isolations = ['isolate', 'gvisor', 'docker', 'microvm'] as const
export type OfferedIsolation = (typeof isolations)[number]

/** Milliseconds that a runner is given to try out its host before nothing is said of it. */
const tellMs = 120_000

/** The name of an isolation’s runner among the processes. */
export const runnerName = (isolation: OfferedIsolation): string =>
  isolation === 'isolate' ? 'runner' : `runner-${isolation}`

/**
 * A quick look at what could be offered: only a runner’s own trial says what is. Undefined: worth a try; else what is
 * missing.
 */
export function missingFor(isolation: OfferedIsolation, env: NodeJS.ProcessEnv): string | undefined {
  switch (isolation) {
    case 'isolate':
      return undefined
    case 'gvisor':
      return which('runsc', env.PATH ?? '') ? undefined : 'runsc is not on PATH'
    case 'docker': {
      if (env.DOCKER_HOST) return undefined
      const socket = '/var/run/docker.sock'
      return kindOf(socket)?.isSocket() ? undefined : `there is no ${socket}, and DOCKER_HOST is not set`
    }
    case 'microvm':
      return missingForMicrovm(env)
    default:
      throw new Error(`unhandled ${isolation satisfies never}`)
  }
}

function missingForMicrovm(env: NodeJS.ProcessEnv): string | undefined {
  const vmms = ['qemu-system-x86_64', 'firecracker']
  const cacheDir = cacheDirectory(env)
  const found =
    env.VULCAN_FIRECRACKER ||
    vmms.some((name) => which(name, env.PATH ?? '')) ||
    fetchedFirecracker(cacheDir) !== undefined
  if (!found) return `neither ${vmms.join(' nor ')} is on PATH`
  const store = storeOf(cacheDir)
  const isThere = partsKinds.some((kind) => kindOf(join(store, partsPlace(kind))) !== undefined)
  return isThere ? undefined : `no kernel for machines was prepared in ${store}`
}

function kindOf(path: string): Stats | undefined {
  try {
    return statSync(path)
  } catch {
    return undefined
  }
}

interface Backend {
  isolation: string
  available: boolean
  reason: string | null
  fix: string | null
  capabilities: { version: string } | null
}

/** Says a line about each isolation as soon as its runner has spoken, or what is missing for it. Never throws. */
export async function tellOffers(
  url: string,
  { started, env }: { started: readonly OfferedIsolation[]; env: NodeJS.ProcessEnv },
  log: (line: string) => void,
  signal: AbortSignal,
): Promise<void> {
  for (const isolation of isolations) {
    if (started.includes(isolation)) continue
    const missing = missingFor(isolation, env) ?? 'left out by VULCAN_ISOLATIONS'
    log(`  ${isolation}: not offered: ${missing}; npm run setup -- ${isolation}`)
  }
  const over = AbortSignal.any([signal, AbortSignal.timeout(tellMs)])
  const open = new Set<string>(started)
  try {
    while (open.size > 0) {
      const answer = await fetch(`${url}/v1/backends`, { signal: over }).catch(() => undefined)
      const { backends = [] } = ((await answer?.json()) ?? {}) as { backends?: Backend[] }
      for (const { isolation, available, reason, fix, capabilities } of backends) {
        const spoken = available || reason !== `no ${isolation} runner has been seen`
        if (!spoken || !open.delete(isolation)) continue
        log(
          `  ${isolation}: ${available ? `offered (${capabilities?.version})` : `not offered: ${reason}; ${fix}`}`,
        )
      }
      if (open.size > 0) await sleep(250, undefined, { signal: over })
    }
  } catch {
    for (const isolation of open) if (!signal.aborted) log(`  ${isolation}: its runner has not spoken yet`)
  }
}
