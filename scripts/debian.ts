/**
 * Debian's archive without the system's apt: lists, sources and downloads of our own, verified by the keyring on the
 * machine. Works without root, from the mirror that the machine's own sources name, for any suite that it carries.
 */
import { execFile, spawn } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { existsSync, globSync } from 'node:fs'
import { copyFile, mkdir, mkdtemp, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { promisify } from 'node:util'

const execute = promisify(execFile)

const keyring = '/usr/share/keyrings/debian-archive-keyring.gpg'
const listsTimeoutMs = 180_000
const downloadTimeoutMs = 600_000
const unpackTimeoutMs = 120_000

/** A package of one version, as the archive's signed lists name it. */
export type DebianPackage = {
  name: string
  version: string
  /** As apt names the package's file. */
  file: string
  /** Of the file, in hex. */
  sha256: string
}

/** The archive cannot be used here, or does not have what was asked for; the message says why. */
export class DebianError extends Error {
  override name = 'DebianError'
}

export interface DebianArchive extends AsyncDisposable {
  /** `amd64`, `arm64`… */
  readonly architecture: string
  /**
   * The newest version of each in these suites, in the order of their names. `name/suite` takes that suite's, which
   * a package needs that only a backports suite has in a newer version.
   *
   * @throws DebianError where there is none
   */
  find(names: readonly string[]): Promise<DebianPackage[]>
  /**
   * Downloads into `folder`, verified.
   *
   * @returns the files, in the order of `packages`
   * @throws DebianError
   */
  download(packages: readonly DebianPackage[], folder: string): Promise<string[]>
}

/**
 * Fetches the lists of `suites`, such as `bookworm`, `bookworm-security` or `forky`, from the first mirror that has
 * them all. Takes some seconds. What it keeps is gone when it is disposed of.
 *
 * @param parent where it keeps its lists
 * @throws DebianError where the machine has no apt, names no mirror, or no mirror has the suites
 */
export async function openDebian(suites: readonly string[], parent = tmpdir()): Promise<DebianArchive> {
  const { mirrors, security } = await configuredMirrors()
  if (mirrors.length === 0) throw new DebianError('found no Debian mirror in the apt sources of this machine')
  await using scope = new AsyncDisposableStack()
  const work = await mkdtemp(join(parent, 'vulcan-apt-'))
  scope.defer(() => rm(work, { recursive: true, force: true }))
  await mkdir(join(work, 'lists', 'partial'), { recursive: true })
  await mkdir(join(work, 'cache', 'archives', 'partial'), { recursive: true })

  const failures: string[] = []
  for (const mirror of mirrors) {
    const sources = suites.map((suite) => {
      const uri = suite.endsWith('-security') ? (security[0] ?? `${mirror}-security`) : mirror
      return `deb [signed-by=${keyring}] ${uri} ${suite} main\n`
    })
    await writeFile(join(work, 'sources.list'), sources.join(''))
    try {
      await apt(work, listsTimeoutMs, ['update'])
      const architecture = (await execute('dpkg', ['--print-architecture'])).stdout.trim()
      const resources = scope.move()
      return archive(work, architecture, () => resources.disposeAsync())
    } catch (error) {
      failures.push(`${mirror}: ${(error as Error).message}`)
    }
  }
  throw new DebianError(failures.join('; '))
}

function archive(work: string, architecture: string, dispose: () => Promise<void>): DebianArchive {
  return {
    architecture,
    async find(names) {
      const text = await apt(work, listsTimeoutMs, ['download', '--print-uris', ...names])
      const found = packagesIn(text)
      return names.map((wanted) => {
        const name = wanted.split('/')[0]!
        const item = found.find((candidate) => candidate.name === name)
        if (item === undefined) throw new DebianError(`there is no package ${wanted} in these suites`)
        return item
      })
    },
    async download(packages, folder) {
      const wanted = packages.map(({ name, version }) => `${name}=${version}`)
      if (wanted.length > 0) await apt(work, downloadTimeoutMs, ['download', ...wanted], folder)
      return packages.map(({ name, version, file }) => {
        const path = join(folder, file)
        if (!existsSync(path)) throw new DebianError(`apt-get downloaded no ${name} ${version}`)
        return path
      })
    },
    [Symbol.asyncDispose]: dispose,
  }
}

/** Lists, package cache and sources are all private: the system's apt neither sees nor gains anything. */
async function apt(work: string, timeoutMs: number, args: string[], cwd = work): Promise<string> {
  const options = [
    `Dir::Etc::sourcelist=${join(work, 'sources.list')}`,
    'Dir::Etc::sourceparts=/dev/null',
    'Dir::Etc::preferences=/dev/null',
    'Dir::Etc::preferencesparts=/dev/null',
    `Dir::State::Lists=${join(work, 'lists')}`,
    `Dir::Cache=${join(work, 'cache')}`,
    'Acquire::Languages=none',
    // A suite of which a part is missing is not there.
    'APT::Update::Error-Mode=any',
    // The work folder is private to this user, so apt's own user could not write there anyway.
    'APT::Sandbox::User=',
  ]
  const all = ['--quiet=2', ...options.flatMap((option) => ['-o', option]), ...args]
  try {
    return (await execute('apt-get', all, { cwd, timeout: timeoutMs, maxBuffer: 16 << 20 })).stdout
  } catch (cause) {
    throw new DebianError(failureOf(cause), { cause })
  }
}

/** Why a program of Debian's could not be run or failed, in one line. */
export function failureOf(error: unknown): string {
  const { code, killed, stderr, message } = error as Error & {
    code?: unknown
    killed?: boolean
    stderr?: string
  }
  if (code === 'ENOENT') return 'needs apt-get and dpkg, which this machine does not have'
  if (killed) return 'did not end in time'
  return stderr?.trim().split('\n').pop() || message
}

/** apt-get's lines `'URI' file size SHA256:…`. The file is named `name_version_architecture.deb`, percent-encoded. */
function packagesIn(text: string): DebianPackage[] {
  return [...text.matchAll(/^'[^']+' (\S+) \d+ SHA256:([0-9a-f]{64})$/gm)].map(([, file, sha256]) => {
    const [name, version] = decodeURIComponent(file!).split('_')
    return { name: name!, version: version!, file: file!, sha256: sha256! }
  })
}

