// npm test [-- [--in <folder>] [part of a path…]]   every test/**/*.test.ts, two at once, 180 s a file unless it asks for more
// npm run soak [-- …]                               every test/**/*.soak.ts, 12 h a file
//
// With CI set, up to two failed files are run once more, alone, and both runs are shown.
//
// The last line is `N passed, N failed, N skipped`; the exit code is 1 when something failed.
import { resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { cacheDirectory } from './cache-directory.ts'
import { ensureHostTools, ensureTestTools } from './setup.ts'
import { closingLine, findTests, runTests } from './testing/run-tests.ts'

const root = resolve(import.meta.dirname, '..')
const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { in: { type: 'string', default: root } },
})
const isSoak = positionals[0] === 'soak'
const filters = isSoak ? positionals.slice(1) : positionals
const folder = resolve(values.in)

const stop = new AbortController()
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => stop.abort())

let counts = { passed: 0, failed: 1, skipped: 0 }
try {
  const host = { cacheDir: cacheDirectory(process.env), log: console.log, env: process.env }
  await ensureHostTools(host)
  await ensureTestTools(host)
  const files = findTests(folder, isSoak ? 'test/**/*.soak.ts' : 'test/**/*.test.ts', filters)
  if (files.length === 0) throw new Error(`no test file matches ${filters.join(', ') || 'at all'}`)
  counts = await runTests({
    files,
    root: folder,
    timeoutMs: isSoak ? 12 * 3_600_000 : 180_000,
    log: console.log,
    lanes: isSoak ? 1 : 2,
    live: isSoak,
    again: process.env.CI && !isSoak ? 2 : 0,
    signal: stop.signal,
  })
} catch (error) {
  console.log(error instanceof Error ? error.message : error)
}
console.log(closingLine(counts))
process.exitCode = stop.signal.aborted ? 130 : counts.failed > 0 ? 1 : 0
