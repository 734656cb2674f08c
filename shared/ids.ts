/** Workload ids: UUIDv7 where we choose (sortable by time), UUIDv8 where an idempotency key decides. */
import { createHash, hash, randomUUIDv7 } from 'node:crypto'
import type { Digest, WorkloadId } from './workload.ts'

export const newWorkloadId = (): WorkloadId => randomUUIDv7()

/** The same namespace and key always give the same id, on any gateway: RFC 9562 version 8 over sha256. */
export function derivedWorkloadId(namespace: string, key: string): WorkloadId {
  const bytes = createHash('sha256').update(namespace).update('\0').update(key).digest().subarray(0, 16)
  bytes[6] = (bytes[6]! & 0x0f) | 0x80
  bytes[8] = (bytes[8]! & 0x3f) | 0x80
  const hex = bytes.toString('hex')
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-${hex.slice(12, 16)}-${hex.slice(16, 20)}-${hex.slice(20)}`
}

/** Short random id of a process, unique per start, fit for a subject token. */
export const newProcessId = (kind: string): string => `${kind}-${randomUUIDv7().slice(-12)}`

export const sha256Hex = (bytes: Uint8Array | string): string => hash('sha256', bytes)

export const digestOf = (bytes: Uint8Array | string): Digest => `sha256:${sha256Hex(bytes)}`
