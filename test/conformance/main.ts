/**
 * Runs published web platform tests against the APIs inside isolates: `npm run conformance -- <folder>`, with
 * `--update` to write the table of docs/conformance.md anew, and `--only=<pattern>` for some paths only.
 */
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { underFlags } from './flags.ts'
import { webCode } from './realm.ts'
import { reasons } from './reasons.ts'
import { type Result, runFile, serveFiles } from './run.ts'
import { apis, filesOf, type Rule, rules } from './tests.ts'

const howToGet = `Give the folder of the web platform tests, the one that holds resources/testharness.js:

  npm run conformance -- <folder>

They stand in Node's repository (nodejs/node) under test/fixtures/wpt, and in web-platform-tests/wpt itself:

  git clone --depth 1 --filter=blob:none --sparse https://github.com/nodejs/node
  cd node && git sparse-checkout set test/fixtures/wpt
`
/** Files under way at once: most of their time is waiting. */
const width = 8
const doc = join(import.meta.dirname, '../../docs/conformance.md')

interface Row {
  name: string
  target: number | undefined
  passed: number
  total: number
  files: number
  excluded: Map<string, Rule>
  failing: Map<string, Result>
}

const percent = (row: { passed: number; total: number }) => (row.total === 0 ? 1 : row.passed / row.total)
const shown = (share: number) => `${(Math.floor(share * 1000) / 10).toFixed(1)} %`
const reasonFor = (path: string) => reasons.find(([pattern]) => pattern.test(path))?.[1]

async function measure(folder: string, only: RegExp | undefined): Promise<Row[]> {
  const code = await webCode()
  const { origin, close } = await serveFiles(folder)
  const rows: Row[] = []
  const jobs: (() => Promise<void>)[] = []
  for (const api of apis) {
    const { run, excluded } = filesOf(api, folder)
    const chosen = run.filter(({ path }) => only?.test(path) !== false)
    const row: Row = {
      ...{ name: api.name, target: api.target, passed: 0, total: 0 },
      ...{ files: chosen.length, excluded, failing: new Map() },
    }
    rows.push(row)
    for (const file of chosen)
      for (const variant of file.variants)
        jobs.push(async () => {
          const result = await runFile(code, { folder, origin }, file, variant)
          row.passed += result.passed
          row.total += result.passed + result.failed.length
          if (result.failed.length === 0) return
          const before = row.failing.get(file.path) ?? { passed: 0, failed: [] }
          before.passed += result.passed
          before.failed.push(...result.failed)
          row.failing.set(file.path, before)
        })
  }
  const work = async () => {
    for (let job = jobs.shift(); job !== undefined; job = jobs.shift()) await job()
  }
  await Promise.all(Array.from({ length: width }, work))
  close()
  return rows.filter((row) => row.files > 0)
}

/** The generated part of the page. */
function page(rows: Row[]): string {
  const cell = (text: string) => text.replaceAll('|', '\\|')
  const lines = ['| API | passed | total | share | files run | excluded |', '|---|--:|--:|--:|--:|--:|']
  for (const row of rows)
    lines.push(
      `| ${row.name} | ${row.passed} | ${row.total} | ${shown(percent(row))} | ${row.files} | ${row.excluded.size} |`,
    )
  lines.push('', '## Files with failing tests', '', '| file | failed | of | reason |', '|---|--:|--:|---|')
  for (const { failing } of rows)
    for (const [path, { passed, failed }] of [...failing].sort(([a], [b]) => (a < b ? -1 : 1)))
      lines.push(
        `| \`${path}\` | ${failed.length} | ${passed + failed.length} | ${cell(reasonFor(path) ?? '')} |`,
      )
  lines.push('', '## Files not run', '')
  for (const [rule, what] of Object.entries(rules)) {
    const count = rows.reduce(
      (sum, { excluded }) => sum + [...excluded.values()].filter((found) => found === rule).length,
      0,
    )
    lines.push(`- ${count}: ${what}.`)
  }
  lines.push('', '| API | needs a DOM | needs workers | needs a server |', '|---|--:|--:|--:|')
  for (const { name, excluded } of rows) {
    const count = (rule: Rule) => [...excluded.values()].filter((found) => found === rule).length
    lines.push(`| ${name} | ${count('dom')} | ${count('worker')} | ${count('server')} |`)
  }
  return lines.join('\n')
}

async function main(): Promise<number> {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { update: { type: 'boolean', default: false }, only: { type: 'string' } },
  })
  const [folder] = positionals
  if (folder === undefined || !existsSync(join(folder, 'resources/testharness.js'))) {
    process.stderr.write(howToGet)
    return 2
  }
  const rows = await measure(folder, values.only === undefined ? undefined : new RegExp(values.only))
  let bad = 0
  for (const row of rows) {
    const share = percent(row)
    const short = row.target !== undefined && share < row.target
    if (short) bad++
    console.log(
      `${row.name.padEnd(24)} ${String(row.passed).padStart(6)} / ${String(row.total).padEnd(6)} ${shown(share).padStart(7)}${short ? `  below ${shown(row.target!)}` : ''}`,
    )
  }
  console.log()
  for (const { failing } of rows)
    for (const [path, { passed, failed }] of failing) {
      const reason = reasonFor(path)
      if (reason === undefined) bad++
      console.log(
        `${path}: ${failed.length} of ${passed + failed.length} failed. ${reason ?? 'NO REASON GIVEN'}`,
      )
      if (reason === undefined || values.only !== undefined)
        for (const { name, message } of failed.slice(0, 5))
          console.log(`    ${name.slice(0, 120)}: ${message.slice(0, 200)}`)
    }
  if (values.update) {
    const [before, , after] = readFileSync(doc, 'utf8').split(/<!-- (?:generated|end) -->\n/)
    writeFileSync(doc, `${before}<!-- generated -->\n${page(rows)}\n<!-- end -->\n${after ?? ''}`)
  }
  return bad === 0 ? 0 : 1
}

underFlags(import.meta.filename)
process.exit(await main())
