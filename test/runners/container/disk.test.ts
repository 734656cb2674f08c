import { mkdtempSync, openSync, readdirSync, rmSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import * as assert from 'uvu/assert'
import {
  atLeast,
  DiskMeter,
  diskOfProcesses,
  readIoStat,
  readProcessIo,
  since,
} from '../../../runners/container/disk.ts'
import { KeptFiles } from '../../../runners/container/kept-files.ts'

test('the kernel’s counts are read: of a process, and of a group of version 2 over all its disks', () => {
  const io = 'rchar: 38835\nwchar: 9254\nread_bytes: 4096\nwrite_bytes: 36864\ncancelled_write_bytes: 4096\n'
  assert.equal(readProcessIo(io), { in: 4_096, out: 36_864 })
  const stat =
    '8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0\n8:0 rbytes=90430464 wbytes=299008000 rios=8950 wios=1252 dbytes=50331648 dios=3021\n254:0\n'
  assert.equal(readIoStat(stat), { in: 91_889_664, out: 613_781_504 })
  assert.equal(readIoStat(''), { in: 0, out: 0 })
})

test('what a run used is what came since, and never less than nothing', () => {
  assert.equal(since({ in: 5, out: 5 }, { in: 7, out: 4 }), { in: 2, out: 0 })
  assert.equal(since(undefined, { in: 7, out: 4 }), { in: 7, out: 4 })
  assert.is(since({ in: 5, out: 5 }, undefined), undefined)
  assert.equal(atLeast({ in: 5, out: 1 }, { in: 3, out: 2 }), { in: 5, out: 2 })
  assert.equal(atLeast(undefined, { in: 3, out: 2 }), { in: 3, out: 2 })
})

test('a meter sees what this process writes, counts what has ended with what it had, and leaves nothing open', () => {
  const dir = mkdtempSync(join(tmpdir(), 'vulcan-test-disk-'))
  const descriptors = () => readdirSync('/proc/self/fd').length
  try {
    const file = openSync(join(dir, 'x'), 'w')
    const before = descriptors()
    {
      using files = new KeptFiles()
      const meter = DiskMeter.ofProcesses(files, [process.pid, 2 ** 30])
      const first = meter.read()!
      writeSync(file, Buffer.alloc(1_048_576, 1))
      assert.ok(descriptors() > before)
      const written = meter.read()!.out - first.out
      // Where the directory is in memory nothing goes to a disk.
      assert.ok(written === 0 || written >= 1_048_576, `${written}`)
      assert.is(meter.read()!.out, diskOfProcesses([process.pid])!.out)
      assert.is(DiskMeter.ofProcesses(files, [2 ** 30]).read(), undefined)
      assert.is(DiskMeter.ofGroup(files, dir).read(), undefined)
    }
    assert.is(descriptors(), before)
  } finally {
    rmSync(dir, { recursive: true })
  }
})

test.run()
