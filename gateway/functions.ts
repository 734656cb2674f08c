/** `/v1/functions`: deploy, versions, aliases, rollback, delete. */
import { Hono } from 'hono'
import { z } from 'zod'
import type { Bus } from '../shared/bus.ts'
import { fieldPath, Problem } from '../shared/errors.ts'
import {
  AliasName,
  AliasTarget,
  type FunctionRecord,
  type FunctionVersion,
  type Lane,
  laneOf,
  lanesOf,
} from '../shared/functions.ts'
import type { Registry } from '../shared/registry.ts'
import { ensureLane, laneConsumer, type TopologyOptions } from '../shared/topology.ts'
import { FunctionName, VersionId } from '../shared/workload.ts'
import { parseJson, requireJson, withBody } from './body.ts'
import { type DeployContext, deployable } from './deploy.ts'
import { readUpload } from './uploads.ts'
import { canonical, contentOf } from './versions.ts'

export interface FunctionRoutes extends DeployContext {
  bus: Bus
  registry: Registry
  topology: TopologyOptions
}

/** Tries of a change that others make at the same moment. */
const tries = 8
/** Versions that a function lists; the oldest that nothing points at leave the list first. */
const listedVersions = 5_000

export function functionRoutes(deps: FunctionRoutes): Hono {
  const { bus, registry, topology, maxBodyBytes } = deps
  const app = new Hono()

  app.use('/:name/*', async (c, next) => {
    const name = FunctionName.safeParse(c.req.param('name'))
    if (!name.success)
      throw new Problem('invalid_field', {
        detail: `name: ${name.error.issues[0]!.message}`,
        field: 'name',
      })
    await next()
  })

  app.get('/', (c) => {
    const all = registry.list()
    const shown =
      c.req.query('deleted') === 'true' ? all : all.filter(({ deleted_at }) => deleted_at === null)
    return c.json({ functions: shown.map((record) => summary(record, c.req.url)) })
  })

  app.put('/:name', async (c) => {
    const name = c.req.param('name')
    const signal = c.req.raw.signal
    const version = await withBody(c, maxBodyBytes, async (body) => {
      const upload = await readUpload(c, body)
      return await deployable(deps, name, upload, signal)
    }).catch((error) => {
      if (signal.aborted) return undefined
      throw error
    })
    // Nobody is there to be answered.
    if (version === undefined) return c.body(null, 400)
    const lane = laneFor(version)
    if (lane !== undefined) {
      // Another version may be the one that its numbers come from.
      const standing = registry.lanes().find((one) => laneConsumer(one) === laneConsumer(lane))
      await ensureLane(bus.jsm, topology, standing ?? lane)
      if (standing === undefined) await registry.putLane(lane)
    }
    await store(version)
    const { record, created } = await adopt(version)
    for (const wanted of lanesOf(record, (id) => registry.version(name, id))) {
      await ensureLane(bus.jsm, topology, wanted)
      await registry.putLane(wanted)
    }
    const { warnings } = version
    return c.json({ ...full(record, c.req.url), created, warnings }, created ? 201 : 200, {
      Location: `/v1/functions/${name}`,
    })
  })

  app.get('/:name', (c) => c.json(full(live(c.req.param('name')), c.req.url)))

  app.delete('/:name', async (c) => {
    await change(c.req.param('name'), (record) => ({
      ...record,
      deleted_at: new Date().toISOString(),
      aliases: {},
    }))
    return c.body(null, 204)
  })

  // The history of a deleted function stays readable.
  app.get('/:name/versions', (c) => {
    const { record } = known(c.req.param('name'))
    return c.json({
      versions: record.versions.map(({ version, deployed_at }) => ({
        ...shown(registry.version(record.name, version), version),
        deployed_at,
        latest: version === record.latest,
      })),
    })
  })
  app.get('/:name/versions/:version', (c) => {
    const { record } = known(c.req.param('name'))
    const { version: id } = c.req.param()
    const listed = record.versions.find(({ version }) => version === id)
    const version = registry.version(record.name, id)
    if (listed === undefined || version === undefined) throw noVersion(record.name, id)
    return c.json({ ...version, deployed_at: listed.deployed_at, latest: id === record.latest })
  })

  app.get('/:name/aliases', (c) => {
    const { aliases, latest } = live(c.req.param('name'))
    return c.json({ aliases: { ...aliases, latest: { version: latest } } })
  })
  app.get('/:name/aliases/:alias', (c) => {
    const { name, aliases, latest } = live(c.req.param('name'))
    const { alias } = c.req.param()
    const target = alias === 'latest' ? { version: latest } : own(aliases, alias)
    if (target === undefined) throw noAlias(name, alias)
    return c.json({ name, alias, ...target })
  })
  app.put('/:name/aliases/:alias', async (c) => {
    const { name } = c.req.param()
    const alias = settable(c.req.param('alias'))
    requireJson(c)
    const target = await withBody(c, 1_048_576, async (body) => parseTarget(parseJson(body)))
    let previous: AliasTarget | undefined
    await change(name, (record) => {
      previous = own(record.aliases, alias)
      const versions = new Set(record.versions.map(({ version }) => version))
      for (const [field, version] of named(target))
        if (!versions.has(version)) throw noVersion(name, version, field)
      return { ...record, aliases: { ...record.aliases, [alias]: target } }
    })
    const status = previous === undefined ? 201 : 200
    return c.json({ name, alias, ...target, previous: previous ?? null }, status)
  })
  app.delete('/:name/aliases/:alias', async (c) => {
    const { name } = c.req.param()
    const alias = settable(c.req.param('alias'))
    await change(name, (record) => {
      if (own(record.aliases, alias) === undefined) throw noAlias(name, alias)
      const { [alias]: _, ...aliases } = record.aliases
      return { ...record, aliases }
    })
    return c.body(null, 204)
  })

  return app

  /** The same content is stored once. */
  async function store(version: FunctionVersion): Promise<void> {
    await registry.putVersion(version)
    const first = registry.version(version.name, version.version)
    if (first !== undefined && canonical(contentOf(first)) !== canonical(contentOf(version)))
      throw new Problem('internal', { detail: `${version.version} already stands for something else` })
  }

  /** Makes a stored version the latest of its function, which may be a new one. */
  async function adopt(version: FunctionVersion): Promise<{ record: FunctionRecord; created: boolean }> {
    const { name } = version
    const deployed = { version: version.version, deployed_at: new Date().toISOString() }
    let created = true
    const record = await changeOrMake(name, (before) => {
      created = !before?.versions.some((listed) => listed.version === version.version)
      if (before?.latest === version.version && before.deleted_at === null) return before
      const others = (before?.versions ?? []).filter((listed) => listed.version !== version.version)
      return {
        name,
        created_at: before?.created_at ?? deployed.deployed_at,
        updated_at: deployed.deployed_at,
        deleted_at: null,
        latest: version.version,
        versions: trimmed([deployed, ...others], before?.aliases ?? {}),
        aliases: before?.aliases ?? {},
      }
    })
    return { record, created }
  }

  /** Compare and set until it stands; `decide` sees what stands now each time. */
  async function changeOrMake(
    name: string,
    decide: (before: FunctionRecord | undefined) => FunctionRecord,
  ): Promise<FunctionRecord> {
    for (let attempt = 1; ; attempt++) {
      const before = registry.get(name)
      const record = decide(before?.record)
      if (record === before?.record) return record
      try {
        await registry.put(record, before?.revision ?? 0)
        return record
      } catch (error) {
        if (!(error instanceof Problem && error.code === 'function_conflict') || attempt === tries)
          throw error
      }
    }
  }

  function change(name: string, decide: (before: FunctionRecord) => FunctionRecord): Promise<FunctionRecord> {
    return changeOrMake(name, () => ({ ...decide(live(name)), updated_at: new Date().toISOString() }))
  }

  function known(name: string) {
    const found = registry.get(name)
    if (found === undefined)
      throw new Problem('function_not_found', { detail: `there is no function ${name}` })
    return found
  }

  function live(name: string): FunctionRecord {
    const { record } = known(name)
    if (record.deleted_at !== null)
      throw new Problem('function_not_found', {
        detail: `function ${name} was deleted at ${record.deleted_at}; its versions are kept`,
      })
    return record
  }

  function summary(record: FunctionRecord, requestUrl: string) {
    const { name, latest, aliases, created_at, updated_at, deleted_at, versions } = record
    const version = registry.version(name, latest)
    return {
      name,
      version: latest,
      url: new URL(`/fn/${name}`, requestUrl).href,
      isolation: version?.isolation ?? null,
      runtime: version?.runtime ?? null,
      aliases: { ...aliases, latest: { version: latest } },
      versions: versions.length,
      created_at,
      updated_at,
      deleted_at,
    }
  }

  function full(record: FunctionRecord, requestUrl: string) {
    const version = registry.version(record.name, record.latest)
    return {
      ...summary(record, requestUrl),
      routing_reason: version?.routing_reason ?? null,
      bundle: version?.bundle ?? null,
      source: version?.source ?? null,
      spec: version?.spec ?? null,
      warnings: version?.warnings ?? [],
    }
  }
}

