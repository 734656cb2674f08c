// Takes what OTLP exporters send and forgets it: only the platform’s own work on traces is to be measured, not
// somebody’s who keeps them. Tells its port on the first line, and on stdin’s every line the bytes it got so far.
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { createInterface } from 'node:readline'

let bytes = 0
const server = createServer((request, response) => {
  request.on('data', (chunk: Buffer) => {
    bytes += chunk.length
  })
  request.on('end', () => response.writeHead(200, { 'content-type': 'application/x-protobuf' }).end())
})
server.listen(0, '127.0.0.1', () => console.log((server.address() as AddressInfo).port))
createInterface(process.stdin)
  .on('line', () => console.log(bytes))
  .on('close', () => process.exit())
