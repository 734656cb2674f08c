/** What uvu-counting.ts tells the wrapper about a test file. */
export type Report = {
  /** Tests registered, skipped ones included. */
  registered: number
  /** `<name>: <first line of the error>` of each test that failed. */
  failures: string[]
}

/** Stands in front of the report, a line of JSON, in the file's output. */
export const reportMark = 'test-file-report '
