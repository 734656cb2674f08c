// timeout: 300
import { node, python, shell } from './languages.ts'
import { conformance } from './suite.ts'

await conformance({
  isolation: 'docker',
  languages: [node, python, shell],
  holds: ['container'],
  memoryMb: 96,
})
