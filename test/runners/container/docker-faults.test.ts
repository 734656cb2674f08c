// timeout: 300
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { text } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { Api } from '../../../runners/container/docker/api.ts'
import { ownLabels } from '../../../runners/container/docker/identity.ts'
import { Images } from '../../../runners/container/docker/images.ts'
import { createDocker } from '../../../runners/container/docker/index.ts'
import { BoxError } from '../../../runners/container/engine.ts'
import { gone, startTime } from '../../../scripts/process-identity.ts'
import { skip } from '../../harness.ts'
import { busyboxImage, type DockerHost, noDocker, runIn, sh, specOf, startEngine } from './docker-support.ts'

const reason = noDocker()
const hostTest = (name: string, run: (host: DockerHost) => Promise<void>) => {
  if (reason !== undefined) skip(test, name, reason)
  else
    test(name, async () => {
      // Shorter than in use, for some of these tests wait for it.
      await using host = await startEngine({ answerMs: 3_000 })
      await run(host)
    })
}
const isAlive = (pid: number) => startTime(pid) !== undefined
const failure = async (promise: Promise<unknown>): Promise<unknown> =>
  promise.then(
    () => undefined,
    (error) => error,
  )
const namesOf = async (host: DockerHost) =>
  (await host.docker.containers()).map((name) => name.slice(1)).sort()

hostTest('every limit is enforced, as exceeding it has shown', async ({ engine }) => {
  assert.equal(engine.limits, {
    memory: 'enforced',
    cpu: 'enforced',
    pids: 'enforced',
    file_size: 'enforced',
    disk: 'enforced',
  })
  assert.equal(engine.egress, ['none', 'all', 'allowlist'])
  assert.ok(engine.version.startsWith('Docker Engine '))
  for (const wall of ['runc', 'seccomp', 'read-only root']) assert.ok(engine.walls.includes(wall), wall)
})

test('an engine that is not there is told at once, with its name', async () => {
  const stateDir = '/tmp/vulcan-test-none'
  const of = (host: string) =>
    failure(createDocker({ owner: 'docker-none', stateDir, host })) as Promise<Error>
  const missing = await of('unix:///nowhere/docker.sock')
  assert.instance(missing, BoxError)
  assert.ok(missing.message.includes('/nowhere/docker.sock'), missing.message)
  assert.ok((await of('tcp://192.0.2.1:2375')).message.includes('is another host'))
  assert.ok((await of('ssh://somebody@example.com')).message.includes('must be unix:///path'))
  assert.not(existsSync(join(stateDir, 'docker-none')))
})

