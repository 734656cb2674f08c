/** The cases that every isolation passes, written once; what an isolation does not have is skipped with the reason. */
import { setTimeout as delay } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { Isolation, Workload } from '../../../shared/workload.ts'
import { fetchRaw, open } from '../../gateway/functions.ts'
import { skip } from '../../harness.ts'
import { http } from '../../platform.ts'
import { until } from '../../shared/support.ts'
import { type Fields, Ground, slots } from './ground.ts'
import type { Language, Programs } from './languages.ts'

/** What the suite has to know of an isolation. */
export interface Subject {
  isolation: Isolation
  /** The first is the one that begins fastest. */
  languages: Language[]
  /** What the host holds for a sandbox that stands ready, as the census calls it. */
  holds: string[]
  /** MiB that a program of any of its languages needs to begin. */
  memoryMb: number
}

const megabytes = 1_000_000
const mebibytes = 1_048_576
/** Longer than a killed runner’s successor takes to start and to be given the work, ms. */
const recoveryMs = 90_000

/** Registers every case for this isolation, and runs them. */
export async function conformance(subject: Subject): Promise<void> {
  const ground = await Ground.open(subject.isolation)
  const unavailable = await ground.obstacle()
  const when = (name: string, why: string | undefined, body: () => Promise<void>) => {
    const obstacle = unavailable ?? why
    if (obstacle === undefined) test(name, body)
    else skip(test, name, obstacle)
  }
  for (const language of subject.languages) casesOf(language, subject, ground, when)
  casesOfAll(subject, ground, when)
  test('nothing is left behind when the platform has stopped', async () => {
    try {
      const before = await ground.census.now()
      for (const word of ['process', 'file', ...(unavailable === undefined ? subject.holds : [])])
        assert.ok(
          before.some((line) => line.startsWith(`${word} `)),
          `the count sees what is there while it runs: ${word}`,
        )
      assert.equal(await ground.leftovers(), [])
    } finally {
      await ground[Symbol.asyncDispose]()
    }
  })
  test.run()
}

type When = (name: string, obstacle: string | undefined, body: () => Promise<void>) => void

const brief = ({ status, cause, error, exit_code, attempts }: Workload) =>
  JSON.stringify({ status, cause, error, exit_code, attempts })

function completed(workload: Workload): unknown {
  assert.is(workload.status, 'completed', brief(workload))
  return workload.output
}

function failed(workload: Workload, cause: Workload['cause']): NonNullable<Workload['error']> {
  assert.is(workload.status, 'failed', brief(workload))
  assert.is(workload.cause, cause, brief(workload))
  return workload.error!
}

