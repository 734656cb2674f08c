/**
 * What the parts of the container runner owe each other: an image store gives images, an engine makes boxes of them,
 * the network gives namespaces. `session.ts` runs jobs with these and knows neither runsc nor Docker.
 */
import type { Readable, Writable } from 'node:stream'
import type { LimitReport } from '../../shared/backends.ts'
import type { Digest, Egress } from '../../shared/workload.ts'
import type { ByteSource, RegistryAuth } from '../runner.ts'
import type { Phases } from './phases.ts'

/** Where an image comes from. */
export type ImageSource =
  /** `host/name:tag`, `host/name@sha256:…`, or `oci:/absolute/directory[:tag]`, which only a listed directory may be. */
  | { kind: 'reference'; reference: string; auth?: RegistryAuth | undefined }
  /** An OCI or docker-save archive, plain or compressed, by the digest of its bytes. */
  | { kind: 'archive'; digest: Digest; open(): Promise<ByteSource> }

/** What an image says of itself (OCI image specification, config.md). */
export interface ImageConfig {
  entrypoint: string[]
  cmd: string[]
  env: Record<string, string>
  /** Absolute. */
  workingDir: string
  /** As it stands there: `user`, `uid`, `uid:gid`, `user:group`, or empty: root. */
  user: string
}

/** An image that is here and verified. Held until it is disposed of: what is held is not evicted. */
export interface Image extends Disposable {
  /** Of the manifest for this platform. */
  digest: Digest
  config: ImageConfig
  /** The OCI layout directory that holds it, with `digest` as its tag-less manifest; for engines with stores of their own. */
  layout: string
  /** The unpacked root file system, shared and read-only; made when it is first asked for. Throws `ImageError`. */
  root(phases?: Phases): Promise<string>
}

/** Why an image cannot be had; the message names the image, what was wrong and the way out. */
export class ImageError extends Error {
  override name = 'ImageError'
  /** `image_not_found`: there is none of this name or digest, or it may not be read; `invalid_workload`: it is broken or hostile; `backend_unavailable`: trying again can help; `disk_full`: there is no room for it. */
  readonly reason: 'image_not_found' | 'invalid_workload' | 'backend_unavailable' | 'disk_full'
  constructor(reason: ImageError['reason'], message: string, options?: ErrorOptions) {
    super(message, options)
    this.reason = reason
  }
}

export interface ImageStore extends AsyncDisposable {
  /** Fetches, verifies and unpacks what is not there yet; several that ask for the same share one fetch. */
  get(source: ImageSource, signal: AbortSignal, phases?: Phases): Promise<Image>
}

/** Numeric: names are looked up in the image’s own /etc/passwd and /etc/group. */
export interface User {
  uid: number
  gid: number
  groups: number[]
}

/** A directory or file of the host that the box sees. */
export interface Mount {
  /** On the host, absolute. */
  source: string
  /** In the box, absolute; made where the image has none, also below a read-only root. */
  target: string
  readonly: boolean
}

export interface BoxLimits {
  memoryMb: number
  /** In cores. */
  cpu: number
  pids: number
  /** Size of /tmp, MiB. */
  diskMb: number
  /** Largest single file that can be written, bytes (RLIMIT_FSIZE). */
  fileBytes: number
}

/** One process tree to be, in its own root. */
export interface BoxSpec {
  image: Image
  argv: string[]
  env: Record<string, string>
  /** Absolute; made where the image has none. */
  cwd: string
  user: User
  mounts: Mount[]
  limits: BoxLimits
  network: Network | undefined
  /** Who measures its making. */
  phases?: Phases
  /** Of boxes that all begin alike, with nothing of a job in them: for engines that can begin where one was left. */
  template?: BoxTemplate
  /** Nobody waits for it, and it may stand for long: little memory is worth more than an early start. */
  ahead?: boolean
}

/**
 * Boxes with the same key, image, limits and kind of network may begin where another was left. Whoever makes the first
 * brings it there; engines without snapshots ignore it.
 */
export interface BoxTemplate {
  /** What the process is and how it was brought where it is. */
  key: string
  /** Starts a box and brings it where all others are to begin. Nothing of a user’s may ever be in it. */
  exercise(box: Box): Promise<void>
}

/** How the first process of a box ended. */
export interface Exit {
  /** As a shell would say it: 128 + n where signal n ended it. */
  code: number
  /** The kernel has killed for want of memory within the box’s limit. */
  oom: boolean
  /** The sandbox itself died (crashed, or killed by somebody else), so that `code` is not the process’s own. */
  lost?: boolean
  /** Of one that is lost: what is known of it. */
  reason?: string
}

