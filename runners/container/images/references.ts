/**
 * What a user writes to name an image, by the grammar of the field (distribution/reference): names are lower case,
 * one without a host means Docker Hub, one without a tag means `latest`.
 */
import type { Digest } from '../../../shared/workload.ts'
import { ImageError } from '../engine.ts'

export interface RegistryReference {
  kind: 'registry'
  /** `host` or `host:port`. */
  host: string
  /** `host/path`. */
  name: string
  /** Undefined where a digest says which. */
  tag: string | undefined
  digest: Digest | undefined
}

/** An OCI layout on this host. */
export interface DirectoryReference {
  kind: 'directory'
  /** Absolute. */
  path: string
  tag: string | undefined
}

const component = '[a-z0-9]+(?:(?:\\.|_|__|-+)[a-z0-9]+)*'
const pathPattern = new RegExp(`^${component}(?:/${component})*$`)
const hostPattern =
  /^(?:\[[0-9a-fA-F:.]+\]|[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*)(?::[0-9]{1,5})?$/
const tagPattern = /^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$/
const digestPattern = /^sha256:[0-9a-f]{64}$/
/** Of a name with its host, in characters. */
const maxName = 255

/** @throws ImageError `invalid_workload` that says what is wrong with it */
export function parseReference(reference: string): RegistryReference | DirectoryReference {
  const wrong = (why: string): ImageError =>
    new ImageError(
      'invalid_workload',
      `${JSON.stringify(reference.slice(0, 300))} is not an image reference: ${why}; write host/name:tag or host/name@sha256:…`,
    )
  if (reference.startsWith('oci:')) {
    const [, path, tag] = /^oci:(\/[^:\0]*)(?::(.*))?$/.exec(reference) ?? []
    if (path === undefined) throw wrong('oci: is followed by an absolute directory')
    if (tag !== undefined && !tagPattern.test(tag))
      throw wrong('its tag has other characters than a tag may have')
    return { kind: 'directory', path, tag }
  }
  const at = reference.indexOf('@')
  const digest = at < 0 ? undefined : reference.slice(at + 1)
  if (digest !== undefined && !digestPattern.test(digest))
    throw wrong('a digest is sha256: and 64 hex digits')
  let rest = at < 0 ? reference : reference.slice(0, at)

  const colon = rest.lastIndexOf(':')
  let tag: string | undefined
  if (colon > rest.lastIndexOf('/')) {
    tag = rest.slice(colon + 1)
    rest = rest.slice(0, colon)
    if (!tagPattern.test(tag)) throw wrong('its tag has other characters than a tag may have')
  }
  const slash = rest.indexOf('/')
  const first = slash < 0 ? '' : rest.slice(0, slash)
  const hasHost = /[.:]/.test(first) || first === 'localhost'
  const host = hasHost ? first : 'docker.io'
  let path = hasHost ? rest.slice(slash + 1) : rest
  if (host === 'docker.io' && !path.includes('/')) path = `library/${path}`
  if (!hostPattern.test(host)) throw wrong('its host is not one')
  if (path.toLowerCase() !== path) throw wrong('names of images are lower case')
  if (!pathPattern.test(path)) throw wrong('its name has other characters than a name may have')
  const name = `${host}/${path}`
  if (name.length > maxName) throw wrong(`its name is longer than ${maxName} characters`)
  return {
    kind: 'registry',
    host,
    name,
    tag: digest === undefined ? (tag ?? 'latest') : undefined,
    digest: digest as Digest | undefined,
  }
}

/** Whether a registry’s host is this machine itself, by its name or address alone. */
export function isLoopback(host: string): boolean {
  const bare = host.replace(/:[0-9]+$/, '').replace(/^\[(.*)\]$/, '$1')
  return bare.toLowerCase() === 'localhost' || bare === '::1' || /^127(?:\.[0-9]{1,3}){3}$/.test(bare)
}
