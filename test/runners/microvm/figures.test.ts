// timeout: 600
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import { createMicrovmRunner, probeMicrovm } from '../../../runners/microvm/index.ts'
import { cacheDirectory } from '../../../scripts/cache-directory.ts'
import { figures } from '../container/figures.ts'

const dataDir = await mkdtemp(join(tmpdir(), 'vulcan-test-figures-'))
const options = {
  ...{ slots: 4, dataDir, cacheDir: cacheDirectory(process.env), egress: {} },
  ...{ insecureRegistries: [], imageDirectories: [], diskBudgetMb: 20_480, snapshots: true },
  pool: { count: 4, memoryMb: 1_024, ageMs: 600_000 },
}
const probe = await probeMicrovm(options)
const isReady = probe.available && probe.capabilities.runtimes.includes('node')
await figures({
  isolation: 'microvm',
  create: isReady
    ? (metrics) => createMicrovmRunner({ ...options, metrics })
    : `microvm is not available here: ${probe.available ? 'the runtime image for node was not built' : probe.reason}`,
  phases: ['restore machine', 'mount files'],
})
test.after(() => rm(dataDir, { recursive: true, force: true }))
test.run()
