/**
 * Configuration, read once in each `main.ts` by a zod schema and passed down. Nothing else reads `process.env`.
 */
import { homedir } from 'node:os'
import { join } from 'node:path'
import { z } from 'zod'
import { fieldPath } from './errors.ts'
import { TopologyOptions } from './topology.ts'

/** What every process needs. Names in the environment are `VULCAN_` and the field in capitals, `NATS_URL` apart. */
export const CommonConfig = z.object({
  natsUrl: z.string().default('nats://127.0.0.1:4222'),
  /** Address to listen on. */
  host: z.string().default('127.0.0.1'),
  dataDir: z.string().default('.vulcan'),
  /** What was downloaded or can be made again. */
  cacheDir: z.string().default(() => join(homedir(), '.cache', 'vulcan')),
  logLevel: z.enum(['trace', 'debug', 'info', 'warn', 'error', 'silent']).default('info'),
  /** What secrets are encrypted with: base64 of 32 bytes; where it is not set, the file has it. */
  secretsKey: z.string().optional(),
  /** Default: `secrets.key` in the data directory. */
  secretsKeyFile: z.string().optional(),
  topology: TopologyOptions.prefault({}),
})
export type CommonConfig = z.infer<typeof CommonConfig>

/** What `SecretBox.open` takes. */
export const secretKeyOf = (config: CommonConfig): { key?: string | undefined; file: string } => ({
  key: config.secretsKey,
  file: config.secretsKeyFile ?? join(config.dataDir, 'secrets.key'),
})

type Env = Record<string, string | undefined>

/** Environment variable of each common field. */
const common = {
  natsUrl: 'NATS_URL',
  host: 'VULCAN_HOST',
  dataDir: 'VULCAN_DATA_DIR',
  cacheDir: 'VULCAN_CACHE_DIR',
  logLevel: 'VULCAN_LOG_LEVEL',
  secretsKey: 'VULCAN_SECRETS_KEY',
  secretsKeyFile: 'VULCAN_SECRETS_KEY_FILE',
  'topology.replicas': 'VULCAN_REPLICAS',
  'topology.ackWaitMs': 'VULCAN_ACK_WAIT_MS',
  'topology.eventsMaxAgeH': 'VULCAN_EVENTS_MAX_AGE_H',
  'topology.logsMaxAgeH': 'VULCAN_LOGS_MAX_AGE_H',
  'topology.eventsMaxMb': 'VULCAN_EVENTS_MAX_MB',
  'topology.logsMaxMb': 'VULCAN_LOGS_MAX_MB',
}

/**
 * Reads a config from the environment: `names` maps the schema’s own fields to variables. Ends the process with
 * every bad variable named, since nothing can run on half a configuration.
 */
export function readConfig<S extends z.ZodObject>(
  schema: S,
  names: Record<string, string>,
  env: Env,
): z.infer<S> {
  const table: Record<string, string> = { ...common, ...names }
  const raw: Record<string, unknown> = {}
  const topology: Record<string, unknown> = {}
  for (const [field, variable] of Object.entries(table)) {
    const value = env[variable]
    if (value === undefined || value === '') continue
    if (field.startsWith('topology.')) topology[field.slice('topology.'.length)] = value
    else raw[field] = value
  }
  const parsed = schema.safeParse({ ...raw, topology })
  if (parsed.success) return parsed.data
  for (const issue of parsed.error.issues) {
    const field = fieldPath(issue.path)
    console.error(`${table[field] ?? field}: ${issue.message}`)
  }
  process.exit(78)
}