function casesOf(language: Language, { memoryMb }: Subject, ground: Ground, when: When): void {
  const { programs, name } = language
  const run = (program: keyof Programs, fields?: Fields) => ground.run(language, programs[program]!, fields)
  const begin = (program: keyof Programs, fields?: Fields) =>
    ground.begin(language, programs[program]!, fields)
  const lacks = (program: keyof Programs, why: string) => (programs[program] === undefined ? why : undefined)

  when(`${name}: the result is the output`, undefined, async () => {
    for (const input of [{ x: [1, 'é\u2028', null, { y: 2.5 }] }, 'text', 7, null, false, []]) {
      const workload = await run('echo', { input })
      assert.equal(completed(workload), input)
      assert.is(workload.isolation, ground.isolation)
      assert.is(workload.attempts, 1)
      assert.is(workload.exit_code, language.command === undefined ? null : 0)
    }
  })

  when(
    `${name}: an error is the user’s, with message and stack`,
    lacks('throws', 'a command has an exit code, no error'),
    async () => {
      const error = failed(await run('throws'), 'user_error')
      assert.match(error.message, 'no luck')
      assert.match(error.stack ?? '', 'inner')
    },
  )

  when(
    `${name}: an exit code that is not 0 is the cause`,
    lacks('exits', 'there is no process of the user’s that could exit'),
    async () => {
      const workload = await run('exits', { input: 7 })
      const error = failed(workload, 'exit_code')
      assert.is(workload.exit_code, 7)
      assert.match(error.message, '7')
    },
  )

  when(
    `${name}: env and secrets are there, and a secret’s value leaves neither by the log nor by an error`,
    undefined,
    async () => {
      const token = `hunter2-${name}-"quoted"-${'x'.repeat(20)}`
      await http(`${ground.url}/v1/secrets/TOKEN`, { method: 'PUT', body: { value: token } })
      const fields = { env: { MODE: 'test' }, secrets: ['TOKEN'] }
      // A runner that has not heard of the new value yet would still have that of the language before.
      const wanted = ['test', Buffer.from(token).toString('base64')]
      await until('the secret', async () => {
        const output = completed(await run('env', fields))
        return JSON.stringify(output) === JSON.stringify(wanted) ? true : undefined
      })
      const told = await run('tells', fields)
      assert.is(told.status, 'failed')
      assert.is(told.cause, language.command === undefined ? 'user_error' : 'exit_code')
      const { lines } = await ground.log(told.id)
      const redacted = lines.filter(({ text }) => text.includes('[redacted: TOKEN]'))
      assert.ok(redacted.length >= 2, JSON.stringify(lines))
      for (const where of [
        JSON.stringify(told),
        JSON.stringify(lines),
        JSON.stringify(await ground.read(told.id)),
      ])
        assert.not.match(where, 'hunter2')
      if (language.command === undefined) assert.match(told.error!.message, 'about [redacted: TOKEN]')
    },
  )

  when(`${name}: 5 MB of input arrive`, undefined, async () => {
    const input = 'i'.repeat(5 * megabytes)
    assert.is(completed(await run('size', { input })), 5 * megabytes + 2)
  })

  when(`${name}: output up to the limit is kept, more is output_too_large`, undefined, async () => {
    const input = 6 * mebibytes - 100
    const output = completed(await run('text', { input }))
    assert.ok(output === 'x'.repeat(input), `${String(output).length} characters of ${input}`)
    const limits = { output_mb: 1 }
    failed(await run('text', { input: mebibytes + 100_000, limits }), 'output_too_large')
  })

  when(
    `${name}: lines keep their order, and what is over the limit of lines is said to be lost`,
    undefined,
    async () => {
      const workload = await run('lines', { input: 12_000 })
      assert.is(completed(workload), 12_000)
      const { lines, lost } = await ground.log(workload.id)
      assert.is(lines.length, 10_000)
      for (const [i, { text }] of lines.entries()) assert.is(text, `line ${i}`)
      assert.is(lost, 2_000)
    },
  )

  when(`${name}: a timeout ends what sleeps and what spins`, undefined, async () => {
    const limits = { timeout_s: 2 }
    const before = Date.now()
    const ended = await Promise.all([run('sleeps', { input: 600, limits }), run('spins', { limits })])
    for (const workload of ended) assert.match(failed(workload, 'timeout').message, '2')
    assert.ok(Date.now() - before < 30_000, `${Date.now() - before} ms`)
  })

  when(
    `${name}: a timeout ends what ignores SIGTERM`,
    lacks('deaf', 'there are no signals in it'),
    async () => {
      const before = Date.now()
      failed(await run('deaf', { limits: { timeout_s: 2 } }), 'timeout')
      assert.ok(Date.now() - before < 30_000, `${Date.now() - before} ms`)
    },
  )

  when(`${name}: killed while running, it is killed and says no more`, undefined, async () => {
    for (const program of ['sleeps', 'spins'] as const) {
      const id = await begin(program, { input: 600 })
      await ground.said(id, 'begun')
      const killed = await ground.kill(id)
      assert.is(killed.status, 'killed', brief(killed))
      assert.is(killed.attempts, 1)
      assert.equal(
        (await ground.log(id)).lines.map(({ text }) => text),
        ['begun'],
      )
    }
  })

  when(`${name}: too much memory is an oom, and hurts nobody else`, undefined, async () => {
    const other = await begin('sleeps', { input: 3 })
    const limits = { memory_mb: memoryMb, timeout_s: 60 }
    failed(await run('grows', { limits }), 'oom')
    assert.is(completed(await ground.ended(other)), 'woke')
    assert.equal(completed(await run('echo', { input: 'after' })), 'after')
  })
}

