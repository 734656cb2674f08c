/**
 * Keeps the tables of one stream folded up to the stream’s end: batch by batch, each in one transaction together
 * with the checkpoint. A crash anywhere repeats at most a batch that was never committed.
 */
import { setTimeout as delay } from 'node:timers/promises'
import type { InStatement } from '@libsql/client'
import { eq } from 'drizzle-orm'
import type { Bus } from '../shared/bus.ts'
import { Follower, type StoredMessage, type StreamPlace, StreamReplaced } from '../shared/follow.ts'
import type { Logger } from '../shared/process.ts'
import { preciseNow } from '../shared/tracing.ts'
import { type Database, isHopeless } from './database.ts'
import type { DispatcherMetrics } from './metrics.ts'
import type { Changes, Progress } from './progress.ts'
import { checkpoints } from './schema.ts'

/** A batch is committed at so many messages at the latest. */
const batchMessages = 2_000

/** What one batch does to the database, and to what is remembered of it once it is committed. */
export interface Plan {
  statements: InStatement[]
  /** Workloads it touches. */
  touched: Iterable<string>
  /** Sequences of messages to be counted, by counter. */
  counted: Map<string, number[]>
  /** It is in the database. */
  committed(): void
  /** After `committed`: to count and trace what the messages say. */
  tell(batch: Batch): void
}

/** What is known of a committed batch besides its messages. */
export interface Batch {
  /** Messages up to this sequence were told before: by another process, or from another database. */
  toldTo: number
  messages: number
  /** When it was read, ms since the epoch with fractions. */
  readAt: number
}

/** Up to where this process has told of a stream, whatever became of the database. */
export interface Told {
  /** Creation time of that stream. */
  created: string | null
  seq: number
}

/** How the messages of a stream become rows. */
export interface Projection {
  stream: string
  /** A batch is committed so many milliseconds after its first message, unless a reader hurries it. */
  lingerMs: number
  /** Reads what it needs and decides; changes nothing, as it may be asked again for the same messages. */
  plan(database: Database, messages: StoredMessage[]): Promise<Plan>
  /** Forgets what it remembers of the rows. */
  forget(): void
  /** Empties its tables. */
  clear: string[]
  /** Prefix of its counters. */
  counter: 'events' | 'logs'
}

export interface ProjectContext {
  bus: Bus
  database: Database
  projection: Projection
  progress: Progress
  /** Changed here. */
  told: Told
  changes: Changes
  metrics: DispatcherMetrics
  /** Brings the streams into being where they are missing. */
  ensure(): Promise<void>
  /** Told of every failed try and, with undefined, of the next that succeeds. */
  trouble(error: unknown): void
  log: Logger
}

/** Runs until `signal` is aborted; rejects then with its reason. */
export async function project(context: ProjectContext, signal: AbortSignal): Promise<never> {
  const { bus, database, projection, progress, ensure, log } = context
  const { stream, lingerMs } = projection
  for (;;) {
    const place = await persist(context, signal, () => readPlace(database, stream))
    projection.forget()
    await using follower = new Follower(bus, { stream, place, batch: batchMessages, lingerMs, ensure })
    let isNew = place.created === null
    let inHand = 0
    const behind = () => (follower.behind === undefined ? undefined : follower.behind + inHand)
    progress.restart(place.seq, behind, () => follower.hurry())
    try {
      for (;;) {
        const messages = await follower.next(signal)
        const created = follower.created!
        inHand = messages.length
        const toldBefore = isNew ? (toldOf(context.told, created) ?? follower.heldAtFirst) : undefined
        await commit(context, { messages, created, readAt: preciseNow(), toldBefore }, signal)
        isNew = false
        inHand = 0
        progress.advance(messages.at(-1)!.seq)
      }
    } catch (error) {
      if (!(error instanceof StreamReplaced)) throw error
      // The stream is the truth and the database its projection, so what is not in the stream is not true. Where
      // only the address of the server was wrong, the right one brings everything back that its streams hold.
      log.warn({ stream, reason: error.message }, 'folding the stream anew, from its first message')
      await persist(context, signal, () => clear(context, place))
    }
  }
}

async function readPlace(database: Database, stream: string): Promise<StreamPlace> {
  const [row] = await database.orm.select().from(checkpoints).where(eq(checkpoints.stream, stream))
  return row ?? { seq: 0, at: 0, created: null }
}

/** Unless another dispatcher has done it already. */
async function clear({ database, projection }: ProjectContext, place: StreamPlace): Promise<void> {
  const now = await readPlace(database, projection.stream)
  if (now.created !== place.created || now.seq < place.seq) return
  await database.client.batch(
    [
      ...projection.clear,
      { sql: `DELETE FROM counters WHERE name LIKE ?`, args: [`${projection.counter}.%`] },
      { sql: 'DELETE FROM checkpoints WHERE stream = ?', args: [projection.stream] },
      { sql: 'DELETE FROM told WHERE stream = ?', args: [projection.stream] },
    ],
    'write',
  )
}

interface Taken {
  messages: StoredMessage[]
  /** Creation time of their stream. */
  created: string
  readAt: number
  /** With the first messages of a new database: up to where the stream was told of before it was made. */
  toldBefore: number | undefined
}

const toldOf = (told: Told, created: string): number | undefined =>
  told.created === created ? told.seq : undefined

