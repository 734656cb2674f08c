/** What the invocations of a function log and how they end, as they come. */
import { setTimeout as delay } from 'node:timers/promises'

/** Milliseconds between two looks for new invocations. */
const lookMs = 500
/** Invocations whose lines are followed at once; of more only the end is shown. */
const followed = 20

export type TailOptions = {
  gateway: string
  name: string
  log: (line: string) => void
  signal: AbortSignal
}

type Listed = { id: string; created_at: string }
type Ended = {
  id: string
  status: string
  cause: string | null
  duration_ms: number | null
  error: { message: string; stack: string | null } | null
  http: { method: string; path: string; status: number | null } | null
  function: { version: string } | null
}

/** Runs until the signal; a gateway that is away for a while is waited for. */
export async function tail({ gateway, name, log, signal }: TailOptions): Promise<void> {
  let since = new Date().toISOString()
  const seen = new Set<string>()
  const open = new Set<Promise<void>>()
  while (!signal.aborted) {
    await delay(lookMs, undefined, { signal }).catch(() => {})
    for (const { id, created_at } of await newer(since).catch(() => [])) {
      if (seen.has(id)) continue
      seen.add(id)
      if (created_at > since) since = created_at
      const following = follow(id, open.size < followed)
        .catch((error) => {
          if (!signal.aborted) log(`${short(id)} cannot be followed: ${error.message}`)
        })
        .finally(() => open.delete(following))
      open.add(following)
    }
  }
  await Promise.all(open)

  async function newer(from: string): Promise<Listed[]> {
    const query = new URLSearchParams({ function: name, since: from, limit: '100' })
    const answer = await fetch(`${gateway}/v1/workloads?${query}`, { signal })
    if (!answer.ok) return []
    return ((await answer.json()) as { workloads: Listed[] }).workloads.reverse()
  }

  async function follow(id: string, withLines: boolean): Promise<void> {
    if (withLines) {
      const headers = { accept: 'text/event-stream' }
      const answer = await fetch(`${gateway}/v1/workloads/${id}/logs`, { headers, signal })
      for await (const { event, data } of eventsIn(answer.body)) {
        if (event === 'log') {
          const { level, text } = JSON.parse(data) as { level: string; text: string }
          log(`${short(id)} ${level === 'info' ? '' : `${level}: `}${text}`)
        }
        if (event === 'gap') log(`${short(id)} (lines were dropped)`)
      }
    }
    for (let tries = 0; !signal.aborted && tries < 3_600; tries++) {
      const answer = await fetch(`${gateway}/v1/workloads/${id}`, { signal })
      const workload = (await answer.json()) as Ended
      if (/completed|failed|killed/.test(workload.status)) return show(workload)
      await delay(1_000, undefined, { signal })
    }
  }

  function show({ id, status, cause, duration_ms, error, http, function: of }: Ended): void {
    const call = http === null ? 'invoked' : `${http.method} ${http.path} ${http.status ?? ''}`.trim()
    const took = duration_ms === null ? '' : ` in ${Math.round(duration_ms)} ms`
    log(
      `${short(id)} ${call}: ${status}${cause === null ? '' : ` (${cause})`}${took} ${of?.version ?? ''}`.trim(),
    )
    if (error !== null) for (const line of (error.stack ?? error.message).split('\n')) log(`  ${line}`)
  }
}

/** The random end of an id: the beginning is its time. */
const short = (id: string) => id.slice(-8)

/** Server-Sent Events in a body, as far as this needs them. */
async function* eventsIn(
  body: ReadableStream<Uint8Array> | null,
): AsyncGenerator<{ event: string; data: string }> {
  let text = ''
  const decoder = new TextDecoder()
  for await (const part of body ?? []) {
    text += decoder.decode(part, { stream: true })
    for (let end = text.indexOf('\n\n'); end >= 0; end = text.indexOf('\n\n')) {
      const lines = text.slice(0, end).split('\n')
      text = text.slice(end + 2)
      const field = (name: string) =>
        lines
          .filter((line) => line.startsWith(`${name}:`))
          .map((line) => line.slice(name.length + 1).trimStart())
          .join('\n')
      yield { event: field('event') || 'message', data: field('data') }
    }
  }
}
