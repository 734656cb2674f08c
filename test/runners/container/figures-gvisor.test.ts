// timeout: 300
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import { createContainerRunner, probeContainer } from '../../../runners/container/index.ts'
import { cacheDirectory } from '../../../scripts/cache-directory.ts'
import { figures } from './figures.ts'

const dataDir = await mkdtemp(join(tmpdir(), 'vulcan-test-figures-'))
const options = {
  ...{ slots: 4, dataDir, cacheDir: cacheDirectory(process.env), egress: {} },
  ...{ insecureRegistries: [], imageDirectories: [], diskBudgetMb: 20_480 },
}
const probe = await probeContainer('gvisor', options)
const isReady = probe.available && probe.capabilities.runtimes.includes('node')
await figures({
  isolation: 'gvisor',
  create: isReady
    ? (metrics) => createContainerRunner('gvisor', { ...options, metrics })
    : `gvisor is not available here: ${probe.available ? 'the runtime image for node was not built' : probe.reason}`,
  phases: ['create container', 'start handler'],
})
test.after(() => rm(dataDir, { recursive: true, force: true }))
test.run()
