/** The floor’s far end, a process of its own: pull from the sourced queue, reply over core NATS, acknowledge. */
import { Bus } from '../shared/bus.ts'
import { pullWork } from '../shared/queue.ts'

const [url = '', consumer = ''] = process.argv.slice(2)
const bus = await Bus.connect({ url, name: 'floor-consumer' })
const puller = pullWork(bus, consumer, 256, (message) => {
  bus.send(`floor.reply.${message.workload}`, '{}')
  message.ack()
  puller.release()
})
await bus.nc.flush()
console.log('ready')
