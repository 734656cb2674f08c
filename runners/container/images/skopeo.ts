/** Registries, by skopeo: it knows their tokens, mirrors, redirects and certificates. */
import { mkdirSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Digest } from '../../../shared/workload.ts'
import type { RegistryAuth } from '../../runner.ts'
import { ImageError } from '../engine.ts'
import { maxDocumentBytes } from './manifests.ts'
import { findProgram, run, searchPath } from './processes.ts'
import { isLoopback, type RegistryReference } from './references.ts'

export interface RegistryOptions {
  /** Path or name of the program; `skopeo` on the usual path unless told. */
  skopeo?: string | undefined
  /** `host` or `host:port` of registries that may be asked without TLS, or with a certificate nobody vouches for. */
  insecureRegistries: string[]
  /** Docker’s config.json, or any of its form: credentials where a source brings none. */
  authFile?: string | undefined
  /** `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`, where there is one. */
  proxy?: Record<string, string> | undefined
}

/** A look at a manifest, ms. */
const lookMs = 30_000
/** A file that no image of these sizes can be larger than: what else skopeo writes is small. */
const slackBytes = 8 * 1024 * 1024

export const installSkopeo = 'install skopeo (Debian: apt-get install skopeo)'

export class Registries {
  readonly #options: RegistryOptions

  constructor(options: RegistryOptions) {
    this.#options = options
  }

  /** The bytes behind a reference: a manifest or a list of them. Not verified where it is by tag. Throws `ImageError`. */
  manifest(
    at: RegistryReference,
    auth: RegistryAuth | undefined,
    scratch: string,
    signal: AbortSignal,
  ): Promise<Buffer> {
    return this.#document(['--raw'], at, auth, scratch, signal)
  }

  /** The config of the image, as it lies in the registry. */
  config(
    at: RegistryReference,
    auth: RegistryAuth | undefined,
    scratch: string,
    signal: AbortSignal,
  ): Promise<Buffer> {
    return this.#document(['--config', '--raw'], at, auth, scratch, signal)
  }

  #document(
    what: string[],
    at: RegistryReference,
    auth: RegistryAuth | undefined,
    scratch: string,
    signal: AbortSignal,
  ) {
    const limited = AbortSignal.any([signal, AbortSignal.timeout(lookMs)])
    return this.#skopeo(
      'inspect',
      [...what, ...this.#tls(at, '--tls-verify')],
      at,
      auth,
      scratch,
      limited,
      maxDocumentBytes,
    )
  }

  /**
   * Brings the blobs of a manifest, which is named by its digest, into an OCI layout at `layout`; those that are
   * there already are not fetched again. Its manifest is not to be used: it may be converted.
   */
  async blobs(
    at: RegistryReference & { digest: Digest },
    layout: string,
    largest: number,
    auth: RegistryAuth | undefined,
    scratch: string,
    signal: AbortSignal,
  ): Promise<void> {
    const args = [
      ...['--quiet', '--dest-oci-accept-uncompressed-layers', ...this.#tls(at, '--src-tls-verify')],
      // A registry that sends for ever fills no disk.
    ]
    await this.#skopeo('copy', args, at, auth, scratch, signal, largest + slackBytes, [`oci:${layout}:image`])
  }

  #tls({ host }: RegistryReference, flag: string): string[] {
    return isLoopback(host) || this.#options.insecureRegistries.includes(host) ? [`${flag}=false`] : []
  }

  async #skopeo(
    verb: 'inspect' | 'copy',
    args: string[],
    at: RegistryReference,
    auth: RegistryAuth | undefined,
    scratch: string,
    signal: AbortSignal,
    maxBytes: number,
    rest: string[] = [],
  ): Promise<Buffer> {
    const skopeo = findProgram(this.#options.skopeo ?? 'skopeo')
    const image = nameOf(at)
    if (skopeo === undefined)
      throw new ImageError(
        'backend_unavailable',
        `${image} is fetched with skopeo, which is not here: ${installSkopeo}`,
      )
    // A home of its own: credentials of whoever started this process are not for everybody’s images.
    const home = join(scratch, 'home')
    mkdirSync(home, { recursive: true, mode: 0o700 })
    const authFile = auth ? writeAuthFile(join(home, 'auth.json'), at.host, auth) : this.#options.authFile
    try {
      // It ends with this process, and writes no file larger than it may.
      const command = [
        `--fsize=${maxBytes}`,
        '--',
        'setpriv',
        '--pdeathsig',
        'KILL',
        '--',
        skopeo,
        verb,
        ...args,
      ]
      if (authFile) command.push('--authfile', authFile)
      const env = {
        ...{ PATH: searchPath, HOME: home, XDG_RUNTIME_DIR: home, TMPDIR: home },
        // As root it would keep notes for all of the host in /var/lib/containers; this way they are in its home.
        _CONTAINERS_ROOTLESS_UID: '65534',
        ...this.#options.proxy,
      }
      const maxOutput = maxDocumentBytes
      const from = `docker://${at.name}${at.digest ? `@${at.digest}` : `:${at.tag}`}`
      const { code, stdout, stderr } = await run('prlimit', [...command, from, ...rest], {
        signal,
        env,
        maxOutput,
      })
      if (code !== 0) throw explain(image, at.host, stderr)
      return stdout
    } catch (error) {
      if ((error as Error).name === 'TimeoutError')
        throw new ImageError('backend_unavailable', `${image}: the registry did not answer in time`, {
          cause: error,
        })
      throw error
    } finally {
      if (auth) rmSync(authFile!, { force: true })
    }
  }
}

