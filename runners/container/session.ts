/** One job in a container, from the choice of its box to its outcome. */
import { FrameError } from '../../shared/frames.ts'
import { kinds, type Message } from '../../shared/guest.ts'
import { preciseNow } from '../../shared/tracing.ts'
import type { Cause, LogLine, MachineReceipt, Start, Usage } from '../../shared/workload.ts'
import { nothingRan, round, timestamp, unknownUsage } from '../guest/report.ts'
import { Traffic } from '../guest/traffic.ts'
import {
  type Failed,
  inlineResponseBytes,
  type Job,
  type Outcome,
  type Prepared,
  type RunEvents,
} from '../runner.ts'
import { ArchiveError } from './archives.ts'
import { type CommandEnd, runCommand } from './command.ts'
import { atLeast, since } from './disk.ts'
import { BoxError, type Bytes, type Exit, ImageError } from './engine.ts'
import { BuildFailed } from './go.ts'
import type { Gone, Occupant } from './handler.ts'
import { answered, type Entered, inputOf, problem } from './http-json.ts'
import { Phases } from './phases.ts'
import {
  blankKey,
  fitsBlank,
  InvalidPlan,
  outputBytes,
  programKey,
  type Route,
  routeOf,
  warmKey,
} from './plan.ts'
import type { Pool } from './pool.ts'
import { type DoneHeader, inBox, memorySpent, type RunContext } from './protocol.ts'
import type { Sandbox } from './sandbox.ts'
import { TooSmall, type Workshop } from './workshop.ts'

/** A box that was told to stop has so many ms to say that it has; then it is killed, as it is in the end anyway. */
const graceMs = 150
/** Blanks kept of each kind that is asked for. */
const blanks = 2

/** A box for a job, and how the job came to it. */
type Seat =
  | { kind: 'handler'; sandbox: Sandbox; start: Start; route: HandlerRoute }
  | { kind: 'command'; sandbox: Sandbox; start: Start; result: string }
type HandlerRoute = Extract<Route, { kind: 'handler' }>

export class Attempt implements Prepared {
  readonly #workshop: Workshop
  readonly #pool: Pool
  readonly #job: Job
  readonly #phases: Phases
  readonly #giveUp = new AbortController()
  readonly #seat: Promise<Seat>
  #ran = false

  constructor(workshop: Workshop, pool: Pool, job: Job) {
    this.#workshop = workshop
    this.#pool = pool
    this.#job = job
    this.#phases = new Phases(job, workshop.metrics)
    this.#seat = this.#sit()
    // Told by `run`, if that is ever called.
    this.#seat.catch(() => {})
  }

  async run(signal: AbortSignal, events: RunEvents): Promise<Outcome> {
    if (this.#ran) throw new Error('a job runs once')
    this.#ran = true
    this.#phases.tell(events.onPhase)
    try {
      return await this.#toTheEnd(signal, events)
    } finally {
      this.#phases.close()
    }
  }

  async #toTheEnd(signal: AbortSignal, events: RunEvents): Promise<Outcome> {
    const stopped = { status: 'stopped' as const, ...nothingRan }
    if (signal.aborted) {
      this.#leave()
      return stopped
    }
    let seat: Seat | 'stopped'
    try {
      seat = await orAborted(this.#seat, signal)
    } catch (error) {
      return failure(error)
    }
    if (seat === 'stopped') {
      const before = this.#phases.underWay ?? 'no sandbox yet'
      this.#leave()
      return { ...stopped, before }
    }
    try {
      return await this.#run(seat, signal, events)
    } catch (error) {
      if (error instanceof BoxError && error.fault === 'engine' && !signal.aborted)
        this.#workshop.metrics?.sandboxFailed('start')
      await seat.sandbox.kill()
      this.#close(seat.sandbox)
      return signal.aborted ? stopped : failure(error)
    }
  }

  release(): void {
    if (this.#ran) return
    this.#ran = true
    this.#leave()
  }

  /** Nothing was run: what is there, or still comes, goes back. */
  #leave(): void {
    this.#giveUp.abort(new Error('the job was given up'))
    this.#seat.then(
      ({ sandbox }) => {
        const isUsed = sandbox.shim !== undefined && sandbox.shim.runs > 0
        // Started before the job ran: the program is in it, and nothing else of the job’s.
        const isPrepared = sandbox.shim !== undefined
        if (!isUsed && !isPrepared) return this.#close(sandbox)
        if (!isUsed) sandbox.warmKey = undefined
        this.#pool.giveBack(sandbox)
      },
      () => {},
    )
  }

