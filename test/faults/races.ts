/** Kills raced against starts and against completions, on a whole platform. */
import { setTimeout as delay } from 'node:timers/promises'
import { derivedWorkloadId } from '../../shared/ids.ts'
import { http, startTestPlatform } from '../platform.ts'
import { type Audit, audit } from './audit.ts'
import { seeded } from './driver.ts'

export interface RaceReport {
  audit: Audit
  /** Ends by status. */
  killVersusStart: Record<string, number>
  killVersusCompletion: Record<string, number>
  /** Killed before they ever started. */
  neverStarted: number
  /** Answers of a kill that were not the workload in an end. */
  wrongAnswers: string[]
}

interface Brief {
  id: string
  status: string
  attempts: number
}

/** `each` races of both kinds, `width` at a time. */
export async function runRaces(each: number, width: number, seed: number): Promise<RaceReport> {
  const random = seeded(seed)
  await using platform = await startTestPlatform()
  const report: RaceReport = {
    audit: undefined as never,
    killVersusStart: {},
    killVersusCompletion: {},
    neverStarted: 0,
    wrongAnswers: [],
  }
  const code = 'export default ({ ms }) => new Promise((resolve) => setTimeout(resolve, ms))'
  const post = (key: string, ms: number) =>
    http<Brief>(`${platform.url}/v1/workloads/async`, {
      body: { code, input: { ms } },
      headers: { 'idempotency-key': key },
    })
  /** Kills as soon as there is something to kill. */
  const kill = async (id: string, counts: Record<string, number>) => {
    let killed = await http<Brief>(`${platform.url}/v1/workloads/${id}/kill`, { method: 'POST' })
    while (killed.status === 404)
      killed = await http<Brief>(`${platform.url}/v1/workloads/${id}/kill`, { method: 'POST' })
    const { status, attempts } = killed.body
    if (killed.status !== 200 || !['completed', 'killed'].includes(status))
      report.wrongAnswers.push(`${id}: ${killed.status} ${JSON.stringify(killed.body)}`)
    counts[status] = (counts[status] ?? 0) + 1
    if (status === 'killed' && attempts === 0) report.neverStarted++
    const read = await http<Brief>(`${platform.url}/v1/workloads/${id}`)
    if (read.body.status !== status)
      report.wrongAnswers.push(`${id}: killed as ${status}, read as ${read.body.status}`)
  }
  let left = each
  const racer = async () => {
    for (let n = left--; n > 0; n = left--) {
      // The id is known beforehand, so the kill can set out before the workload exists.
      const key = `race-${seed}-${n}`
      const posted = post(key, 10_000)
      await delay(3 * random())
      await Promise.all([posted, kill(derivedWorkloadId('default', key), report.killVersusStart)])

      const ms = 10 + 20 * random()
      const accepted = await post(`${key}-completion`, ms)
      await delay(Math.max(0, ms + 8 * (random() - 0.4)))
      await kill(accepted.body.id, report.killVersusCompletion)
    }
  }
  await Promise.all(Array.from({ length: width }, racer))
  report.audit = await audit(platform.natsUrl)
  return report
}