/** As a user would write it. */
export const nameOf = ({ name, tag, digest }: RegistryReference) =>
  `${name}${digest ? `@${digest}` : `:${tag}`}`

/** containers-auth.json(5). */
function writeAuthFile(path: string, host: string, { username, password }: RegistryAuth): string {
  const auth = Buffer.from(`${username}:${password}`).toString('base64')
  rmSync(path, { force: true })
  writeFileSync(path, JSON.stringify({ auths: { [host]: { auth } } }), { mode: 0o600, flag: 'wx' })
  return path
}

/** What skopeo’s last words mean (containers/image, docker/errors.go; distribution specification, error codes). */
function explain(image: string, host: string, stderr: string): ImageError {
  const told = /msg="((?:[^"\\]|\\.)*)"\s*$/.exec(stderr.trim())?.[1]?.replaceAll('\\"', '"') ?? stderr.trim()
  const detail = told.split('\n').at(-1)!.slice(-400)
  const is = (pattern: RegExp) => pattern.test(told)
  if (is(/no space left on device|disk quota exceeded/i))
    return new ImageError('disk_full', `${image}: the disk is full`)
  if (is(/file too large/i))
    return new ImageError('invalid_workload', `${image} is larger than its manifest says`)
  if (
    is(
      /unauthorized|authentication required|access to the resource is denied|invalid username\/password|status code.*40[13]/i,
    )
  )
    return new ImageError(
      'image_not_found',
      `${image} may not be read: the registry wants other credentials, or there is no such image; name a secret with them, or set VULCAN_REGISTRY_AUTH_FILE`,
    )
  if (
    is(
      /manifest unknown|name unknown|repository name not known|manifest invalid.*404|status code.*404|not found/i,
    ) &&
    !is(/no such host/i)
  )
    return new ImageError('image_not_found', `${image} is not in the registry: check its name and tag`)
  if (is(/server gave HTTP response to HTTPS client/i))
    return new ImageError(
      'backend_unavailable',
      `${host} has no TLS: list it in VULCAN_INSECURE_REGISTRIES to fetch ${image} all the same`,
    )
  if (is(/x509|certificate|tls: /i))
    return new ImageError(
      'backend_unavailable',
      `${host} has a certificate that is not trusted here, so ${image} was not fetched: ${detail}; put its authority into /etc/docker/certs.d/${host}/ or list it in VULCAN_INSECURE_REGISTRIES`,
    )
  if (is(/digest did not match|does not match|Digest mismatch|digest invalid/i))
    return new ImageError('invalid_workload', `${image}: the registry sends other bytes than its digests say`)
  if (is(/Source image rejected/i))
    return new ImageError('invalid_workload', `${image} is refused by /etc/containers/policy.json`)
  return new ImageError('backend_unavailable', `${image} could not be fetched: ${detail}`)
}
