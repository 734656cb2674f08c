// What is made here, as the kernel in a virtual machine sees it. Its first program is busybox with a script.
import { execFile } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import {
  chmodSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { cpus, tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import { type CpioEntry, writeCpio } from '../../rootfs/cpio.ts'
import { driveOf, writeJobDrive } from '../../rootfs/drives.ts'
import { partsKinds, readParts } from '../../rootfs/parts.ts'
import { cacheDirectory } from '../../scripts/cache-directory.ts'
import { systemPath, which } from '../../scripts/host-tools.ts'
import { skip } from '../harness.ts'

const execute = promisify(execFile)
const cacheDir = cacheDirectory(process.env)
const qemu = which('qemu-system-x86_64', systemPath)
const busybox = which('busybox', systemPath)
/** A boot takes two seconds, and may hang on a busy host. */
const bootMs = 40_000
const boots = 4
/** The kernel may fail to calibrate its clock on a busy host, and stops there; any frequency will do here. */
const clock = `tsc_early_khz=${(cpus()[0]?.speed || 2_000) * 1_000}`

const script = `#!/bin/busybox sh
PATH=/bin
busybox mount -t proc none /proc && busybox mount -t sysfs none /sys && busybox mount -t devtmpfs none /dev
exec >/dev/console 2>&1
while read name; do busybox insmod /modules/$name || echo "failed $name"; done </modules/order
for drive in vda vdb vdc; do
  serial=$(busybox cat /sys/block/$drive/serial)
  busybox mkdir /$serial
  busybox mount -t \${serial#*-} -o ro /dev/$drive /$serial || echo "failed $serial"
done
echo BEGIN
for folder in job-erofs root-erofs root-ext4; do
  busybox find /$folder -type f -exec busybox sha256sum {} +
  busybox find /$folder -exec busybox stat -c 'stat %a %u %h %F %n' {} +
  busybox find /$folder -type l -exec busybox stat -c 'link %N' {} +
done
echo END
busybox poweroff -f
`

/** The lines between BEGIN and END. */
async function boot(
  kernel: string,
  modules: string | undefined,
  drives: Record<string, string>,
  dir: string,
) {
  const folder = (path: string): CpioEntry => ({ path, mode: 0o40755 })
  const file = (path: string, content: Buffer): CpioEntry => ({ path, mode: 0o100755, content })
  const names = modules === undefined ? [] : readdirSync(modules)
  const entries = [
    ...['bin', 'dev', 'modules', 'proc', 'sys'].map(folder),
    { path: 'dev/console', mode: 0o20600, device: { major: 5, minor: 1 } },
    file('bin/busybox', readFileSync(busybox!)),
    file('init', Buffer.from(script)),
    ...names.map((name) => file(`modules/${name}`, readFileSync(join(modules!, name)))),
    ...(names.length === 0 ? [file('modules/order', Buffer.alloc(0))] : []),
  ]
  const initramfs = join(dir, 'initramfs')
  writeFileSync(initramfs, writeCpio(entries))
  const args = [
    ...['-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot', '-m', '256', '-accel', 'tcg'],
    ...['-M', 'microvm,acpi=on', '-kernel', kernel, '-initrd', initramfs, '-serial', 'stdio'],
    ...['-append', `console=ttyS0 quiet panic=-1 no_timer_check ${clock}`],
    ...Object.entries(drives).flatMap(([serial, path]) => [
      ...['-drive', `id=${serial},file=${path},format=raw,if=none,read-only=on`],
      ...['-device', `virtio-blk-device,drive=${serial},serial=${serial}`],
    ]),
  ]
  for (let count = 1; ; count++)
    try {
      const { stdout } = await execute(qemu!, args, {
        timeout: bootMs,
        killSignal: 'SIGKILL',
        maxBuffer: 8 << 20,
      })
      const lines = stdout.split(/\r?\n/)
      assert.ok(lines.includes('BEGIN') && lines.includes('END'), stdout)
      return lines.slice(lines.indexOf('BEGIN') + 1, lines.indexOf('END'))
    } catch (error) {
      const { killed, stdout } = error as { killed?: boolean; stdout?: string }
      if (!killed || stdout?.includes('BEGIN') || count === boots) throw error
    }
}

function fill(root: string): void {
  mkdirSync(root)
  // mke2fs has it at the root in any case.
  mkdirSync(join(root, 'lost+found'), { mode: 0o700 })
  for (const size of [0, 1, 4032, 4033, 4096, 70_000, (2 << 20) + 1])
    writeFileSync(join(root, `file-${size}`), randomBytes(size))
  mkdirSync(join(root, 'many'))
  for (let index = 0; index < 400; index++)
    writeFileSync(join(root, 'many', `${'n'.repeat(index % 90)}${index}`), `content ${index}`)
  symlinkSync('many/0', join(root, 'short'))
  symlinkSync(`${'d/'.repeat(1_900)}x`, join(root, 'long'))
  chmodSync(join(root, 'file-1'), 0o4755)
  mkdirSync(join(root, ...Array.from({ length: 120 }, () => 'd')), { recursive: true })
}

/** As the machine says it. */
function expected(root: string, prefix: string): string[] {
  const lines: string[] = []
  const kinds = {
    file: 'regular file',
    empty: 'regular empty file',
    directory: 'directory',
    link: 'symbolic link',
  }
  const add = (path: string, name: string) => {
    const stat = lstatSync(path)
    const kind = stat.isDirectory()
      ? 'directory'
      : stat.isFile()
        ? stat.size > 0
          ? 'file'
          : 'empty'
        : 'link'
    lines.push(`stat ${(stat.mode & 0o7777).toString(8)} 0 ${stat.nlink} ${kinds[kind]} ${name}`)
    if (stat.isFile()) {
      const hash = createHash('sha256').update(readFileSync(path)).digest('hex')
      lines.push(`${hash}  ${name}`)
    }
    if (stat.isDirectory()) for (const entry of readdirSync(path)) add(join(path, entry), `${name}/${entry}`)
  }
  add(root, prefix)
  return lines
}

for (const kind of partsKinds) {
  const parts = await readParts(cacheDir, kind)
  const name = `${kind} kernel: a machine finds its drives and reads what was written`
  const lacks =
    (qemu === undefined && 'qemu-system-x86 is not installed') ||
    (busybox === undefined && 'busybox is not installed') ||
    (process.getuid?.() !== 0 && 'the owner of files is told apart as root only') ||
    (parts === undefined && 'this kernel was not made here')
  if (lacks || parts === undefined) {
    skip(test, name, lacks || '')
    continue
  }
  test(name, async () => {
    const dir = mkdtempSync(join(tmpdir(), 'vulcan-test-'))
    using _remove = { [Symbol.dispose]: () => rmSync(dir, { recursive: true }) }
    const root = join(dir, 'root')
    fill(root)
    const image = { digest: `sha256:${randomBytes(32).toString('hex')}`, root: async () => root }
    const job = join(dir, 'job')
    writeFileSync(job, '')
    truncateSync(job, 2 ** 31)
    await writeJobDrive(
      [
        { source: root, path: 'tree' },
        { source: join(root, 'file-70000'), path: 'one/file' },
      ],
      job,
    )
    const drives = {
      'root-erofs': await driveOf(image, 'erofs', dir),
      'root-ext4': await driveOf(image, 'ext4', dir),
      'job-erofs': job,
    }
    const said = await boot(parts.kernel.vmlinux, parts.kernel.modules, drives, dir)
    const has = new Set(said)
    const failed = said.filter((line) => line.startsWith('failed'))
    assert.equal(failed, [])
    for (const [place, from] of [
      ['/root-erofs', root],
      ['/root-ext4', root],
      ['/job-erofs/tree', root],
      ['/job-erofs/one/file', join(root, 'file-70000')],
    ] as const)
      assert.equal(
        expected(from, place)
          .filter((line) => !has.has(line))
          .slice(0, 5),
        [],
        place,
      )
    for (const place of ['root-erofs', 'root-ext4', 'job-erofs/tree']) {
      assert.ok(
        has.has(`link '/${place}/short' -> 'many/0'`),
        said.find((line) => line.includes('short')),
      )
      assert.ok(has.has(`link '/${place}/long' -> '${'d/'.repeat(1_900)}x'`))
    }
  })
}

test.run()
