/**
 * The rules of the router namespace, as text for `nft -f`. Every packet from a box goes through the chain of its box,
 * also those of connections that stand: what was allowed at first is cut off once it may not be reached any more.
 * What is refused is counted and answered at once, in the one way that all network stacks tell their programs.
 */
import { specialRanges4 } from '../../egress.ts'

/** Interface to the way out, within the router namespace. */
export const outside = 'tap0'
/** slirp4netns’s own network: it takes the second address for itself and answers name queries on the third. */
export const outsideRange = '198.19.255.0/24'
export const nameserver = '198.19.255.3'

/** Connections that one box may have at once. */
const maxConnections = 1_024
const dnsPort = 53
/** HTTP/3 is HTTPS by UDP on the port of the same number. */
const httpsPort = 443

/** An address of the outside that an allowlist leads to. */
export interface Pin {
  address: string
  port: number
  /** Reached although it is not public, or an address of this host: its operator has named it. */
  unguarded: boolean
}

/** What is there before the first box. Names beginning with `box` are of interfaces, chains and counters of boxes. */
export const baseRules = `table inet vulcan {
  set special { type ipv4_addr; flags interval; auto-merge; elements = { ${specialRanges4.join(', ')} } }
  set own { type ipv4_addr; flags interval; auto-merge; }
  set platform { type ipv4_addr . inet_service; }
  map boxes { type ifname : verdict; }

  chain sources {
    type filter hook prerouting priority raw; policy accept;
    meta nfproto != ipv4 drop
    iifname "box*" fib saddr . iif oif missing drop
  }
  chain public {
    oifname != "${outside}" return
    ip daddr ${nameserver} udp dport ${dnsPort} accept
    ip daddr ${nameserver} tcp dport ${dnsPort} accept
    ip daddr @special return
    ip daddr @own return
    meta l4proto { tcp, udp } ip daddr . th dport @platform return
    meta l4proto { tcp, udp } accept
    icmp type echo-request accept
  }
  chain refuse {
    meta l4proto tcp reject with tcp reset
    meta l4proto udp reject with icmpx type port-unreachable
    reject with icmpx type admin-prohibited
  }
  chain input {
    type filter hook input priority filter; policy drop;
    iifname vmap @boxes
  }
  chain forward {
    type filter hook forward priority filter; policy drop;
    ct state invalid drop
    iifname "${outside}" ct state established,related accept
    iifname vmap @boxes
  }
  chain translate {
    type nat hook postrouting priority srcnat; policy accept;
    oifname "${outside}" masquerade
  }
}
`

/** Replaces what is known of this host and of the platform. `platform`: address and port. */
export function guardRules(own: readonly string[], platform: readonly [string, number][]): string {
  const lines = ['flush set inet vulcan own', 'flush set inet vulcan platform']
  if (own.length > 0) lines.push(`add element inet vulcan own { ${own.join(', ')} }`)
  if (platform.length > 0) {
    const pairs = platform.map(([address, port]) => `${address} . ${port}`)
    lines.push(`add element inet vulcan platform { ${pairs.join(', ')} }`)
  }
  return `${lines.join('\n')}\n`
}

/** Lets the box of that name go where the pins lead, and to all that is public where it may. */
export function openRules(box: string, reach: readonly Pin[], toPublic: boolean): string {
  const rule = (text: string) => `add rule inet vulcan ${box} ${text}`
  const lines = [
    `add counter inet vulcan ${box}`,
    `add chain inet vulcan ${box}`,
    rule(`ct state new ct count over ${maxConnections} counter name ${box} goto refuse`),
  ]
  for (const unguarded of [true, false]) {
    const pins = reach.filter((pin) => pin.unguarded === unguarded)
    const verdict = unguarded ? 'accept' : 'jump public'
    const allow = (protocol: string, among: readonly Pin[]) => {
      if (among.length === 0) return
      const pairs = among.map(({ address, port }) => `${address} . ${port}`)
      lines.push(rule(`oifname "${outside}" ip daddr . ${protocol} dport { ${pairs.join(', ')} } ${verdict}`))
    }
    allow('tcp', pins)
    allow(
      'udp',
      pins.filter(({ port }) => port === httpsPort),
    )
  }
  if (toPublic) lines.push(rule('jump public'))
  lines.push(
    rule(`counter name ${box} goto refuse`),
    `add element inet vulcan boxes { "${box}" : goto ${box} }`,
  )
  return `${lines.join('\n')}\n`
}

export const closeRules = (box: string): string =>
  [
    `delete element inet vulcan boxes { "${box}" }`,
    `delete chain inet vulcan ${box}`,
    `delete counter inet vulcan ${box}`,
    '',
  ].join('\n')
