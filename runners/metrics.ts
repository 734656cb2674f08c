/**
 * What a runner process counts and measures. Every series carries `service`, `process` and `isolation`. All methods
 * are cheap and never throw; durations are seconds, sizes bytes.
 */
import {
  BoundedLabel,
  byteBuckets,
  Count,
  createRegistry,
  Distribution,
  Reading,
  type Registry,
} from '../shared/metrics.ts'
import type { Cause, Isolation, Start, Usage } from '../shared/workload.ts'
import type { Use } from './descendants.ts'

/** How an attempt ended for its runner; `late`: somebody else had ended it before. */
export type AttemptEnd = 'completed' | 'failed' | 'killed' | 'retrying' | 'late'

/** Of the parts of a cold start: the names of `Phase`s, which are the same to metrics and traces. */
export type PhaseName =
  | 'fetch bundle'
  | 'fetch payload'
  | 'create isolate'
  | 'compile'
  | 'pull image'
  | 'unpack image'
  | 'create container'
  | 'boot machine'
  | 'restore machine'
  | 'mount files'
  | 'start handler'
  | 'open network'
  | 'build program'
  | 'wait for sandbox'

/** Why a sandbox could not be made, or died other than by its own end or by our hand. */
export type SandboxFailure = 'create' | 'start' | 'lost' | 'oom'

export class RunnerMetrics {
  readonly registry: Registry
  readonly #functions = new BoundedLabel()
  readonly #received: Count<['delivery']>
  readonly #attempts: Count<['function', 'status', 'cause']>
  readonly #starts: Count<['start']>
  readonly #coldStart: Distribution<['function', 'start']>
  readonly #phases: Distribution<['phase']>
  readonly #cpu: Distribution<['function']>
  readonly #memory: Distribution<['function']>
  readonly #disk: Distribution<['function', 'direction']>
  readonly #network: Distribution<['function', 'direction']>
  readonly #lines: Count<[]>
  readonly #droppedLines: Count<[]>
  readonly #sandboxFailures: Count<['cause']>
  readonly #egress: Count<['result']>
  readonly #pools: Reading<['state']>
  readonly #imageRequests: Count<['result']>
  readonly #pulls: Distribution<['result']>
  readonly #pulledBytes: Count<[]>
  readonly #caches: Reading<['cache']>
  /** Of virtual machines; of other isolations there is nothing to say. */
  readonly #machines: MachineMetrics | undefined
  readonly #cleanup: Distribution<[]>

