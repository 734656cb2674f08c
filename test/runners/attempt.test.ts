import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Bundles } from '../../runners/bundles.ts'
import { unknownUsage } from '../../runners/guest/report.ts'
import { withoutPrefix } from '../../runners/job.ts'
import { redactor } from '../../runners/redact.ts'
import type { Outcome } from '../../runners/runner.ts'
import type { AcceptedEvent, LogEvent } from '../../shared/events.ts'
import { digestOf } from '../../shared/ids.ts'
import { Secrets } from '../../shared/secrets.ts'
import { logSubject } from '../../shared/subjects.ts'
import { EVENTS, LOGS } from '../../shared/topology.ts'
import type { Digest } from '../../shared/workload.ts'
import { type Ground, ground, history, kindsOf, submit, until, untilEnd } from '../shared/support.ts'
import { type Code, codeOf, completed, line, startWorker, testBox } from './support.ts'

/** A store of texts that counts who reads them. */
function store(...texts: string[]) {
  const byDigest = new Map<Digest, Uint8Array>(texts.map((text) => [digestOf(text), Buffer.from(text)]))
  const reads: Digest[] = []
  return {
    reads,
    get: async (digest: Digest) => {
      reads.push(digest)
      await new Promise((resolve) => setTimeout(resolve, 5))
      return byDigest.get(digest)
    },
  }
}

test('a bundle is fetched once, also by several at the same moment, and then is there at once', async () => {
  const blobs = store('code')
  const bundles = new Bundles(blobs)
  const digest = digestOf('code')
  assert.equal(await Promise.all([bundles.get(digest), bundles.get(digest)]), ['code', 'code'])
  assert.is(bundles.get(digest), 'code')
  assert.is(blobs.reads.length, 1)
})

test('bundles leave memory by least use when their bytes are too many', async () => {
  const texts = ['a', 'b', 'c'].map((letter) => letter.repeat(40))
  const blobs = store(...texts)
  const bundles = new Bundles(blobs, 100)
  const [a, b, c] = texts.map((text) => digestOf(text)) as [Digest, Digest, Digest]
  await bundles.get(a)
  await bundles.get(b)
  bundles.get(a)
  await bundles.get(c)
  assert.is(bundles.bytes, 80)
  assert.is(typeof bundles.get(a), 'string')
  assert.is(typeof bundles.get(c), 'string')
  assert.is(await bundles.get(b), texts[1])
  assert.equal(blobs.reads, [a, b, c, b])
  const large = new Bundles(store('x'.repeat(200)), 100)
  assert.is(await large.get(digestOf('x'.repeat(200))), 'x'.repeat(200))
  assert.is(large.bytes, 0)
})

test('a bundle that is gone says so, and is asked for again', async () => {
  const blobs = store()
  const bundles = new Bundles(blobs)
  const digest = digestOf('gone')
  for (let i = 0; i < 2; i++)
    try {
      await bundles.get(digest)
      assert.unreachable()
    } catch (error) {
      assert.match((error as Error).message, 'no longer stored')
    }
  assert.is(blobs.reads.length, 2)
})

test('secrets are hidden as they are, as JSON writes them and line by line; short ones are not', () => {
  const redact = redactor({
    KEY: 'hunter22',
    LONG: 'hunter22-and-more',
    PEM: 'first line\nsecond "line"\n',
    PIN: '123',
  })!
  assert.is(redact('a hunter22 b hunter22'), 'a [redacted: KEY] b [redacted: KEY]')
  assert.is(redact('x hunter22-and-more'), 'x [redacted: LONG]')
  assert.is(redact('123'), '123')
  assert.is(redact(JSON.stringify({ pem: 'first line\nsecond "line"\n' })), '{"pem":"[redacted: PEM]"}')
  assert.is(redact('only second "line" here'), 'only [redacted: PEM] here')
  assert.is(redact('nothing'), 'nothing')
  assert.is(redactor({ DOLLAR: "$&$'pay" })!("x $&$'pay"), 'x [redacted: DOLLAR]')
  assert.is(redactor({ PIN: '123' }), undefined)
})

