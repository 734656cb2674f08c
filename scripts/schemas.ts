/** Writes the JSON Schemas of the public events to docs/schemas; a test holds them to the code. */
import { mkdir, writeFile } from 'node:fs/promises'
import { eventJsonSchemas } from '../shared/events.ts'

const directory = new URL('../docs/schemas/', import.meta.url)
await mkdir(directory, { recursive: true })
for (const [kind, schema] of Object.entries(eventJsonSchemas()))
  await writeFile(new URL(`${kind}.json`, directory), `${JSON.stringify(schema, null, 2)}\n`)
