interface Input {
  /** The day reported on, such as `2026-01-31`; the day before the run where it is left out. */
  day?: string
}
interface Sale {
  product: string
  amount: number
}

/** Runs the same for the same day however often it is started: a schedule may start it twice. */
export default async function report({ day = yesterday() }: Input, ctx: { id: string; signal: AbortSignal }) {
  if (!/^\d{4}-\d{2}-\d{2}$/.test(day)) throw new TypeError(`day must be such as 2026-01-31, not ${day}`)
  console.log(`report for ${day}, run ${ctx.id}`)
  const sales = await salesOf(day, ctx.signal)
  const totals: Record<string, number> = {}
  for (const { product, amount } of sales) totals[product] = (totals[product] ?? 0) + amount
  return { day, count: sales.length, totals }
}

const yesterday = () => new Date(Date.now() - 86_400_000).toISOString().slice(0, 10)

/** In place of a call of your own API: name it in `network.egress` and use `fetch` with `signal`. */
async function salesOf(day: string, signal: AbortSignal): Promise<Sale[]> {
  signal.throwIfAborted()
  const seed = Number(day.replaceAll('-', ''))
  return Array.from({ length: 5 + (seed % 7) }, (_, i) => ({
    product: ['anvil', 'hammer', 'tongs'][(seed + i) % 3]!,
    amount: 10 + ((seed * (i + 1)) % 90),
  }))
}