test('a long line is searched, not copied about', () => {
  const redact = redactor(
    Object.fromEntries(Array.from({ length: 32 }, (_, i) => [`S${i}`, `secret-value-${i}`])),
  )!
  const long = 'lorem ipsum '.repeat(500_000)
  const before = performance.now()
  assert.is(redact(long), long)
  // 6 MB and 32 secrets take some 100 ms.
  assert.ok(performance.now() - before < 5_000)
})

test('the prefix of a function is taken out of its URL', () => {
  for (const [url, seen] of [
    ['http://h/fn/a', 'http://h/'],
    ['http://h/fn/a/', 'http://h/'],
    ['http://h/fn/a?x=/fn/b', 'http://h/?x=/fn/b'],
    ['http://h:1/fn/a@v1/fn/a/b?c', 'http://h:1/fn/a/b?c'],
    ['http://h/fn/a%40live/b', 'http://h/b'],
  ])
    assert.is(withoutPrefix(url!), seen)
})

async function submitFunction(
  on: Ground,
  code: string,
  spec: Record<string, unknown> = {},
  over: Partial<AcceptedEvent['data']> = {},
) {
  const blob = await on.blobs.put(Buffer.from(code))
  return await submit(on.bus, spec, {
    function: { name: 'hello', version: 'v0123456789abcdef', ref: 'live' },
    bundle: { ...blob, map: null },
    ...over,
  })
}

test('the code of a function comes from its bundle, its secrets from the bucket', async () => {
  await using on = await ground()
  const secrets = await Secrets.open(on.bus, 1, await testBox())
  await secrets.put('TOKEN', 'sup3rs3cret')
  await using worker = await startWorker(on, (job, _signal, log) => {
    log(line(`token ${job.env.TOKEN}`))
    return completed(job.env.MODE)
  })
  const { id } = await submitFunction(on, 'export default 1', {
    runtime: 'typescript',
    env: { MODE: 'x' },
    secrets: ['TOKEN'],
    network: { egress: ['api.example.com:443'] },
  })
  const end = await untilEnd(on.bus, id)
  assert.is(end.data.output, 'x')
  assert.is(end.data.receipt!.code_sha256, digestOf('export default 1').slice(7))
  const job = worker.runner.ran[0]!
  assert.is(codeOf(job), 'export default 1')
  assert.is(job.runtime, 'javascript')
  assert.equal(job.env, { MODE: 'x', TOKEN: 'sup3rs3cret' })
  assert.equal(job.egress, ['api.example.com:443'])
  assert.is(job.function!.name, 'hello')
  secrets.close()
})

test('the values of secrets stand in no event and no log line', async () => {
  await using on = await ground()
  const secrets = await Secrets.open(on.bus, 1, await testBox())
  await secrets.put('TOKEN', 'sup3rs3cret')
  await using _ = await startWorker(on, (job, _signal, log) => {
    log(line(`token ${job.env.TOKEN}`))
    const message = `refused ${job.env.TOKEN}`
    return {
      status: 'failed',
      cause: 'user_error',
      error: { message, stack: `Error: ${message}\n    at index.js:1:1` },
      exitCode: null,
      usage: unknownUsage,
      start: 'warm',
    }
  })
  const { id } = await submit(on.bus, { secrets: ['TOKEN'] })
  const end = await untilEnd(on.bus, id)
  assert.is(end.data.error!.message, 'refused [redacted: TOKEN]')
  assert.match(end.data.error!.stack!, '[redacted: TOKEN]')
  let all = ''
  for (const stream of [EVENTS, LOGS]) {
    const { state } = await until('the lines', async () => {
      const info = await on.bus.jsm.streams.info(stream)
      return info.state.messages > 0 ? info : undefined
    })
    for (let seq = 1; seq <= state.last_seq; seq++)
      all += (await on.bus.jsm.streams.getMessage(stream, { seq }))!.string()
  }
  assert.match(all, 'token [redacted: TOKEN]')
  assert.not.match(all, 'sup3rs3cret')
  secrets.close()
})

