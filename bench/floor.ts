/**
 * The least that the messaging shape costs: an accepted event is published and acknowledged, the server sources it
 * into the queue, a consumer pulls it and replies. Nothing is parsed, run or recorded; both ends are the nats.js
 * client as it comes, one process each.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { type JetStreamClient, jetstream, jetstreamManager } from '@nats-io/jetstream'
import { connect } from '@nats-io/transport-node'
import { makeEvent } from '../shared/events.ts'
import { newWorkloadId } from '../shared/ids.ts'
import { acceptedSubject, lastToken, lifecycleSubjects } from '../shared/subjects.ts'
import { ensureTopology, TopologyOptions, WORK } from '../shared/topology.ts'
import { WorkloadSpec } from '../shared/workload.ts'
import { type LoadResult, repeat } from './load.ts'

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

function publish(js: JetStreamClient, id: string) {
  const event = makeEvent('accepted', id, 0, data, { source: '/vulcan/floor' })
  return js.publish(acceptedSubject(id, isolation), JSON.stringify(event), {
    expect: { lastSubjectSequence: 0, lastSubjectSequenceSubject: lifecycleSubjects(id) },
  })
}

/** Round trips per second and their latency in ms, `inFlight` at a time; `url` is a server that nothing else uses. */
export async function floor(url: string, inFlight: number, seconds: number): Promise<LoadResult> {
  const connection = await connect({ servers: url })
  await ensureTopology(await jetstreamManager(connection), TopologyOptions.parse({}))
  const far = new URL('./floor-consumer.ts', import.meta.url).pathname
  const consumer = spawn(process.execPath, [far, url, isolation], { stdio: ['ignore', 'pipe', 'inherit'] })
  await once(consumer.stdout, 'data')
  const js = jetstream(connection)
  const waiting = new Map<string, () => void>()
  connection.subscribe('floor.reply.*', {
    callback: (_, message) => waiting.get(lastToken(message.subject))?.(),
  })
  const roundTrip = async () => {
    const id = newWorkloadId()
    const replied = new Promise<void>((resolve) => waiting.set(id, resolve))
    await Promise.all([publish(js, id), replied])
    return waiting.delete(id)
  }
  await repeat(roundTrip, inFlight, 0.5)
  const result = await repeat(roundTrip, inFlight, seconds)
  consumer.kill()
  await once(consumer, 'exit')
  await connection.close()
  return result
}

/** Accepted events published and acknowledged per second, nothing behind them. The queue is emptied afterwards. */
export async function acceptFloor(url: string, inFlight: number, seconds: number): Promise<LoadResult> {
  const connection = await connect({ servers: url })
  const js = jetstream(connection)
  const result = await repeat(async () => (await publish(js, newWorkloadId())).seq > 0, inFlight, seconds)
  const jsm = await jetstreamManager(connection)
  await jsm.streams.purge(WORK, { filter: `vulcan.work.${isolation}.>` })
  await connection.close()
  return result
}
