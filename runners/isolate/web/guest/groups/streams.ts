/** Streams, by web-streams-polyfill. */
import {
  ByteLengthQueuingStrategy,
  CountQueuingStrategy,
  ReadableByteStreamController,
  ReadableStream,
  ReadableStreamBYOBReader,
  ReadableStreamBYOBRequest,
  ReadableStreamDefaultController,
  ReadableStreamDefaultReader,
  TransformStream,
  TransformStreamDefaultController,
  WritableStream,
  WritableStreamDefaultController,
  WritableStreamDefaultWriter,
} from 'web-streams-polyfill'

// The polyfill does not look for the language’s own prototype of asynchronous iterators.
const iterator = Object.getPrototypeOf(new ReadableStream().values())
const generator = Object.getPrototypeOf(async function* () {}.prototype)
Object.setPrototypeOf(iterator, Object.getPrototypeOf(generator))
Reflect.deleteProperty(iterator, Symbol.asyncIterator)

/** The polyfill’s own field; the interface has no way to ask. */
export const isDisturbed = (stream: object) => (stream as { _disturbed: boolean })._disturbed

const has = (constructor: new (...args: never[]) => object) => (value: object) => value instanceof constructor
export const is = {
  ReadableStream: has(ReadableStream),
  WritableStream: has(WritableStream),
  TransformStream: has(TransformStream),
}
export {
  ByteLengthQueuingStrategy,
  CountQueuingStrategy,
  ReadableByteStreamController,
  ReadableStream,
  ReadableStreamBYOBReader,
  ReadableStreamBYOBRequest,
  ReadableStreamDefaultController,
  ReadableStreamDefaultReader,
  TransformStream,
  TransformStreamDefaultController,
  WritableStream,
  WritableStreamDefaultController,
  WritableStreamDefaultWriter,
}

const { tee } = ReadableStream.prototype

/** Two streams with the same bytes, neither of which sees what the other’s reader does to a chunk. */
export function teeBytes(stream: ReadableStream): [ReadableStream, ReadableStream] {
  const [first, second] = tee.call(stream)
  const { _readableStreamController: controller } = stream as unknown as { _readableStreamController: object }
  if (controller instanceof ReadableByteStreamController) return [first, second]
  const copy = new TransformStream({
    transform(chunk, controller) {
      controller.enqueue(structuredClone(chunk))
    },
  })
  return [first, second.pipeThrough(copy)]
}