test('a secret that is missing, or code that is gone, ends the workload and says what it was', async () => {
  await using on = await ground()
  await using _ = await startWorker(on, () => completed())
  const missing = await submit(on.bus, { secrets: ['NOWHERE'] })
  const end = await untilEnd(on.bus, missing.id)
  assert.equal([end.data.cause, end.data.error!.message], ['invalid_workload', 'there is no secret NOWHERE'])
  const digest = digestOf('never stored')
  const gone = await submit(on.bus, {}, { bundle: { blob: digest, size: 1, map: null } })
  const other = await untilEnd(on.bus, gone.id)
  assert.is(other.data.cause, 'internal')
  assert.match(other.data.error!.message, `its code ${digest} cannot be read`)
  assert.equal(kindsOf(await history(on.bus, gone.id)), ['accepted', 'started', 'failed'])
})

test('a stack points at the lines the user wrote', async () => {
  await using on = await ground()
  // One segment: line 2, column 4 of the bundle is line 10, column 3 of src/main.ts (all from 0 in the map).
  const map = JSON.stringify({
    version: 3,
    sources: ['src/main.ts'],
    names: [],
    mappings: ';;IAUG',
  })
  const stored = await on.blobs.put(Buffer.from(map))
  let forged: string | undefined
  const code: Code = (_job, _signal, log) => {
    log(line('before'))
    log(line(forged ?? 'Error: caught\n    at run (index.js:3:5)'))
    log(line('after'))
    return forged === undefined ? broken : { ...broken, error: { message: 'forged', stack: forged } }
  }
  const broken: Outcome = {
    status: 'failed',
    cause: 'user_error',
    error: {
      message: 'at index.js:3:5 it broke',
      stack:
        'Error: at index.js:3:5 it broke\n    at run (index.js:3:5)\n    at to (file:///workspace/index.mjs:3:5)\n    at index.js:99:1\n    at other.js:3:5',
    },
    exitCode: null,
    usage: unknownUsage,
    start: 'warm',
  }
  await using _ = await startWorker(on, code)
  const blob = await on.blobs.put(Buffer.from('x'))
  const mapped = await submit(on.bus, {}, { bundle: { ...blob, map: stored.blob } })
  const end = await untilEnd(on.bus, mapped.id)
  assert.is(
    end.data.error!.stack,
    'Error: at index.js:3:5 it broke\n    at run (src/main.ts:11:4)\n    at to (file:///workspace/src/main.ts:11:4)\n    at index.js:99:1\n    at other.js:3:5',
  )
  const { event } = await until('the lines', async () => {
    const found = await on.bus.jsm.streams
      .getMessage(LOGS, { last_by_subj: logSubject(mapped.id) })
      .catch(() => null)
    return found === null ? undefined : { event: found.json<LogEvent>() }
  })
  assert.equal(
    event.data.lines.map(({ text }) => text),
    ['before', 'Error: caught\n    at run (src/main.ts:11:4)', 'after'],
  )
  // Places that cannot be, as code may write them itself: in a line while it runs, and in its error.
  forged = 'Error: forged\n    at run (index.js:0:1)\n    at run (index.js:1:0)'
  const liar = await submit(on.bus, {}, { bundle: { ...blob, map: stored.blob } })
  const forgery = await untilEnd(on.bus, liar.id)
  assert.equal(kindsOf(await history(on.bus, liar.id)), ['accepted', 'started', 'failed'])
  assert.is(forgery.data.error!.stack, forged)
  assert.is(forgery.data.logs!.lines, 3)
  forged = undefined
  const unmapped = await submit(on.bus, {}, { bundle: { ...blob, map: digestOf('gone') } })
  assert.match((await untilEnd(on.bus, unmapped.id)).data.error!.stack!, 'run (index.js:3:5)')
})

test('of a value that a cut text ends with, the beginning is hidden too', () => {
  const redact = redactor({ KEY: 'sk_live_0123456789', OTHER: 'other-value' })!
  const long = 'x'.repeat(16_000)
  assert.is(redact(`${long}sk_live_01`), `${long}[redacted: KEY]`)
  const mark = ' … [line cut: it had 70000 bytes]'
  assert.is(
    redact(`${long} sk_live_0123456789 sk_l${mark}`),
    `${long} [redacted: KEY] [redacted: KEY]${mark}`,
  )
  assert.is(redact(`${long}sk_`), `${long}sk_`)
  assert.is(redact('a short sk_live_01'), 'a short sk_live_01')
})

test.run()
