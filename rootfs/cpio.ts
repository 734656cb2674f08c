/** Archives as the kernel takes them for its first root file system (Documentation/driver-api/early-userspace/buffer-format.rst). */

export interface CpioEntry {
  /** Relative; directories come before what is in them. */
  path: string
  /** Type and permissions, as in `st_mode`. */
  mode: number
  content?: Buffer
  /** Of a device. */
  device?: { major: number; minor: number }
}

const trailer = 'TRAILER!!!'

/** An archive of the form `newc`. All is root's and of the epoch: the same entries give the same bytes. */
export function writeCpio(entries: readonly CpioEntry[]): Buffer {
  const parts: Buffer[] = []
  const all = [...entries, { path: trailer, mode: 0 }] satisfies CpioEntry[]
  for (const [index, entry] of all.entries()) {
    const { path, mode, content = Buffer.alloc(0), device } = entry as CpioEntry
    const isTrailer = path === trailer
    const name = Buffer.from(`${path}\0`)
    const fields = [
      isTrailer ? 0 : index + 1,
      mode,
      ...[0, 0, 1, 0],
      content.length,
      ...[0, 0, device?.major ?? 0, device?.minor ?? 0],
      name.length,
      0,
    ]
    const head = `070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}`
    parts.push(padded(Buffer.concat([Buffer.from(head), name])), padded(content))
  }
  return Buffer.concat(parts)
}

function padded(bytes: Buffer): Buffer {
  const rest = bytes.length % 4
  return rest === 0 ? bytes : Buffer.concat([bytes, Buffer.alloc(4 - rest)])
}
