/** Reads what `/metrics` answers, as a test wants it: sums over the series that carry some labels. */

export interface Series {
  name: string
  labels: Record<string, string>
  value: number
}

/** Of the text format; what a page of Prometheus’s own would not have is an error. */
export function parsePage(text: string): Series[] {
  return text
    .split('\n')
    .filter((line) => line !== '' && !line.startsWith('#'))
    .map((line) => {
      const parts = /^([a-z_]+)(?:\{(.*)\})? (\S+)$/.exec(line)
      if (parts === null) throw new Error(`not a series: ${line}`)
      const labels = [...(parts[2] ?? '').matchAll(/([a-z_]+)="((?:[^"\\]|\\.)*)"(?:,|$)/g)]
      return {
        name: parts[1]!,
        labels: Object.fromEntries(labels.map(([, name, value]) => [name!, value!])),
        value: Number(parts[3]),
      }
    })
}

/** Of the series of this name with all these labels; undefined: there is none. */
export function sumOf(
  page: readonly Series[],
  name: string,
  labels: Record<string, string> = {},
): number | undefined {
  const found = page.filter(
    (series) =>
      series.name === name &&
      Object.entries(labels).every(([label, value]) => series.labels[label] === value),
  )
  return found.length === 0 ? undefined : found.reduce((sum, { value }) => sum + value, 0)
}

export async function scrape(url: string): Promise<Series[]> {
  const answer = await fetch(`${url}/metrics`)
  if (answer.status !== 200) throw new Error(`${url}/metrics answered ${answer.status}`)
  return parsePage(await answer.text())
}
