/** The machine’s monotonic clock (ms, with fractions), which runner and children read alike. */

/** What it says where `performance.now()` says 0: of a few readings the one that was disturbed least. */
function findOrigin(): number {
  let origin = 0
  let best = Number.POSITIVE_INFINITY
  for (let i = 0; i < 5; i++) {
    const before = performance.now()
    const now = Number(process.hrtime.bigint()) / 1e6
    const after = performance.now()
    if (after - before >= best) continue
    best = after - before
    origin = now - (before + after) / 2
  }
  return origin
}

const origin = findOrigin()

export const monotonic = (): number => origin + performance.now()

/** Ms since the epoch, as this process counts them. */
export const fromMonotonic = (ms: number): number => ms - origin + performance.timeOrigin
