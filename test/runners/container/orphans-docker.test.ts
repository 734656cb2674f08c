// timeout: 400
import { test } from 'uvu'
import { orphans } from './orphans.ts'

const seed = Number(process.env.VULCAN_SEED ?? Date.now() % 1_000_000)
await orphans('docker', { seed, runs: 40, kills: 4 })
test.run()
