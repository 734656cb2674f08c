import { execFileSync, spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { createServer } from 'node:net'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import type { Network } from '../../../runners/container/engine.ts'
import { programsEnv } from '../../../runners/container/gvisor/programs.ts'
import { findProgram } from '../../../runners/container/images/processes.ts'
import { skip } from '../../harness.ts'
import { gvisorTests, runIn, sh, traces } from './gvisor-support.ts'

const boxTest = await gvisorTests()

/** A namespace with one interface, whose other end is on this host. */
async function openPair(): Promise<Network & { hostAddress: string }> {
  const holder = spawn('unshare', ['--net', '--', 'sh', '-c', 'echo up; exec sleep 1000'], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  await once(holder.stdout!, 'data')
  const hex = randomBytes(4).toString('hex')
  const [outer, inner] = [`vo${hex}`, `vi${hex}`]
  const ip = (...args: string[]) => execFileSync('ip', args, { env: programsEnv })
  // Of TEST-NET-2 (RFC 5737): nobody’s.
  const third = randomBytes(1)[0]! & 0xfc
  const [hostAddress, address] = [`198.51.100.${third + 1}`, `198.51.100.${third + 2}`]
  ip('link', 'add', outer, 'type', 'veth', 'peer', 'name', inner, 'netns', String(holder.pid))
  ip('address', 'add', `${hostAddress}/30`, 'dev', outer)
  ip('link', 'set', outer, 'up')
  const within = (...args: string[]) =>
    execFileSync('nsenter', [`--net=/proc/${holder.pid}/ns/net`, 'ip', ...args], { env: programsEnv })
  within('address', 'add', `${address}/30`, 'dev', inner)
  within('link', 'set', inner, 'up')
  within('link', 'set', 'lo', 'up')
  return {
    hostAddress,
    path: `/proc/${holder.pid}/ns/net`,
    hosts: [{ address: hostAddress, name: 'api.test' }],
    nameservers: ['198.51.100.254'],
    denied: async () => 0,
    traffic: () => undefined,
    join: async () => {},
    async [Symbol.asyncDispose]() {
      const exited = once(holder, 'exit')
      holder.kill('SIGKILL')
      await exited
    },
  }
}

if (findProgram('ip') === undefined) skip(test, 'a box in a network', 'iproute2 is not installed')
else
  boxTest('a box in a network reaches what that leads to, by the names it was given', async (it) => {
    await using network = await openPair()
    const server = createServer((socket) => socket.end('hello\n'))
    server.listen(0, network.hostAddress)
    await once(server, 'listening')
    const { port } = server.address() as { port: number }
    try {
      const before = traces(it)
      const ran = await runIn(it, sh(`nc api.test ${port}; cat /etc/resolv.conf; echo $?`), { network })
      assert.is(ran.stdout, 'hello\nnameserver 198.51.100.254\n0\n', ran.stderr)
      assert.equal(traces(it), before)
      const alone = await runIn(it, sh(`nc -w 2 ${network.hostAddress} ${port} || echo unreachable`))
      assert.is(alone.stdout, 'unreachable\n')
    } finally {
      server.close()
    }
  })

test.run()
