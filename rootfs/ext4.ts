/** Root drives as ext4, by mke2fs: for VMMs whose usual kernels have no erofs. */
import { execFile } from 'node:child_process'
import { lstat, open, readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'

const execute = promisify(execFile)
const makeTimeoutMs = 600_000

const blockBytes = 4096
const inodeBytes = 256
/** Any, but always the same. */
const uuid = '76756c63-616e-4000-8000-726f6f746673'
/** All that only a file system needs which is written to is left out. */
const features = ['^has_journal', '^metadata_csum', '^resize_inode', '^64bit', '^dir_index']

/**
 * Writes a read-only ext4 with the tree in `root`: the same bytes for the same tree.
 *
 * @param path of the file to make; its directory is there
 * @throws Error that says what to install, or what mke2fs says
 */
export async function writeExt4(
  root: string,
  path: string,
  { owner }: { owner: 'kept' | 'root' },
): Promise<void> {
  const { bytes, entries } = await measure(root)
  const inodes = entries + 64
  const blocks = Math.ceil(((bytes + inodes * inodeBytes) * 1.02) / blockBytes) + 1024
  const options = [
    ...['-q', '-F', '-t', 'ext4', '-b', String(blockBytes), '-I', String(inodeBytes), '-N', String(inodes)],
    ...['-m', '0', '-U', uuid, '-O', features.join(','), '-d', root],
    ...['-E', `hash_seed=${uuid},lazy_itable_init=0,nodiscard`],
  ]
  try {
    await execute('mke2fs', [...options, path, String(blocks)], {
      env: {
        PATH: '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
        E2FSPROGS_FAKE_TIME: '1',
        LC_ALL: 'C',
      },
      timeout: makeTimeoutMs,
    })
  } catch (error) {
    const { code, stderr } = error as Error & { code?: unknown; stderr?: string }
    if (code === 'ENOENT') throw new Error('mke2fs is missing: install the package e2fsprogs')
    throw new Error(`mke2fs: ${stderr?.trim() || (error as Error).message}`)
  }
  await settleInodes(path, owner)
}

/** Blocks that the contents take, and how many entries there are. */
async function measure(root: string): Promise<{ bytes: number; entries: number }> {
  let bytes = 0
  let entries = 1
  const pending = [root]
  for (let folder = pending.pop(); folder !== undefined; folder = pending.pop()) {
    const names = await readdir(folder)
    bytes += blockBytes * (1 + Math.ceil(names.reduce((sum, name) => sum + name.length + 16, 0) / 3500))
    for (const name of names) {
      const path = join(folder, name)
      const stat = await lstat(path)
      entries++
      if (stat.isDirectory()) pending.push(path)
      else if (stat.isFile()) bytes += Math.ceil(stat.size / blockBytes) * blockBytes
      else bytes += blockBytes
    }
  }
  return { bytes, entries }
}

/** Fields of superblock, group descriptor and inode (kernel: Documentation/filesystems/ext4). */
const superblockAt = 1024
const groupBytes = 32
const time = { access: 8, change: 12, modification: 16, extra: [0x84, 0x88, 0x8c, 0x90, 0x94] }
const ids = [0x02, 0x18, 0x78, 0x7a]

/** mke2fs takes times of access and change from the host's tree, which differ each time that is unpacked. */
async function settleInodes(path: string, owner: 'kept' | 'root'): Promise<void> {
  const file = await open(path, 'r+')
  await using _close = { [Symbol.asyncDispose]: () => file.close() }
  const read = async (position: number, bytes: number) =>
    (await file.read(Buffer.alloc(bytes), 0, bytes, position)).buffer
  const superblock = await read(superblockAt, 1024)
  const inodes = superblock.readUInt32LE(0)
  const perGroup = superblock.readUInt32LE(0x28)
  const size = superblock.readUInt16LE(0x58)
  const groups = Math.ceil(inodes / perGroup)
  const descriptors = await read(blockBytes, groups * groupBytes)
  for (let group = 0; group < groups; group++) {
    const at = descriptors.readUInt32LE(group * groupBytes + 8) * blockBytes
    const table = await read(at, perGroup * size)
    for (let inode = 0; inode < table.length; inode += size) {
      // Not in use.
      if (table.readUInt16LE(inode) === 0) continue
      // As in an erofs: links get their time when a tree is unpacked.
      const isLink = (table.readUInt16LE(inode) & 0xf000) === 0xa000
      const modified = isLink ? 0 : table.readUInt32LE(inode + time.modification)
      for (const field of [time.access, time.change, time.modification])
        table.writeUInt32LE(modified, inode + field)
      for (const field of time.extra) table.writeUInt32LE(0, inode + field)
      if (owner === 'root') for (const field of ids) table.writeUInt16LE(0, inode + field)
    }
    await file.write(table, 0, table.length, at)
  }
}
