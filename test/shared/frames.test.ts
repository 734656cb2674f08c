import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { encodeFrame, FrameDecoder, FrameError, frameHeaderBytes } from '../../shared/frames.ts'

const collect = (decoder: FrameDecoder, chunks: Uint8Array[]) => {
  const frames: string[] = []
  for (const chunk of chunks) decoder.push(Buffer.from(chunk), (frame) => frames.push(frame.toString()))
  return frames
}

const texts = ['', 'a', 'two words', 'é'.repeat(300), '']
const stream = Buffer.concat(texts.map((text) => encodeFrame(Buffer.from(text))))

test('frames come back whole from any cut of the stream in two', () => {
  for (let cut = 0; cut <= stream.length; cut++) {
    const decoder = new FrameDecoder(1_000)
    assert.equal(collect(decoder, [stream.subarray(0, cut), stream.subarray(cut)]), texts)
    assert.is(decoder.partial, false)
  }
})

test('frames come back whole from any chunk size', () => {
  for (let size = 1; size < 64; size++) {
    const chunks: Uint8Array[] = []
    for (let at = 0; at < stream.length; at += size) chunks.push(stream.subarray(at, at + size))
    assert.equal(collect(new FrameDecoder(1_000), chunks), texts)
  }
})

test('what was collected outlives the chunk it came in', () => {
  const decoder = new FrameDecoder(100)
  const frame = encodeFrame(Buffer.from('hello'))
  const chunk = Buffer.from(frame.subarray(0, 7))
  decoder.push(chunk, () => assert.unreachable())
  chunk.fill(0)
  assert.equal(collect(decoder, [frame.subarray(7)]), ['hello'])
})

test('a stream that ends in the middle of a frame is known to be cut', () => {
  for (const bytes of [1, frameHeaderBytes, frameHeaderBytes + 2]) {
    const decoder = new FrameDecoder(100)
    collect(decoder, [encodeFrame(Buffer.from('hello')).subarray(0, bytes)])
    assert.is(decoder.partial, true)
  }
})

test('a length over the limit is refused when its header is complete, and nothing is taken after it', () => {
  const decoder = new FrameDecoder(10)
  const header = Buffer.from([0xff, 0xff, 0xff, 0xff])
  collect(decoder, [header.subarray(0, 3)])
  assert.throws(
    () => collect(decoder, [header.subarray(3)]),
    (error: unknown) => error instanceof FrameError,
  )
  assert.throws(
    () => collect(decoder, [encodeFrame(Buffer.from('a'))]),
    (error: unknown) => error instanceof FrameError,
  )
})

test('a frame of exactly the limit is taken', () => {
  assert.equal(collect(new FrameDecoder(5), [encodeFrame(Buffer.from('12345'))]), ['12345'])
})

test('a large claim costs nothing before its bytes come', () => {
  const before = process.memoryUsage().rss
  const decoders = Array.from({ length: 100 }, () => new FrameDecoder(0xffffffff))
  for (const decoder of decoders) collect(decoder, [Buffer.from([0x7f, 0xff, 0xff, 0xff, 1])])
  assert.ok(process.memoryUsage().rss - before < 50 * 1024 * 1024)
})

test('the limit can be changed between frames, also within one chunk', () => {
  const decoder = new FrameDecoder(3)
  const frames: string[] = []
  decoder.push(
    Buffer.concat([encodeFrame(Buffer.from('abc')), encodeFrame(Buffer.from('12345'))]),
    (frame) => {
      frames.push(frame.toString())
      decoder.maxBytes = 5
    },
  )
  assert.equal(frames, ['abc', '12345'])
})

test.run()
