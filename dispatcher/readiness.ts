/** Whether the dispatcher’s parts can do what they are for. */
import type { DispatcherReadiness } from '../shared/reads.ts'
import type { Live } from './live.ts'

/** Messages not yet folded, up to which the fold counts as ready. */
const readyLag = 20_000

export function partsOf(live: Live): DispatcherReadiness['parts'] {
  const lagEvents = live.events.lag
  const lagLogs = live.logs.lag
  const bus = live.connectedBus !== undefined
  const database = live.database !== undefined && live.databaseTrouble === undefined
  const fold = live.events.caughtUp && (lagEvents ?? 0) <= readyLag
  return {
    bus: { ready: bus, reason: bus ? null : 'not connected to the message bus' },
    database: { ready: database, reason: live.databaseTrouble ?? null },
    fold: { ready: fold, lag_events: lagEvents ?? null, lag_logs: lagLogs ?? null },
  }
}
