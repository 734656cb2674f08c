import { readFileSync } from 'node:fs'
import { networkInterfaces } from 'node:os'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { localAddresses } from '../../../runners/container/network/guard.ts'
import { trafficOf } from '../../../runners/container/network/meter.ts'
import { Together } from '../../../runners/container/network/together.ts'

test('bytes of an interface are read as its other end sees them', () => {
  const text = `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       1       2    0    0    0     0          0         0        3       4    0    0    0     0       0          0
  box1:     100       3    0    0    0     0          0         0      200       5    0    0    0     0       0          0
 box12:    1000       3    0    0    0     0          0         0 18446744       5    0    0    0     0       0          0
`
  assert.equal(trafficOf(text, 'box1'), { in: 200, out: 100 })
  assert.equal(trafficOf(text, 'box12'), { in: 18_446_744, out: 1_000 })
  assert.is(trafficOf(text, 'box2'), undefined)
})

test('what the kernel takes for itself is read from its table: addresses, broadcasts and whole prefixes', () => {
  const trie = `Main:
  +-- 0.0.0.0/0 2 0 2
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 45.33.10.0/24 2 0 2
        |-- 45.33.10.0
           /24 link UNICAST
        |-- 45.33.10.2
           /32 host LOCAL
        |-- 45.33.10.255
           /32 link BROADCAST
Local:
  +-- 0.0.0.0/0 2 0 2
     |-- 93.184.216.0
        /24 host LOCAL
     |-- 127.0.0.0
        /8 host LOCAL
     |-- 127.0.0.1
        /32 host LOCAL
`
  assert.equal(localAddresses(trie), [
    '127.0.0.0/8',
    '127.0.0.1',
    '45.33.10.2',
    '45.33.10.255',
    '93.184.216.0/24',
  ])
})

test('every address of this host is among them', () => {
  const found = localAddresses(readFileSync('/proc/net/fib_trie', 'utf8'))
  for (const { address, family } of Object.values(networkInterfaces()).flatMap((one) => one ?? []))
    if (family === 'IPv4') assert.ok(found.includes(address), address)
})

test('what comes while an act is under way is done in the next, and fails with it alone', async () => {
  const acts: string[][] = []
  const together = new Together(async (names) => {
    acts.push(names)
    await new Promise((resolve) => setTimeout(resolve, 20))
    if (names.includes('b')) throw new Error('b cannot be done')
  })
  const first = together.add('a')
  await new Promise((resolve) => setTimeout(resolve, 5))
  const second = ['b', 'c'].map((name) => together.add(name).catch((error: Error) => error.message))
  await first
  await new Promise((resolve) => setTimeout(resolve, 5))
  const third = together.add('d')
  assert.equal(await Promise.all(second), ['b cannot be done', 'b cannot be done'])
  await third
  assert.equal(acts, [['a'], ['b', 'c'], ['d']])
})

test.run()
