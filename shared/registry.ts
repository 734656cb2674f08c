/** The deployed functions, their versions and their lanes, as the KV bucket has them, mirrored in memory. */
import type { z } from 'zod'
import { Bucket } from './bucket.ts'
import type { Bus } from './bus.ts'
import { Problem } from './errors.ts'
import { FunctionRecord, FunctionVersion, Lane } from './functions.ts'
import { FUNCTIONS } from './topology.ts'

type Value = FunctionRecord | FunctionVersion | Lane

/** function.{name} */
const functionKey = (name: string) => `function.${name}`
/** version.{name}.{version} */
const versionKey = (name: string, version: string) => `version.${name}.${version}`
/** lane.{isolation}.{lane} */
const laneKey = ({ isolation, lane }: Lane) => `lane.${isolation}.${lane}`

const schemas: Record<string, z.ZodType<Value>> = {
  function: FunctionRecord,
  version: FunctionVersion,
  lane: Lane,
}

function parse(key: string, data: Uint8Array): Value | undefined {
  try {
    return schemas[key.slice(0, key.indexOf('.'))]?.safeParse(JSON.parse(Buffer.from(data).toString())).data
  } catch {
    return undefined
  }
}

export class Registry {
  readonly #bucket: Bucket<Value>
  private constructor(bucket: Bucket<Value>) {
    this.#bucket = bucket
  }

  /** Resolves once everything present has been read. It follows the bucket through lost connections. */
  static async open(bus: Bus, replicas: number): Promise<Registry> {
    const description = 'Functions, their versions and their lanes'
    return new Registry(await Bucket.open(bus, { name: FUNCTIONS, description, replicas, parse }))
  }

  /** Also of a deleted function. */
  get(name: string): { record: FunctionRecord; revision: number } | undefined {
    const entry = this.#bucket.get(functionKey(name))
    return entry && { record: entry.value as FunctionRecord, revision: entry.revision }
  }

  /** By name, deleted ones among them. */
  list(): FunctionRecord[] {
    return this.#all<FunctionRecord>('function.').sort((a, b) => (a.name < b.name ? -1 : 1))
  }

  version(name: string, version: string): FunctionVersion | undefined {
    return this.#bucket.get(versionKey(name, version))?.value as FunctionVersion | undefined
  }

  /** All versions of all functions, in no order. */
  versions(): FunctionVersion[] {
    return this.#all('version.')
  }

  /** A version is stored once; the same again is nothing. */
  async putVersion(version: FunctionVersion): Promise<void> {
    await this.#bucket.put(versionKey(version.name, version.version), JSON.stringify(version), 0)
  }

  /**
   * Compare and set; revision 0: it must not exist. Returns the new revision. Throws `function_conflict` where
   * another was first; what that one wrote is then in memory.
   */
  async put(record: FunctionRecord, revision: number): Promise<number> {
    const stored = await this.#bucket.put(functionKey(record.name), JSON.stringify(record), revision)
    if (stored !== undefined) return stored
    throw new Problem('function_conflict', {
      detail: `function ${record.name} was changed at the same moment; read it again and retry`,
      retryAfterS: 1,
    })
  }

  lanes(): Lane[] {
    return this.#all('lane.')
  }

  async putLane(lane: Lane): Promise<void> {
    await this.#bucket.put(laneKey(lane), JSON.stringify(lane))
  }

  async removeLane(lane: Lane): Promise<void> {
    await this.#bucket.remove(laneKey(lane))
  }

  /** Calls back with the key after memory was updated; returns how to stop that. */
  onChange(listener: (key: string) => void): () => void {
    return this.#bucket.onChange(listener)
  }

  close(): void {
    this.#bucket.close()
  }

  #all<T extends Value>(prefix: string): T[] {
    const found: T[] = []
    for (const [key, value] of this.#bucket.entries()) if (key.startsWith(prefix)) found.push(value as T)
    return found
  }
}