function casesOfAll({ languages }: Subject, ground: Ground, when: When): void {
  const [quick] = languages as [Language]
  const command = languages.find((language) => language.command !== undefined)

  when(`ten run at once; one more waits, and killed there it never starts`, undefined, async () => {
    const ids = await Promise.all(
      Array.from({ length: slots }, () => ground.begin(quick, quick.programs.sleeps, { input: 60 })),
    )
    await Promise.all(ids.map((id) => ground.said(id, 'begun')))
    for (const id of ids) assert.is((await ground.read(id)).status, 'running')
    const waiting = await ground.begin(quick, quick.programs.sleeps, { input: 0 })
    await delay(500)
    assert.is((await ground.read(waiting)).status, 'pending')
    const killed = await ground.kill(waiting)
    assert.is(killed.status, 'killed')
    for (const id of ids) assert.is((await ground.kill(id)).status, 'killed')
    const read = await ground.read(waiting)
    assert.is(read.attempts, 0)
    assert.is(read.started_at, null)
    assert.equal((await ground.log(waiting)).lines, [])
  })

  when('a hundred in a row have each their own result', undefined, async () => {
    for (let input = 0; input < 100; input++) {
      const language = languages[input % languages.length]!
      assert.is(completed(await ground.run(language, language.programs.echo, { input })), input)
    }
  })

  when(
    'a streamed call by HTTP gives back each piece before the next is sent',
    quick.programs.http === undefined ? 'none of its languages answers HTTP' : undefined,
    async () => {
      const spec = await ground.spec(quick, quick.programs.http!)
      const put = { method: 'PUT', body: spec }
      const deployed = await http(`${ground.url}/v1/functions/capitals`, put)
      assert.is(deployed.status, 201, JSON.stringify(deployed.body))
      const pieces = Array.from({ length: 5 }, (_, i) => `piece ${i};`)
      let next = Promise.withResolvers<void>()
      const body = (async function* () {
        for (const piece of pieces) {
          yield Buffer.from(piece)
          await next.promise
          next = Promise.withResolvers()
        }
      })()
      const response = await open(ground.platform, '/fn/capitals', { method: 'POST', body })
      assert.is(response.statusCode, 201)
      assert.is(response.headers['x-method'], 'POST')
      let heard = ''
      for await (const part of response) {
        heard += part
        if (heard.endsWith(';')) next.resolve()
      }
      assert.is(heard, pieces.join('').toUpperCase())

      const large = Buffer.alloc(20 * megabytes, 'abcdefghi\n')
      const answer = await fetchRaw(ground.platform, '/fn/capitals', { method: 'POST', body: large })
      assert.is(answer.status, 201)
      assert.ok(
        answer.body.equals(Buffer.from(large.toString().toUpperCase())),
        `${answer.body.length} bytes`,
      )
    },
  )

  when(
    'what ran under a runner that was killed is retried or runner_lost, and does not outlive it',
    undefined,
    async () => {
      const runner = await ground.runnerPid()
      const last = { retry: { max_attempts: 1 } }
      const again = { retry: { max_attempts: 3, backoff: 'none' } }
      const lost: string[] = []
      const retried: string[] = []
      for (const language of command === undefined ? [quick] : [quick, command]) {
        const { sleeps } = language.programs
        lost.push(await ground.begin(language, sleeps, { input: 600, ...last }))
        retried.push(await ground.begin(language, sleeps, { input: 4, ...again }))
      }
      await Promise.all([...lost, ...retried].map((id) => ground.said(id, 'begun')))
      ground.census.look(runner)
      process.kill(runner, 'SIGKILL')
      const successor = await ground.runnerPid(runner)
      for (const id of retried) {
        const workload = await ground.ended(id, recoveryMs)
        assert.is(completed(workload), 'woke')
        assert.is(workload.attempts, 2)
      }
      for (const id of lost) failed(await ground.ended(id, recoveryMs), 'runner_lost')
      assert.equal(await ground.census.orphans(successor), [])
    },
  )
}
