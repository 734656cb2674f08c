import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { fatal, isLost, startError } from '../../../runners/container/gvisor/report.ts'

const line = (text: string) => `W1121 05:54:41.664800   29265 sandbox.go:1248] ${text}\n`
const ended = (status: number) => line(`Exiting with status: ${status}`)
const failed = line(
  'Wait RPC to container "b1" failed: urpc method "containerManager.Wait" failed: EOF. Will try …',
)
const refused = line('Wait on container "b1" failed: connecting to control server at PID 12: … Will try …')

test('a box is lost where its sandbox was ended by a signal, or said nothing, or panicked', () => {
  for (const [log, panic, lost] of [
    [ended(7 << 8), '', false],
    [ended(9), '', false],
    // The sandbox ended before it told, and in good order: with what the process ended with.
    [failed + ended(7 << 8), '', false],
    [refused + ended(137 << 8), '', false],
    [failed + ended(9), '', true],
    [refused + ended(9), '', true],
    [failed + ended(2 << 8), 'panic: out of ideas', true],
    ['', '', true],
  ] as const)
    assert.is(isLost(log, panic), lost, log)
})

test('whose fault it is that a process did not start', () => {
  const begun = 'running container: starting container: starting root container: starting sandbox: '
  const spec = { argv: ['run', 'it'], cwd: '/' }
  for (const [why, fault] of [
    [`${begun}creating process: failed to load /run: no such file or directory`, 'user'],
    [`${begun}error finding executable "run" in PATH [/bin]: no such file or directory`, 'user'],
    [`${begun}creating process: failed to load /run: exec format error`, 'user'],
    [
      'creating container: cannot create gofer process: gofer: fork/exec /proc/self/exe: out of memory',
      'engine',
    ],
    ['runsc ended with SIGKILL', 'engine'],
  ] as const) {
    assert.is(fatal(line(`FATAL ERROR: ${why}`)), why)
    assert.is(startError('b1', spec, why).fault, fault, why)
  }
  assert.is(fatal(ended(0)), undefined)
})

test.run()
