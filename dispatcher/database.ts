/** Opening the database: a libSQL file or a remote libSQL server, migrated, and watched for being replaced. */
import { mkdir, rename, rm, stat } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { type Client, createClient, type InStatement, LibsqlError } from '@libsql/client'
import { drizzle, type LibSQLDatabase } from 'drizzle-orm/libsql'
import { migrate } from 'drizzle-orm/libsql/migrator'
import Libsql from 'libsql'
import * as schema from './schema.ts'
import { type Returned, Writer } from './writer.ts'

/** Milliseconds between two looks at whether the file is still the one that was opened. */
const watchMs = 500
/** Milliseconds a remote server is given for one request. */
const remoteTimeoutMs = 15_000
/** Milliseconds SQLite itself waits for another process’s lock; it blocks this process meanwhile. */
const busyMs = 100

const synchronous = 'PRAGMA synchronous = NORMAL'
/** Bytes of a page of a new file: rows are some 2 KiB, and with more of them to a page less is written for each. */
const pageSize = 'PRAGMA page_size = 16384'
const migrationsFolder = join(import.meta.dirname, 'migrations')

export interface DatabaseOptions {
  /** `file:/path/to.db`, `libsql://…`, `http(s)://…` or `ws(s)://…` */
  url: string
  /** For a remote server. */
  authToken?: string | undefined
}

/** One opened database. After `lost` it is of no more use: another has to be opened and folded into. */
export interface Database {
  client: Client
  orm: LibSQLDatabase<typeof schema>
  /** One transaction, and what each statement returned. For what is written often, by few different texts. */
  write(statements: InStatement[]): Promise<Returned[]>
  /** Aborted when the file was deleted or replaced, or the tables are gone. */
  lost: AbortSignal
  /** To be told of every error before the next try: some mean that the database is lost. */
  failed(error: unknown): Promise<void>
  close(): void
}

/** Opens and migrates. Rejects when that cannot be done now; a damaged file is moved aside, as it can be rebuilt. */
export async function openDatabase({ url, authToken }: DatabaseOptions): Promise<Database> {
  const path = filePath(url)
  // A write-ahead log that a deleted database left behind is thrown away by SQLite itself.
  if (path !== undefined) await mkdir(dirname(path), { recursive: true })
  const client = createClient({
    url: path === undefined ? url : `file:${path}`,
    ...(authToken === undefined ? {} : { authToken }),
    // A local connection is synchronous, so one is enough, and it keeps its pragmas.
    ...(path === undefined ? { fetch: fetchInTime } : { concurrency: 1, timeout: busyMs }),
  })
  const writer = path === undefined ? undefined : new Writer(path, busyMs, [synchronous])
  const lost = new AbortController()
  let closed = false
  try {
    if (path !== undefined) {
      await client.execute(pageSize)
      await client.execute('PRAGMA journal_mode = WAL')
      // Without an fsync per commit a power loss may take the last commits, never the order of them: the
      // checkpoint goes back together with the rows, and what is missing is folded again from the stream.
      await client.execute(synchronous)
    }
    const orm = drizzle(client, { schema })
    await migrate(orm, { migrationsFolder })
    const opened = path === undefined ? undefined : await inode(path)
    const watch =
      path === undefined
        ? undefined
        : setInterval(async () => {
            if ((await inode(path)) !== opened)
              lost.abort(new Error('the database file was deleted or replaced'))
          }, watchMs)
    return {
      client,
      orm,
      lost: lost.signal,
      async write(statements) {
        if (writer !== undefined) return writer.write(statements)
        const results = await client.batch(statements, 'write')
        return results.map(({ rows }) => rows.map((row) => Array.from(row)))
      },
      async failed(error) {
        if (/no such table/.test(messages(error))) lost.abort(new Error('the tables are gone'))
        if (path === undefined || codeOf(error) === undefined || lost.signal.aborted || closed) return
        if (isDamaged(error)) {
          await moveAside(path)
          lost.abort(new Error('the database file is damaged'))
        } else {
          // libsql 0.5 does not reset a statement that failed: after one SQLITE_BUSY the connection answers every
          // COMMIT with `SQL statements in progress`. Another connection does not.
          await client.reconnect()
          await client.execute(synchronous).catch(() => {})
        }
      },
      close() {
        closed = true
        clearInterval(watch)
        writer?.close()
        client.close()
      },
    }
  } catch (error) {
    client.close()
    if (path !== undefined && isDamaged(error)) await moveAside(path)
    throw error
  }
}

/** The path of a `file:` URL; undefined for a remote one. */
export function filePath(url: string): string | undefined {
  if (!url.startsWith('file:')) return undefined
  return url.startsWith('file:/') ? fileURLToPath(url) : decodeURIComponent(url.slice('file:'.length))
}

const inode = async (path: string): Promise<number | undefined> =>
  await stat(path).then(
    ({ ino }) => ino,
    () => undefined,
  )

async function moveAside(path: string): Promise<void> {
  await rename(path, `${path}.damaged`).catch(() => {})
  for (const end of ['-wal', '-shm']) await rm(path + end, { force: true })
}

const fetchInTime = (request: Request) => fetch(request, { signal: AbortSignal.timeout(remoteTimeoutMs) })

const causes = function* (error: unknown): Generator<unknown> {
  for (let at = error; at !== undefined && at !== null; at = (at as Error).cause) yield at
}
const messages = (error: unknown): string =>
  [...causes(error)].map((one) => (one as Error).message).join(': ')
/** Code of the libSQL error in there; undefined where there is none. */
const codeOf = (error: unknown): string | undefined =>
  [...causes(error)].find(
    (one): one is LibsqlError => one instanceof LibsqlError || one instanceof Libsql.SqliteError,
  )?.code

const isDamaged = (error: unknown): boolean => /^SQLITE_(CORRUPT|NOTADB)/.test(codeOf(error) ?? '')

/** Our own code failed on what a message says: it would fail again. */
export class Unfoldable extends Error {
  override name = 'Unfoldable'
}

/** True where the same statements will fail again however often they are tried. */
export const isHopeless = (error: unknown): boolean =>
  error instanceof Unfoldable ||
  error instanceof RangeError ||
  /^SQLITE_(CONSTRAINT|TOOBIG|MISMATCH|RANGE)/.test(codeOf(error) ?? '')

/** The connection was replaced under the query; asking again is enough. */
export const wasReplaced = (error: unknown): boolean => codeOf(error) === 'CLIENT_CLOSED'
