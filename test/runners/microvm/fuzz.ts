/**
 * Hostile bytes for the runner’s side of the frames: the same for the same seed. Each case is one conversation; what
 * must hold is checked after each, and what is wrong names seed and case.
 */
import { Duplex } from 'node:stream'
import * as assert from 'uvu/assert'
import { Channel } from '../../../runners/microvm/channel.ts'
import {
  encodeMachineFrame,
  machineKinds as kinds,
  MachineFrameError,
  MachineFrames,
  type MachineKind,
  machineChunkBytes,
  machineProtocol,
  machineWindowBytes,
  maxMachineFrameBytes,
} from '../../../shared/machine.ts'

/** mulberry32 (public domain, Tommy Ettinger). */
class Dice {
  #state: number
  constructor(seed: number) {
    this.#state = seed >>> 0
  }
  unit(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0
    let t = this.#state
    t = Math.imul(t ^ (t >>> 15), t | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
  }
  below(n: number): number {
    return Math.floor(this.unit() * n)
  }
  pick<T>(all: readonly T[]): T {
    return all[this.below(all.length)]!
  }
  /** Small ones are the most frequent. */
  size(most: number): number {
    return Math.floor(this.unit() ** 4 * (most + 1))
  }
  bytes(size: number): Buffer<ArrayBuffer> {
    const bytes = Buffer.alloc(size + 4)
    for (let i = 0; i < size; i += 4) bytes.writeUInt32LE(this.below(2 ** 32), i)
    return bytes.subarray(0, size)
  }
}

interface Frame {
  kind: number
  stream: number
  payload: Buffer
}

const encode = ({ kind, stream, payload }: Frame) => encodeMachineFrame(kind as MachineKind, payload, stream)

const allKinds = Object.values(kinds)

const anyFrame = (dice: Dice): Frame => ({
  kind: dice.unit() < 0.9 ? dice.pick(allKinds) : dice.below(256),
  stream: dice.unit() < 0.9 ? dice.below(3) : dice.below(256),
  payload: dice.bytes(dice.size(dice.unit() < 0.05 ? maxMachineFrameBytes - 2 : 600)),
})

/** Cut anywhere, also into nothing. */
function* cut(dice: Dice, bytes: Buffer): Generator<Buffer> {
  for (let at = 0; at < bytes.length; ) {
    const size = dice.unit() < 0.3 ? dice.below(8) : dice.size(bytes.length)
    yield bytes.subarray(at, at + size)
    at += size
  }
}

function damage(dice: Dice, bytes: Buffer): Buffer {
  const at = dice.below(bytes.length)
  switch (dice.below(6)) {
    case 0:
      return bytes.subarray(0, at)
    case 1: {
      const copy = Buffer.from(bytes)
      for (let n = 0; n <= dice.below(8); n++) copy[dice.below(copy.length)] = dice.below(256)
      return copy
    }
    case 2:
      return Buffer.concat([bytes.subarray(at), bytes.subarray(0, at)])
    case 3: {
      // A length that is claimed and never comes.
      const head = Buffer.alloc(6)
      head.writeUInt32BE(
        dice.pick([0, 1, 2, maxMachineFrameBytes, maxMachineFrameBytes + 1, 2 ** 31, 2 ** 32 - 1]),
      )
      return Buffer.concat([bytes.subarray(0, at), head, dice.bytes(dice.below(64))])
    }
    case 4:
      return Buffer.concat([bytes.subarray(0, at), dice.bytes(dice.below(16)), bytes.subarray(at)])
    default:
      return dice.bytes(dice.below(400))
  }
}

/** Whole frames come through as they were sent, however they are cut. */
function validStream(dice: Dice): void {
  const sent = Array.from({ length: 1 + dice.below(6) }, () => anyFrame(dice))
  const frames = new MachineFrames()
  let i = 0
  for (const piece of cut(dice, Buffer.concat(sent.map(encode))))
    frames.push(piece, (kind, stream, payload) => {
      const { kind: wantedKind, stream: wantedStream, payload: wanted } = sent[i++]!
      assert.is(kind, wantedKind)
      assert.is(stream, wantedStream)
      assert.ok(wanted.equals(payload))
    })
  assert.is(i, sent.length)
}

/** Whatever comes, it is refused or taken apart into frames that are within bounds, and nothing is made of a claim. */
function brokenStream(dice: Dice): void {
  let bytes = Buffer.concat(Array.from({ length: 1 + dice.below(4) }, () => encode(anyFrame(dice))))
  for (let n = 0; n <= dice.below(3) && bytes.length > 0; n++) bytes = Buffer.from(damage(dice, bytes))
  const frames = new MachineFrames()
  let taken = 0
  let refused = false
  for (const piece of cut(dice, bytes)) {
    try {
      frames.push(piece, (_kind, _stream, payload) => {
        assert.ok(payload.length <= maxMachineFrameBytes - 2)
        taken += payload.length + 6
      })
      assert.not.ok(refused, 'what was refused once is refused for good')
    } catch (error) {
      if (!(error instanceof MachineFrameError)) throw error
      refused = true
    }
  }
  assert.ok(taken <= bytes.length, `${taken} bytes of frames from ${bytes.length} bytes`)
}

const json = (value: unknown) => Buffer.from(JSON.stringify(value))
const usage = { cpu_ms: 1, memory_peak_mb: 2, oom_kills: 0 }

/** What an agent could say, in place or not. */
function anyWord(dice: Dice): Frame {
  const word = (kind: number, payload: Buffer = Buffer.alloc(0), stream = 0): Frame => ({
    kind,
    stream,
    payload,
  })
  switch (dice.below(14)) {
    case 0:
      return word(kinds.ready, json({ protocol: dice.unit() < 0.8 ? machineProtocol : 7, kernel: 'x' }))
    case 1:
      return word(kinds.configured)
    case 2:
      return word(kinds.started)
    case 3:
      return word(kinds.usage, json(dice.unit() < 0.5 ? usage : { cpu_ms: -1 }))
    case 4:
      return word(kinds.pong, dice.bytes(8))
    case 5:
      return word(kinds.exited, json({ code: dice.below(300), oom: dice.unit() < 0.5, usage }))
    case 6:
      return word(kinds.result, dice.bytes(dice.size(4_000)))
    case 7:
      return word(kinds.end, undefined, dice.below(4))
    case 8:
      return word(kinds.credit, Buffer.from(String(dice.pick([0, 1, 5, -3, 2 ** 40, '1e3', '07', '']))), 0)
    case 9:
      return word(
        kinds.failed,
        json({ fault: dice.pick(['user', 'machine', 'nobody']), message: 'm'.repeat(dice.below(5_000)) }),
      )
    case 10:
      return anyFrame(dice)
    default:
      return word(kinds.data, dice.bytes(dice.size(machineChunkBytes + 1)), 1 + dice.below(2))
  }
}

/** What is left of one at a restore. */
const outWindow = 20_000

/** A guest that says anything, at any time: it is heard or given up, and holds no more than its windows. */
function conversation(dice: Dice): void {
  const sink = new Duplex({ read() {}, write: (_chunk, _encoding, done) => done() })
  let broken = 0
  let results = 0
  let ends = 0
  const resumes = dice.unit() < 0.5
  const channel = new Channel(sink, {
    running: resumes ? { stdin: 1_000, stdout: outWindow, stderr: machineWindowBytes } : undefined,
    onBroken: () => broken++,
    onExited: () => ends++,
    onResult: (bytes) => {
      results += bytes.length
    },
  })
  const ignore = () => {}
  if (!resumes) {
    channel.configure({ time_ms: 0, entropy: '', network: null, mounts: [], disk_mb: 1 }).catch(ignore)
    if (dice.unit() < 0.7)
      channel
        .start({
          ...{ argv: ['a'], env: {}, cwd: '/', user: { uid: 1, gid: 1, groups: [] } },
          ...{ memory_mb: 1, pids: 1, file_bytes: 1, result: '/r', result_bytes: 5_000 },
        })
        .catch(ignore)
  }
  if (dice.unit() < 0.5) channel.ping().catch(ignore)
  if (dice.unit() < 0.5) channel.usage().catch(ignore)
  if (dice.unit() < 0.5) channel.stdin.write(Buffer.alloc(dice.below(3_000)))
  let bytes = Buffer.concat(Array.from({ length: 1 + dice.below(10) }, () => encode(anyWord(dice))))
  if (dice.unit() < 0.5) bytes = Buffer.from(damage(dice, bytes))
  for (const piece of cut(dice, bytes)) sink.emit('data', piece)
  assert.ok(broken <= 1 && ends <= 1)
  assert.ok(results <= 5_001, `${results} bytes of a result`)
  // Nobody has read, so there was no further credit.
  assert.ok(channel.stdout.readableLength <= (resumes ? outWindow : machineWindowBytes))
  assert.ok(channel.stderr.readableLength <= machineWindowBytes)
  channel.close()
  for (const stream of [channel.stdin, channel.stdout, channel.stderr, sink]) stream.destroy()
}

const kindsOfCases = [
  validStream,
  validStream,
  brokenStream,
  brokenStream,
  brokenStream,
  conversation,
] as const

export interface Fuzzed {
  cases: number
  /** Of everything that the process holds, MiB: at the end, and at most while it went on. */
  grownMb: number
  mostMb: number
}

/** Runs so many cases. Throws with seed and number where one does not hold. */
export async function fuzz(
  seed: number,
  cases: number,
  onProgress?: (done: number) => void,
): Promise<Fuzzed> {
  const before = held()
  let mostMb = 0
  for (let i = 0; i < cases; i++) {
    const dice = new Dice(seed + i)
    try {
      dice.pick(kindsOfCases)(dice)
    } catch (error) {
      throw new Error(`seed ${seed}, case ${i}: ${(error as Error).message}`, { cause: error })
    }
    if (i % 500 !== 499) continue
    // Streams that were destroyed let go only then.
    await new Promise((resolve) => setImmediate(resolve))
    mostMb = Math.max(mostMb, held() - before)
    onProgress?.(i + 1)
  }
  return { cases, grownMb: held() - before, mostMb }
}

function held(): number {
  const { heapUsed, external } = process.memoryUsage()
  return (heapUsed + external) / 2 ** 20
}
