/** Reads the whole event and log streams of a server and says what does not hold. */
import { Bus } from '../../shared/bus.ts'
import { isEnd, LifecycleEvent, type LogEvent } from '../../shared/events.ts'
import { fold, type WorkloadRecord } from '../../shared/lifecycle.ts'
import { workloadOf } from '../../shared/subjects.ts'
import { EVENTS, LOGS } from '../../shared/topology.ts'

export interface Audit {
  records: Map<string, WorkloadRecord>
  /** Workloads that have ended. */
  ends: number
  /** Attempts beyond the first. */
  retries: number
  late: number
  /** What must not be: a second end, an illegal move, a log line after the end. */
  wrong: string[]
}

interface Stored {
  subject: string
  seq: number
  /** ms since the epoch. */
  at: number
  value: unknown
}

async function* everything(bus: Bus, stream: string): AsyncGenerator<Stored> {
  const { state } = await bus.jsm.streams.info(stream)
  if (state.messages === 0) return
  const consumer = await bus.js.consumers.get(stream)
  const messages = await consumer.consume({ max_messages: 2_000 })
  for await (const message of messages) {
    yield { subject: message.subject, seq: message.seq, at: message.time.getTime(), value: message.json() }
    if (message.seq >= state.last_seq) break
  }
  await messages.close()
}

export async function audit(natsUrl: string): Promise<Audit> {
  await using bus = await Bus.connect({ url: natsUrl, name: 'audit' })
  const result: Audit = { records: new Map(), ends: 0, retries: 0, late: 0, wrong: [] }
  const endedAt = new Map<string, number>()
  for await (const { subject, seq, at, value } of everything(bus, EVENTS)) {
    const id = workloadOf(subject)
    if (subject.startsWith('vulcan.late.')) {
      result.late++
      continue
    }
    const event = LifecycleEvent.parse(value)
    const folded = fold(result.records.get(id), event, seq)
    if ('record' in folded) result.records.set(id, folded.record)
    else result.wrong.push(`${id} at ${seq}: ${'illegal' in folded ? folded.illegal : 'stale'}`)
    if (event.type === 'vulcan.workload.started' && event.data.attempt > 1) result.retries++
    if (isEnd(event)) {
      if (endedAt.has(id)) result.wrong.push(`${id} ended twice`)
      endedAt.set(id, at)
      result.ends++
    }
  }
  for await (const { subject, at, value } of everything(bus, LOGS)) {
    const id = workloadOf(subject)
    const ended = endedAt.get(id)
    const { lines } = (value as LogEvent).data
    const last = Date.parse(lines.at(-1)?.time ?? '')
    if (ended !== undefined && last > ended + 1)
      result.wrong.push(`${id} wrote a line ${last - ended} ms after its end`)
    if (ended !== undefined && at > ended + 1 && last > ended)
      result.wrong.push(`${id}: a batch of lines after its end`)
  }
  return result
}
