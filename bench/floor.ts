/**
 * The least that the messaging shape costs: an accepted event is published and acknowledged, the server sources it
 * into the queue, a consumer pulls it and replies. Nothing is parsed, run or recorded.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { Bus } from '../shared/bus.ts'
import { makeEvent } from '../shared/events.ts'
import { newWorkloadId } from '../shared/ids.ts'
import { acceptedSubject, lastToken } from '../shared/subjects.ts'
import { ensureTopology, TopologyOptions, WORK } from '../shared/topology.ts'
import { WorkloadSpec } from '../shared/workload.ts'
import { type LoadResult, summarise } from './load.ts'

const isolation = 'isolate'

const spec = WorkloadSpec.parse({ code: 'export default ({ x }) => ({ y: x * 2 })', input: { x: 21 } })
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

function publish(bus: Bus, id: string) {
  const event = makeEvent('accepted', id, 0, data, { source: '/vulcan/floor' })
  return bus.publishEvent(acceptedSubject(id, isolation), event, 0)
}

async function repeat(one: () => Promise<unknown>, inFlight: number, seconds: number): Promise<LoadResult> {
  const latencies: number[] = []
  const start = performance.now()
  const client = async () => {
    while (performance.now() < start + seconds * 1_000) {
      const before = performance.now()
      await one()
      latencies.push(performance.now() - before)
    }
  }
  await Promise.all(Array.from({ length: inFlight }, client))
  return summarise(latencies, (performance.now() - start) / 1_000, 0)
}

/** Round trips per second and their latency in ms, at each number in flight; `url` is a server
 * that nothing else uses. */
export async function floor(
  url: string,
  inFlight: number[],
  seconds: number,
): Promise<Map<number, LoadResult>> {
  await using bus = await Bus.connect({ url, name: 'floor' })
  await ensureTopology(bus.jsm, TopologyOptions.parse({}))
  const far = new URL('./floor-consumer.ts', import.meta.url).pathname
  const consumer = spawn(process.execPath, [far, url, isolation], { stdio: ['ignore', 'pipe', 'inherit'] })
  await once(consumer.stdout, 'data')
  const waiting = new Map<string, () => void>()
  bus.listen('floor.reply.*', (message) => waiting.get(lastToken(message.subject))?.())
  const roundTrip = async () => {
    const id = newWorkloadId()
    const replied = new Promise<void>((resolve) => waiting.set(id, resolve))
    await Promise.all([publish(bus, id), replied])
    waiting.delete(id)
  }
  await repeat(roundTrip, 16, 0.5)
  const results = new Map<number, LoadResult>()
  for (const n of inFlight) results.set(n, await repeat(roundTrip, n, seconds))
  consumer.kill()
  await once(consumer, 'exit')
  return results
}

/** Accepted events published and acknowledged per second, nothing behind them. The queue is emptied afterwards. */
export async function acceptFloor(url: string, inFlight: number, seconds: number): Promise<LoadResult> {
  await using bus = await Bus.connect({ url, name: 'accept-floor' })
  const result = await repeat(() => publish(bus, newWorkloadId()), inFlight, seconds)
  await bus.jsm.streams.purge(WORK, { filter: `vulcan.work.${isolation}.>` })
  return result
}
