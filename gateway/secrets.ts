/** `/v1/secrets`: values go in and never come out. */
import { Hono } from 'hono'
import { fieldPath, Problem } from '../shared/errors.ts'
import { SecretName, type Secrets, SecretValue, secretMaxBytes } from '../shared/secrets.ts'
import { parseJson, requireJson, withBody } from './body.ts'

export interface SecretRoutes {
  secrets: Secrets
}

/** Room (bytes) for a value written as JSON, where a character may take six. */
const bodyBytes = 6 * secretMaxBytes + 1_024

const parseName = (name: string): string => {
  const parsed = SecretName.safeParse(name)
  if (parsed.success) return parsed.data
  throw new Problem('invalid_field', {
    detail: 'a secret’s name must be one that can stand in env: letters, digits and _, at most 256',
    field: 'name',
  })
}

export function secretRoutes({ secrets }: SecretRoutes): Hono {
  const app = new Hono()

  app.get('/', (c) => c.json({ secrets: secrets.names().map((name) => ({ name })) }))

  app.put('/:name', async (c) => {
    const name = parseName(c.req.param('name'))
    requireJson(c)
    const value = await withBody(c, bodyBytes, async (body) => {
      const parsed = SecretValue.safeParse(parseSecretly(body))
      if (parsed.success) return parsed.data.value
      // Without the value: what is refused here may still be a secret.
      const [issue] = parsed.error.issues
      const field =
        issue?.code === 'unrecognized_keys' ? issue.keys[0] : fieldPath(issue?.path ?? []) || undefined
      const detail = issue?.code === 'unrecognized_keys' ? 'unknown field' : issue!.message
      throw new Problem('invalid_field', { detail: `${field ?? 'the body'}: ${detail}`, field })
    })
    const known = secrets.has(name)
    await secrets.put(name, value)
    return c.json({ name }, known ? 200 : 201, { Location: '/v1/secrets' })
  })

  app.delete('/:name', async (c) => {
    const name = parseName(c.req.param('name'))
    if (await secrets.remove(name)) return c.body(null, 204)
    throw new Problem('not_found', { detail: `there is no secret ${name}` })
  })
  return app
}

/** A parser’s message quotes the text it stumbled over. */
function parseSecretly(body: Buffer): unknown {
  try {
    return parseJson(body)
  } catch {
    throw new Problem('malformed_json', { detail: 'the body is not JSON such as {"value": "…"}' })
  }
}
