/** The runner’s end of the channel, over a socket at whose other end the test says what an agent would. */
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { connect, createServer, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Channel, type ProcessEnd, type Windows } from '../../../runners/microvm/channel.ts'
import {
  encodeMachineFrame,
  machineKinds as kinds,
  MachineFrames,
  type MachineKind,
  machineChunkBytes,
  machineProtocol,
  machineWindowBytes,
} from '../../../shared/machine.ts'

const usage = { cpu_ms: 5, memory_peak_mb: 7, oom_kills: 0 }
const start = {
  ...{ argv: ['a'], env: {}, cwd: '/', user: { uid: 1, gid: 1, groups: [] } },
  ...{ memory_mb: 1, pids: 1, file_bytes: 1, result: '/r', result_bytes: 10 },
}
const config = { time_ms: 1, entropy: '', network: null, mounts: [], disk_mb: 1 }

interface Frame {
  kind: number
  stream: number
  payload: Buffer
}

class Talk implements AsyncDisposable {
  readonly channel: Channel
  readonly broken: string[] = []
  readonly ends: ProcessEnd[] = []
  results = ''
  readonly #agent: Socket
  readonly #heard: Frame[] = []
  #wake: (() => void) | undefined
  readonly #dispose: () => Promise<void>

  private constructor(
    ours: Socket,
    agent: Socket,
    running: Windows | undefined,
    dispose: () => Promise<void>,
  ) {
    this.#agent = agent
    this.#dispose = dispose
    this.channel = new Channel(ours, {
      running,
      onBroken: (message) => this.broken.push(message),
      onExited: (end) => this.ends.push(end),
      onResult: (bytes) => {
        this.results += Buffer.from(bytes)
      },
    })
    const frames = new MachineFrames()
    agent.on('error', () => {})
    agent.on('data', (chunk: Buffer) => {
      frames.push(chunk, (kind, stream, payload) =>
        this.#heard.push({ kind, stream, payload: Buffer.from(payload) }),
      )
      this.#wake?.()
    })
  }

  static async begin(running?: Windows): Promise<Talk> {
    const dir = await mkdtemp(join(tmpdir(), 'vulcan-channel-'))
    const server = createServer()
    server.listen(join(dir, 's'))
    const accepted = once(server, 'connection')
    const agent = connect(join(dir, 's'))
    const [ours] = (await accepted) as [Socket]
    return new Talk(ours, agent, running, async () => {
      ours.destroy()
      agent.destroy()
      server.close()
      await rm(dir, { recursive: true, force: true })
    })
  }

  say(kind: MachineKind, payload: unknown = Buffer.alloc(0), stream = 0): void {
    const bytes = payload instanceof Uint8Array ? payload : Buffer.from(JSON.stringify(payload))
    this.#agent.write(encodeMachineFrame(kind, bytes, stream))
  }

  raw(bytes: Uint8Array): void {
    this.#agent.write(bytes)
  }

