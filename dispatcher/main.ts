/** The dispatcher process: `node dispatcher/main.ts`. May be killed at any instruction and started again. */
import { join, resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import { logOptionsOf, readConfig } from '../shared/config.ts'
import { newProcessId } from '../shared/ids.ts'
import { makeLogger, stopSignal, untilAborted } from '../shared/process.ts'
import { startTracing } from '../shared/telemetry.ts'
import { DispatcherConfig, dispatcherVariables, startDispatcher } from './dispatcher.ts'

const config = readConfig(DispatcherConfig, dispatcherVariables, process.env)
const id = newProcessId('dispatcher')
const secrets = config.databaseToken === undefined ? [] : [config.databaseToken]
const log = await makeLogger('vulcan-dispatcher', logOptionsOf(config, id, secrets))
const stop = stopSignal()
const databaseUrl = config.databaseUrl ?? pathToFileURL(join(resolve(config.dataDir), 'vulcan.db')).href
// Disposed last: what is being folded has spans to end.
await using tracing = await startTracing(config.telemetry, { service: 'vulcan-dispatcher', id, log })
await using dispatcher = await startDispatcher({ ...config, databaseUrl, id, tracing }, log)
log.info({ url: dispatcher.url }, 'listening')
await untilAborted(stop)
log.info('stopping')
