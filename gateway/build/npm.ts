/** Installs a project’s dependencies: npm in the sandbox, scripts off, from the registry alone. */
import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { realpath } from 'node:fs/promises'
import { delimiter, dirname, join } from 'node:path'
import { promisify } from 'node:util'
import { Problem } from '../../shared/errors.ts'
import type { Install } from './manifest.ts'
import { type Bind, inside, ours, runStep, type SandboxOptions, unavailable } from './sandbox.ts'
import { installMs, kept } from './trees.ts'

/** The host’s npm and what it is configured with. */
interface Npm {
  /** Folders it consists of. */
  folders: string[]
  cli: string
  env: Record<string, string>
  /** Files that its settings name. */
  files: string[]
}

/** Settings of the host’s npm that a download depends on. */
const settings = ['registry', 'proxy', 'https-proxy', 'noproxy', 'ca', 'cafile', 'strict-ssl']
/** Variables that they may stand in, too. */
const variables = /^(https?_proxy|no_proxy|NODE_EXTRA_CA_CERTS|SSL_CERT_FILE)$/i

const found = new WeakMap<NodeJS.ProcessEnv, Promise<Npm>>()

/** Asks the host’s npm once for each environment. Throws `build_unavailable` where there is none. */
function findNpm(env: NodeJS.ProcessEnv): Promise<Npm> {
  let npm = found.get(env)
  if (npm === undefined) {
    npm = lookForNpm(env).catch((error) => {
      found.delete(env)
      throw error
    })
    found.set(env, npm)
  }
  return npm
}

async function lookForNpm(env: NodeJS.ProcessEnv): Promise<Npm> {
  const program = (env.PATH ?? '')
    .split(delimiter)
    .map((folder) => join(folder, 'npm'))
    .find((path) => existsSync(path))
  if (program === undefined)
    throw unavailable(
      'npm was not found on the gateway’s host; install it, or put node_modules in the archive',
    )
  const cli = await cliOf(program, env)
  const { stdout } = await promisify(execFile)(program, ['config', 'list', '--long', '--json'], {
    cwd: '/',
    env,
  })
  const config = JSON.parse(stdout) as Record<string, unknown>
  const entries = Object.entries(config).filter(
    ([key, value]) =>
      (settings.includes(key) || /^@[^:]+:registry$/.test(key)) && value !== null && value !== undefined,
  )
  const own = entries.map(([key, value]) => [`npm_config_${key}`, String(value)] as const)
  const given = Object.entries(env).filter(([key, value]) => variables.test(key) && value)
  const files = [config.cafile, env.NODE_EXTRA_CA_CERTS, env.SSL_CERT_FILE].filter(
    (path): path is string => typeof path === 'string' && existsSync(path),
  )
  const folder = dirname(dirname(cli))
  // Debian’s package keeps what npm is made of beside it.
  const debian = ['/usr/share/nodejs', '/usr/lib/nodejs', '/usr/share/node_modules']
  const folders = folder.startsWith('/usr/share/nodejs/') ? debian.filter(existsSync) : [folder]
  return { folders, cli, env: Object.fromEntries([...own, ...given]) as Record<string, string>, files }
}

/** npm’s own file, behind whatever starts it here: a link, or the shim of a version manager. */
async function cliOf(program: string, env: NodeJS.ProcessEnv): Promise<string> {
  const path = await realpath(program)
  if (path.endsWith('.js')) return path
  const { stdout } = await promisify(execFile)(program, ['root', '--global'], { cwd: '/', env })
  const cli = join(stdout.trim(), 'npm', 'bin', 'npm-cli.js')
  if (existsSync(cli)) return await realpath(cli)
  throw unavailable(`what ${program} starts was not found; put node_modules in the archive`)
}

export interface InstallOptions extends SandboxOptions {
  /** Where installed trees are kept. */
  dir: string
  /** Of this process: where npm is and what it is told. */
  env: NodeJS.ProcessEnv
}

/** The folder with the installed `node_modules`, to be used read-only. Throws `build_failed`. */
export function installed(install: Install, options: InstallOptions, signal?: AbortSignal): Promise<string> {
  const { key, lock } = install
  const make = (out: string) => npmInstall(install, out, options, signal)
  return kept({ dir: options.dir, key, name: 'node_modules', locked: lock !== null }, make)
}

async function npmInstall(
  install: Install,
  out: string,
  options: InstallOptions,
  signal?: AbortSignal,
): Promise<void> {
  const npm = await findNpm(options.env)
  const at = (path: string) => `${inside}/host${path}`
  const flags = ['--ignore-scripts', '--omit=dev', '--no-audit', '--no-fund', '--no-bin-links']
  const quiet = ['--loglevel=error', '--no-progress', '--no-update-notifier']
  const command = [install.lock === null ? 'install' : 'ci', ...flags, ...quiet]
  const end = await runStep(
    {
      // npm has no use for more than files and the network; the script that starts it, for processes.
      args: ['--disable-warning=ExperimentalWarning', `${inside}/gateway/build/install.ts`],
      binds: [
        ours('gateway/build/install.ts'),
        ...npm.folders.map((path): Bind => [path, at(path)]),
        ...npm.files.map((path): Bind => [path, path]),
      ],
      writable: [[out, '/out']],
      scratch: ['/install', '/tmp'],
      env: {
        ...npm.env,
        HOME: '/tmp',
        npm_config_cache: '/tmp/cache',
        npm_config_userconfig: '/tmp/none',
        npm_config_globalconfig: '/tmp/none-either',
        npm_config_allow_git: 'none',
        npm_config_allow_remote: 'none',
        npm_config_allow_file: 'none',
        npm_config_allow_directory: 'none',
        npm_config_fetch_timeout: '30000',
        npm_config_fetch_retry_mintimeout: '500',
        npm_config_fetch_retry_maxtimeout: '5000',
      },
      network: true,
      cwd: '/install',
      stdin: JSON.stringify({
        cli: at(npm.cli),
        args: command,
        files: {
          'package.json': install.packageJson,
          ...(install.lock === null ? {} : { 'package-lock.json': install.lock }),
        },
      }),
      timeoutMs: installMs,
    },
    options,
    signal,
  )
  if (end.timedOut)
    throw failed(`npm took longer than ${installMs / 1_000} s; put node_modules in the archive instead`)
  if (end.code !== 0) throw failed(saidBy(end.stderr) || `npm ended with exit code ${end.code}`)
}

const failed = (detail: string) =>
  new Problem('build_failed', {
    detail: `the dependencies could not be installed: ${detail}`,
    field: 'package.json',
    errors: [{ detail, file: 'package.json', line: null, column: null }],
  })

/** npm’s own words, without its advice and where it keeps its log. */
function saidBy(stderr: string): string {
  const lines = stderr.split('\n').map((line) => line.replace(/^npm (error|ERR!) ?(E?\d{3}\b)? */, '').trim())
  const told = lines.filter(
    (line) =>
      line !== '' && !/^(A complete log|\/tmp\/|npm warn|node:|\(|Note that you|tarball, )/.test(line),
  )
  return [...new Set(told)].slice(0, 8).join('; ').slice(0, 2_000)
}
