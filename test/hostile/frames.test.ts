/** Attempts of a child that is wholly in an attacker’s hands: it says what it likes on its pipe. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { EgressGate } from '../../runners/egress.ts'
import { Pool } from '../../runners/isolate/pool.ts'
import type { HttpRequest, Outcome } from '../../runners/runner.ts'
import { encodeMessage, kinds, windowBytes } from '../../shared/guest.ts'
import { isAlive, job, sleep } from '../runners/isolate/support.ts'

/** A child that says it is ready, then answers the first message with these bytes. */
const liar = (replies: Buffer[]) => {
  const file = join(folder, `${++liars}`)
  writeFileSync(file, Buffer.concat(replies))
  const ready = encodeMessage(kinds.ready, 0, ['0']).toString('hex')
  const source = `process.stdout.write(Buffer.from('${ready}', 'hex'))
    process.stdin.once('data', () => process.stdout.write(require('node:fs').readFileSync('${file}')))`
  return { file: process.execPath, args: ['-e', source], names: [], missing: [] }
}
const folder = mkdtempSync(join(tmpdir(), 'vulcan-frames-'))
let liars = 0

interface Seen {
  outcome: Outcome
  heads: unknown[]
  bytes: number
  ended: string
  alive: boolean
}

async function answered(
  replies: Buffer[],
  { isHttp = true, body = false, slow = false } = {},
): Promise<Seen> {
  const gate = new EgressGate()
  const pool = new Pool(liar(replies), { min: 1, max: 1, idleMs: 60_000, warmMb: 64 }, gate)
  const http: HttpRequest = {
    method: 'POST',
    url: 'http://a.test/',
    headers: [],
    body: body ? new Uint8Array(300_000) : null,
    gone: new AbortController().signal,
  }
  const seen = { heads: [] as unknown[], bytes: 0, ended: '' }
  try {
    await pool.filled()
    const [pid] = pool.pids()
    const stop = AbortSignal.timeout(2_000)
    const outcome = await pool.prepare({ ...job('x'), ...(isHttp ? { http } : {}) }).run(stop, {
      onLog() {},
      respond(head) {
        seen.heads.push(head)
        return {
          async write(piece) {
            seen.bytes += piece.length
            if (slow) await new Promise(() => {})
          },
          end() {
            seen.ended ||= 'end'
          },
          fail() {
            seen.ended ||= 'fail'
          },
        }
      },
    })
    await sleep(50)
    return { outcome, ...seen, alive: isAlive(pid!, (path) => readFileSync(path, 'utf8')) }
  } finally {
    await pool.close()
    await gate[Symbol.asyncDispose]()
  }
}

const usage = {
  cause: null,
  message: null,
  stack: null,
  start: 'warm',
  cpu_ms: 1,
  wall_ms: 1,
  memory_mb: 1,
  dropped: [],
}
const done = (more: object = {}, body?: Buffer) =>
  encodeMessage(kinds.done, 1, [JSON.stringify({ status: 'completed', ...usage, ...more }), 'null', body])
const head = (value: object) => encodeMessage(kinds.respond, 1, [JSON.stringify(value)])
const data = (size: number, stream = 1) => encodeMessage(kinds.data, 1, [Buffer.alloc(size)], stream)
const end = (stream = 1) => encodeMessage(kinds.end, 1, [], stream)
const fetched = (value: object, n = 1) => encodeMessage(kinds.fetch, 1, [JSON.stringify(value)], n)
const plain = { status: 200, headers: [['a', 'b']] }
const outgoing = { method: 'GET', url: 'http://127.0.0.1:1/', headers: [], redirect: 'follow', body: 'none' }

test('control: the same child is believed where it keeps to the protocol', async () => {
  const inline = await answered([done({ response: plain }, Buffer.from('hi'))])
  assert.is(inline.outcome.status, 'completed', JSON.stringify(inline.outcome))
  const streamed = await answered([head(plain), data(10), data(20), end(), done()])
  assert.is(streamed.outcome.status, 'completed', JSON.stringify(streamed.outcome))
  assert.equal([streamed.heads, streamed.bytes, streamed.ended], [[plain], 30, 'end'])
  const json = await answered([done()], { isHttp: false })
  assert.is(json.outcome.status, 'completed', JSON.stringify(json.outcome))
  const fetching = await answered([fetched(outgoing), fetched(outgoing, 2), done({ response: plain })])
  assert.is(fetching.outcome.status, 'completed', JSON.stringify(fetching.outcome))
  const taken = await answered([encodeMessage(kinds.credit, 1, ['1'], 0), done({ response: plain })], {
    body: true,
  })
  assert.is(taken.outcome.status, 'completed', JSON.stringify(taken.outcome))
})

