import type { Test } from 'uvu'

/** Skips a test and says why; the wrapper prints the reason and fails a skip that has none. */
export function skip<T>(test: Test<T>, name: string, reason: string): void {
  test.skip(name)
  console.log(`SKIP ${name}: ${reason}`)
}
