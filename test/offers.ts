/** What runners say that they offer. */
import type { Backend } from '../shared/backends.ts'
import type { Isolation } from '../shared/workload.ts'
import { http } from './platform.ts'
import { until } from './shared/support.ts'

/** What the platform at `url` says of an isolation now. */
export async function backendOf(url: string, isolation: Isolation): Promise<Backend> {
  const { body } = await http<{ backends: Backend[] }>(`${url}/v1/backends`)
  return body.backends.find((one) => one.isolation === isolation)!
}

/** The same once a runner of it has spoken: it tries the host out first. */
export function offerOf(url: string, isolation: Isolation): Promise<Backend> {
  return until(
    'the runner’s word',
    async () => {
      const offer = await backendOf(url, isolation)
      return offer.reason === `no ${isolation} runner has been seen` ? undefined : offer
    },
    120_000,
  )
}
