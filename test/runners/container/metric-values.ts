/** Reads figures of a registry, as tests want them. */
import type { RunnerMetrics } from '../../../runners/metrics.ts'

/** The sum of the series with this name (histograms: `…_count`, `…_sum`) and these labels; 0: there is none. */
export async function seriesSum(
  registry: RunnerMetrics['registry'],
  name: string,
  labels: Record<string, string> = {},
): Promise<number> {
  let total = 0
  for (const line of (await registry.metrics()).split('\n')) {
    const found = /^([a-z_]+)\{(.*?)\} ([-+.e\dNaInf]+)(?: #.*)?$/.exec(line)
    if (found === null || found[1] !== name) continue
    if (Object.entries(labels).every(([key, value]) => found[2]!.includes(`${key}="${value}"`)))
      total += Number(found[3])
  }
  return total
}
