// timeout: 300
import { attempts } from './attempts.ts'

await attempts('docker')
