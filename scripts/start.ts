import { deployExamples } from './examples.ts'
import { tellOffers } from './isolations.ts'
import { type Platform, platformConfig, StartError, startPlatform } from './platform.ts'
import { ensureBubblewrap } from './setup.ts'
import { NotReadyError } from './supervisor.ts'

/** One Ctrl-C arrives several times, from the terminal and forwarded by npm; only a later one is a second wish. */
const repeatedSignalMs = 1_000

const log = (line: string) => void process.stdout.write(`${line}\n`)
// The terminal may go away before the platform has stopped.
process.stdout.on('error', () => {})

let platform: Platform | undefined
const stop = new AbortController()
let askedAt = Number.POSITIVE_INFINITY
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
  process.on(signal, () => {
    if (signal === 'SIGINT' && performance.now() - askedAt > repeatedSignalMs) {
      platform?.supervisor.kill()
      process.exit(130)
    }
    if (stop.signal.aborted) return
    askedAt = performance.now()
    log('stopping (Ctrl-C again to stop at once)')
    stop.abort()
  })
}

try {
  const config = platformConfig({ ...forPeople(), ...process.env })
  await ensureBubblewrap({ log, env: process.env })
  platform = await startPlatform(config, { log, signal: stop.signal })
  // biome-ignore lint/suspicious/noTemplateCurlyInString: it is the code of a workload
  const workload = { code: 'export default ({ name }) => `hello, ${name}`', input: { name: 'vulcan' } }
  log(`
vulcan is ready
  http  ${platform.url}
  nats  ${platform.natsUrl.replace(/\/\/.*@/, '//')}
  data  ${platform.dataDir}

  curl -s ${platform.url}/v1/workloads -H 'content-type: application/json' -d '${JSON.stringify(workload)}'
`)
  log('isolations')
  void tellOffers(platform.url, { started: platform.isolations, env: process.env }, log, stop.signal)
  if (!stop.signal.aborted) void showExamples(platform.url)
  if (!stop.signal.aborted) {
    await new Promise((resolve) => stop.signal.addEventListener('abort', resolve, { once: true }))
  }
  await platform.stop()
  log('stopped')
} catch (error) {
  const expected = error instanceof StartError || error instanceof NotReadyError
  if (!stop.signal.aborted) {
    console.error(expected ? `vulcan: ${error.message}` : error)
    process.exitCode = 1
  }
}

/** What the processes write goes through a pipe, and still to a terminal. */
function forPeople(): NodeJS.ProcessEnv {
  if (!process.stdout.isTTY) return {}
  return { VULCAN_LOG_FORMAT: process.env.NO_COLOR ? 'pretty' : 'color' }
}

/** In the background: what is missing for an example, npm's registry say, is no reason not to run. */
async function showExamples(url: string): Promise<void> {
  try {
    await deployExamples(url, log, stop.signal)
    const answer = await fetch(`${url}/v1/functions/hello-js`, { signal: stop.signal })
    if (answer.ok) log(`\n  curl -s '${url}/fn/hello-js?name=vulcan'\n`)
  } catch (error) {
    if (!stop.signal.aborted) log(`the examples could not be deployed: ${(error as Error).message}`)
  }
}
