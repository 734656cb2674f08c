import { readFile } from 'node:fs/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { eventJsonSchemas } from '../shared/events.ts'

test('docs/schemas holds what the code says; `npm run schemas` writes it anew', async () => {
  for (const [kind, schema] of Object.entries(eventJsonSchemas())) {
    const written = await readFile(new URL(`../docs/schemas/${kind}.json`, import.meta.url), 'utf8')
    assert.equal(JSON.parse(written), JSON.parse(JSON.stringify(schema)), kind)
  }
})

test.run()
