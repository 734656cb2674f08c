import { defineConfig } from 'drizzle-kit'

export default defineConfig({
  dialect: 'sqlite',
  schema: './dispatcher/schema.ts',
  out: './dispatcher/migrations',
})