  /**
   * @param process the runner’s id, as in events and heartbeats
   * @param use asked when somebody looks: what the sandboxes of this runner use now
   */
  constructor(process: string, isolation: Isolation, use?: () => Promise<Use | undefined>) {
    const registry = createRegistry('vulcan-runner', process, { isolation })
    this.registry = registry
    if (use !== undefined) countUse(registry, use)
    this.#received = new Count({
      name: 'vulcan_deliveries_total',
      help: 'Queued workloads that came to this runner, for the first time or again.',
      labels: ['delivery'],
      registry,
    })
    this.#attempts = new Count({
      name: 'vulcan_attempts_total',
      help: 'Attempts that ended here, by what was recorded of them.',
      labels: ['function', 'status', 'cause'],
      registry,
    })
    this.#starts = new Count({
      name: 'vulcan_starts_total',
      help: 'Sandboxes that began to run code: made for it (cold), made ready before (pooled), or used before by the same code (warm).',
      labels: ['start'],
      registry,
    })
    this.#coldStart = new Distribution({
      name: 'vulcan_cold_start_seconds',
      help: 'Seconds from the moment an attempt was taken up until its code could run, where no warm sandbox was there.',
      labels: ['function', 'start'],
      registry,
    })
    this.#phases = new Distribution({
      name: 'vulcan_cold_start_phase_seconds',
      help: 'Seconds that the parts of a cold start took.',
      labels: ['phase'],
      registry,
    })
    this.#cpu = new Distribution({
      name: 'vulcan_workload_cpu_seconds',
      help: 'CPU seconds of an attempt, as its sandbox measured them.',
      labels: ['function'],
      registry,
    })
    this.#memory = new Distribution({
      name: 'vulcan_workload_memory_peak_bytes',
      help: 'Most memory that an attempt held, in bytes, as its sandbox measured it.',
      labels: ['function'],
      buckets: byteBuckets,
      registry,
    })
    this.#disk = new Distribution({
      name: 'vulcan_workload_disk_bytes',
      help: 'Bytes that an attempt read from and wrote to disks.',
      labels: ['function', 'direction'],
      buckets: byteBuckets,
      registry,
    })
    this.#network = new Distribution({
      name: 'vulcan_workload_network_bytes',
      help: 'Bytes that an attempt received from and sent to the network.',
      labels: ['function', 'direction'],
      buckets: byteBuckets,
      registry,
    })
    this.#lines = new Count({
      name: 'vulcan_log_lines_total',
      help: 'Log lines that workloads wrote and that were published.',
      labels: [],
      registry,
    })
    this.#droppedLines = new Count({
      name: 'vulcan_log_lines_dropped_total',
      help: 'Log lines that workloads wrote beyond their limit, and that nobody will see.',
      labels: [],
      registry,
    })
    this.#sandboxFailures = new Count({
      name: 'vulcan_sandbox_failures_total',
      help: 'Sandboxes that could not be made or that died, by cause.',
      labels: ['cause'],
      registry,
    })
    this.#egress = new Count({
      name: 'vulcan_egress_requests_total',
      help: 'Requests of user code to the network that went through the runner, by how they fared.',
      labels: ['result'],
      registry,
    })
    this.#pools = new Reading({
      name: 'vulcan_pool_sandboxes',
      help: 'Sandboxes by what they do now: running a workload, idle and ready, or warm with code that ran before; paused: of the last two, those that get no time.',
      labels: ['state'],
      registry,
    })
    this.#imageRequests = new Count({
      name: 'vulcan_image_cache_requests_total',
      help: 'Images that were asked for: those that were here already (hit) and those that were not (miss).',
      labels: ['result'],
      registry,
    })
    this.#pulls = new Distribution({
      name: 'vulcan_image_pull_seconds',
      help: 'Seconds that fetching an image took.',
      labels: ['result'],
      registry,
    })
    this.#pulledBytes = new Count({
      name: 'vulcan_image_pulled_bytes_total',
      help: 'Bytes of images that were fetched.',
      labels: [],
      registry,
    })
    this.#caches = new Reading({
      name: 'vulcan_cache_bytes',
      help: 'Bytes that a cache holds on disk.',
      labels: ['cache'],
      registry,
    })
    this.#machines = isolation === 'microvm' ? new MachineMetrics(registry) : undefined
    this.#cleanup = new Distribution({
      name: 'vulcan_sandbox_cleanup_seconds',
      help: 'Seconds from the decision that a sandbox goes until nothing is left of it.',
      labels: [],
      registry,
    })
  }

  /** A queued workload came. @param deliveries 1 for the first time; more: redelivered */
  received(deliveries: number): void {
    this.#received.add(1, deliveries > 1 ? 'again' : 'first')
  }

  /** An attempt has its recorded end, or is to be tried again. @param fn name of the function, where it is one */
  attempted(fn: string | undefined, status: AttemptEnd, cause: Cause | null): void {
    this.#attempts.add(1, this.#functions.of(fn), status, cause ?? '')
  }

  /**
   * Code is about to run. @param seconds since its attempt was prepared; of warm ones not kept
   */
  started(fn: string | undefined, start: Start, seconds: number, traceparent?: string): void {
    this.#starts.add(1, start)
    if (start !== 'warm') this.#coldStart.add(seconds, traceparent, this.#functions.of(fn), start)
  }

  /** A part of a cold start took so long; measured whether it is traced or not. */
  phase(name: PhaseName, seconds: number, traceparent?: string): void {
    this.#phases.add(seconds, traceparent, name)
  }

  /** What an attempt used: processor, memory, disk and network; what is not known is left out. */
  used(fn: string | undefined, usage: Usage, traceparent?: string): void {
    const name = this.#functions.of(fn)
    const { cpu_ms, memory_peak_mb, disk_read_bytes, disk_written_bytes } = usage
    const { network_received_bytes, network_sent_bytes } = usage
    if (cpu_ms !== null) this.#cpu.add(cpu_ms / 1_000, traceparent, name)
    if (memory_peak_mb !== null) this.#memory.add(memory_peak_mb * 1_048_576, traceparent, name)
    if (disk_read_bytes !== null) this.#disk.add(disk_read_bytes, traceparent, name, 'read')
    if (disk_written_bytes !== null) this.#disk.add(disk_written_bytes, traceparent, name, 'write')
    if (network_received_bytes !== null)
      this.#network.add(network_received_bytes, traceparent, name, 'receive')
    if (network_sent_bytes !== null) this.#network.add(network_sent_bytes, traceparent, name, 'transmit')
  }

  /** Of one attempt, when its log is closed. */
  logged(lines: number, dropped: number): void {
    this.#lines.add(lines)
    this.#droppedLines.add(dropped)
  }

  sandboxFailed(cause: SandboxFailure): void {
    this.#sandboxFailures.add(1, cause)
  }

  egress(result: 'sent' | 'denied' | 'failed'): void {
    this.#egress.add(1, result)
  }

  /** `read` is called whenever somebody looks; the last one given for a state holds. */
  pool(state: 'running' | 'idle' | 'warm' | 'paused', read: () => number): void {
    this.#pools.from(read, state)
  }

  /** `read` gives bytes, or undefined where they are not known; called whenever somebody looks: no walking of folders. */
  cache(cache: 'images' | 'templates' | 'archives' | 'warm isolates', read: () => number | undefined): void {
    this.#caches.from(read, cache)
  }

  imageAsked(result: 'hit' | 'miss'): void {
    this.#imageRequests.add(1, result)
  }

  /** @param bytes that were really fetched */
  imagePulled(result: 'ok' | 'failed', seconds: number, bytes: number): void {
    this.#pulls.add(seconds, undefined, result)
    this.#pulledBytes.add(bytes)
  }

  templateAsked(result: 'hit' | 'miss'): void {
    this.#machines?.templates.add(1, result)
  }

  machineBooted(seconds: number): void {
    this.#machines?.boots.add(seconds, undefined)
  }

  machineRestored(seconds: number): void {
    this.#machines?.restores.add(seconds, undefined)
  }

  channelRoundTrip(seconds: number): void {
    this.#machines?.channel.add(seconds, undefined)
  }

  /** A sandbox of any kind is gone without a trace. */
  cleanedUp(seconds: number): void {
    this.#cleanup.add(seconds, undefined)
  }
}