const lies: Record<
  string,
  Buffer[] | { replies: Buffer[]; isHttp?: boolean; body?: boolean; slow?: boolean }
> = {
  'a header with a line break in its value': [head({ status: 200, headers: [['a', 'b\r\nset-cookie: c']] })],
  'a header with a line break in its name': [head({ status: 200, headers: [['a\r\nb', 'c']] })],
  'a header with a NUL': [head({ status: 200, headers: [['a', 'b\0']] })],
  'a header of letters that are no bytes': [head({ status: 200, headers: [['a', 'č\u010d\u010a']] })],
  'a header list that is none': [head({ status: 200, headers: { a: 'b' } })],
  'headers without an end': [
    head({ status: 200, headers: Array.from({ length: 70 }, (_, i) => [`h${i}`, 'x'.repeat(1000)]) }),
  ],
  'a status that splits a response': [head({ status: 101, headers: [] })],
  'a status that is no number': [head({ status: '200 OK\r\nx: y', headers: [] })],
  'an inline response with a bad header': [
    done({ response: { status: 200, headers: [['a', '\r\n\r\nbody']] } }),
  ],
  'two heads of one response': [head(plain), head(plain)],
  'a streamed response and an inline one': [head(plain), end(), done({ response: plain })],
  'no response at all': [done()],
  'a response to a call that is not by HTTP': { replies: [head(plain)], isHttp: false },
  'an inline response to a call that is not by HTTP': { replies: [done({ response: plain })], isHttp: false },
  'bytes before a head': [data(10)],
  'more bytes than there is credit for': {
    replies: [head(plain), ...Array.from({ length: 200 }, () => data(60_000))],
    slow: true,
  },
  'bytes after the end': [head(plain), end(), data(10)],
  'two ends': [head(plain), end(), end()],
  'an empty piece': [head(plain), data(0)],
  'a piece that is too large': [head(plain), data(windowBytes / 2)],
  'credit for bytes that were never sent': {
    replies: [encodeMessage(kinds.credit, 1, ['99999999'], 0)],
    body: true,
  },
  'credit that is no number': { replies: [encodeMessage(kinds.credit, 1, ['-5'], 0)], body: true },
  'bytes of a stream that is none': [data(10, 77)],
  'a body for a fetch that has none': [fetched(outgoing), data(10, 2)],
  'a fetch out of its order': [fetched(outgoing, 2)],
  'the same fetch twice': [fetched(outgoing), fetched(outgoing)],
  'a fetch with a line break in a header': [fetched({ ...outgoing, headers: [['a', 'b\r\nhost: c']] })],
  'a fetch with a line break in its method': [fetched({ ...outgoing, method: 'GET / HTTP/1.1\r\nx: y' })],
  'a fetch that is not JSON': [encodeMessage(kinds.fetch, 1, ['{'], 1)],
  'a message about another run': [encodeMessage(kinds.respond, 2, [JSON.stringify(plain)])],
  'a second readiness': [encodeMessage(kinds.ready, 0, ['0'])],
}
for (const [name, lie] of Object.entries(lies)) {
  test(`held: a child sends ${name}`, async () => {
    const { replies, ...options } = Array.isArray(lie) ? { replies: lie } : lie
    const { outcome, alive, heads, ended, bytes } = await answered([...replies], options)
    assert.is(outcome.status === 'failed' && outcome.cause, 'runner_lost', JSON.stringify(outcome))
    assert.not.ok(alive, 'it was left alive')
    assert.ok(heads.length <= 1)
    assert.ok(!/\r|\n|\0/.test(JSON.stringify(heads.map((one) => Object.values(one as object)))))
    assert.ok(bytes <= windowBytes)
    if (heads.length === 1 && !/two ends|after the end|and an inline/.test(name)) assert.is(ended, 'fail')
  })
}

test('the files of this pack are removed', () => rmSync(folder, { recursive: true }))

test.run()