  async #sit(): Promise<Seat> {
    const job = this.#job
    const route = routeOf(job)
    const phases = this.#phases
    const signal = this.#giveUp.signal
    if (route.kind !== 'handler') {
      const { sandbox, result } = await this.#workshop.command(route, job, signal, phases)
      this.#pool.add(sandbox)
      return { kind: 'command', sandbox, start: 'cold', result }
    }
    const own = typeof route.base !== 'string'
    const image = own ? await this.#workshop.image(route.base, signal, phases) : undefined
    const key = warmKey(job, image?.digest)
    const found = this.#pool.takeWarm(key)
    if (found !== undefined && (await this.#wake(found))) {
      image?.[Symbol.dispose]()
      return { kind: 'handler', sandbox: found, start: 'warm', route }
    }
    const sandbox = own ? undefined : await this.#pooled(route)
    if (sandbox !== undefined) {
      sandbox.warmKey = key
      return { kind: 'handler', sandbox, start: 'pooled', route }
    }
    const made = await this.#workshop.handler(
      route,
      job,
      image ?? (await this.#workshop.image(route.base, signal, phases)),
      signal,
      { phases },
    )
    made.warmKey = key
    made.programKey = programKey(job)
    this.#pool.add(made)
    return { kind: 'handler', sandbox: made, start: 'cold', route }
  }

