/** Log lines per second from `console.log` to a client’s SSE, and the same batches through JetStream alone. */
import { Bus } from '../shared/bus.ts'
import { type LogEvent, makeEvent } from '../shared/events.ts'
import { newWorkloadId } from '../shared/ids.ts'
import { logSubject } from '../shared/subjects.ts'
import { LOGS } from '../shared/topology.ts'
import type { LogLine } from '../shared/workload.ts'
import { type LoadResult, summarise } from './load.ts'

const text = (i: number) => `line ${i} of a workload that has something to say`

/** One workload writes `count` lines; the clock runs from its acceptance to its stream’s end. */
export async function logLines(url: string, count: number): Promise<LoadResult> {
  const code = `export default ({ count }) => { for (let i = 0; i < count; i++) console.log('line ' + i + ' of a workload that has something to say') }`
  const start = performance.now()
  const accepted = await fetch(`${url}/v1/workloads/async`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ code, input: { count } }),
  })
  const { id } = (await accepted.json()) as { id: string }
  const stream = await fetch(`${url}/v1/workloads/${id}/logs`, { headers: { accept: 'text/event-stream' } })
  let lines = 0
  let rest = ''
  const decoder = new TextDecoder()
  for await (const chunk of stream.body ?? []) {
    rest += decoder.decode(chunk, { stream: true })
    const end = rest.lastIndexOf('\n')
    for (const line of rest.slice(0, Math.max(0, end)).split('\n')) if (line === 'event: log') lines++
    rest = rest.slice(end + 1)
  }
  const took = (performance.now() - start) / 1_000
  return { ...summarise([took * 1_000], took, lines === count ? 0 : 1), rate: lines / took }
}

/** The same lines in batches of 500, published one by one with acknowledgement, and read by one consumer. */
export async function logFloor(url: string, count: number): Promise<LoadResult> {
  await using bus = await Bus.connect({ url, name: 'log-floor' })
  const id = newWorkloadId()
  const consumer = await bus.js.consumers.get(LOGS, { filter_subjects: logSubject(id) })
  const messages = await consumer.consume()
  const start = performance.now()
  const reading = (async () => {
    let lines = 0
    for await (const message of messages) {
      lines += message.json<LogEvent>().data.lines.length
      if (lines >= count) return
    }
  })()
  for (let from = 0, n = 1; from < count; from += 500, n++) {
    const time = new Date().toISOString()
    const lines: LogLine[] = []
    for (let i = from; i < Math.min(count, from + 500); i++)
      lines.push({ time, level: 'info', stream: 'console', text: text(i) })
    const event = makeEvent(
      'log',
      id,
      `1.${n}`,
      { attempt: 1, n, lines, dropped: 0 },
      { source: '/vulcan/bench' },
    )
    await bus.publishRecord(logSubject(id), event, `${id}.1.log.${n}`)
  }
  await reading
  const took = (performance.now() - start) / 1_000
  await messages.close()
  return { ...summarise([took * 1_000], took, 0), rate: count / took }
}
