// npm run dev -- path/to/fn [--name NAME] [--url http://127.0.0.1:8080]
//
// Deploys the folder now and on every save, and shows what its invocations log and how they end.
import { statSync, watch } from 'node:fs'
import { resolve } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { DeployError, deployFolder, functionName } from './deploy.ts'
import { tail } from './tail.ts'

/** An editor writes a file in several steps (ms). */
const quietMs = 150

const usage = 'usage: npm run dev -- path/to/function [--name NAME] [--url http://127.0.0.1:8080]'
const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { name: { type: 'string' }, url: { type: 'string' } },
})
const [path] = positionals
const folder = path === undefined ? undefined : resolve(path)
if (folder === undefined || !statSync(folder, { throwIfNoEntry: false })?.isDirectory()) {
  console.error(path === undefined ? usage : `${path} is no folder\n${usage}`)
  process.exit(2)
}
const name = values.name ?? functionName(folder)
const { VULCAN_HOST = '127.0.0.1', VULCAN_PORT = '8080' } = process.env
const gateway = (values.url ?? `http://${VULCAN_HOST}:${VULCAN_PORT}`).replace(/\/$/, '')

const stop = new AbortController()
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => stop.abort())
const log = (line: string) => void process.stdout.write(`${line}\n`)

let changed = true
let wake: (() => void) | undefined
const watcher = watch(folder, { recursive: true }, (_, file) => {
  if (file !== null && /(^|\/)(node_modules|\.git)(\/|$)/.test(file)) return
  changed = true
  wake?.()
})
stop.signal.addEventListener('abort', () => {
  watcher.close()
  wake?.()
})

const tailing = tail({ gateway, name, log, signal: stop.signal })
while (!stop.signal.aborted) {
  if (!changed) await new Promise<void>((resolve) => (wake = resolve))
  wake = undefined
  await delay(quietMs, undefined, { signal: stop.signal }).catch(() => {})
  if (stop.signal.aborted) break
  changed = false
  await deploy(folder)
}
await tailing

async function deploy(from: string): Promise<void> {
  const began = performance.now()
  try {
    const { version, url, created, warnings } = await deployFolder(gateway, name, from, stop.signal)
    for (const warning of warnings) log(`warning: ${warning}`)
    const took = `${Math.round(performance.now() - began)} ms`
    log(created ? `deployed ${version} in ${took}: ${url}` : `${version} is what was deployed before: ${url}`)
  } catch (error) {
    if (stop.signal.aborted) return
    const lines = error instanceof DeployError ? error.lines : [(error as Error).message]
    for (const line of lines) log(`error: ${line}`)
    log('not deployed; the version before goes on')
  }
}
