/**
 * A process that owns what a driver owns: taps in the namespace of its argument, and a machine where there is a binary.
 * Says what that is, and waits to be killed.
 */
import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { recordOwner } from '../../../runners/container/gvisor/owners.ts'
import { createFirecracker } from '../../../runners/microvm/firecracker/index.ts'
import { drawIdentity } from '../../../runners/microvm/firecracker/jailer.ts'
import { Taps } from '../../../runners/microvm/firecracker/network.ts'

const { stateDir, owner, netns, driver, shape, machine } = JSON.parse(process.argv[2]!)
if (driver === undefined) {
  await mkdir(stateDir, { recursive: true })
  await recordOwner(stateDir, owner, `/vulcan-test/${owner}`)
  const taps = new Taps(join(stateDir, owner, 'taps'), owner)
  const opened = [await taps.open(netns, drawIdentity()), await taps.open(netns, drawIdentity())]
  console.log(JSON.stringify(opened.map(({ name }) => name)))
} else {
  const firecracker = await createFirecracker(driver)
  const { pid } = await firecracker.boot(shape, { ...machine, netns })
  console.log(JSON.stringify([pid]))
}
setInterval(() => {}, 1_000)
