/**
 * From the user’s source to JavaScript, with errors a user can act on. Runs in the sandbox child: source text is
 * as hostile as the code in it.
 */
import { stripTypeScriptTypes } from 'node:module'

/** The code cannot be run as it is; `message` says what and where. */
export class InvalidCode extends Error {
  override name = 'InvalidCode'
  readonly reason: 'invalid_workload' | 'oom'
  constructor(message: string, reason: 'invalid_workload' | 'oom' = 'invalid_workload') {
    super(message)
    this.reason = reason
  }
}

export const sourceName = (typescript: boolean) => (typescript ? 'index.ts' : 'index.js')

/** Blanks the types out, so that lines and columns stay what they were. Throws `InvalidCode`. */
export function stripTypes(code: string): string {
  try {
    return stripTypeScriptTypes(code, { mode: 'strip' })
  } catch (error) {
    const { message, stack = '' } = error as Error
    // Node puts the place in front of the stack: `:line`, the source around it, a line of carets.
    const line = /^:(\d+)\n/.exec(stack)?.[1]
    const caret = /^( *)\^+$/m.exec(stack)?.[1]
    const at =
      line === undefined ? '' : ` (index.ts:${line}${caret === undefined ? '' : `:${caret.length + 1}`})`
    throw new InvalidCode(`${message}${at}`)
  }
}

/** isolated-vm writes the place behind the message, in brackets. */
export function syntaxError(error: unknown): InvalidCode {
  const { name, message } = error as Error
  return new InvalidCode(`${name}: ${message.replace(/ \[([^\]]+:\d+:\d+)\]$/, ' ($1)')}`)
}

/** The stack as the user should see it: without the frames of the guest’s own code and of the host that called it. */
export function userStack(stack: string): string {
  const lines = stack.split('\n')
  const boundary = lines.findIndex((line) => line.includes('(<isolated-vm boundary>)'))
  return lines
    .slice(0, boundary < 0 ? lines.length : boundary)
    .filter((line) => !/^\s+at .*vulcan:(?:guest|hook|main|node|web)/.test(line))
    .join('\n')
}
