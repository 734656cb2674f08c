/**
 * A runner in a process of its own, for tests that count what runs and kill it: tells its parent of every start and
 * end with the time. `lane-runner.ts <nats url> <ack wait ms> <slots>`; code is `<ms to take>`.
 */
import { setTimeout as delay } from 'node:timers/promises'
import { TopologyOptions } from '../../shared/topology.ts'
import { codeOf, completed, startWorker } from './support.ts'

/** Milliseconds of the monotonic clock, the same for all processes of a host. */
const clock = () => Number(process.hrtime.bigint()) / 1e6

const [url, ackWaitMs, slots] = process.argv.slice(2)
const worker = await startWorker(
  { nats: { url: url! }, topology: TopologyOptions.parse({ ackWaitMs }) },
  async (job) => {
    process.send!({ type: 'start', id: job.id, attempt: job.attempt, at: clock() })
    await delay(Number(codeOf(job)))
    process.send!({ type: 'end', id: job.id, at: clock() })
    return completed()
  },
  { slots: Number(slots) },
)
process.on('message', async () => {
  await worker[Symbol.asyncDispose]()
  process.disconnect!()
})
process.send!({ type: 'ready', id: worker.id, at: clock() })
