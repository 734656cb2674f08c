/** A kernel of a few bytes: it says `line` on the serial port, and then halts, says it again for ever, or resets. */

const loadAddress = 0x100000
const headerBytes = 64
const programHeaderBytes = 56

const ends = {
  halt: [0xf4, 0xeb, 0xfd], // hlt, jmp to it
  again: [0xeb, 0xea], // jmp to the start
  reset: [0xb0, 0xfe, 0xe6, 0x64, 0xf4], // mov al, 0xfe; out 0x64, al (keyboard controller); hlt
}

/** An ELF executable for x86-64, entered in long mode with flat segments, as Linux’s boot protocol has it. */
export function tinyKernel(line: string, then: 'halt' | 'again' | 'reset' = 'halt'): Buffer {
  const text = Buffer.from(`${line}\n\0`)
  const code = (textAddress: number) =>
    Buffer.from([
      ...[0x66, 0xba, 0xf8, 0x03], // mov dx, 0x3f8 (COM1)
      ...[0xbe, ...bytes32(textAddress)], // mov esi, text
      ...[0x8a, 0x06], // mov al, [rsi]
      ...[0x84, 0xc0], // test al, al
      ...[0x74, 0x05], // jz over the next three
      ...[0xee], // out dx, al
      ...[0xff, 0xc6], // inc esi
      ...[0xeb, 0xf5], // jmp to: mov al, [rsi]
      ...ends[then],
    ])
  const start = headerBytes + programHeaderBytes
  const image = Buffer.concat([code(loadAddress + start + code(0).length), text])
  const header = Buffer.alloc(start)
  header.write('\x7fELF', 'latin1')
  header.set([2, 1, 1], 4)
  header.writeUInt16LE(2, 16) // ET_EXEC
  header.writeUInt16LE(62, 18) // EM_X86_64
  header.writeUInt32LE(1, 20)
  header.writeBigUInt64LE(BigInt(loadAddress + start), 24) // entry
  header.writeBigUInt64LE(BigInt(headerBytes), 32) // program headers
  header.writeUInt16LE(headerBytes, 52)
  header.writeUInt16LE(programHeaderBytes, 54)
  header.writeUInt16LE(1, 56)
  header.writeUInt32LE(1, headerBytes) // PT_LOAD
  header.writeUInt32LE(7, headerBytes + 4)
  for (const [offset, value] of [
    [16, loadAddress],
    [24, loadAddress],
    [32, start + image.length],
    [40, start + image.length],
    [48, 0x1000],
  ] as const)
    header.writeBigUInt64LE(BigInt(value), headerBytes + offset)
  return Buffer.concat([header, image])
}

const bytes32 = (value: number) => [0, 8, 16, 24].map((shift) => (value >> shift) & 0xff)
