/**
 * Takes the place of `uvu` in a test file (see uvu-preload.ts) and counts what the file registers, so that the wrapper
 * can tell when uvu ran less than that: a test registered after `run()`, a suite whose `run()` was forgotten. Also
 * keeps the first words of each failure, which uvu loses when an `after.each` hook throws too.
 */
import * as uvu from 'uvu'
import { type Report, reportMark } from './report.ts'

const report: Report = { registered: 0, failures: [] }

function counting<T>(suite: uvu.Test<T>): uvu.Test<T> {
  type Handler = uvu.Callback<T>
  const observed =
    (name: string, handler: Handler): Handler =>
    async (context) => {
      try {
        await handler(context)
      } catch (error) {
        report.failures.push(`${name}: ${String((error as Error)?.message ?? error).split('\n')[0]}`)
        throw error
      }
    }
  const test = (name: string, handler: Handler) => {
    report.registered++
    suite(name, observed(name, handler))
  }
  return Object.assign(test, {
    before: suite.before,
    after: suite.after,
    only: (name: string, handler: Handler) => {
      report.registered++
      suite.only(name, observed(name, handler))
    },
    skip: () => {
      report.registered++
      suite.skip()
    },
    run: () => suite.run(),
  })
}

export const test = counting(uvu.test)
export const suite = <T>(title?: string, context?: T) => counting(uvu.suite(title, context))
export const exec = uvu.exec

process.on('exit', () => process.stdout.write(`\n${reportMark}${JSON.stringify(report)}\n`))
