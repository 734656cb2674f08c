/** A server beside vulcan, as a process of its own. */
import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { setTimeout as delay } from 'node:timers/promises'

export interface Peer extends AsyncDisposable {
  /** Without a trailing slash. */
  url: string
}

/** Waits until something answers HTTP there, whatever it says; throws when the process ends before. */
export async function answers(url: string, child: ChildProcess): Promise<void> {
  for (let tries = 0; tries < 600; tries++) {
    if (child.exitCode !== null || child.signalCode !== null)
      throw new Error(`${child.spawnfile} ended: ${child.exitCode ?? child.signalCode}`)
    const answer = await fetch(url).catch(() => undefined)
    await answer?.body?.cancel()
    if (answer !== undefined) return
    await delay(50)
  }
  throw new Error(`${child.spawnfile} does not answer at ${url}`)
}

/**
 * Ends a process that was started `detached`, with all of its group: the peers’ commands are scripts that start the
 * real thing and do not pass signals on.
 */
export async function ended(child: ChildProcess): Promise<void> {
  const group = -child.pid!
  const exit = child.exitCode === null && child.signalCode === null ? once(child, 'exit') : undefined
  try {
    process.kill(group, 'SIGTERM')
    const timer = setTimeout(() => process.kill(group, 'SIGKILL'), 5_000)
    await exit
    clearTimeout(timer)
    // What is left of the group when its leader is gone.
    process.kill(group, 'SIGKILL')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error
  }
}
