// timeout: 120
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { secretMaxBytes } from '../../shared/secrets.ts'
import { ground } from '../shared/support.ts'
import { call, startGateway } from './support.ts'

test('a secret is put, named and removed, and its value never comes out', async () => {
  await using on = await ground()
  await using gateway = await startGateway(on)
  const put = (name: string, body: unknown) => call(gateway, 'PUT', `/v1/secrets/${name}`, { body })
  const answers = [
    await put('STRIPE_KEY', { value: 'sk-very-secret' }),
    await put('STRIPE_KEY', { value: 'sk-very-secret' }),
    await put('OTHER', { value: 'x' }),
    await call(gateway, 'GET', '/v1/secrets'),
    await call(gateway, 'GET', '/v1/secrets/STRIPE_KEY'),
  ]
  assert.equal(
    answers.map(({ status }) => status),
    [201, 200, 201, 200, 405],
  )
  assert.equal(answers[0]!.body, { name: 'STRIPE_KEY' })
  assert.equal(answers[3]!.body, { secrets: [{ name: 'OTHER' }, { name: 'STRIPE_KEY' }] })
  assert.not.match(JSON.stringify(answers.map(({ body }) => body)), 'sk-very')
  assert.equal(gateway.secrets.values(['STRIPE_KEY']), { STRIPE_KEY: 'sk-very-secret' })
  assert.is((await call(gateway, 'DELETE', '/v1/secrets/STRIPE_KEY')).status, 204)
  const gone = await call(gateway, 'DELETE', '/v1/secrets/STRIPE_KEY')
  assert.equal([gone.status, gone.body.code], [404, 'not_found'])
})

test('what is refused is not quoted', async () => {
  await using on = await ground()
  await using gateway = await startGateway(on)
  const send = (raw: string, name = 'A', type = 'application/json') =>
    call(gateway, 'PUT', `/v1/secrets/${name}`, { raw, headers: { 'content-type': type } })
  const secret = 'sk-very-secret'
  const refused = [
    [await send(`{"value": "${secret}`), 400, 'malformed_json'],
    [await send(`"${secret}"`), 422, 'invalid_field'],
    [await send(`{"value": ["${secret}"]}`), 422, 'invalid_field'],
    [await send(`{"value": "x", "more": "${secret}"}`), 422, 'invalid_field'],
    [await send('{"value": ""}'), 422, 'invalid_field'],
    [await send(JSON.stringify({ value: 'x'.repeat(secretMaxBytes + 1) })), 422, 'invalid_field'],
    [await send(JSON.stringify({ value: 'x'.repeat(7 * secretMaxBytes) })), 413, 'payload_too_large'],
    [await send('{"value": "x"}', '1A'), 422, 'invalid_field'],
    [await send('{"value": "x"}', 'a.b'), 422, 'invalid_field'],
    [await send('{"value": "x"}', 'A%3E'), 422, 'invalid_field'],
    [await send('{"value": "x"}', 'A', 'text/plain'), 415, 'unsupported_media_type'],
  ] as const
  for (const [answer, status, code] of refused) {
    assert.equal([answer.status, answer.body.code], [status, code], JSON.stringify(answer.body))
    assert.not.match(JSON.stringify(answer.body), 'very-secret')
  }
  assert.equal(gateway.secrets.names(), [])
  assert.is((await send(JSON.stringify({ value: 'ä'.repeat(secretMaxBytes / 2) }))).status, 201)
})

test.run()
