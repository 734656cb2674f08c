import { spawnSync } from 'node:child_process'
import pino from 'pino'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { type LogOptions, loggerSettings } from '../../shared/process.ts'

// biome-ignore lint/suspicious/noExplicitAny: lines are looked into field by field.
type Line = any

/** What a logger writes, as text and parsed. */
function logger(options: Partial<LogOptions> = {}) {
  const texts: string[] = []
  const stream = { write: (text: string) => void texts.push(text) }
  const log = pino(loggerSettings('vulcan-test', { level: 'debug', ...options }), stream)
  return { log, texts, last: (): Line => JSON.parse(texts.at(-1)!) }
}

test('a line is JSON with its level in words, its time, its service and its process', () => {
  const { log, last, texts } = logger({ level: 'info', fields: { process: 'gateway-1' } })
  log.warn({ workload: 'w', trace_id: 't' }, 'it is slow')
  const { time, ...rest } = last()
  assert.ok(Math.abs(Date.parse(time) - Date.now()) < 60_000)
  assert.equal(rest, {
    level: 'warn',
    service: 'vulcan-test',
    process: 'gateway-1',
    workload: 'w',
    trace_id: 't',
    msg: 'it is slow',
  })
  log.debug('not shown')
  assert.is(texts.length, 1)
  assert.match(texts[0]!, /\n$/)
})

test('credentials are not written, at whatever depth they stand', () => {
  const { log, last, texts } = logger()
  log.info(
    {
      headers: { Authorization: 'Bearer abcdefgh', cookie: ['a=hunter22'], accept: 'text/html' },
      options: { nested: [{ password: 'hunter22', user: 'me' }], apiKey: 'hunter22', token: null },
    },
    'asked',
  )
  const line = last()
  assert.is(line.headers.accept, 'text/html')
  assert.is(line.options.nested[0].user, 'me')
  assert.is(line.options.token, null)
  assert.not.match(texts.join(), /hunter22|abcdefgh/)
})

test('credentials in URLs and headers inside of texts are not written, nor the secrets that are known', () => {
  const { log, texts, last } = logger({ secrets: ['s3cret"key/+='] })
  log.error(
    { err: new Error('no answer from nats://vulcan:hunter22@127.0.0.1:4222, https://token@host/') },
    'authorization: Bearer abcdefgh.ij with s3cret"key/+= and s3cret%22key%2F%2B%3D',
  )
  assert.not.match(texts.join(), /hunter22|token@|abcdefgh|s3cret/)
  assert.match(last().err.message, /127\.0\.0\.1:4222/)
  assert.match(last().msg, /^authorization: Bearer \[redacted\] with \[redacted\] and \[redacted\]$/)
})

test('an error is told with its cause, its code and its stack, and without what else hangs on it', () => {
  const { log, last, texts } = logger()
  const cause = Object.assign(new TypeError('no such host'), { code: 'ENOTFOUND' })
  const error = Object.assign(new Error('cannot fetch', { cause }), { request: { body: 'hunter22' } })
  log.error({ err: error }, 'failed')
  const { err } = last()
  assert.is(err.type, 'Error')
  assert.is(err.message, 'cannot fetch')
  assert.match(err.stack, /process\.test/)
  assert.equal(
    [err.cause.type, err.cause.message, err.cause.code],
    ['TypeError', 'no such host', 'ENOTFOUND'],
  )
  assert.not.match(texts.join(), /hunter22/)
  log.error(new AggregateError([cause], 'all of them'))
  assert.is(last().err.errors[0].code, 'ENOTFOUND')
})

test('lines stay within bounds, and what refers to itself does not matter', () => {
  const { log, texts } = logger()
  const circle: Record<string, unknown> = { text: 'x'.repeat(100_000) }
  circle.circle = circle
  const error = new Error('y'.repeat(100_000))
  error.cause = error
  log.info({ circle, err: error, list: Array.from({ length: 10_000 }, () => 'z') }, 'large')
  assert.ok(texts[0]!.length < 500_000, String(texts[0]!.length))
  JSON.parse(texts[0]!)
})

/** Output of a process that logs one line. */
const printed = (options: LogOptions) =>
  spawnSync(
    process.execPath,
    [
      '--input-type=module',
      '-e',
      `import { makeLogger } from '${import.meta.resolve('../../shared/process.ts')}'
       const log = await makeLogger('vulcan-test', ${JSON.stringify(options)})
       log.warn({ workload: 'w1', password: 'hunter22' }, 'at nats://a:hunter22@host')`,
    ],
    { encoding: 'utf8' },
  ).stdout

test('into a pipe goes JSON, for people lines, redacted alike', () => {
  const json = printed({ level: 'info' })
  assert.is(JSON.parse(json).level, 'warn')
  const pretty = printed({ level: 'info', format: 'pretty' })
  assert.match(pretty, /WARN.*at nats:/)
  assert.match(pretty, /workload: "w1"/)
  assert.not(pretty.includes('\u001b'))
  const color = printed({ level: 'info', format: 'color' })
  assert.ok(color.includes('\u001b['))
  for (const text of [json, pretty, color]) assert.not.match(text, /hunter22/)
})

test.run()
