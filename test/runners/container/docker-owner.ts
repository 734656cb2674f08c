/** A process that has boxes: one that runs, one that was only made. Says their names and waits to be killed. */
import { createDocker } from '../../../runners/container/docker/index.ts'
import { sh, specOf } from './docker-support.ts'

const { options, digest, layout } = JSON.parse(process.argv[2]!)
const engine = await createDocker(options)
const config = { entrypoint: [], cmd: [], env: {}, workingDir: '/', user: '' }
const image = { digest, layout, config, root: async () => '', [Symbol.dispose]: () => {} }
const running = await engine.create(specOf(image, sh('sleep 1000')))
await running.start()
const made = await engine.create(specOf(image, sh('sleep 1000')))
console.log(JSON.stringify({ names: [running.name, made.name], pids: running.pids() }))
setInterval(() => {}, 1_000)
