// timeout: 180
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { http, startTestPlatform } from './platform.ts'

type Deployed = { version: string; url: string }

const answering = (text: string) => `export default { fetch: () => new Response(${JSON.stringify(text)}) }`

async function deploy(url: string, text: string): Promise<Deployed> {
  const answer = await http<Deployed>(`${url}/v1/functions/roll`, {
    method: 'PUT',
    body: { code: answering(text) },
  })
  assert.ok(answer.status === 200 || answer.status === 201, JSON.stringify(answer.body))
  return answer.body
}

const alias = (url: string, body: unknown) =>
  http(`${url}/v1/functions/roll/aliases/live`, { method: 'PUT', body })

/** How often each answer came in so many calls, eight at a time; a call that fails counts by its status. */
async function tally(url: string, calls: number): Promise<Record<string, number>> {
  const counts: Record<string, number> = {}
  let left = calls
  const caller = async () => {
    while (left-- > 0) {
      const answer = await fetch(`${url}/fn/roll`)
      const text = await answer.text()
      const key = answer.ok ? text : `${answer.status} ${text}`
      counts[key] = (counts[key] ?? 0) + 1
    }
  }
  await Promise.all(Array.from({ length: 8 }, caller))
  return counts
}

test('a 90/10 split and a rollback are what 1,000 calls see', async () => {
  await using platform = await startTestPlatform()
  const { url } = platform
  const one = await deploy(url, 'one')
  const two = await deploy(url, 'two')
  assert.equal(await tally(url, 50), { two: 50 })

  assert.is((await alias(url, { weights: { [one.version]: 90, [two.version]: 10 } })).status, 201)
  const split = await tally(url, 1_000)
  assert.equal(Object.keys(split).sort(), ['one', 'two'], JSON.stringify(split))
  assert.is(split.one! + split.two!, 1_000)
  assert.ok(split.two! > 50 && split.two! < 160, JSON.stringify(split))

  assert.is((await alias(url, { version: two.version })).status, 200)
  assert.equal(await tally(url, 50), { two: 50 })
  assert.is((await alias(url, { version: one.version })).status, 200)
  assert.equal(await tally(url, 1_000), { one: 1_000 })
  assert.is(await (await fetch(`${url}/fn/roll@${two.version}`)).text(), 'two')
  assert.is(await (await fetch(`${url}/fn/roll@latest`)).text(), 'two')
})

test('no call fails while new versions are deployed, and one that begins after a deploy sees it', async () => {
  await using platform = await startTestPlatform()
  const { url } = platform
  await deploy(url, 'version 0')
  let over = false
  const load = (async () => {
    const counts: Record<string, number> = {}
    while (!over)
      for (const [key, count] of Object.entries(await tally(url, 40)))
        counts[key] = (counts[key] ?? 0) + count
    return counts
  })()
  try {
    for (let i = 1; i <= 8; i++) {
      await deploy(url, `version ${i}`)
      assert.is(await (await fetch(`${url}/fn/roll`)).text(), `version ${i}`)
    }
  } finally {
    over = true
  }
  const counts = await load
  const failed = Object.keys(counts).filter((key) => !/^version \d$/.test(key))
  assert.equal(failed, [], JSON.stringify(counts))
  assert.ok(Object.keys(counts).length > 3, JSON.stringify(counts))
})

test('500 calls at once of a function with concurrency 5 all end well, and at most 5 run at once', async () => {
  await using platform = await startTestPlatform()
  const { url } = platform
  const code = `export default { async fetch() {
    const from = Date.now()
    await new Promise((resolve) => setTimeout(resolve, 5))
    return Response.json({ from, to: Date.now() })
  } }`
  const deployed = await http(`${url}/v1/functions/five`, { method: 'PUT', body: { code, concurrency: 5 } })
  assert.is(deployed.status, 201, JSON.stringify(deployed.body))
  const calls = Array.from({ length: 500 }, () => http<{ from: number; to: number }>(`${url}/fn/five`))
  const answers = await Promise.all(calls)
  assert.equal(
    answers.filter(({ status }) => status !== 200),
    [],
  )
  // In one and the same millisecond an end comes before a start.
  const steps = answers.flatMap(({ body }) => [
    { at: body.from, step: 1 },
    { at: body.to, step: -1 },
  ])
  let now = 0
  let most = 0
  for (const { step } of steps.sort((a, b) => a.at - b.at || a.step - b.step)) {
    now += step
    most = Math.max(most, now)
  }
  assert.ok(most >= 2 && most <= 5, `${most} at once`)
})

test.run()
