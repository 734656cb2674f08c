/**
 * Configuration, read once in each `main.ts` by a zod schema and passed down. Nothing else reads `process.env`.
 */
import { homedir } from 'node:os'
import { join } from 'node:path'
import { z } from 'zod'
import { fieldPath } from './errors.ts'
import { type LogOptions, logFormats, logLevels } from './process.ts'
import { TelemetryOptions, telemetryVariables } from './telemetry.ts'
import { TopologyOptions } from './topology.ts'

/** What every process needs. Names in the environment are `VULCAN_` and the field in capitals, `NATS_URL` apart. */
export const CommonConfig = z.object({
  natsUrl: z.string().default('nats://127.0.0.1:4222'),
  /** Address to listen on. */
  host: z.string().default('127.0.0.1'),
  dataDir: z.string().default('.vulcan'),
  /** What was downloaded or can be made again. */
  cacheDir: z.string().default(() => join(homedir(), '.cache', 'vulcan')),
  logLevel: z.enum(logLevels).default('info'),
  /** Unless given: for people on a terminal, else JSON. */
  logFormat: z.enum(logFormats).optional(),
  /** What secrets are encrypted with: base64 of 32 bytes; where it is not set, the file has it. */
  secretsKey: z.string().optional(),
  /** Default: `secrets.key` in the data directory. */
  secretsKeyFile: z.string().optional(),
  /** How often the supervisor has started this part again. */
  restarts: z.coerce.number().int().min(0).default(0),
  topology: TopologyOptions.prefault({}),
  telemetry: TelemetryOptions.prefault({}),
  /** Where people look at traces: a URL with `{trace_id}`, or the base URL of a Jaeger UI. */
  traceUrl: z.url({ protocol: /^https?$/, error: 'must be an http or https URL' }).optional(),
})
export type CommonConfig = z.infer<typeof CommonConfig>

/** What `SecretBox.open` takes. */
export const secretKeyOf = (config: CommonConfig): { key?: string | undefined; file: string } => ({
  key: config.secretsKey,
  file: config.secretsKeyFile ?? join(config.dataDir, 'secrets.key'),
})

/** What a log must never show, wherever it turns up: the secrets’ key, and passwords of the bus. */
const secretsOf = ({ secretsKey, natsUrl }: CommonConfig): string[] => [
  ...(secretsKey === undefined ? [] : [secretsKey]),
  ...[...natsUrl.matchAll(/[^/:@,]*:([^/@,]+)@/g)].map(([, password]) => password!),
]

/** What `makeLogger` takes. */
export const logOptionsOf = (config: CommonConfig, process: string, secrets: string[] = []): LogOptions => ({
  level: config.logLevel,
  format: config.logFormat,
  fields: { process },
  secrets: [...secretsOf(config), ...secrets],
})

type Env = Record<string, string | undefined>

const within = (group: string, variables: Record<string, string>) =>
  Object.fromEntries(Object.entries(variables).map(([field, variable]) => [`${group}.${field}`, variable]))

/** Environment variable of each common field. */
const common = {
  natsUrl: 'NATS_URL',
  host: 'VULCAN_HOST',
  dataDir: 'VULCAN_DATA_DIR',
  cacheDir: 'VULCAN_CACHE_DIR',
  logLevel: 'VULCAN_LOG_LEVEL',
  logFormat: 'VULCAN_LOG_FORMAT',
  secretsKey: 'VULCAN_SECRETS_KEY',
  secretsKeyFile: 'VULCAN_SECRETS_KEY_FILE',
  restarts: 'VULCAN_RESTARTS',
  traceUrl: 'VULCAN_TRACE_URL',
  ...within('telemetry', telemetryVariables),
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
  const groups: Record<string, Record<string, unknown>> = { topology: {}, telemetry: {} }
  for (const [field, variable] of Object.entries(table)) {
    const value = env[variable]
    if (value === undefined || value === '') continue
    const [group, name] = field.split('.', 2) as [string, string | undefined]
    if (name === undefined) raw[field] = value
    else groups[group]![name] = value
  }
  const parsed = schema.safeParse({ ...raw, ...groups })
  if (parsed.success) return parsed.data
  for (const issue of parsed.error.issues) {
    const field = fieldPath(issue.path)
    console.error(`${table[field] ?? field}: ${issue.message}`)
  }
  process.exit(78)
}