const shown = (version: FunctionVersion | undefined, id: VersionId) => ({
  version: id,
  created_at: version?.created_at ?? null,
  isolation: version?.isolation ?? null,
  runtime: version?.runtime ?? null,
  bundle: version?.bundle ?? null,
  source: version?.source ?? null,
})

function laneFor({ name, isolation, spec }: FunctionVersion): Lane | undefined {
  const lane = laneOf(name, spec)
  if (lane === undefined) return undefined
  return { lane, isolation, function: name, concurrency: spec.concurrency, rate: spec.rate }
}

/** Aliases and the latest keep what they point at. */
function trimmed(versions: FunctionRecord['versions'], aliases: FunctionRecord['aliases']) {
  if (versions.length <= listedVersions) return versions
  const pointed = new Set(Object.values(aliases).flatMap((target) => named(target).map(([, id]) => id)))
  return versions.filter(({ version }, i) => i < listedVersions || pointed.has(version))
}

/** The versions a target names, each with its field. */
const named = (target: AliasTarget): [field: string, version: VersionId][] =>
  'version' in target
    ? [['version', target.version]]
    : Object.keys(target.weights).map((version) => [`weights.${version}`, version])

const own = (aliases: FunctionRecord['aliases'], alias: string): AliasTarget | undefined =>
  Object.hasOwn(aliases, alias) ? aliases[alias] : undefined

