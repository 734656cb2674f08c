// node main.ts [--file view.json] [--prefix vulcan.js] [--once]
//
// Follows the events of vulcan and keeps a view of all workloads in a file, together with the sequence up to which it
// has read. Stopped, killed or cut off, it goes on behind that sequence: nothing is missed and nothing counts twice.
//
//   NATS_URL, NATS_USER, NATS_PASSWORD   the server; a user where it has accounts
//   --prefix   of JetStream’s requests; `vulcan.js` for the reader in nats.conf
//   --once     ends when it has read what there is
//
// Its packages: npm install @nats-io/transport-node @nats-io/jetstream
import { readFile, rename, writeFile } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { type JetStreamManager, jetstreamManager, type StoredMsg } from '@nats-io/jetstream'
import { connect } from '@nats-io/transport-node'
import { eventIn, fold, type Workload } from './view.ts'

const stream = 'VULCAN_EVENTS'
/** Messages of one request. */
const batch = 500
/** Events are read so long (ms) after one was heard, in one go with those that follow it. */
const lingerMs = 50
/** Without one heard, the stream is looked at all the same: a subscription may lose what it is sent. */
const lookMs = 2_000
/** A batch of which nothing is heard for so long (ms) was lost. */
const silenceMs = 5_000

interface View {
  /** When the stream was made: in another one, sequences mean something else. */
  created: string
  /** Of the last event in the view. */
  seq: number
  workloads: Record<string, Workload>
}

const { values } = parseArgs({
  options: {
    file: { type: 'string', default: 'view.json' },
    prefix: { type: 'string', default: '$JS.API' },
    once: { type: 'boolean', default: false },
  },
})
const { NATS_URL = 'nats://127.0.0.1:4222', NATS_USER, NATS_PASSWORD } = process.env
await using nats = await connect({
  servers: NATS_URL,
  name: 'vulcan-view',
  maxReconnectAttempts: -1,
  waitOnFirstConnect: true,
  ...(NATS_USER === undefined ? {} : { user: NATS_USER, pass: NATS_PASSWORD ?? '' }),
})
// A reader may not ask what its account may do.
const streams = await jetstreamManager(nats, { apiPrefix: values.prefix, checkAPI: false })

let view = await load(values.file)
const stop = new AbortController()
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => stop.abort())
let heard = () => {}
nats.subscribe('vulcan.events.>', { callback: () => heard() })

while (!stop.signal.aborted) {
  // From here on: what is stored while the stream is being read makes another round.
  const next = new Promise<void>((resolve) => {
    heard = resolve
  })
  try {
    if (await catchUp(streams)) {
      if (values.once) break
      await Promise.race([next, sleep(lookMs, undefined, { signal: stop.signal, ref: false })])
      await sleep(lingerMs, undefined, { signal: stop.signal })
    }
  } catch (error) {
    if (stop.signal.aborted) break
    if (nats.isClosed()) throw error
    // The client connects again by itself; what was read is in the file.
    console.error(`${(error as Error).message}; trying again`)
    await sleep(1_000)
  }
}

/** Reads a batch, into the file. True: there is nothing more for now. */
async function catchUp(streams: JetStreamManager): Promise<boolean> {
  const { created, state } = await streams.streams.info(stream)
  if (view.created !== created || view.seq > state.last_seq) {
    if (view.seq > 0) console.error('another stream stands there now: the view begins anew')
    view = { created, seq: 0, workloads: {} }
  }
  if (view.seq >= state.last_seq || state.messages === 0) return true
  if (view.seq > 0 && state.first_seq > view.seq + 1)
    console.error(`the stream no longer keeps ${view.seq + 1} to ${state.first_seq - 1}: away for too long`)

  const before = view.seq
  for await (const message of messagesFrom(streams, before + 1)) {
    const event = eventIn(message.subject, message.data)
    const workload = event && fold(view.workloads[event.subject], event)
    if (workload !== undefined) view.workloads[workload.id] = workload
    view.seq = message.seq
  }
  await save(values.file, view)
  const count = Object.keys(view.workloads).length
  console.log(`read ${before + 1} to ${view.seq} of ${state.last_seq}: ${count} workloads`)
  return view.seq === before || view.seq >= state.last_seq
}

/** Up to `batch` messages in order and without a gap. */
async function* messagesFrom(streams: JetStreamManager, seq: number): AsyncGenerator<StoredMsg> {
  const messages = await streams.direct.getBatch(stream, { seq, batch })
  const silent = setTimeout(() => messages.stop(new Error('the server is silent')), silenceMs)
  let last = 0
  try {
    for await (const message of messages) {
      silent.refresh()
      // What was on its way when the connection was lost is gone: the next batch begins with it.
      if (last > 0 && message.lastSequence !== last) return
      last = message.seq
      yield message
    }
  } catch (error) {
    // There is no message from `seq` on.
    if ((error as { code?: unknown }).code !== 404) throw error
  } finally {
    clearTimeout(silent)
  }
}

async function load(file: string): Promise<View> {
  const text = await readFile(file, 'utf8').catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'ENOENT') throw error
    return undefined
  })
  return text === undefined ? { created: '', seq: 0, workloads: {} } : JSON.parse(text)
}

/** View and sequence are replaced at once. With a database: what has changed and the sequence, in one transaction. */
async function save(file: string, view: View): Promise<void> {
  await writeFile(`${file}.new`, JSON.stringify(view))
  await rename(`${file}.new`, file)
}