  /** A box that is there already, with the program put into it. */
  async #pooled({ language }: HandlerRoute): Promise<Sandbox | undefined> {
    const job = this.#job
    const program = programKey(job)
    const prepared = this.#pool.takePrepared(program)
    if (prepared !== undefined && (await this.#wake(prepared))) return prepared
    if (!fitsBlank(job)) return undefined
    const { limits } = job
    const blank = this.#pool.takeBlank(blankKey(language, limits), blanks, () =>
      this.#workshop.blank(language, limits),
    )
    if (blank === undefined) return undefined
    try {
      const filling = this.#workshop.fill(blank, job, this.#phases)
      const [fits, awake] = await Promise.all([filling, this.#wake(blank)])
      if (fits && awake) {
        blank.programKey = program
        return blank
      }
    } catch (error) {
      this.#pool.drop(blank)
      throw error
    }
    this.#pool.drop(blank)
    return undefined
  }

  /** False where it could not be thawed: then it is gone, and another is to be found. */
  async #wake(sandbox: Sandbox): Promise<boolean> {
    try {
      await sandbox.thaw()
      return true
    } catch {
      this.#pool.drop(sandbox)
      return false
    }
  }

  async #run(seat: Seat, signal: AbortSignal, events: RunEvents): Promise<Outcome> {
    const job = this.#job
    const byHttp = job.http !== undefined && !(seat.kind === 'handler' && seat.route.language === 'node')
    if (!byHttp) return await this.#runOnce(seat, job, signal, events)
    let entered: Entered | 'stopped'
    try {
      entered = await orAborted(inputOf(job.http!), signal)
    } catch (error) {
      // As for code that reads the body itself: whoever sent it has broken it off.
      this.#giveBack(seat)
      return { ...failure(error), cause: 'user_error' }
    }
    if (entered === 'stopped') {
      this.#giveBack(seat)
      return { status: 'stopped', ...nothingRan, before: 'read request body' }
    }
    if ('status' in entered) {
      this.#giveBack(seat)
      return {
        status: 'completed',
        output: 'null',
        exitCode: null,
        ...nothingRan,
        response: problem(entered),
      }
    }
    const outcome = await this.#runOnce(
      seat,
      { ...job, input: entered.input, http: undefined },
      signal,
      events,
    )
    return await answered(outcome, events, signal)
  }

  #giveBack(seat: Seat): void {
    if (seat.kind === 'handler') this.#pool.giveBack(seat.sandbox)
    else this.#close(seat.sandbox)
  }

  async #runOnce(seat: Seat, job: Job, signal: AbortSignal, events: RunEvents): Promise<Outcome> {
    const denials = await seat.sandbox.network?.denied()
    const outcome =
      seat.kind === 'command'
        ? await this.#runCommand(seat, job, signal, events)
        : await this.#runHandler(seat, job, signal, events)
    if (outcome.status !== 'failed') return outcome
    if (outcome.cause === 'oom') this.#workshop.metrics?.sandboxFailed('oom')
    if (outcome.cause === 'runner_lost') this.#workshop.metrics?.sandboxFailed('lost')
    if (denials === undefined) return outcome
    if (outcome.cause !== 'user_error' && outcome.cause !== 'exit_code') return outcome
    if ((await seat.sandbox.network!.denied().catch(() => denials)) <= denials) return outcome
    const policy = typeof job.egress === 'string' ? job.egress : JSON.stringify(job.egress)
    const message = `${outcome.error.message} (connections were refused: network.egress is ${policy})`
    return { ...outcome, cause: 'egress_denied', error: { ...outcome.error, message } }
  }

  // ------------------------------------------------------------------------------------------- commands

  async #runCommand(
    { sandbox, result, start }: Extract<Seat, { kind: 'command' }>,
    job: Job,
    signal: AbortSignal,
    events: RunEvents,
  ): Promise<Outcome> {
    const limit = outputBytes(job.limits)
    const onAbort = () => void sandbox.kill()
    signal.addEventListener('abort', onAbort)
    if (signal.aborted) onAbort()
    let end: CommandEnd
    try {
      end = await runCommand(sandbox.box, {
        input: job.input,
        result,
        outputBytes: limit,
        phases: this.#phases,
        onLine: (line) => {
          if (!signal.aborted) events.onLog(stamped(line))
        },
      })
    } finally {
      signal.removeEventListener('abort', onAbort)
    }
    const { usage, oom } = await this.#usage(sandbox)
    await sandbox.kill()
    this.#close(sandbox)
    const ran = { usage, start, ...provenance(sandbox, start) }
    if (signal.aborted) return { status: 'stopped', ...ran }
    const { exit } = end
    const failed = (cause: Cause, message: string, exitCode: number | null = null): Outcome => ({
      status: 'failed',
      cause,
      error: { message, stack: null },
      exitCode,
      ...ran,
    })
    const code = exit.lost === true ? null : exit.code
    if (end.kind === 'too_large') return failed('output_too_large', tooLarge(end.size, limit), code)
    if (end.output !== undefined)
      return { status: 'completed', output: end.output, exitCode: exit.code, ...ran }
    if (exit.oom || oom) return failed('oom', oomMessage(job), code)
    if (exit.lost === true) return failed('runner_lost', lostMessage('the command', exit))
    return failed('exit_code', exitMessage('the command', exit), code)
  }

  // ------------------------------------------------------------------------------------------- handlers

  async #runHandler(
    seat: Extract<Seat, { kind: 'handler' }>,
    job: Job,
    signal: AbortSignal,
    events: RunEvents,
  ): Promise<Outcome> {
    const { sandbox, start, route } = seat
    const own = typeof route.base !== 'string'
    if (sandbox.shim === undefined) {
      const shim = sandbox.attach()
      const start = () => sandbox.box.start().then(() => shim.ready)
      const starting = this.#phases.measure('start handler', start)
      const ready = await orAborted(starting, signal)
      if (ready === 'stopped') {
        await sandbox.kill()
        this.#close(sandbox)
        return { status: 'stopped', ...nothingRan, before: 'start handler' }
      }
    }
    this.#phases.started(start)
    const call = new Call(sandbox, job, events, signal, own)
    const { end, traffic } = await call.run(route, this.#phases)
    const { usage, oom } = await this.#usage(sandbox)
    const ran = { usage, start, ...provenance(sandbox, start) }
    const outcome = this.#judge(end, job, ran, traffic, oom)
    // After an oom, whoever it took, the counter would speak of the next run too.
    const isSound =
      outcome.status === 'completed' || (outcome.status === 'failed' && outcome.cause !== 'runner_lost')
    if (end.kind === 'done' && end.header.worn !== true && isSound && !oom) this.#pool.giveBack(sandbox)
    else {
      await sandbox.kill()
      this.#close(sandbox)
    }
    // The code is through; the response may still be on its way to a slow reader.
    return await call.deliver(outcome)
  }

  #judge(end: CallEnd, job: Job, ran: Ran, traffic: Traffic, oom: boolean): Outcome {
    const failed = (
      cause: Cause,
      message: string,
      stack: string | null = null,
      exitCode: number | null = null,
    ) => ({ status: 'failed', cause, error: { message, stack }, exitCode, ...ran }) as const
    switch (end.kind) {
      case 'stopped':
        return { status: 'stopped', ...ran }
      case 'gone': {
        const { exit, protocol, stderr } = end.gone
        if (exit.oom || oom) return failed('oom', oomMessage(job))
        if (protocol !== undefined)
          return failed('runner_lost', `the sandbox broke its protocol: ${protocol}`.slice(0, 1_000))
        if (memorySpent(stderr)) return failed('oom', oomMessage(job), null, exit.code)
        if (end.unready)
          return failed(
            'invalid_workload',
            `the image cannot run the handler: ${stderr.slice(-1_000) || `exit code ${exit.code}`}`,
          )
        if (exit.lost === true || exit.code === 128 + 9)
          return failed('runner_lost', lostMessage('the code', exit))
        return failed('exit_code', exitMessage('the handler’s process', exit, stderr), null, exit.code)
      }
      case 'done': {
        const { header, output, body } = end
        const { status, cause, message, stack, response } = header
        if (status === 'failed')
          return oom ? failed('oom', oomMessage(job), stack) : failed(cause!, message!, stack)
        const answers = (response === undefined ? 0 : 1) + (traffic.responding ? 1 : 0)
        const sound = status === 'completed' && output !== undefined && isJson(output)
        if (!sound || answers !== (job.http === undefined ? 0 : 1))
          return failed('runner_lost', 'the sandbox sent a result that is none')
        const limit = outputBytes(job.limits)
        const size = Buffer.byteLength(output)
        if (size > limit) return failed('output_too_large', tooLarge(String(size), limit))
        const done = { status, output, exitCode: null, ...ran }
        return response === undefined
          ? done
          : { ...done, response: { ...response, body: body ?? Buffer.alloc(0) } }
      }
      default:
        throw new Error(`unhandled ${end satisfies never}`)
    }
  }

  /** Of the run that ended, and whether the kernel has killed in the box for want of memory. */
  async #usage(sandbox: Sandbox): Promise<{ usage: Usage; oom: boolean }> {
    try {
      const { cpuMs, memoryPeakMb, oomKills = 0, disk } = await sandbox.box.usage()
      const before = sandbox.cpuMs
      const { disk: diskBefore, traffic: trafficBefore } = sandbox
      sandbox.disk = atLeast(diskBefore, disk)
      sandbox.traffic = sandbox.network === undefined ? nothingMoved : sandbox.network.traffic()
      const onDisk = since(diskBefore, disk)
      const onNetwork = since(trafficBefore, sandbox.traffic)
      sandbox.cpuMs = cpuMs ?? 0
      sandbox.memoryMb = memoryPeakMb ?? this.#job.limits.memory_mb
      return {
        usage: {
          cpu_ms: cpuMs === null ? null : round(Math.max(0, cpuMs - before)),
          memory_peak_mb: memoryPeakMb === null ? null : round(memoryPeakMb),
          disk_read_bytes: onDisk?.in ?? null,
          disk_written_bytes: onDisk?.out ?? null,
          network_received_bytes: onNetwork?.in ?? null,
          network_sent_bytes: onNetwork?.out ?? null,
        },
        oom: oomKills > 0,
      }
    } catch {
      return { usage: unknownUsage, oom: false }
    }
  }

  /** In the background: nothing of the user’s runs in it any more. */
  #close(sandbox: Sandbox): void {
    this.#pool.drop(sandbox)
    void sandbox.close()
  }
}

