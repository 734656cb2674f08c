import { javascript } from './languages.ts'
import { conformance } from './suite.ts'

await conformance({ isolation: 'isolate', languages: [javascript], holds: [], memoryMb: 64 })
