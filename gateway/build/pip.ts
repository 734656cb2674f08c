/** Installs a Python project’s requirements: pip in the sandbox, wheels only, from the index alone. */
import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { delimiter, join } from 'node:path'
import { promisify } from 'node:util'
import { z } from 'zod'
import { Problem } from '../../shared/errors.ts'
import { sha256Hex } from '../../shared/ids.ts'
import type { InstallOptions } from './npm.ts'
import { type Requirements, requirementsFile, vendorFolder } from './requirements.ts'
import { type Bind, inside, ours, runStep, unavailable } from './sandbox.ts'
import { installMs, kept } from './trees.ts'

/** The Python that packages are chosen for: that of the runtime image `python` (runners/container/runtimes). */
const targetVersion = '3.11'

/** The host’s pip, and what it is configured with. */
interface Pip {
  python: string
  /** Read-only, so that the same Python runs in the sandbox. */
  binds: Bind[]
  env: Record<string, string>
}

const Found = z.object({ python: z.string(), prefix: z.string(), pip: z.string() })
const ask =
  'import json, os, sys, pip; print(json.dumps({"python": os.path.realpath(sys.executable), "prefix": os.path.realpath(sys.base_prefix), "pip": os.path.realpath(os.path.dirname(os.path.dirname(pip.__file__)))}))'

/** Settings of the host’s pip that a download depends on. */
const settings = [
  'index-url',
  'extra-index-url',
  'proxy',
  'cert',
  'trusted-host',
  'timeout',
  'default-timeout',
]
/** Variables that they may stand in, too. */
const variables = /^(https?_proxy|no_proxy|SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE)$/i
/** What every program of the host is linked with, and where certificates are. */
const shared = ['/lib', '/lib64', '/usr/lib', '/usr/share', '/etc/ssl', '/etc/pki', '/etc/ca-certificates']

const vendorIt = `put the packages in the archive under ${vendorFolder} instead (pip install --target ${vendorFolder} -r ${requirementsFile})`

const found = new WeakMap<NodeJS.ProcessEnv, Promise<Pip>>()

/** Asks the host’s Python once for each environment. Throws `build_unavailable` where it has no pip. */
function findPip(env: NodeJS.ProcessEnv): Promise<Pip> {
  let pip = found.get(env)
  if (pip === undefined) {
    pip = lookForPip(env).catch((error) => {
      found.delete(env)
      throw error
    })
    found.set(env, pip)
  }
  return pip
}

async function lookForPip(env: NodeJS.ProcessEnv): Promise<Pip> {
  const programs = (env.PATH ?? '')
    .split(delimiter)
    .map((folder) => join(folder, 'python3'))
    .filter((path) => existsSync(path))
  const run = promisify(execFile)
  for (const program of programs) {
    const answer = await run(program, ['-c', ask], { cwd: '/', env }).catch(() => undefined)
    const told = answer === undefined ? undefined : Found.safeParse(JSON.parse(answer.stdout)).data
    if (told === undefined) continue
    const { stdout } = await run(program, ['-m', 'pip', 'config', 'list'], { cwd: '/', env })
    const own = [...stdout.matchAll(/^(?:global|install|:env:)\.([\w-]+|\.[\w-]+)='(.*)'$/gm)]
      .map(([, name, value]) => [name!.replace(/^\./, ''), value!] as const)
      .filter(([name]) => settings.includes(name))
      .map(([name, value]) => [`PIP_${name.toUpperCase().replaceAll('-', '_')}`, value] as const)
    const given = Object.entries(env).filter(([name, value]) => variables.test(name) && value)
    const pipEnv = Object.fromEntries([...given, ...own]) as Record<string, string>
    const certificates = [pipEnv.PIP_CERT, pipEnv.SSL_CERT_FILE, pipEnv.REQUESTS_CA_BUNDLE]
    const system = told.prefix === '/usr' ? ['/usr'] : [told.prefix]
    const folders = new Set([
      ...system,
      ...shared,
      told.pip,
      ...certificates.filter((path) => path !== undefined),
    ])
    const binds = [...folders].filter((path) => existsSync(path)).map((path): Bind => [path, path])
    return { python: told.python, binds, env: pipEnv }
  }
  throw unavailable(
    `requirements are installed by pip, which was not found on the gateway’s host (Debian: apt-get install python3-pip); install it there, or ${vendorIt}`,
  )
}

