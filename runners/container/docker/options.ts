/** A box in the words of the Docker Engine API. */
import type { ContainerCreateOptions, HostConfig } from 'dockerode'
import type { BoxLimits, BoxSpec, Network } from '../engine.ts'

const mib = 2 ** 20
/** /run, /var/tmp and /dev/shm, MiB each; /tmp is as large as the limit says. */
const smallMb = 16
const openFiles = 4096
/** Behind the limit that gVisor keeps itself. */
const hostThreads = 4096
/** The kernel kills a box before it kills the platform: proc(5), oom_score_adj. */
const oomScoreAdj = 500

export interface Making {
  name: string
  /** Of the image, by which the engine knows it. */
  ref: string
  labels: Record<string, string>
  runtime: string | undefined
  /** Whether there is an init process: it reaps orphans, and signals end the process as they do elsewhere. */
  init: boolean
  /** Whether the runtime is gVisor’s, whose own threads count as processes of the container on the host. */
  guestKernel: boolean
  /** Cores of the engine’s host: it refuses more. */
  cores: number
  /** Id of the container whose network is shared. */
  holder: string | undefined
}

/** What can be changed later, too. */
export const changeable = (
  limits: BoxLimits,
  { init, cores, guestKernel }: Pick<Making, 'init' | 'cores' | 'guestKernel'>,
) => ({
  Memory: limits.memoryMb * mib,
  // Memory and swap together: no swap.
  MemorySwap: limits.memoryMb * mib,
  NanoCpus: Math.round(Math.min(Math.max(limits.cpu, 0.01), cores) * 1e9),
  PidsLimit: guestKernel ? hostThreads : processes(limits, init),
})

const processes = ({ pids }: BoxLimits, init: boolean) => pids + (init ? 1 : 0)

const tmpfs = (mb: number) => `rw,exec,nosuid,nodev,mode=1777,size=${mb}m`

/** Nobody listens there, so that asking fails at once; else the engine would copy the host’s own. */
const noNameserver = '127.0.0.1'

/** The walls, the same around every container of ours. */
export const walls: HostConfig = {
  ReadonlyRootfs: true,
  CapDrop: ['ALL'],
  SecurityOpt: ['no-new-privileges'],
  Privileged: false,
  IpcMode: 'private',
  CgroupnsMode: 'private',
  // What a container says is read as it comes, and is not to fill the host’s disk.
  LogConfig: { Type: 'none', Config: {} },
  RestartPolicy: { Name: 'no' },
  OomScoreAdj: oomScoreAdj,
} as HostConfig

export function createOptions(
  spec: Omit<BoxSpec, 'image' | 'network'>,
  making: Making,
): ContainerCreateOptions {
  const { limits, user } = spec
  const guestPids = processes(limits, making.init)
  return {
    name: making.name,
    Image: making.ref,
    Labels: making.labels,
    Hostname: making.holder === undefined ? 'vulcan' : '',
    Entrypoint: spec.argv,
    Cmd: [],
    Env: Object.entries(spec.env).map(([name, value]) => `${name}=${value}`),
    WorkingDir: spec.cwd,
    User: `${user.uid}:${user.gid}`,
    AttachStdin: true,
    AttachStdout: true,
    AttachStderr: true,
    OpenStdin: true,
    StdinOnce: true,
    Tty: false,
    NetworkDisabled: false,
    HostConfig: {
      ...walls,
      ...changeable(limits, making),
      ...(making.runtime === undefined ? {} : { Runtime: making.runtime }),
      Init: making.init,
      ...(making.holder === undefined
        ? { NetworkMode: 'none', Dns: [noNameserver] }
        : { NetworkMode: `container:${making.holder}` }),
      GroupAdd: user.groups.map(String),
      Ulimits: [
        { Name: 'fsize', Soft: limits.fileBytes, Hard: limits.fileBytes },
        { Name: 'nofile', Soft: openFiles, Hard: openFiles },
        { Name: 'core', Soft: 0, Hard: 0 },
        // On the host this would count all processes of that user; within gVisor it counts those of the box.
        ...(making.guestKernel ? [{ Name: 'nproc', Soft: guestPids, Hard: guestPids }] : []),
      ],
      Tmpfs: { '/tmp': tmpfs(limits.diskMb), '/run': tmpfs(smallMb), '/var/tmp': tmpfs(smallMb) },
      ShmSize: smallMb * mib,
      Mounts: spec.mounts.map(({ source, target, readonly }) => ({
        Type: 'bind',
        Source: source,
        Target: target,
        ReadOnly: readonly,
        BindOptions: { Propagation: 'rprivate' },
      })),
    },
  }
}

/** A container that does nothing but hold a network, which others are put into. */
export function holderOptions(
  { hosts, nameservers }: Pick<Network, 'hosts' | 'nameservers'>,
  making: Pick<Making, 'name' | 'ref' | 'labels'>,
): ContainerCreateOptions {
  return {
    name: making.name,
    Image: making.ref,
    Labels: making.labels,
    Hostname: 'vulcan',
    Entrypoint: ['/bin/sleep', 'inf'],
    Cmd: [],
    User: '65534:65534',
    HostConfig: {
      ...walls,
      Memory: 16 * mib,
      MemorySwap: 16 * mib,
      PidsLimit: 4,
      NetworkMode: 'none',
      ExtraHosts: hosts.map(({ address, name }) => `${name}:${address}`),
      Dns: nameservers.length > 0 ? nameservers : [noNameserver],
    },
  }
}
