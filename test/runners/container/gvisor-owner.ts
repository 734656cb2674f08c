/** A process that has boxes: one runs, one is frozen, one was only made. Says their pids and waits to be killed. */
import { createGvisor } from '../../../runners/container/gvisor/index.ts'
import { imageOf, sh, specOf } from './gvisor-support.ts'

const { options, root } = JSON.parse(process.argv[2]!)
const engine = await createGvisor(options)
const image = imageOf(root)
// They have a daemon that left its parent.
const script = sh('(sleep 1000 &) ; sleep 1000')
const [running, frozen, made] = await Promise.all([
  engine.create(specOf(image, script)),
  engine.create(specOf(image, script)),
  engine.create(specOf(image, script)),
])
await Promise.all([running.start(), frozen.start()])
await frozen.freeze()
console.log(JSON.stringify([running, frozen, made].map((box) => box.pids())))
setInterval(() => {}, 1_000)
