/** A host that cannot offer an isolation when its runner starts may be able to later. */
import { mkdtemp, rm, symlink } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { Backend } from '../../../shared/backends.ts'
import { noDockerd, startDocker } from '../../dockerd.ts'
import { skip } from '../../harness.ts'
import { http, startTestPlatform } from '../../platform.ts'
import { until } from '../../shared/support.ts'

const reason = noDockerd()
const name = 'a runner whose Docker Engine comes later offers its isolation then'
if (reason !== undefined) skip(test, name, reason)
else
  test(name, async () => {
    await using scope = new AsyncDisposableStack()
    const folder = await mkdtemp(join(tmpdir(), 'vulcan-test-'))
    scope.defer(() => rm(folder, { recursive: true, force: true }))
    const socket = join(folder, 'docker.sock')
    const { url } = scope.use(
      await startTestPlatform({ VULCAN_ISOLATIONS: 'isolate,docker', DOCKER_HOST: `unix://${socket}` }),
    )
    const docker = async () => {
      const { body } = await http<{ backends: Backend[] }>(`${url}/v1/backends`)
      return body.backends.find(({ isolation }) => isolation === 'docker')!
    }
    const unheard = 'no docker runner has been seen'
    const before = await until('the runner’s word', async () => {
      const backend = await docker()
      return backend.reason === unheard ? undefined : backend
    })
    assert.is(before.available, false, JSON.stringify(before))
    assert.match(before.reason!, /docker\.sock|Docker/)

    const engine = scope.use(await startDocker())
    await symlink(engine.socketPath, socket)
    await until('the isolation', async () => (await docker()).available || undefined, 60_000)
  })

test.run()
