/** A process that holds a pool whose children are all busy: prints their pids, then waits to be killed. */
import { createIsolateRunner } from '../../../runners/isolate/index.ts'
import { hearing, job } from './support.ts'

const runner = await createIsolateRunner(JSON.parse(process.argv[2] ?? '{}'))
let started = 0
for (let i = 0; i < 2; i++)
  void runner.prepare(job(`console.log('running'); export default () => { while (true) {} }`)).run(
    new AbortController().signal,
    hearing(() => {
      if (++started === 2)
        console.log(JSON.stringify({ pids: runner.pids(), walls: runner.capabilities.walls }))
    }),
  )