  /** The next frame that the agent gets. */
  async hears(kind: MachineKind): Promise<Frame> {
    while (this.#heard.length === 0)
      await new Promise<void>((resolve) => {
        this.#wake = resolve
      })
    const frame = this.#heard.shift()!
    assert.is(frame.kind, kind)
    return frame
  }

  get unheard(): Frame[] {
    return this.#heard
  }

  async started(): Promise<void> {
    const started = this.channel.start(start)
    await this.hears(kinds.start)
    this.say(kinds.started)
    await started
  }

  async until(holds: () => boolean): Promise<void> {
    for (const deadline = Date.now() + 10_000; !holds(); await sleep(5))
      if (Date.now() > deadline) throw new Error('it never came to be')
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#dispose()
  }
}

test('what is asked is answered in turn, and a failure says whose fault it is', async () => {
  await using talk = await Talk.begin()
  talk.say(kinds.ready, { protocol: machineProtocol, kernel: '6.12' })
  assert.is((await talk.channel.ready).kernel, '6.12')
  const configured = talk.channel.configure(config)
  const ping = talk.channel.ping()
  assert.equal(JSON.parse((await talk.hears(kinds.configure)).payload.toString()), config)
  talk.say(kinds.configured)
  talk.say(kinds.pong, (await talk.hears(kinds.ping)).payload)
  await Promise.all([configured, ping])
  const failing = talk.channel.start(start)
  talk.say(kinds.failed, { fault: 'user', message: 'there is no a' })
  await failing.then(
    () => assert.unreachable(),
    (error) => assert.equal([error.fault, error.message], ['user', 'there is no a']),
  )
  assert.equal(talk.broken, [])
})

test('standard input waits for room in the machine', async () => {
  await using talk = await Talk.begin()
  await talk.started()
  const total = machineWindowBytes * 2
  talk.channel.stdin.end(Buffer.alloc(total, 'x'))
  let came = 0
  const take = async () => {
    const { payload, stream } = await talk.hears(kinds.data)
    assert.is(stream, 0)
    assert.ok(payload.length <= machineChunkBytes)
    came += payload.length
  }
  while (came < machineWindowBytes) await take()
  await sleep(50)
  assert.is(came, machineWindowBytes)
  assert.is(talk.unheard.length, 0)
  for (let credit = machineWindowBytes; credit > 0; credit -= 65_536)
    talk.say(kinds.credit, Buffer.from('65536'), 0)
  while (came < total) await take()
  await talk.hears(kinds.end)
})

test('output that nobody reads is held back, and goes on where it is read', async () => {
  await using talk = await Talk.begin()
  await talk.started()
  for (let sent = 0; sent < machineWindowBytes; sent += machineChunkBytes)
    talk.say(kinds.data, Buffer.alloc(machineChunkBytes, 'y'), 1)
  await talk.until(() => talk.channel.stdout.readableLength === machineWindowBytes)
  assert.is(talk.unheard.length, 0)
  const read = text(talk.channel.stdout)
  let credit = 0
  while (credit < machineWindowBytes / 2) {
    const { payload, stream } = await talk.hears(kinds.credit)
    assert.is(stream, 1)
    credit += Number(payload.toString())
  }
  talk.say(kinds.data, Buffer.from('end'), 1)
  talk.say(kinds.end, undefined, 1)
  talk.say(kinds.result, Buffer.from('done'))
  talk.say(kinds.exited, { code: 3, oom: false, usage })
  assert.is((await read).length, machineWindowBytes + 3)
  assert.equal(talk.ends, [{ code: 3, oom: false, usage }])
  assert.is(talk.results, 'done')
  assert.equal(talk.broken, [])
})

test('windows go on over a snapshot', async () => {
  await using talk = await Talk.begin({ stdin: 10, stdout: 20, stderr: machineWindowBytes })
  talk.channel.stdin.write('0123456789abc')
  assert.is((await talk.hears(kinds.data)).payload.toString(), '0123456789')
  talk.say(kinds.credit, Buffer.from('3'), 0)
  assert.is((await talk.hears(kinds.data)).payload.toString(), 'abc')
  talk.say(kinds.data, Buffer.alloc(20), 1)
  talk.say(kinds.data, Buffer.alloc(1), 2)
  // What was taken before the snapshot is credited now.
  const credit = await talk.hears(kinds.credit)
  assert.equal([credit.stream, credit.payload.toString()], [1, String(machineWindowBytes - 20)])
  await talk.until(() => talk.channel.stderr.readableLength === 1)
  assert.equal(talk.channel.windows(), {
    stdin: 0,
    stdout: machineWindowBytes - 20,
    stderr: machineWindowBytes - 1,
  })
  assert.equal(talk.broken, [])
})

test('more than there was credit for ends the conversation', async () => {
  await using talk = await Talk.begin({ stdin: 0, stdout: machineWindowBytes, stderr: 9 })
  talk.say(kinds.data, Buffer.alloc(10), 2)
  await talk.until(() => talk.broken.length === 1)
})

const outOfPlace: [string, (talk: Talk) => void][] = [
  ['a kind that no agent sends', (talk) => talk.say(kinds.start, start)],
  ['an answer that was not asked for', (talk) => talk.say(kinds.usage, usage)],
  ['bytes of a stream that there is not', (talk) => talk.say(kinds.data, Buffer.from('x'), 7)],
  [
    'bytes after the end',
    (talk) => [talk.say(kinds.end, undefined, 1), talk.say(kinds.data, Buffer.from('x'), 1)],
  ],
  ['a chunk that is too long', (talk) => talk.say(kinds.data, Buffer.alloc(machineChunkBytes + 1), 1)],
  ['no bytes at all', (talk) => talk.say(kinds.data, Buffer.alloc(0), 1)],
  ['a credit for nothing', (talk) => talk.say(kinds.credit, Buffer.from('1'), 0)],
  ['a result that is too long', (talk) => talk.say(kinds.result, Buffer.alloc(12))],
  ['an end that makes no sense', (talk) => talk.say(kinds.exited, { code: 1.5, oom: false, usage })],
  [
    'an end with another after it',
    (talk) => [0, 1].map(() => talk.say(kinds.exited, { code: 0, oom: false, usage })),
  ],
  [
    'a second beginning',
    (talk) => [0, 1].map(() => talk.say(kinds.ready, { protocol: machineProtocol, kernel: '' })),
  ],
  ['another protocol', (talk) => talk.say(kinds.ready, { protocol: machineProtocol + 1, kernel: '' })],
  ['a length that is too large', (talk) => talk.raw(Buffer.from('ffffffff1600', 'hex'))],
  [
    'failure upon failure',
    (talk) => [0, 1].map(() => talk.say(kinds.failed, { fault: 'machine', message: '' })),
  ],
]
for (const [name, say] of outOfPlace)
  test(`${name} ends the conversation`, async () => {
    await using talk = await Talk.begin()
    await talk.started()
    const asked = talk.channel.ping()
    asked.catch(() => {})
    say(talk)
    await talk.until(() => talk.broken.length === 1)
    assert.match(talk.broken[0]!, 'broke its protocol')
    await rejects(asked)
    await rejects(talk.channel.ping())
  })

test('a pong that is another is no answer', async () => {
  await using talk = await Talk.begin()
  const asked = talk.channel.ping()
  asked.catch(() => {})
  talk.say(kinds.pong, Buffer.from('hello'))
  await talk.until(() => talk.broken.length === 1)
  await rejects(asked)
})

async function rejects(promise: Promise<unknown>): Promise<void> {
  await promise.then(
    () => assert.unreachable('it did not reject'),
    () => {},
  )
}

test.run()