/** The folder with the installed packages, to be used read-only. Throws `build_failed`. */
export function vendored(
  requirements: Requirements,
  options: InstallOptions,
  signal?: AbortSignal,
): Promise<string> {
  const key = sha256Hex(`${requirements.key} ${targetVersion}`)
  const make = (out: string) => pipInstall(requirements, out, options, signal)
  return kept({ dir: options.dir, key, name: vendorFolder, locked: requirements.locked }, make)
}

async function pipInstall(
  requirements: Requirements,
  out: string,
  options: InstallOptions,
  signal?: AbortSignal,
): Promise<void> {
  const pip = await findPip(options.env)
  const args = [
    // Neither this user’s own packages nor variables beside ours.
    ...['-I', '-m', 'pip', 'install', '--isolated', '--no-input', '--no-color', '--quiet', '--no-cache-dir'],
    ...[
      '--disable-pip-version-check',
      '--root-user-action=ignore',
      '--no-compile',
      '--no-warn-script-location',
    ],
    // Nothing is built: that would run code of packages.
    ...['--only-binary=:all:', `--python-version=${targetVersion}`, '--implementation=cp'],
    ...['--target', `/install/${vendorFolder}`, '-r', `/install/${requirementsFile}`],
    ...Object.entries(pip.env).flatMap(([name, value]) => optionOf(name, value)),
  ]
  const end = await runStep(
    {
      args: ['--disable-warning=ExperimentalWarning', `${inside}/gateway/build/install-python.ts`],
      binds: [ours('gateway/build/install-python.ts'), ...pip.binds],
      writable: [[out, '/out']],
      scratch: ['/install', '/tmp'],
      env: { ...pip.env, HOME: '/tmp', TMPDIR: '/tmp', PATH: '/usr/bin:/bin', LANG: 'C.UTF-8' },
      network: true,
      cwd: '/install',
      stdin: JSON.stringify({
        python: pip.python,
        args,
        folder: vendorFolder,
        files: { [requirementsFile]: requirements.text },
      }),
      timeoutMs: installMs,
    },
    options,
    signal,
  )
  if (end.timedOut) throw failed(`pip took longer than ${installMs / 1_000} s; ${vendorIt}`)
  if (end.code !== 0)
    throw failed(`${saidBy(end.stderr) || `pip ended with exit code ${end.code}`}; ${vendorIt}`)
}

/** `--isolated` makes pip look at no variables of its own, so what it is told goes with the command. */
function optionOf(name: string, value: string): string[] {
  if (!name.startsWith('PIP_')) return []
  const option = name
    .slice('PIP_'.length)
    .toLowerCase()
    .replaceAll('_', '-')
    .replace(/^default-/, '')
  const many = option === 'extra-index-url' || option === 'trusted-host'
  return (many ? value.split(/\s+/).filter(Boolean) : [value]).map((one) => `--${option}=${one}`)
}

const failed = (detail: string) =>
  new Problem('build_failed', {
    detail: `the requirements could not be installed: ${detail}`,
    field: requirementsFile,
    errors: [{ detail, file: requirementsFile, line: null, column: null }],
  })

/** pip’s own words. */
function saidBy(stderr: string): string {
  const told = stderr
    .split('\n')
    .map((line) => line.replace(/^ERROR: /, '').trim())
    .filter((line) => line !== '' && !/^(WARNING|\[notice\]|DEPRECATION)/.test(line))
  return [...new Set(told)].slice(0, 6).join('; ').slice(0, 2_000)
}
