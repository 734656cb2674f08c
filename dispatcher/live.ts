/** What the dispatcher has at hand right now; each part may be missing for a while. */
import type { Blobs } from '../shared/blobs.ts'
import type { Bus } from '../shared/bus.ts'
import { Problem } from '../shared/errors.ts'
import { type Database, wasReplaced } from './database.ts'
import type { DispatcherMetrics } from './metrics.ts'
import { Changes, Progress } from './progress.ts'

export class Live {
  bus: Bus | undefined
  blobs: Blobs | undefined
  database: Database | undefined
  /** Why the database takes no writes; undefined while it does. */
  databaseTrouble: string | undefined = 'it is not open yet'
  /** Of the event and of the log stream. */
  readonly events = new Progress()
  readonly logs = new Progress()
  readonly changes = new Changes()
  readonly #metrics: DispatcherMetrics

  constructor(metrics: DispatcherMetrics) {
    this.#metrics = metrics
  }

  get connectedBus(): Bus | undefined {
    return this.bus?.connected ? this.bus : undefined
  }

  /** Runs a query; whatever keeps the database from answering becomes `database_unavailable`. */
  async read<T>(act: (database: Database) => Promise<T>): Promise<T> {
    const { database } = this
    const measured = (on: Database) => this.#metrics.database('read', () => act(on))
    if (database === undefined) throw unavailable(this.databaseTrouble)
    try {
      return await measured(database)
    } catch (cause) {
      if (cause instanceof Problem) throw cause
      if (wasReplaced(cause) && database === this.database) return await measured(database).catch(failed)
      return await failed(cause)
    }
    async function failed(cause: unknown): Promise<never> {
      await database?.failed(cause)
      throw unavailable('a query failed', cause)
    }
  }
}

const unavailable = (reason: string | undefined, cause?: unknown) =>
  new Problem('database_unavailable', {
    detail: `the database cannot answer now: ${reason ?? 'it is being opened'}`,
    retryAfterS: 1,
    cause,
  })