/** Commits the messages, halving them where one of them cannot be stored, and counting that one out. */
async function commit(context: ProjectContext, taken: Taken, signal: AbortSignal): Promise<void> {
  const { database, projection, changes, metrics, log } = context
  const { messages } = taken
  const { stream } = projection
  const last = messages.at(-1)!
  try {
    const done = await persist(context, signal, async () => {
      const before = performance.now()
      const plan = await projection.plan(database, messages)
      metrics.planned(stream, messages.length, (performance.now() - before) / 1_000)
      const told = await write(context, taken, plan.statements, plan.counted)
      plan.committed()
      changes.committed(plan.touched)
      return { plan, told }
    })
    tell(context, taken, done.plan, done.told)
  } catch (error) {
    if (!isHopeless(error)) throw error
    projection.forget()
    if (messages.length > 1) {
      const half = messages.length >> 1
      await commit(context, { ...taken, messages: messages.slice(0, half) }, signal)
      await commit(context, { ...taken, messages: messages.slice(half) }, signal)
      return
    }
    log.error({ stream, seq: last.seq, err: error }, 'skipped a message that cannot be stored')
    const counted = new Map([['unstorable', [last.seq]]])
    const told = await persist(context, signal, () => write(context, taken, [], counted))
    tell(context, taken, { counted, tell() {} }, told)
  }
}

/** One transaction. Resolves to the sequence up to which messages of the stream were told of before it. */
async function write(
  { database, projection, metrics }: ProjectContext,
  { messages, created, toldBefore }: Taken,
  statements: InStatement[],
  counted: Map<string, number[]>,
): Promise<number> {
  const { stream, counter } = projection
  const last = messages.at(-1)!
  const [first] = await metrics.database(`fold ${counter}`, () =>
    database.write([
      { sql: readTold, args: [stream, created] },
      ...statements,
      ...[...counted].map(([name, seqs]) => count(`${counter}.${name}`, seqs)),
      ...(toldBefore === undefined ? [] : [{ sql: setTold, args: [stream, toldBefore] }]),
      { sql: setCheckpoint, args: [stream, last.seq, last.at, created] },
    ]),
  )
  return Math.max(Number(first![0]![0]), toldBefore ?? 0)
}

/** Counts and traces what is new in a committed batch. */
function tell(
  { projection, told, metrics }: ProjectContext,
  { messages, created, readAt }: Taken,
  plan: Pick<Plan, 'counted' | 'tell'>,
  toldInDatabase: number,
): void {
  const { stream } = projection
  const last = messages.at(-1)!
  const toldTo = Math.max(toldInDatabase, toldOf(told, created) ?? 0)
  if (last.seq <= toldTo) return
  told.created = created
  told.seq = last.seq
  const firstNew = messages.find(({ seq }) => seq > toldTo)!
  metrics.committed(stream, (Date.now() - firstNew.at) / 1_000)
  for (const [name, seqs] of plan.counted)
    metrics.refused(stream, name, seqs.filter((seq) => seq > toldTo).length)
  plan.tell({ toldTo, messages: messages.length, readAt })
}

/**
 * The checkpoint says up to where messages were told of, as whoever moves it tells of those behind it. In a database
 * that was made anew those are not new that were stored before it was made.
 */
const readTold = `SELECT max(
    coalesce((SELECT seq FROM checkpoints WHERE stream = ?1 AND created = ?2), 0),
    coalesce((SELECT seq FROM told WHERE stream = ?1), 0)
  ) AS told`
const setTold = 'INSERT OR IGNORE INTO told (stream, seq) VALUES (?, ?)'
const setCheckpoint = `INSERT INTO checkpoints (stream, seq, at, created) VALUES (?, ?, ?, ?)
  ON CONFLICT (stream) DO UPDATE SET seq = excluded.seq, at = excluded.at, created = excluded.created
  WHERE excluded.seq > seq OR excluded.created <> created`

/** Adds the sequences that are above the last one counted. */
const count = (name: string, seqs: number[]): InStatement => ({
  sql: `INSERT INTO counters (name, value, last_seq)
    SELECT ?1, count(*), max(value) FROM json_each(?2)
    WHERE value > coalesce((SELECT last_seq FROM counters WHERE name = ?1), 0) HAVING count(*) > 0
    ON CONFLICT (name) DO UPDATE SET value = value + excluded.value, last_seq = excluded.last_seq`,
  args: [name, JSON.stringify(seqs)],
})

/** Tries until it succeeds: a locked file, a full disk or a server out of reach passes, and nothing is lost meanwhile. */
async function persist<T>(context: ProjectContext, signal: AbortSignal, act: () => Promise<T>): Promise<T> {
  const { database, projection, trouble, log } = context
  for (let tries = 0; ; tries++) {
    signal.throwIfAborted()
    try {
      const result = await act()
      if (tries > 0) {
        trouble(undefined)
        log.info({ stream: projection.stream, tries }, 'the database takes writes again')
      }
      return result
    } catch (error) {
      signal.throwIfAborted()
      await database.failed(error)
      if (isHopeless(error)) throw error
      trouble(error)
      if (tries % 20 === 0)
        log.warn({ stream: projection.stream, err: error }, 'the database does not take writes')
      await delay(Math.min(2_000, 20 * 2 ** tries), undefined, { signal })
    }
  }
}
