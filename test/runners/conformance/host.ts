/** What an isolation needs of its host beside the platform: for docker an Engine of the test’s own. */
import type { Isolation } from '../../../shared/workload.ts'
import { noDockerd, startDocker } from '../../dockerd.ts'

export interface TestHost extends AsyncDisposable {
  isolation: Isolation
  /** Why the isolation cannot be had here; undefined where it can, as far as can be seen. */
  missing: string | undefined
  /** For the processes of the platform. */
  env: Record<string, string>
  /** What the host holds beside processes and files, as lines. */
  held(): Promise<string[]>
}

export async function openHost(isolation: Isolation): Promise<TestHost> {
  const nothing = {
    isolation,
    missing: undefined,
    env: {},
    held: async () => [],
    async [Symbol.asyncDispose]() {},
  }
  if (isolation !== 'docker') return nothing
  const missing = noDockerd()
  if (missing !== undefined) return { ...nothing, missing }
  const docker = await startDocker()
  return {
    ...nothing,
    env: { DOCKER_HOST: docker.host },
    held: async () => {
      const { Volumes } = (await docker.api('GET', '/volumes')) as { Volumes: { Name: string }[] | null }
      return [
        ...(await docker.containers()).map((name) => `container ${name}`),
        ...(Volumes ?? []).map(({ Name }) => `volume ${Name}`),
      ]
    },
    [Symbol.asyncDispose]: () => docker[Symbol.asyncDispose](),
  }
}
