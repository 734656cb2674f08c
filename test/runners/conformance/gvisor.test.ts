// timeout: 300
import { node, python, shell } from './languages.ts'
import { conformance } from './suite.ts'

await conformance({ isolation: 'gvisor', languages: [node, python, shell], holds: ['cgroup'], memoryMb: 96 })
