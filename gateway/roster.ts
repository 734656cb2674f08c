/**
 * Who can run what: live runners by their heartbeats, and each host’s last word on an isolation from the KV bucket,
 * so that work for an isolation whose runner is just being restarted is queued and not refused.
 */
import { type Ability, type Backend, Heartbeat, knownForMs, lostAfterMs } from '../shared/backends.ts'
import type { Bus } from '../shared/bus.ts'
import { allRunners, rollCallSubject } from '../shared/subjects.ts'
import { Isolation } from '../shared/workload.ts'

const installs = (isolation: Isolation): string =>
  `\`npm run setup -- ${isolation}\` installs what it needs; start a runner then, by \`npm start\` or \`node runners/main.ts ${isolation}\``

const fixes: Record<Isolation, string> = {
  isolate: 'start one with `node runners/main.ts isolate`',
  gvisor: installs('gvisor'),
  docker: installs('docker'),
  microvm: installs('microvm'),
}

export interface Roster {
  /** What an isolation can do, as far as is known. */
  ability(isolation: Isolation): Ability
  backends(): Backend[]
  /** True when the runner has not been heard of for as long as a lost one is given. */
  lost(runner: string): boolean
  close(): void
}

export async function openRoster(bus: Bus, replicas: number): Promise<Roster> {
  const live = new Map<string, { beat: Heartbeat; at: number }>()
  /** By the key of the KV bucket. */
  const known = new Map<string, { beat: Heartbeat; at: number }>()
  let since = Date.now()

  const parse = (text: string): Heartbeat | undefined => {
    try {
      return Heartbeat.parse(JSON.parse(text))
    } catch {
      return undefined
    }
  }
  const heartbeats = bus.listen(allRunners, (message) => {
    const beat = parse(message.string())
    if (beat === undefined) return
    if (beat.leaving) live.delete(beat.runner)
    else live.set(beat.runner, { beat, at: Date.now() })
  })
  const watch = await (await bus.backends(replicas)).watch()
  void (async () => {
    for await (const entry of watch) {
      const beat = entry.operation === 'PUT' ? parse(entry.string()) : undefined
      if (beat === undefined) known.delete(entry.key)
      else known.set(entry.key, { beat, at: entry.created.getTime() })
    }
  })()
  bus.send(rollCallSubject, '')
  // Nobody can be heard while the bus is away: silence counts from its return on.
  const unwatch = bus.onConnection((connected) => {
    if (!connected) return
    since = Date.now()
    for (const one of live.values()) one.at = since
    bus.send(rollCallSubject, '')
  })
  const timer = setInterval(() => {
    if (!bus.connected) return
    for (const [runner, { at }] of live) if (Date.now() - at > lostAfterMs) live.delete(runner)
    for (const [key, { at }] of known) if (Date.now() - at > knownForMs) known.delete(key)
  }, 1_000)

  const ability = (isolation: Isolation): Ability => {
    let best: Heartbeat | undefined
    // One that can before one that cannot; of the same, one that lives before what was last heard.
    for (const words of [live, known])
      for (const { beat } of words.values())
        if (beat.isolation === isolation && (best === undefined || (beat.available && !best.available)))
          best = beat
    if (best !== undefined) return best
    return {
      isolation,
      available: false,
      reason: `no ${isolation} runner has been seen`,
      fix: fixes[isolation],
      capabilities: null,
    }
  }
  const backend = (isolation: Isolation): Backend => {
    const runners = []
    for (const { beat, at } of live.values()) {
      if (beat.isolation !== isolation || !beat.available) continue
      const { runner, slots, active, metrics, metrics_url, host, pid, started_at } = beat
      runners.push({
        runner,
        slots,
        active,
        metrics,
        metrics_url,
        host,
        pid,
        started_at,
        last_seen: new Date(at).toISOString(),
      })
    }
    const { available, reason, fix, capabilities } = ability(isolation)
    return { isolation, available, reason, fix, capabilities, runners }
  }
  return {
    ability,
    backends: () => Isolation.options.map(backend),
    lost: (runner) => !live.has(runner) && Date.now() - since > lostAfterMs,
    close() {
      clearInterval(timer)
      unwatch()
      heartbeats.unsubscribe()
      watch.stop()
    },
  }
}
