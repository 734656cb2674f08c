/**
 * What Firecracker’s API takes, of the requests that the driver sends: from its OpenAPI document,
 * https://github.com/firecracker-microvm/firecracker/blob/v1.16.1/src/firecracker/swagger/firecracker.yaml. Fields that
 * the document has and the driver never sends are left out on purpose: sending one is an error here.
 */
import { z } from 'zod'
import type { Request } from '../../../runners/microvm/firecracker/api.ts'

const tokens = z.int().min(0)
const TokenBucket = z.strictObject({ size: tokens, refill_time: tokens, one_time_burst: tokens.optional() })
const RateLimiter = z.strictObject({ bandwidth: TokenBucket.optional(), ops: TokenBucket.optional() })

/** Of each operation the body, and the field that the path repeats. */
const operations: Record<string, { body?: z.ZodType; parameter?: string }> = {
  'GET /': {},
  'PUT /actions': {
    body: z.strictObject({ action_type: z.enum(['FlushMetrics', 'InstanceStart', 'SendCtrlAltDel']) }),
  },
  'PUT /boot-source': {
    body: z.strictObject({
      kernel_image_path: z.string(),
      initrd_path: z.string().optional(),
      boot_args: z.string().optional(),
    }),
  },
  'PUT /drives/{drive_id}': {
    parameter: 'drive_id',
    body: z.strictObject({
      drive_id: z.string(),
      is_root_device: z.boolean(),
      is_read_only: z.boolean().optional(),
      path_on_host: z.string().optional(),
      cache_type: z.enum(['Unsafe', 'Writeback']).optional(),
      io_engine: z.enum(['Sync', 'Async']).optional(),
      rate_limiter: RateLimiter.optional(),
    }),
  },
  'PATCH /drives/{drive_id}': {
    parameter: 'drive_id',
    body: z.strictObject({
      drive_id: z.string(),
      path_on_host: z.string().optional(),
      rate_limiter: RateLimiter.optional(),
    }),
  },
  'PUT /entropy': { body: z.strictObject({ rate_limiter: RateLimiter.optional() }) },
  'PUT /logger': {
    body: z.strictObject({
      level: z.enum(['Error', 'Warning', 'Info', 'Debug', 'Trace', 'Off']).optional(),
      log_path: z.string().optional(),
      show_level: z.boolean().optional(),
      show_log_origin: z.boolean().optional(),
    }),
  },
  'PUT /machine-config': {
    body: z.strictObject({
      vcpu_count: z.int().min(1).max(32),
      mem_size_mib: z.int(),
      smt: z.boolean().optional(),
      track_dirty_pages: z.boolean().optional(),
    }),
  },
  'PUT /metrics': { body: z.strictObject({ metrics_path: z.string() }) },
  'PUT /network-interfaces/{iface_id}': {
    parameter: 'iface_id',
    body: z.strictObject({
      iface_id: z.string(),
      host_dev_name: z.string(),
      guest_mac: z
        .string()
        .regex(/^([0-9a-f]{2}:){5}[0-9a-f]{2}$/)
        .optional(),
      rx_rate_limiter: RateLimiter.optional(),
      tx_rate_limiter: RateLimiter.optional(),
    }),
  },
  'PUT /snapshot/create': {
    body: z.strictObject({
      mem_file_path: z.string(),
      snapshot_path: z.string(),
      snapshot_type: z.enum(['Full', 'Diff']).optional(),
    }),
  },
  'PUT /snapshot/load': {
    body: z.strictObject({
      snapshot_path: z.string(),
      mem_backend: z.strictObject({ backend_type: z.enum(['File', 'Uffd']), backend_path: z.string() }),
      resume_vm: z.boolean().optional(),
      network_overrides: z
        .array(z.strictObject({ iface_id: z.string(), host_dev_name: z.string() }))
        .optional(),
    }),
  },
  'PATCH /vm': { body: z.strictObject({ state: z.enum(['Paused', 'Resumed']) }) },
  'PUT /vsock': { body: z.strictObject({ guest_cid: z.int().min(3), uds_path: z.string() }) },
}

/** Throws where the document has no such operation, or its body is another. */
export function checkRequest({ method, path, body }: Request): void {
  for (const [operation, { body: schema, parameter }] of Object.entries(operations)) {
    const pattern = new RegExp(`^${operation.replace(/\{\w+\}/, '([A-Za-z0-9_]+)')}$`)
    const match = pattern.exec(`${method} ${path}`)
    if (match === null) continue
    if (schema === undefined) {
      if (body !== undefined) throw new Error(`${operation} has no body`)
      return
    }
    const parsed = schema.parse(body) as Record<string, unknown>
    if (parameter !== undefined && parsed[parameter] !== match[1])
      throw new Error(`${operation}: the path says ${match[1]}, the body ${parsed[parameter]}`)
    return
  }
  throw new Error(`no operation ${method} ${path}`)
}