hostTest('what a killed runner left is removed by the next, and nothing of others', async (host) => {
  const { docker, image, options } = host
  const owned = { ...options, owner: 'docker-killed' }
  const { digest, layout } = image
  const script = join(import.meta.dirname, 'docker-owner.ts')
  const owner = spawn(process.execPath, [script, JSON.stringify({ options: owned, digest, layout })], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const [line] = (await once(createInterface({ input: owner.stdout }), 'line')) as [string]
  const { names, pids } = JSON.parse(line) as { names: string[]; pids: number[] }

  // A stranger’s, one that only looks like ours, and one of a live process: this one’s engine.
  const stranger = (name: string, labels: Record<string, string>) =>
    docker.api('POST', `/containers/create?name=${name}`, {
      Image: `vulcan.local/image:${digest.slice(7)}`,
      Cmd: ['/bin/sleep', '1'],
      Labels: labels,
    })
  const dead: Record<string, string> = { ...ownLabels('docker-killed'), 'vulcan.process': '4999999.1' }
  await stranger('db', {})
  await stranger('vulcan-without-labels', {})
  await stranger('of-another-name', dead)
  await stranger('vulcan-in-doubt', { ...dead, 'vulcan.host': `${dead['vulcan.host']!.split('.')[0]}.1` })
  const live = await host.engine.create(specOf(image, sh('sleep 1000')))
  await live.start()

  await (await createDocker({ ...options, owner: 'docker-before' }))[Symbol.asyncDispose]()
  for (const name of names) assert.ok((await namesOf(host)).includes(name), 'a live owner’s box was removed')
  owner.kill('SIGKILL')
  await once(owner, 'exit')
  assert.ok(existsSync(join(options.stateDir, 'docker-killed')))
  assert.ok(pids.length > 0 && pids.every(isAlive))

  await (await createDocker({ ...options, owner: 'docker-next' }))[Symbol.asyncDispose]()
  assert.equal(
    await namesOf(host),
    ['db', 'of-another-name', 'vulcan-in-doubt', live.name, 'vulcan-without-labels'].sort(),
  )
  assert.equal(pids.filter(isAlive), [])
  assert.equal(readdirSync(options.stateDir), [options.owner])
  assert.ok(live.pids().length > 0)
  await live.remove()
})

hostTest('disposing of an engine removes all its boxes', async ({ docker, image, options }) => {
  const engine = await createDocker({ ...options, owner: 'docker-disposed' })
  const boxes = await Promise.all([1, 2, 3].map(() => engine.create(specOf(image, sh('sleep 1000')))))
  await boxes[0]!.start()
  const pids = boxes[0]!.pids()
  await engine[Symbol.asyncDispose]()
  assert.equal(await docker.containers(), [])
  assert.equal(pids.filter(isAlive), [])
  assert.is((await boxes[0]!.exited).code, 137)
  assert.instance(await failure(engine.create(specOf(image, sh('true')))), BoxError)
})

hostTest('a daemon that is restarted loses what runs, and takes new boxes', async (host) => {
  const { docker, engine, image } = host
  const box = await engine.create(specOf(image, sh('sleep 1000')))
  const unstarted = await engine.create(specOf(image, sh('true')))
  await box.start()
  const pids = box.pids()
  await docker.restart()
  for (const one of [box, unstarted]) assert.is((await one.exited).lost, true)
  assert.equal(pids.filter(isAlive), [])
  assert.equal((await runIn(host, sh('cat'), { input: 'again' })).stdout, 'again')
  // Also lacks of memory are heard of again.
  await sleep(1_500)
  await box.remove()
  await unstarted.remove()
  assert.equal(await docker.containers(), [])
})

hostTest(
  'a daemon that was killed takes its boxes with it; what is left is removed when it is back',
  async (host) => {
    const { docker, engine, image } = host
    const box = await engine.create(specOf(image, sh('trap "" TERM; while :; do sleep 1; done')))
    await box.start()
    const pids = box.pids()
    await docker.kill('SIGKILL')
    assert.is((await box.exited).lost, true)
    assert.equal(pids.filter(isAlive), [])
    await box.remove()
    const error = await failure(engine.create(specOf(image, sh('true'))))
    assert.instance(error, BoxError)
    await docker.restart()
    for (let tries = 0; tries < 200 && (await docker.containers()).length > 0; tries++) await sleep(100)
    assert.equal(await docker.containers(), [])
    assert.is((await runIn(host, sh('exit 5'))).code, 5)
  },
)

hostTest(
  'a daemon that does not answer is an error, and what runs can be killed without it',
  async (host) => {
    const { docker, engine, image } = host
    const box = await engine.create(specOf(image, sh('sleep 1000')))
    const unstarted = await engine.create(specOf(image, sh('sleep 1000')))
    await box.start()
    const pids = box.pids()
    process.kill(docker.pid, 'SIGSTOP')
    try {
      const error = (await failure(engine.create(specOf(image, sh('true'))))) as BoxError
      assert.instance(error, BoxError)
      assert.is(error.fault, 'engine')
      await Promise.all([box.kill(), unstarted.kill()])
      assert.equal(pids.filter(isAlive), [])
      assert.is((await box.exited).code, 137)
      assert.is((await unstarted.exited).code, 137)
    } finally {
      process.kill(docker.pid, 'SIGCONT')
    }
    await Promise.all([box.remove(), unstarted.remove()])
    for (let tries = 0; tries < 300 && (await docker.containers()).length > 0; tries++) await sleep(100)
    assert.equal(await docker.containers(), [])
  },
)

hostTest('an image is loaded once, however many ask, and again when it was removed', async (host) => {
  const { docker, engine, dir } = host
  const image = await busyboxImage(join(dir, 'shared'), { Env: ['N=1'] })
  const ref = `vulcan.local/image:${image.digest.slice(7)}`
  const tags = async () =>
    ((await docker.api('GET', '/images/json')) as { RepoTags: string[] }[]).flatMap((one) => one.RepoTags)
  const loads = follow(docker.socketPath)
  const boxes = await Promise.all(Array.from({ length: 10 }, () => engine.create(specOf(image, sh('true')))))
  assert.is((await tags()).filter((tag) => tag === ref).length, 1)
  assert.is(await loads(), 1)
  await Promise.all(boxes.map((box) => box.remove()))
  await docker.api('DELETE', `/images/${ref}`)
  assert.is((await runIn({ engine, image }, sh('echo here'))).stdout, 'here\n')
  assert.equal(readdirSync(join(dir, 'state', host.options.owner)), ['process'])
})

/** Counts the images that are loaded from now on; the count is given a moment after it is asked for. */
function follow(socketPath: string): () => Promise<number> {
  const api = new Api(`unix://${socketPath}`)
  let count = 0
  const filters = JSON.stringify({ type: ['image'], event: ['load'] })
  const events = api.docker.getEvents({ filters }) as unknown as Promise<
    NodeJS.ReadableStream & { destroy(): void }
  >
  void events.then((stream) => createInterface({ input: stream }).on('line', () => count++))
  return async () => {
    await sleep(500)
    ;(await events).destroy()
    return count
  }
}

hostTest('images that nobody uses are removed, those in use and those of others stay', async (host) => {
  const { docker, engine, dir, image } = host
  const images = new Images(new Api(docker.host), join(dir, 'images'))
  const other = await busyboxImage(join(dir, 'other'), { Env: ['N=2'] })
  const [used, unused] = [await images.ensure(image), await images.ensure(other)]
  const box = await engine.create(specOf(image, sh('true')))
  await docker.api('POST', `/images/${unused}/tag?repo=somebody/else&tag=1`)
  const tags = async () =>
    ((await docker.api('GET', '/images/json')) as { RepoTags: string[] }[]).flatMap((one) => one.RepoTags)
  await images.evict(60_000)
  for (const ref of [used, unused]) assert.ok((await tags()).includes(ref))
  await sleep(10)
  await images.evict(0)
  assert.ok((await tags()).includes(used))
  assert.ok((await tags()).includes('somebody/else:1'))
  assert.not((await tags()).includes(unused))
  await box.remove()
})

hostTest('a broken image is an error that names it', async (host) => {
  const image = { ...host.image, digest: `sha256:${'0'.repeat(64)}` as const, [Symbol.dispose]: () => {} }
  const error = (await failure(host.engine.create(specOf(image, sh('true'))))) as Error
  assert.ok(error.message.includes('000000'), error.message)
  assert.is((await runIn(host, sh('exit 0'))).code, 0)
})

hostTest('the daemon’s end is not the runner’s: a box that is read goes on to its end', async (host) => {
  const box = await host.engine.create(specOf(host.image, sh('echo before; sleep 1000')))
  const said = text(box.stdout)
  void text(box.stderr)
  await box.start()
  await sleep(500)
  const { pid } = host.docker
  await host.docker.kill('SIGKILL')
  assert.ok(await gone(pid, 5_000))
  assert.is((await box.exited).lost, true)
  assert.is(await said, 'before\n')
  await host.docker.restart()
})

test.run()
