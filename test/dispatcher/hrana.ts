/**
 * A remote libSQL server, as small as a test can have it: Hrana 2 over HTTP
 * (https://github.com/tursodatabase/libsql/blob/main/docs/HRANA_2_SPEC.md) upon SQLite in memory.
 */
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { DatabaseSync } from 'node:sqlite'

interface Value {
  type: 'null' | 'integer' | 'float' | 'text' | 'blob'
  value?: string | number
}
interface Stmt {
  sql?: string
  /** Of a text that was sent before in the same request. */
  sql_id?: number
  args?: Value[]
}
type Condition =
  | { type: 'ok' | 'error'; step: number }
  | { type: 'not'; cond: Condition }
  | { type: 'and' | 'or'; conds: Condition[] }
  | { type: 'is_autocommit' }
type Request =
  | { type: 'execute'; stmt: Stmt }
  | { type: 'batch'; batch: { steps: { condition?: Condition | null; stmt: Stmt }[] } }
  | { type: 'sequence'; sql: string }
  | { type: 'store_sql'; sql_id: number; sql: string }
  | { type: 'close' | 'get_autocommit' | 'close_sql' }

const fromValue = ({ type, value }: Value) =>
  type === 'null' ? null : type === 'integer' ? BigInt(value as string) : (value as string | number)
const toValue = (value: unknown): Value =>
  value === null
    ? { type: 'null' }
    : typeof value === 'bigint'
      ? { type: 'integer', value: String(value) }
      : typeof value === 'number'
        ? { type: 'float', value }
        : { type: 'text', value: String(value) }

export type RemoteDatabase = AsyncDisposable & {
  url: string
  database: DatabaseSync
  /** While true, every request is answered with 503. */
  down: boolean
}

export async function startRemoteDatabase(): Promise<RemoteDatabase> {
  const database = new DatabaseSync(':memory:')
  const texts = new Map<number | undefined, string>()
  const execute = ({ sql, sql_id, args = [] }: Stmt) => {
    const statement = database.prepare(sql ?? texts.get(sql_id)!)
    statement.setReadBigInts(true)
    statement.setReturnArrays(true)
    const columns = statement.columns()
    const rows = statement.all(...args.map(fromValue)) as unknown as unknown[][]
    return {
      cols: columns.map(({ name }) => ({ name, decltype: null })),
      rows: rows.map((row) => row.map(toValue)),
      affected_row_count: 0,
      last_insert_rowid: null,
    }
  }
  const errorOf = (error: unknown) => ({ message: (error as Error).message, code: 'SQLITE_ERROR' })
  const answer = (request: Request) => {
    switch (request.type) {
      case 'execute':
        return { type: 'execute', result: execute(request.stmt) }
      case 'store_sql':
        texts.set(request.sql_id, request.sql)
        return { type: 'store_sql' }
      case 'sequence':
        database.exec(request.sql)
        return { type: 'sequence' }
      case 'batch': {
        const results: unknown[] = []
        const errors: unknown[] = []
        const holds = (condition: Condition): boolean => {
          switch (condition.type) {
            case 'ok':
              return results[condition.step] !== null
            case 'error':
              return errors[condition.step] !== null
            case 'not':
              return !holds(condition.cond)
            case 'and':
              return condition.conds.every(holds)
            case 'or':
              return condition.conds.some(holds)
            case 'is_autocommit':
              return !database.isTransaction
          }
        }
        for (const { condition, stmt } of request.batch.steps) {
          let result: unknown = null
          let error: unknown = null
          try {
            if (!condition || holds(condition)) result = execute(stmt)
          } catch (cause) {
            error = errorOf(cause)
          }
          results.push(result)
          errors.push(error)
        }
        return { type: 'batch', result: { step_results: results, step_errors: errors } }
      }
      default:
        return { type: request.type, is_autocommit: !database.isTransaction }
    }
  }
  const remote = { url: '', database, down: false }
  const server = createServer(async (request, response) => {
    let body = ''
    for await (const chunk of request) body += chunk
    if (remote.down) return response.writeHead(503).end()
    if (request.method === 'GET') return response.writeHead(request.url === '/v2' ? 200 : 404).end()
    const { requests } = JSON.parse(body) as { requests: Request[] }
    const results = requests.map((one) => {
      try {
        return { type: 'ok', response: answer(one) }
      } catch (error) {
        return { type: 'error', error: errorOf(error) }
      }
    })
    const open = requests.at(-1)?.type === 'close' ? null : 'open'
    response
      .writeHead(200, { 'content-type': 'application/json' })
      .end(JSON.stringify({ baton: open, base_url: null, results }))
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  remote.url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  return Object.assign(remote, {
    async [Symbol.asyncDispose]() {
      server.closeAllConnections()
      await new Promise((resolve) => server.close(resolve))
      database.close()
    },
  })
}
