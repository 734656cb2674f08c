import { test } from 'uvu'
import { orphans } from './orphans.ts'

const seed = Number(process.env.VULCAN_SEED ?? Date.now() % 1_000_000)
await orphans('gvisor', { seed, runs: 1_000, kills: 100 })
test.run()
