// timeout: 600
import { node, python, shell } from './languages.ts'
import { conformance } from './suite.ts'

await conformance({ isolation: 'microvm', languages: [node, python, shell], holds: ['cgroup'], memoryMb: 96 })
