import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { headerBlock, Outbox } from '../../shared/outbox.ts'

const text = (bytes: Uint8Array) => Buffer.from(bytes).toString()

test('messages stand one behind the other, each with its lengths in bytes', () => {
  const outbox = new Outbox()
  assert.ok(outbox.isEmpty)
  outbox.add('a.b', undefined, '', 'größe')
  outbox.add('a.c', '_INBOX.1', headerBlock('X', '1', 'Y', undefined), Uint8Array.of(0x61, 0x0d, 0x0a))
  assert.not.ok(outbox.isEmpty)
  assert.is(
    text(outbox.take().bytes),
    'PUB a.b 7\r\ngröße\r\nHPUB a.c _INBOX.1 18 21\r\nNATS/1.0\r\nX: 1\r\n\r\na\r\n\r\n',
  )
  assert.ok(outbox.isEmpty)
  assert.is(outbox.take().messages, 0)
})

test('what was taken stays as it is, whatever is added later and however large', () => {
  const outbox = new Outbox()
  const taken: [Uint8Array, string][] = []
  for (let n = 0; n < 400; n++) {
    let expected = ''
    for (let k = 0; k <= n % 3; k++) {
      const payload = String.fromCharCode(97 + (n % 26)).repeat(n % 50 === 7 ? 200_000 : 700 + n)
      outbox.add(`s.${n}`, undefined, '', payload)
      expected += `PUB s.${n} ${payload.length}\r\n${payload}\r\n`
    }
    taken.push([outbox.take().bytes, expected])
  }
  for (const [bytes, expected] of taken) assert.ok(text(bytes) === expected)
})

test('nothing can be written into the protocol by a subject or a header', () => {
  const outbox = new Outbox()
  for (const subject of ['', 'a b', 'a\r\nPUB x 0\r\n', 'a\tb']) {
    assert.throws(() => outbox.add(subject, undefined, '', ''), /no subject to publish on/)
    if (subject !== '') assert.throws(() => outbox.add('a', subject, '', ''), /no subject to publish on/)
  }
  assert.ok(outbox.isEmpty)
  assert.is(headerBlock('A', 'x\r\nB: y', 'C', 'ü', 'D', 'z'), 'NATS/1.0\r\nD: z\r\n\r\n')
})

test.run()