export interface BoxUsage {
  cpuMs: number | null
  memoryPeakMb: number | null
  /** Processes that the kernel has killed so far for want of memory within the box’s limit, where it is known. */
  oomKills?: number
  /** Bytes that it has really read from and written to disks so far, where it is known. */
  disk?: Bytes | undefined
}

/** Of disks: read and written. Of networks: received and sent. */
export interface Bytes {
  in: number
  out: number
}

/** A sandbox from its making to its removal. */
export interface Box {
  /** Unique on this host; told in errors. */
  readonly name: string
  readonly stdin: Writable
  readonly stdout: Readable
  readonly stderr: Readable
  /** It goes on where its template was left: its process runs, and `start` has nothing to do. */
  readonly resumed?: boolean
  /** Of a virtual machine. */
  readonly machine?: { vmm: string; start: 'boot' | 'restore' }
  /** Runs `argv`. Rejects with `BoxError`. */
  start(): Promise<void>
  /**
   * Lays a directory’s files into a directory that the box has, or over it where they are many: for boxes that see no
   * directory of the host. Once, apart from what is small. Rejects with `BoxError`.
   */
  provide?(directory: string, target: string): Promise<void>
  /** Settles when the first process has ended and its output was read to the end, or the box was killed. Never rejects. */
  readonly exited: Promise<Exit>
  /** Limits of a box that is not started yet, or stands idle. */
  update(limits: BoxLimits): Promise<void>
  /** No process of it gets time until it is thawed. */
  freeze(): Promise<void>
  thaw(): Promise<void>
  usage(): Promise<BoxUsage>
  /** Every process of it is dead when this settles. Safe at any time and more than once; thaws first. */
  kill(): Promise<void>
  /** Kills, and leaves nothing: no process, mount, cgroup, socket or file. Safe more than once. Never rejects. */
  remove(): Promise<void>
  /** Host processes that belong to it. */
  pids(): number[]
}

/** A box could not be made or started: the engine’s doing, not the user’s, unless `fault` says so. */
export class BoxError extends Error {
  override name = 'BoxError'
  /** `user`: the command is not there or cannot be executed; `engine`: anything else. */
  readonly fault: 'user' | 'engine'
  constructor(fault: BoxError['fault'], message: string, options?: ErrorOptions) {
    super(message, options)
    this.fault = fault
  }
}

export interface Engine extends AsyncDisposable {
  /** Version of runsc or of the Docker Engine, and how it runs, such as `runsc 20240729 (systrap)`. */
  readonly version: string
  readonly walls: string[]
  readonly missing: { wall: string; fix: string }[]
  /** What was found by exceeding each limit. */
  readonly limits: LimitReport
  /** Egress kinds that can be had here. */
  readonly egress: ('none' | 'all' | 'allowlist')[]
  /** Boxes with a `template` are resumed, and have `provide`. */
  readonly resumes?: boolean
  /** Figures of its own, such as `restore_ms_p50`. */
  metrics?(): Record<string, number>
  /** Everything up to, not including, the start of the user’s process. Throws `BoxError` or `ImageError`. */
  create(spec: BoxSpec): Promise<Box>
}

/** What an engine may be told; every path is absolute. */
export interface EngineOptions {
  /** Names what belongs to this process, such as `gvisor-8f3a…`; the janitor goes by it and the process’s identity. */
  owner: string
  /**
   * Sockets, bundles, records of what exists. Below VULCAN_DATA_DIR, mode 0700. The same for every runner process of
   * this kind there: what is this process’s own stands in `<stateDir>/<owner>/`, so that the next start finds it.
   */
  stateDir: string
}

/** A network namespace with its way out, and the rules on it. Disposing of it leaves nothing. */
export interface Network extends AsyncDisposable {
  /** `/run/netns/…`, or wherever it can be entered. */
  readonly path: string
  /** Lines for the box’s /etc/hosts: the allowed names with the addresses that were found and checked for them. */
  readonly hosts: { address: string; name: string }[]
  /** For the box’s /etc/resolv.conf; none where names are in `hosts` alone. */
  readonly nameservers: string[]
  /** Connections that the rules have refused so far. */
  denied(): Promise<number>
  /** Bytes that its box has received and sent so far; undefined: not known any more. */
  traffic(): Bytes | undefined
  /**
   * Moves the interface into the network namespace of a live process, with its address and under its rules; `path`
   * leads there then. For engines that make namespaces of their own. At most once; throws where the process has none.
   */
  join(pid: number): Promise<void>
}

/** The policies of `EgressOptions` hold here too: private addresses and the platform’s own are out of reach. */
export interface Networks extends AsyncDisposable {
  /** Throws `NetworkError` (an Error) that says why there is none, or which name could not be resolved or is not allowed. */
  open(egress: Exclude<Egress, 'none'>, signal: AbortSignal): Promise<Network>
}