/**
 * Unpacks a package's files over what is in `root`; directories that are symbolic links there stay links. Its
 * scripts are not run, and all is owned by whoever runs this.
 *
 * @param exclude tar's patterns of what is left out, such as `./usr/share/doc`; they begin at the root
 * @throws DebianError
 */
export async function unpackPackage(
  file: string,
  root: string,
  exclude: readonly string[] = [],
): Promise<void> {
  const signal = AbortSignal.timeout(unpackTimeoutMs)
  const source = spawn('dpkg-deb', ['--fsys-tarfile', file], { stdio: ['ignore', 'pipe', 'pipe'], signal })
  const patterns = exclude.map((pattern) => `--exclude=${pattern}`)
  // tar would stop at the first empty block, and close the pipe while the padding behind it is being written.
  const flags = [
    '--ignore-zeros',
    '--extract',
    '--preserve-permissions',
    '--no-same-owner',
    '--keep-directory-symlink',
  ]
  const target = spawn('tar', [...flags, '--anchored', ...patterns, '--directory', root, '--file=-'], {
    stdio: ['pipe', 'ignore', 'pipe'],
    signal,
  })
  const ends = [source, target].map(async (child) => {
    let said = ''
    child.stderr!.setEncoding('utf8').on('data', (text: string) => {
      said = (said + text).slice(-2_000)
    })
    const [code] = await once(child, 'close')
    if (code !== 0) throw new DebianError(`${file} could not be unpacked: ${said.trim() || `code ${code}`}`)
  })
  await Promise.allSettled([pipeline(source.stdout, target.stdin), ...ends])
  await Promise.all(ends)
}

/** Copies a program beside its place and renames it, so that a parallel start sees the whole file or none. */
export async function putInPlace(file: string, target: string): Promise<void> {
  const beside = `${target}.${randomUUID()}`
  await copyFile(file, beside)
  await rename(beside, target)
}

/** Mirrors of Debian's main archive and of its security archive that the machine's apt uses. */
async function configuredMirrors(): Promise<{ mirrors: string[]; security: string[] }> {
  const files = ['sources.list', 'sources.list.d/*.list', 'sources.list.d/*.sources']
  const texts = globSync(files, { cwd: '/etc/apt' }).map((file) =>
    readFile(join('/etc/apt', file), 'utf8').catch(() => ''),
  )
  const uris = (await Promise.all(texts)).flatMap(debianUris)
  return {
    mirrors: [...new Set(uris.filter((uri) => !/security/.test(uri)))],
    security: [...new Set(uris.filter((uri) => /security/.test(uri)))],
  }
}

/**
 * The archives of Debian in one of apt's source files, in either of its formats (sources.list(5): lines of
 * `deb [options] uri suite component…`, or deb822 stanzas). Third-party archives are left out.
 */
export function debianUris(text: string): string[] {
  const uncommented = text.replace(/^\s*#.*\n?/gm, '')
  const uris: string[] = []
  for (const [, uri, components] of uncommented.matchAll(/^deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+\S+\s+(.*)$/gm)) {
    if (components!.split(/\s+/).includes('main')) uris.push(uri!)
  }
  for (const stanza of uncommented.split(/\n\s*\n/)) {
    const fields = new Map(
      [...stanza.matchAll(/^([\w-]+):[ \t]*(.*(?:\n[ \t]+.*)*)/gm)].map(([, key, value]) => [
        key!.toLowerCase(),
        value!.trim().split(/\s+/),
      ]),
    )
    if (!fields.get('types')?.includes('deb') || !fields.get('components')?.includes('main')) continue
    if (fields.get('enabled')?.[0] === 'no') continue
    uris.push(...(fields.get('uris') ?? []))
  }
  const isDebian = (uri: string) => /debian/.test(uri) && !/backports|^cdrom/.test(uri)
  return [...new Set(uris.filter(isDebian).map((uri) => uri.replace(/\/$/, '')))]
}
