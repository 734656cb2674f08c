/** The little of ELF that kernels and their modules need. */

const sectionHeaderBytes = 64

/** A section's content in a 64-bit little-endian file; undefined where there is none of this name. */
export function sectionOf(file: Buffer, name: string): Buffer | undefined {
  const at = Number(file.readBigUInt64LE(0x28))
  const count = file.readUInt16LE(0x3c)
  const header = (index: number) => file.subarray(at + index * sectionHeaderBytes)
  const contentOf = (section: Buffer) => {
    const offset = Number(section.readBigUInt64LE(0x18))
    return file.subarray(offset, offset + Number(section.readBigUInt64LE(0x20)))
  }
  const names = contentOf(header(file.readUInt16LE(0x3e)))
  for (let index = 1; index < count; index++) {
    const from = header(index).readUInt32LE(0)
    if (names.toString('latin1', from, names.indexOf(0, from)) === name) return contentOf(header(index))
  }
  return undefined
}

/** The modules that a kernel module needs, by name, as `MODULE_INFO` has them. */
export function dependenciesOf(module: Buffer): string[] {
  const info = sectionOf(module, '.modinfo')?.toString('latin1') ?? ''
  const line = info.split('\0').find((text) => text.startsWith('depends='))
  return (line ?? '').slice('depends='.length).split(',').filter(Boolean)
}
