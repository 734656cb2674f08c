// timeout: 300
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import { createContainerRunner, probeContainer } from '../../../runners/container/index.ts'
import { cacheDirectory } from '../../../scripts/cache-directory.ts'
import { openHost } from '../conformance/host.ts'
import { figures } from './figures.ts'

const dataDir = await mkdtemp(join(tmpdir(), 'vulcan-test-figures-'))
const host = await openHost('docker')
const options = {
  ...{ slots: 4, dataDir, cacheDir: cacheDirectory(process.env), egress: {} },
  ...{ insecureRegistries: [], imageDirectories: [], diskBudgetMb: 20_480 },
  ...(host.env.DOCKER_HOST === undefined ? {} : { dockerHost: host.env.DOCKER_HOST }),
}
const probe =
  host.missing === undefined
    ? await probeContainer('docker', options)
    : { available: false as const, reason: host.missing }
const isReady = probe.available && probe.capabilities.runtimes.includes('node')
await figures({
  isolation: 'docker',
  create: isReady
    ? (metrics) => createContainerRunner('docker', { ...options, metrics })
    : `docker is not available here: ${probe.available ? 'the runtime image for node was not built' : probe.reason}`,
  phases: ['create container', 'start handler'],
})
test.after(async () => {
  await host[Symbol.asyncDispose]()
  await rm(dataDir, { recursive: true, force: true })
})
test.run()
