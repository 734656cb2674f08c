/** What the attempts of every isolation say of their runs in the same words. */
import type { Usage } from '../../shared/workload.ts'

/** Of which nothing is known. */
export const unknownUsage: Usage = {
  cpu_ms: null,
  memory_peak_mb: null,
  disk_read_bytes: null,
  disk_written_bytes: null,
  network_received_bytes: null,
  network_sent_bytes: null,
}

/** Of an attempt whose code never began. */
export const nothingRan = { usage: unknownUsage, start: 'cold' as const }

/** To a thousandth. */
export const round = (amount: number): number => Math.round(amount * 1000) / 1000

let clockMs = 0
let clockText = ''
/** Now as RFC 3339, formatted once per ms. */
export function timestamp(): string {
  const now = Date.now()
  if (now !== clockMs) {
    clockMs = now
    clockText = new Date(now).toISOString()
  }
  return clockText
}
