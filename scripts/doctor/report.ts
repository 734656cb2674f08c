/** What the doctor finds, and how it stands on the screen. */

/**
 * `ok`; `warn`: works, with something to know; `bad`: does not work here and was wanted; `off`: is not there, and
 * nobody asked for it.
 */
export type State = 'ok' | 'warn' | 'bad' | 'off'

export interface Finding {
  state: State
  what: string
  says: string
  /** A command or words that put it right, and what it is for where that is not the finding itself. */
  fixes?: string[]
}

const marks: Record<State, string> = { ok: 'ok', warn: '!', bad: 'BAD', off: '-' }
const columns = 110

/** Lines of a finding: mark, what, what is said; below it what helps. None is longer than a screen is wide. */
export function linesOf({ state, what, says, fixes = [] }: Finding): string[] {
  const indent = ' '.repeat(19)
  const head = `  ${marks[state].padEnd(4)} ${what.padEnd(12)}`
  return [...wrap(head, says, indent), ...fixes.flatMap((fix) => wrap(`${indent}→ `, fix, `${indent}  `))]
}

/** Words that are wider than the room stay whole: a path is to be copied. */
function wrap(head: string, text: string, indent: string): string[] {
  const lines: string[] = []
  let line = head.trimEnd().padEnd(head.length)
  let isEmpty = true
  for (const word of printable(text).split(' ')) {
    if (!isEmpty && line.length + 1 + word.length > columns) {
      lines.push(line)
      line = indent
      isEmpty = true
    }
    line += isEmpty ? word : ` ${word}`
    isEmpty = false
  }
  return [...lines, line.trimEnd()]
}

/** What programs say of themselves goes to a terminal. */
const printable = (text: string): string => text.replace(/\s+/g, ' ').replace(/\p{Cc}/gu, '')

/** 1 where something that was wanted does not work. */
export const exitCode = (findings: readonly Finding[]): 0 | 1 =>
  findings.some(({ state }) => state === 'bad') ? 1 : 0