function settable(alias: string): AliasName {
  if (alias === 'latest')
    throw new Problem('invalid_field', {
      detail: 'alias: latest always stands for the newest version',
      field: 'alias',
    })
  const parsed = AliasName.safeParse(alias)
  if (parsed.success) return parsed.data
  throw new Problem('invalid_field', {
    detail: `alias: ${parsed.error.issues[0]!.message}`,
    field: 'alias',
  })
}

const OneVersion = z.strictObject({ version: VersionId })
const Weights = AliasTarget.options[1]

/** Of the two forms the one that was meant says what is wrong with it. */
function parseTarget(value: unknown): AliasTarget {
  const parsed = AliasTarget.safeParse(value)
  if (parsed.success) return parsed.data
  const meant = typeof value === 'object' && value !== null && 'weights' in value ? Weights : OneVersion
  const [issue] = meant.safeParse(value).error!.issues
  const field = issue!.code === 'unrecognized_keys' ? issue.keys[0]! : fieldPath(issue!.path)
  const detail = issue!.code === 'unrecognized_keys' ? 'unknown field' : issue!.message
  throw new Problem('invalid_field', {
    detail: `${field || 'the body'}: ${detail}; it must be {"version": "v…"} or {"weights": {"v…": 90, "v…": 10}}`,
    field: field || undefined,
  })
}

const noVersion = (name: string, version: string, field?: string) =>
  new Problem('version_not_found', { detail: `function ${name} has no version ${version}`, field })
const noAlias = (name: string, alias: string) =>
  new Problem('alias_not_found', { detail: `function ${name} has no alias ${alias}` })
