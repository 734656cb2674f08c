/** What runsc is told of a box: config.json of the OCI runtime specification (config.md, config-linux.md). */
import type { BoxLimits, BoxSpec, Mount } from '../engine.ts'

export interface ConfigParts {
  spec: BoxSpec
  /** On the host. */
  root: string
  /** Read by the hooks: see `launch.ts`. */
  dir: string
  /** On the host: they become /etc/hosts and /etc/resolv.conf. */
  hosts: string
  resolvConf: string
}

export const mebibyte = 1_048_576
/** Of the box. */
export const hostname = 'vulcan'
/** Those that are bound over the image’s own. */
export const ownFiles = ['/etc/hosts', '/etc/resolv.conf'] as const
/** As many files as a server with some thousand connections wants. */
const openFiles = 16_384

const tmpfs = (destination: string, ...options: string[]) => ({
  destination,
  type: 'tmpfs',
  source: 'tmpfs',
  options: ['nosuid', 'nodev', ...options],
})

/** What lies in them counts as memory of the box, whatever their size. */
const writable = ['/tmp', '/run', '/var/tmp', '/dev/shm']

const bind = ({ source, target, readonly }: Mount) => ({
  destination: target,
  type: 'bind',
  source,
  options: ['rbind', 'nosuid', 'nodev', readonly ? 'ro' : 'rw'],
})

const rlimit = (type: string, value: number) => ({ type, soft: value, hard: value })

/**
 * gVisor holds nproc by user, and lifts it only for those with capabilities: nobody here has any. `root` is held to it
 * as well.
 */
const rlimits = ({ pids, fileBytes }: BoxLimits) => [
  rlimit('RLIMIT_NPROC', pids),
  rlimit('RLIMIT_FSIZE', fileBytes),
  rlimit('RLIMIT_NOFILE', openFiles),
  rlimit('RLIMIT_CORE', 0),
]

/**
 * Hooks are the runtime’s own way to be held: `createRuntime` runs when the sandbox is complete and before the user’s
 * process is, `poststart` after that. They speak on descriptors of runsc’s process, which their own parent is.
 */
const shell = (script: string, dir: string) => ({ path: '/bin/sh', args: ['sh', '-c', script, 'sh', dir] })
export const created = 'c'
export const started = 's'
export const statusDescriptor = 3
export const gateDescriptor = 4
const descriptors = 'read -r pid <"$1/pid"; at=/proc/$pid/fd'
// The gate is opened before anybody can have closed its other end: opening it would then never end.
const onCreated = `set -e; ${descriptors}; exec <"$at/${gateDescriptor}"; echo ${created} >"$at/${statusDescriptor}"; read -r go`
const onStarted = `set -e; ${descriptors}; echo ${started} >"$at/${statusDescriptor}"`

export function runtimeConfig({ spec, root, dir, hosts, resolvConf }: ConfigParts) {
  const { argv, env, cwd, user, limits, mounts, network } = spec
  const size = `size=${limits.diskMb * mebibyte}`
  return {
    ociVersion: '1.0.2',
    process: {
      terminal: false,
      user: { uid: user.uid, gid: user.gid, additionalGids: user.groups },
      args: argv,
      env: Object.entries(env).map(([name, value]) => `${name}=${value}`),
      cwd,
      noNewPrivileges: true,
      capabilities: { bounding: [], effective: [], permitted: [], inheritable: [], ambient: [] },
      rlimits: rlimits(limits),
    },
    root: { path: root, readonly: true },
    hostname,
    mounts: [
      { destination: '/proc', type: 'proc', source: 'proc', options: ['nosuid', 'noexec', 'nodev'] },
      { destination: '/sys', type: 'sysfs', source: 'sysfs', options: ['nosuid', 'noexec', 'nodev', 'ro'] },
      { destination: '/dev', type: 'tmpfs', source: 'tmpfs', options: ['nosuid'] },
      ...writable.map((place) => tmpfs(place, 'mode=1777', size)),
      bind({ source: hosts, target: ownFiles[0], readonly: true }),
      bind({ source: resolvConf, target: ownFiles[1], readonly: true }),
      ...mounts.map(bind),
    ],
    hooks: { createRuntime: [shell(onCreated, dir)], poststart: [shell(onStarted, dir)] },
    linux: {
      namespaces: [
        { type: 'pid' },
        { type: 'ipc' },
        { type: 'uts' },
        { type: 'mount' },
        { type: 'network', ...(network === undefined ? {} : { path: network.path }) },
      ],
    },
  }
}
