/** Run in a network namespace: tries each target of the JSON in its first argument, prints what came of it as JSON. */
import { createSocket } from 'node:dgram'
import { Resolver } from 'node:dns/promises'
import { connect } from 'node:net'

export interface Target {
  /** `dns`: asks that server for the IPv4 addresses of `name`. */
  protocol: 'tcp' | 'udp' | 'dns'
  host: string
  port: number
  /** Address to send from. */
  from?: string
  name?: string
}

/** A target that says nothing for so long (ms) is silent. */
const silentMs = 3_000

/** `reached` and what it said, `refused` and the code of the error, or `silent`. */
function tcp({ host, port }: Target): Promise<string> {
  return new Promise((resolve) => {
    const socket = connect({ host, port })
    const end = (text: string) => {
      socket.destroy()
      resolve(text)
    }
    socket.setTimeout(silentMs, () => end('silent'))
    socket.once('data', (data) => end(`reached ${data.toString('latin1').split(/\r?\n/)[0]}`))
    socket.once('error', (error: NodeJS.ErrnoException) => end(`refused ${error.code}`))
  })
}

function udp({ host, port, from }: Target): Promise<string> {
  return new Promise((resolve) => {
    const socket = createSocket('udp4')
    const end = (text: string) => {
      clearTimeout(timer)
      socket.close()
      resolve(text)
    }
    const timer = setTimeout(() => end('silent'), silentMs)
    socket.once('message', (data) => end(`reached ${data}`))
    socket.once('error', (error: NodeJS.ErrnoException) => end(`refused ${error.code}`))
    socket.bind(0, from, () => {
      socket.connect(port, host)
      socket.once('connect', () => socket.send(`from ${from ?? 'me'}`))
    })
  })
}

async function dns({ host, port, name }: Target): Promise<string> {
  const resolver = new Resolver({ timeout: silentMs, tries: 1 })
  resolver.setServers([`${host}:${port}`])
  return await resolver.resolve4(name!).then(
    (addresses) => `reached ${addresses.join(' ')}`,
    (error: NodeJS.ErrnoException) => `refused ${error.code}`,
  )
}

const attempts = { tcp, udp, dns }
if (import.meta.main) {
  const targets = JSON.parse(process.argv[2]!) as Target[]
  const results = await Promise.all(targets.map((target) => attempts[target.protocol](target)))
  process.stdout.write(JSON.stringify(results), () => process.exit())
}
