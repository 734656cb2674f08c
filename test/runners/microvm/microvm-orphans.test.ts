// timeout: 300
import { test } from 'uvu'
import { orphans } from '../container/orphans.ts'

const seed = Number(process.env.VULCAN_SEED ?? Date.now() % 1_000_000)
await orphans('microvm', { seed, runs: 8, kills: 2, width: 4 })
test.run()
