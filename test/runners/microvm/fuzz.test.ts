/** The runner’s side of the frames under hostile bytes; `npm run soak -- codec` is the long form. */
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { machineKinds as kinds, MachineFrames, maxMachineFrameBytes } from '../../../shared/machine.ts'
import { fuzz } from './fuzz.ts'

test('20,000 conversations with hostile bytes neither crash nor take more memory than they bring', async () => {
  const { mostMb } = await fuzz(1, 20_000)
  assert.ok(mostMb < 256, `${Math.round(mostMb)} MiB more`)
})

test('a claimed length allocates nothing', () => {
  const before = process.memoryUsage().arrayBuffers
  const all = Array.from({ length: 2_000 }, () => {
    const frames = new MachineFrames()
    const head = Buffer.alloc(6)
    head.writeUInt32BE(maxMachineFrameBytes)
    head[4] = kinds.data
    frames.push(head, () => assert.unreachable())
    return frames
  })
  const grown = process.memoryUsage().arrayBuffers - before
  assert.is(all.length, 2_000)
  assert.ok(grown < 10 * 2 ** 20, `${grown} bytes for what never came`)
})

test.run()
