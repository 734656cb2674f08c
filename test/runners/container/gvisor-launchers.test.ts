import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { createGvisor } from '../../../runners/container/gvisor/index.ts'
import { gone } from '../../../scripts/process-identity.ts'
import {
  type GvisorHost,
  gvisorTests,
  newOwner,
  processesOf,
  runIn,
  sh,
  specOf,
  traces,
} from './gvisor-support.ts'

const boxTest = await gvisorTests()

/** An engine of its own that keeps two launchers, with those that stand ready by now. */
async function withLaunchers(it: GvisorHost, use: (host: GvisorHost) => Promise<void>): Promise<void> {
  const options = { ...it.options, owner: newOwner(), launchers: 2 }
  const engine = await createGvisor(options)
  try {
    await use({ ...it, engine, options })
  } finally {
    await engine[Symbol.asyncDispose]()
  }
  assert.equal(traces({ options }), [])
}

/** Pids of those that wait, once there are two and no more. */
async function waiting({ options }: GvisorHost): Promise<number[]> {
  for (let tries = 0; tries < 200; tries++) {
    const pids = processesOf(options.owner)
    if (pids.length === 2) return pids
    await sleep(50)
  }
  throw new Error('there are not two launchers')
}

boxTest('boxes are begun by launchers that stand ready, which others replace', (it) =>
  withLaunchers(it, async (host) => {
    const before = await waiting(host)
    const box = await host.engine.create(specOf(host.image, sh('cat')))
    try {
      const [first] = box.pids()
      assert.ok(before.includes(first!), `${first} is not of ${before}`)
    } finally {
      await box.remove()
    }
    const after = await waiting(host)
    assert.is(after.filter((pid) => before.includes(pid)).length, 1)
  }),
)

boxTest('a launcher that was killed is passed over', (it) =>
  withLaunchers(it, async (host) => {
    for (const pid of await waiting(host)) {
      process.kill(pid, 'SIGKILL')
      assert.ok(await gone(pid, 5_000))
    }
    assert.is((await runIn(host, sh('echo here'))).stdout, 'here\n')
  }),
)

boxTest('more boxes at once than launchers, each with its own', (it) =>
  withLaunchers(it, async (host) => {
    await waiting(host)
    const ran = await Promise.all(
      Array.from({ length: 5 }, (_, n) =>
        runIn(host, sh('cat; exit $N'), { env: { PATH: '/bin', N: `${n}` }, input: `${n}` }),
      ),
    )
    assert.equal(
      ran.map(({ stdout, code }) => [stdout, code]),
      ran.map((_, n) => [`${n}`, n]),
    )
  }),
)

test.run()
