/** What runsc’s own log says of how a box ended. */
import { BoxError, type BoxSpec } from '../engine.ts'

/**
 * The sandbox died under the user’s process, so that nobody knows how that would have ended. `panic`: what the sentry
 * said when it gave up by itself.
 *
 * runsc is told the end by the sandbox. Where that is gone before it told, its own end says the same: it exits with
 * 128 + n where signal n ended the user’s process. Only where a signal ended the sandbox itself is nothing known.
 */
export function isLost(log: string, panic: string): boolean {
  const status = /Exiting with status: (\d+)/.exec(log)?.[1]
  if (status === undefined || panic !== '') return true
  // wait(2): the low bits are those of a signal.
  return (Number(status) & 0x7f) !== 0 && /Wait (?:RPC to|on) container .* failed/.test(log)
}

/** Why runsc gave up; undefined where it did not say. */
export const fatal = (log: string): string | undefined => /FATAL ERROR: (.*)/.exec(log)?.[1]

/** What the loader of gVisor says of a command that is no program. */
const notThere =
  /error finding executable|failed to load .*: no such file or directory|failed to load .*: not a directory/
const notExecutable = /failed to load .*: (.*)$/
const noDirectory = /(?:working directory|chdir|cwd).*: (.*)$/

/** Why the user’s process could not be started. */
export function startError(
  name: string,
  { argv, cwd }: Pick<BoxSpec, 'argv' | 'cwd'>,
  why: string,
): BoxError {
  const command = JSON.stringify(argv[0])
  if (notThere.test(why))
    return new BoxError('user', `${command} is not in the image, or its interpreter is not`)
  const refused = notExecutable.exec(why)
  if (refused) return new BoxError('user', `${command} cannot be executed: ${refused[1]}`)
  const directory = noDirectory.exec(why)
  if (directory) return new BoxError('user', `the working directory ${JSON.stringify(cwd)}: ${directory[1]}`)
  return new BoxError('engine', `runsc could not start ${name}: ${why}`)
}
