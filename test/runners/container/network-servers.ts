/** Run in a network namespace: listens as it is told over IPC, and says `ready`. Ends with who started it. */
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import { createServer } from 'node:net'

export interface Listening {
  /** `tcp` greets with name and address, `udp` answers with the same, `dns` knows the addresses of `names`. */
  protocol: 'tcp' | 'udp' | 'dns'
  address: string
  port: number
  name?: string
  names?: Record<string, string>
}

async function listen({ protocol, address, port, name, names }: Listening): Promise<void> {
  if (protocol === 'tcp') {
    const server = createServer((socket) => {
      socket.on('error', () => {})
      socket.end(`${name} ${socket.localAddress}\n`)
    })
    await once(server.listen(port, address), 'listening')
    return
  }
  const socket = createSocket('udp4')
  socket.on('error', () => {})
  socket.on('message', (data, from) => {
    socket.send(protocol === 'dns' ? answer(data, names ?? {}) : `${name} ${data}`, from.port, from.address)
  })
  await once(socket.bind(port, address), 'listening')
}

/** RFC 1035: one question, and one A record or the code for a name that is not there. */
function answer(query: Buffer, names: Record<string, string>): Buffer {
  const labels: string[] = []
  let at = 12
  for (let length = query[at]!; length > 0; length = query[at]!) {
    labels.push(query.toString('latin1', at + 1, at + 1 + length))
    at += 1 + length
  }
  const question = query.subarray(12, at + 5)
  const address = names[labels.join('.').toLowerCase()]
  const head = Buffer.from(query.subarray(0, 12))
  head.writeUInt16BE(address === undefined ? 0x8183 : 0x8180, 2)
  head.writeUInt16BE(1, 4)
  head.writeUInt16BE(address === undefined ? 0 : 1, 6)
  head.fill(0, 8)
  const record = Buffer.from([
    0xc0,
    12,
    0,
    1,
    0,
    1,
    0,
    0,
    0,
    0,
    0,
    4,
    ...(address ?? '').split('.').map(Number),
  ])
  return Buffer.concat(address === undefined ? [head, question] : [head, question, record])
}

if (import.meta.main) {
  process.once('disconnect', () => process.exit())
  process.on('message', async (listening: Listening[]) => {
    for (const one of listening) await listen(one)
    process.send!('ready')
  })
}