class MachineMetrics {
  readonly templates: Count<['result']>
  readonly boots: Distribution<[]>
  readonly restores: Distribution<[]>
  readonly channel: Distribution<[]>

  constructor(registry: Registry) {
    this.templates = new Count({
      name: 'vulcan_template_requests_total',
      help: 'Templates of machines that were asked for: those that were here already (hit) and those that had to be made (miss).',
      labels: ['result'],
      registry,
    })
    this.boots = new Distribution({
      name: 'vulcan_machine_boot_seconds',
      help: 'Seconds from the start of a virtual machine from its kernel until it is ready.',
      labels: [],
      registry,
    })
    this.restores = new Distribution({
      name: 'vulcan_machine_restore_seconds',
      help: 'Seconds from the start of a virtual machine from a snapshot until it is ready.',
      labels: [],
      registry,
    })
    this.channel = new Distribution({
      name: 'vulcan_machine_channel_seconds',
      help: 'Seconds of a round trip between the runner and the agent in a virtual machine.',
      labels: [],
      registry,
    })
  }
}

function countUse(registry: Registry, use: () => Promise<Use | undefined>): void {
  let last: Use | undefined
  let cpuSeconds = 0
  let looking: Promise<void> | undefined
  const before = () => {
    looking ??= use()
      .then((now) => {
        // Processes that nobody waited for take their time along: a counter never goes back.
        cpuSeconds += Math.max(0, (now?.cpuSeconds ?? 0) - (last?.cpuSeconds ?? 0))
        last = now
      })
      .finally(() => {
        looking = undefined
      })
    return looking
  }
  new Reading({
    name: 'vulcan_sandboxes_cpu_seconds_total',
    help: 'CPU seconds of all sandboxes of the runner, and of what stands around them.',
    labels: [],
    registry,
    before,
  }).from(() => last && cpuSeconds)
  new Reading({
    name: 'vulcan_sandboxes_memory_bytes',
    help: 'Bytes of memory of all sandboxes of the runner now; what several share is counted once.',
    labels: [],
    registry,
    before,
  }).from(() => last?.memoryBytes)
  new Reading({
    name: 'vulcan_sandboxes_processes',
    help: 'Processes of all sandboxes of the runner now.',
    labels: [],
    registry,
    before,
  }).from(() => last?.processes)
}
