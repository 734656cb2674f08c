/** Writing to a database file with statements that are prepared once: preparing costs nearly as much as running. */
import type { InStatement } from '@libsql/client'
import Libsql from 'libsql'

/** Texts kept prepared. Whoever writes often has few of them. */
const keptTexts = 32

/** The rows that a statement returned, as arrays of values; integers are numbers or, where too large, wrong. */
export type Returned = unknown[][]

type Prepared = Libsql.Statement<unknown[]>

/** A connection of its own, opened when it is first needed, beside the one that reads. */
export class Writer {
  readonly #path: string
  readonly #busyMs: number
  readonly #pragmas: string[]
  readonly #prepared = new Map<string, Prepared>()
  #connection: Libsql.Database | undefined

  /** @param busyMs how long it waits for another’s lock, blocking this process @param pragmas of every connection */
  constructor(path: string, busyMs: number, pragmas: string[]) {
    this.#path = path
    this.#busyMs = busyMs
    this.#pragmas = pragmas
  }

  /**
   * One transaction: all of it or nothing. After an error the connection is given up with what it had prepared, as
   * libsql 0.5 does not reset a statement that failed; the next write opens another.
   */
  write(statements: readonly InStatement[]): Returned[] {
    const connection = this.#open()
    try {
      connection.exec('BEGIN IMMEDIATE')
      const returned = statements.map((statement) => this.#run(connection, statement))
      connection.exec('COMMIT')
      return returned
    } catch (error) {
      // A connection with unfinished statements ends only with them: its lock would outlive it.
      try {
        connection.exec('ROLLBACK')
      } catch {}
      this.close()
      throw error
    }
  }

  close(): void {
    this.#prepared.clear()
    this.#connection?.close()
    this.#connection = undefined
  }

  #open(): Libsql.Database {
    if (this.#connection !== undefined) return this.#connection
    const connection = new Libsql(this.#path, { timeout: this.#busyMs })
    for (const pragma of this.#pragmas) connection.exec(pragma)
    this.#connection = connection
    return connection
  }

  #run(connection: Libsql.Database, statement: InStatement): Returned {
    const { sql, args = [] } = typeof statement === 'string' ? { sql: statement } : statement
    let prepared = this.#prepared.get(sql)
    if (prepared === undefined) {
      if (this.#prepared.size >= keptTexts) this.#prepared.clear()
      prepared = connection.prepare(sql)
      if (prepared.reader) prepared.raw()
      this.#prepared.set(sql, prepared)
    }
    if (prepared.reader) return prepared.all(args) as Returned
    prepared.run(args)
    return []
  }
}
