import { PassThrough } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { LineSplitter, Pace } from '../../../runners/container/lines.ts'
import { markOf } from '../../../runners/container/protocol.ts'

function split(chunks: (string | Buffer)[]): string[] {
  const seen: string[] = []
  const lines = new LineSplitter(
    (text) => seen.push(text),
    (mark) => seen.push(`mark ${mark}`),
  )
  for (const chunk of chunks) lines.push(Buffer.from(chunk as string))
  lines.end()
  return seen
}

test('lines, however they are cut into chunks', () => {
  const text = 'one\n\nthree é\r\nfour'
  const wanted = ['one', '', 'three é', 'four']
  assert.equal(split([text]), wanted)
  assert.equal(split([...Buffer.from(text)].map((byte) => Buffer.from([byte]))), wanted)
})

test('marks are found wherever they stand, and are no lines', () => {
  assert.equal(split(['a\n', markOf('m1'), 'b', markOf('m2'), 'c\n']), ['a', 'mark m1', 'b', 'mark m2', 'c'])
  assert.equal(split([`x${markOf('m1').slice(0, 4)}`, markOf('m1').slice(4)]), ['x', 'mark m1'])
  const long = 'x'.repeat(300_000)
  const seen = split([long, markOf('m1')])
  assert.is(seen.length, 2)
  assert.match(seen[0]!, /\[line cut: it had 300000 bytes\]$/)
  assert.is(seen[1], 'mark m1')
})

test('a line without end holds no more memory than a line', () => {
  const seen = split([...Array<string>(200).fill('y'.repeat(64 * 1024)), '\nnext\n'])
  assert.is(seen.length, 2)
  assert.match(seen[0]!, new RegExp(`it had ${200 * 64 * 1024} bytes`))
  assert.is(seen[1], 'next')
})

test('a flood of lines is paid for, also where it comes as one piece', async () => {
  const stream = new PassThrough({ highWaterMark: 2 ** 22 })
  const pace = new Pace(stream)
  let count = 0
  const lines = new LineSplitter(() => count++)
  stream.on('data', (chunk: Buffer) => pace.spend(lines.push(chunk)))
  for (let i = 0; i < 100; i++) stream.write(Buffer.alloc(64 * 1024, '\n'))
  await sleep(2_000)
  stream.destroy()
  assert.ok(count >= 64 * 1024)
  // Without a hold it would be all 6.5 million; two seconds carry 160,000.
  assert.ok(count < 600_000, `${count} lines`)
})

test('a character is not cut in two', () => {
  const [line] = split([`${'x'.repeat(65_535)}éé\n`])
  assert.not.match(line!, /\ufffd/)
})

test.run()
