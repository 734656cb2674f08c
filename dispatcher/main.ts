/** The dispatcher process: `node dispatcher/main.ts`. May be killed at any instruction and started again. */
import { join, resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import { readConfig } from '../shared/config.ts'
import { makeLogger, stopSignal, untilAborted } from '../shared/process.ts'
import { DispatcherConfig, dispatcherVariables, startDispatcher } from './dispatcher.ts'

const config = readConfig(DispatcherConfig, dispatcherVariables, process.env)
const log = makeLogger('vulcan-dispatcher', config.logLevel)
const stop = stopSignal()
const databaseUrl = config.databaseUrl ?? pathToFileURL(join(resolve(config.dataDir), 'vulcan.db')).href
await using dispatcher = await startDispatcher({ ...config, databaseUrl }, log)
log.info({ url: dispatcher.url }, 'listening')
await untilAborted(stop)
log.info('stopping')