const nothingMoved: Bytes = { in: 0, out: 0 }

type Ran = { usage: Usage; start: Start } & ReturnType<typeof provenance>

type CallEnd =
  | { kind: 'done'; header: DoneHeader; output: string | undefined; body: Buffer | undefined }
  /** It was asked to stop, and the box is dead. */
  | { kind: 'stopped' }
  /** `unready`: the user’s image never brought the shim up. */
  | { kind: 'gone'; gone: Gone; unready: boolean }

/** One run of a shim. */
class Call implements Occupant {
  readonly #sandbox: Sandbox
  readonly #job: Job
  readonly #events: RunEvents
  readonly #signal: AbortSignal
  readonly #own: boolean
  readonly #traffic: Traffic
  #resolve: ((end: CallEnd) => void) | undefined
  #cancelled = false
  /** When the run was sent, ms since the epoch: where the guest’s clock begins. */
  #began = 0
  #grace: NodeJS.Timeout | undefined

  constructor(sandbox: Sandbox, job: Job, events: RunEvents, signal: AbortSignal, own: boolean) {
    this.#sandbox = sandbox
    this.#job = job
    this.#events = events
    this.#signal = signal
    this.#own = own
    this.#traffic = new Traffic(
      job,
      events,
      undefined,
      (kind, parts, number) => sandbox.shim!.post(kind, parts, number),
      (ms) => this.#began + ms,
    )
  }

  async run({ entry, base }: HandlerRoute, phases: Phases): Promise<{ end: CallEnd; traffic: Traffic }> {
    const { id, attempt, traceparent, traced, env, input, limits, workingDir } = this.#job
    const traffic = this.#traffic
    const shim = this.#sandbox.shim!
    const neverReady = shim.gone !== undefined && shim.runs === 0
    const ctx: RunContext = {
      ...{ id, attempt, traceparent: traceparent ?? null, env },
      ...(traced === true ? { traced } : {}),
    }
    const ended = new Promise<CallEnd>((resolve) => {
      this.#resolve = resolve
    })
    const request = traffic.enter()
    this.#began = preciseNow()
    shim.start(
      this,
      {
        root: typeof base === 'string' ? inBox.workspace : (workingDir ?? '.'),
        entry,
        output_bytes: outputBytes(limits),
        inline_bytes: inlineResponseBytes,
        ...(traffic.streams ? { follows: true as const } : {}),
      },
      JSON.stringify(ctx),
      input,
      request,
    )
    traffic.begin()
    this.#signal.addEventListener('abort', this)
    if (this.#signal.aborted) this.handleEvent()
    const end = await ended
    clearTimeout(this.#grace)
    if (traced === true) phases.add({ name: 'guest', ...this.#inGuest(end) })
    if (end.kind === 'gone') return { end: { ...end, unready: this.#own && neverReady }, traffic }
    return { end, traffic }
  }

  /** From the handler’s call to its answer, as the guest says within the time of the run; where it says nothing, all of that. */
  #inGuest(end: CallEnd): { start: number; end: number; error?: string } {
    const start = this.#began
    const now = preciseNow()
    const { reason } = this.#signal
    if (end.kind === 'stopped')
      return { start, end: now, error: typeof reason === 'string' ? reason : 'stopped' }
    if (end.kind === 'gone') return { start, end: now, error: 'the sandbox ended' }
    const { guest, status, cause } = end.header
    const failed = status === 'failed' ? { error: String(cause) } : {}
    if (guest === undefined) return { start, end: now, ...failed }
    const [called, through] = guest
    const at = Math.min(Math.max(start, start + called), now)
    return { start: at, end: Math.min(Math.max(at, start + through), now), ...failed }
  }

  /** An `AbortSignal` calls this when it is aborted. */
  handleEvent() {
    if (this.#cancelled) return
    this.#cancelled = true
    if (this.#resolve === undefined) return this.#traffic.cut('the call was stopped')
    this.#sandbox.shim!.cancel(stopMessage(this.#signal.reason))
    this.#grace = setTimeout(() => void this.#sandbox.kill(), graceMs)
  }

  onLine(line: Pick<LogLine, 'level' | 'stream' | 'text'>): void {
    if (this.#resolve !== undefined) this.#events.onLog(stamped(line))
  }

  onMessage(message: Message): void {
    if (message.kind === kinds.need) throw new FrameError('a message that no shim sends')
    this.#traffic.handle(message)
  }

  onDone(header: DoneHeader, output: string | undefined, body: Buffer | undefined) {
    if (!this.#cancelled) return this.#end({ kind: 'done', header, output, body })
    // Whatever it has left behind must not run on.
    void this.#sandbox.kill().then(() => this.#end({ kind: 'stopped' }))
  }

  onGone(gone: Gone): void {
    this.#end(this.#cancelled ? { kind: 'stopped' } : { kind: 'gone', gone, unready: false })
  }

  #end(end: CallEnd): void {
    const resolve = this.#resolve
    this.#resolve = undefined
    resolve?.(end)
  }

  /** Settles when the response, where one was begun, has been taken or given up. */
  async deliver(outcome: Outcome): Promise<Outcome> {
    const failed = outcome.status === 'failed' ? outcome.error.message : 'the call was stopped'
    const closed = this.#traffic.close(failed)
    if (this.#traffic.responding) {
      if (outcome.status !== 'completed' || this.#cancelled) this.#traffic.cut(failed)
      await closed
    }
    this.#signal.removeEventListener('abort', this)
    const { usage, start } = outcome
    if (!this.#cancelled) return outcome
    return { status: 'stopped', usage, start, ...provenance(this.#sandbox, start) }
  }
}

const stamped = ({ level, stream, text }: Pick<LogLine, 'level' | 'stream' | 'text'>): LogLine => ({
  time: timestamp(),
  level,
  stream,
  text,
})

/** The value, or `stopped` where the signal is aborted first. */
function orAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T | 'stopped'> {
  return new Promise((resolve, reject) => {
    const onAbort = () => resolve('stopped')
    if (signal.aborted) onAbort()
    signal.addEventListener('abort', onAbort, { once: true })
    promise.then(resolve, reject).finally(() => signal.removeEventListener('abort', onAbort))
  })
}

function isJson(text: string): boolean {
  try {
    JSON.parse(text)
    return true
  } catch {
    return false
  }
}

/** What the code ran on. */
function provenance(
  { imageDigest, box }: Sandbox,
  start: Start,
): { imageDigest: Sandbox['imageDigest']; machine?: MachineReceipt } {
  const { machine } = box
  if (machine === undefined) return { imageDigest }
  return { imageDigest, machine: { vmm: machine.vmm, start: start === 'cold' ? machine.start : 'pool' } }
}

const lostMessage = (what: string, { reason }: Exit) =>
  `the sandbox died while ${what} ran${reason === undefined ? '' : `: ${reason}`}`

const oomMessage = ({ limits }: Job) =>
  `the code used more than its ${limits.memory_mb} MiB of memory (limits.memory_mb)`

const tooLarge = (size: string, limit: number) =>
  `the output has ${size} bytes, the limit is ${limit} (limits.output_mb)`

function exitMessage(who: string, { code }: Exit, stderr = ''): string {
  const how = code > 128 ? `was ended by signal ${code - 128}` : `ended with exit code ${code}`
  return stderr === '' ? `${who} ${how}` : `${who} ${how}: ${stderr.slice(-1_000)}`
}

/** What the user’s code finds as the reason of its signal. */
const stopMessage = (reason: unknown): string =>
  typeof reason === 'string' ? `the workload was stopped: ${reason}` : 'the workload was stopped'

/** The box could not be made or started: whose doing that is. */
function failure(error: unknown): Failed {
  const { message } = error as Error
  return {
    status: 'failed',
    cause: causeOf(error),
    error: { message, stack: null },
    exitCode: null,
    ...nothingRan,
  }
}

function causeOf(error: unknown): Cause {
  if (error instanceof ImageError) return error.reason
  if (error instanceof InvalidPlan || error instanceof ArchiveError || error instanceof BuildFailed)
    return 'invalid_workload'
  if (error instanceof TooSmall) return 'oom'
  const { fault, code } = error as { fault?: unknown; code?: unknown }
  if (error instanceof BoxError) return fault === 'user' ? 'invalid_workload' : 'backend_unavailable'
  if ((error as Error).name === 'NetworkError' && fault === 'user') return 'egress_denied'
  if (code === 'ENOSPC' || code === 'EDQUOT') return 'disk_full'
  return 'backend_unavailable'
}
