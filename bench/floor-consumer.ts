/** The floor’s far end, a process of its own: pull from the sourced queue, reply over core NATS, acknowledge. */
import { jetstream } from '@nats-io/jetstream'
import { connect } from '@nats-io/transport-node'
import { lastToken } from '../shared/subjects.ts'
import { WORK } from '../shared/topology.ts'

const [url = '', name = ''] = process.argv.slice(2)
const connection = await connect({ servers: url })
const consumer = await jetstream(connection).consumers.get(WORK, name)
await consumer.consume({
  max_messages: 256,
  callback: (message) => {
    connection.publish(`floor.reply.${lastToken(message.subject)}`, '{}')
    message.ack()
  },
})
await connection.flush()
console.log('ready')
