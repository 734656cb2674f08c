/**
 * The least that the messaging shape costs: an accepted event is published and acknowledged, the server sources it
 * into the queue, a consumer pulls it and replies. Nothing is parsed, run or recorded.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { type LoadResult, summarise } from './load.ts'
import { Bus } from '../shared/bus.ts'
import { makeEvent } from '../shared/events.ts'
import { newWorkloadId } from '../shared/ids.ts'
import { acceptedSubject, allReplies, lastToken } from '../shared/subjects.ts'
import { WorkloadSpec } from '../shared/workload.ts'

/** An isolation without a runner of its own in this platform: its queue is free to measure on. */
const isolation = 'docker'

/** Round trips per second and their latency in ms, at each number in flight; `url` is the platform’s own server. */
export async function floor(
  url: string,
  inFlight: number[],
  seconds: number,
): Promise<Map<number, LoadResult>> {
  const consumer = spawn(
    process.execPath,
    [new URL('./floor-consumer.ts', import.meta.url).pathname, url, isolation],
    {
      stdio: ['ignore', 'pipe', 'inherit'],
    },
  )
  await once(consumer.stdout, 'data')
  await using bus = await Bus.connect({ url, name: 'floor' })
  const waiting = new Map<string, () => void>()
  bus.listen(allReplies('floor'), (message) => waiting.get(lastToken(message.subject))?.())
  const spec = WorkloadSpec.parse({ code: 'export default ({ x }) => ({ y: x * 2 })', input: { x: 21 } })

  const roundTrip = async () => {
    const id = newWorkloadId()
    const data = {
      spec,
      payload: null,
      isolation,
      target: 'any',
      routing_reason: 'floor',
      request_sha256: '',
      trace_id: '',
      rerun_of: null,
    } as const
    const replied = new Promise<void>((resolve) => waiting.set(id, resolve))
    const event = makeEvent('accepted', id, 0, data, { source: '/vulcan/floor' })
    await Promise.all([
      bus.publishEvent(acceptedSubject(id, isolation), event, 0, { replyTo: 'floor' }),
      replied,
    ])
    waiting.delete(id)
  }
  const results = new Map<number, LoadResult>()
  for (const n of [0, ...inFlight]) {
    const latencies: number[] = []
    const start = performance.now()
    const end = start + (n === 0 ? 500 : seconds * 1_000)
    const client = async () => {
      while (performance.now() < end) {
        const before = performance.now()
        await roundTrip()
        latencies.push(performance.now() - before)
      }
    }
    await Promise.all(Array.from({ length: n || 16 }, client))
    // The first round, n = 0, only warms both processes up.
    if (n > 0) results.set(n, summarise(latencies, (performance.now() - start) / 1_000, 0))
  }
  consumer.kill()
  await once(consumer, 'exit')
  return results
}
