/** Secrets: sealed with one key that gateways and runners hold, kept sealed in a KV bucket and in memory. */
import { createCipheriv, createDecipheriv, randomBytes } from 'node:crypto'
import { link, mkdir, open, readFile, rm } from 'node:fs/promises'
import { dirname } from 'node:path'
import { z } from 'zod'
import { Bucket } from './bucket.ts'
import type { Bus } from './bus.ts'
import { SECRETS } from './topology.ts'
import { EnvName } from './workload.ts'

/** AES-256-GCM with the lengths of NIST SP 800-38D, in bytes. */
const cipher = 'aes-256-gcm'
const keyBytes = 32
const nonceBytes = 12
const tagBytes = 16
/** Begins everything sealed this way. */
const form = 'v1.'

/** Largest value of a secret, bytes. */
export const secretMaxBytes = 64 * 1024

/** Names of headers, in lower case, whose values are sealed in events. */
export const credentialHeaders: ReadonlySet<string> = new Set([
  'authorization',
  'proxy-authorization',
  'cookie',
  'set-cookie',
  'x-api-key',
])

/** A name as it stands in `env`. */
export const SecretName = EnvName.meta({ id: 'SecretName' })
export const SecretValue = z
  .strictObject({
    value: z
      .string()
      .min(1)
      .refine((value) => Buffer.byteLength(value) <= secretMaxBytes, 'must have at most 64 KiB'),
  })
  .meta({ id: 'SecretValue' })

/** There is no usable key; the message says what to set. */
export class SecretKeyError extends Error {
  override name = 'SecretKeyError'
}

export class SecretBox {
  readonly #key: Buffer
  private constructor(key: Buffer) {
    this.#key = key
  }

  /**
   * With `key` (base64 of 32 bytes), else with the one in `file`, which is made, readable by its owner only, by
   * whoever comes first. Throws `SecretKeyError`.
   */
  static async open({ key, file }: { key?: string | undefined; file: string }): Promise<SecretBox> {
    if (key !== undefined) return new SecretBox(decoded(key, 'VULCAN_SECRETS_KEY'))
    const text = (await readIfThere(file)) ?? (await makeKey(file))
    return new SecretBox(decoded(text, file))
  }

  /** Only `unseal` with the same context opens it: what was sealed for one place is worth nothing in another. */
  seal(text: string, context: string): string {
    const nonce = randomBytes(nonceBytes)
    const sealing = createCipheriv(cipher, this.#key, nonce, { authTagLength: tagBytes })
    sealing.setAAD(Buffer.from(context))
    const bytes = Buffer.concat([nonce, sealing.update(text, 'utf8'), sealing.final(), sealing.getAuthTag()])
    return form + bytes.toString('base64url')
  }

  /** Throws where it was sealed with another key or context, or was changed. */
  unseal(sealed: string, context: string): string {
    const bytes = Buffer.from(sealed.slice(form.length), 'base64url')
    if (!sealed.startsWith(form) || bytes.byteLength < nonceBytes + tagBytes)
      throw new Error('not sealed by this version of vulcan')
    const opening = createDecipheriv(cipher, this.#key, bytes.subarray(0, nonceBytes), {
      authTagLength: tagBytes,
    })
    opening.setAAD(Buffer.from(context))
    opening.setAuthTag(bytes.subarray(-tagBytes))
    return opening.update(bytes.subarray(nonceBytes, -tagBytes), undefined, 'utf8') + opening.final('utf8')
  }
}

function decoded(text: string, from: string): Buffer {
  const key = Buffer.from(text.trim(), 'base64')
  if (key.byteLength === keyBytes) return key
  throw new SecretKeyError(`${from} must hold ${keyBytes} bytes in base64 (openssl rand -base64 ${keyBytes})`)
}

async function readIfThere(file: string): Promise<string | undefined> {
  try {
    return await readFile(file, 'utf8')
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code === 'ENOENT') return undefined
    throw new SecretKeyError(`${file} cannot be read: ${(cause as Error).message}`, { cause })
  }
}

/** Written whole and synced under another name first: nobody ever reads half a key, nor a second one. */
async function makeKey(file: string): Promise<string> {
  const own = `${file}.${process.pid}.${randomBytes(4).toString('hex')}`
  try {
    await mkdir(dirname(file), { recursive: true, mode: 0o700 })
    const handle = await open(own, 'wx', 0o600)
    try {
      await handle.writeFile(`${randomBytes(keyBytes).toString('base64')}\n`)
      await handle.sync()
    } finally {
      await handle.close()
    }
    await link(own, file).catch((error) => {
      if (error.code !== 'EEXIST') throw error
    })
    return await readFile(file, 'utf8')
  } catch (cause) {
    throw new SecretKeyError(
      `${file} cannot be made: ${(cause as Error).message}; set VULCAN_SECRETS_KEY_FILE or VULCAN_SECRETS_KEY`,
      { cause },
    )
  } finally {
    await rm(own, { force: true })
  }
}

export class Secrets {
  readonly #bucket: Bucket<string>
  readonly #box: SecretBox
  private constructor(bucket: Bucket<string>, box: SecretBox) {
    this.#bucket = bucket
    this.#box = box
  }

  /** Resolves once all names are known. It follows the bucket through lost connections. */
  static async open(bus: Bus, replicas: number, box: SecretBox): Promise<Secrets> {
    const parse = (_: string, data: Uint8Array) => Buffer.from(data).toString()
    const description = 'Secrets by name, encrypted'
    return new Secrets(await Bucket.open(bus, { name: SECRETS, description, replicas, parse }), box)
  }

  names(): string[] {
    return [...this.#bucket.entries()].map(([name]) => name).sort()
  }

  has(name: string): boolean {
    return this.#bucket.get(name) !== undefined
  }

  async put(name: string, value: string): Promise<void> {
    await this.#bucket.put(name, this.#box.seal(value, name))
  }

  /** Says whether there was one. */
  async remove(name: string): Promise<boolean> {
    if (!this.has(name)) return false
    await this.#bucket.remove(name)
    return true
  }

  /** Throws an error that names what is missing, or what this key does not open. */
  values(names: string[]): Record<string, string> {
    const missing = names.filter((name) => !this.has(name))
    if (missing.length > 0) throw new Error(`there is no secret ${missing.join(', ')}`)
    return Object.fromEntries(names.map((name) => [name, this.#value(name)]))
  }

  #value(name: string): string {
    try {
      return this.#box.unseal(this.#bucket.get(name)!.value, name)
    } catch (cause) {
      throw new Error(`secret ${name} was encrypted with another key`, { cause })
    }
  }

  close(): void {
    this.#bucket.close()
  }
}
