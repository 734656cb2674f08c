// npm run doctor [-- isolate | gvisor | docker | microvm …]
//
// One screen: what works on this host, what is missing and the command that brings it. The exit code is 1 where
// something wanted does not work: the isolations that are named here, else those of VULCAN_ISOLATIONS, else those that
// `npm start` would start a runner for. Changes nothing.
import { checkClock, checkDisk, checkPorts } from './doctor/host.ts'
import { tryIsolation } from './doctor/isolations.ts'
import { exitCode, type Finding, linesOf } from './doctor/report.ts'
import { checkNatsServer, checkVersions } from './doctor/versions.ts'
import { isolations, type OfferedIsolation } from './isolations.ts'
import { platformConfig, StartError } from './platform.ts'

const stop = new AbortController()
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => stop.abort())

try {
  const findings = await examine(process.argv.slice(2))
  process.exitCode = stop.signal.aborted ? 130 : exitCode(findings)
} catch (error) {
  console.error(error instanceof StartError ? `vulcan: ${error.message}` : error)
  process.exitCode = 1
}

async function examine(named: string[]): Promise<Finding[]> {
  const unknown = named.filter((name) => !(isolations as readonly string[]).includes(name))
  if (unknown.length > 0)
    throw new StartError(`unknown: ${unknown.join(', ')}. There are: ${isolations.join(', ')}`)
  const config = platformConfig(process.env)
  const wanted = named.length > 0 ? (named as OfferedIsolation[]) : config.isolations
  const all: Finding[] = []
  const show = (findings: Finding[]) => {
    all.push(...findings)
    for (const line of findings.flatMap(linesOf)) console.log(line)
  }

  console.log('host')
  show(await checkVersions(config))
  show([await checkNatsServer(config)])
  show(await checkDisk(config))
  show([await checkClock(process.env)])
  console.log('ports')
  show(await checkPorts(config))
  console.log('isolations (each is tried)')
  // One after the other: they measure what they may take of the processor.
  for (const isolation of isolations) {
    const options = { config, wanted: wanted.includes(isolation), signal: stop.signal }
    const finding = await tryIsolation(isolation, options)
    if (stop.signal.aborted) return all
    show([finding])
  }
  const bad = all.filter(({ state }) => state === 'bad').map(({ what }) => what)
  console.log(bad.length === 0 ? '\nall that is wanted works' : `\nnot working: ${bad.join(', ')}`)
  return all
}
