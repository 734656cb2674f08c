/**
 * Whether limits hold on this host, found by exceeding each of them in a sandbox. A runsc that is not root, or a
 * kernel without a controller, takes limits and ignores them.
 */
import { copyFile, mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { LimitReport } from '../../../shared/backends.ts'
import type { BoxSpec, Image } from '../engine.ts'
import type { GvisorBox } from './box.ts'
import { mebibyte, ownFiles } from './config.ts'

export type Create = (spec: BoxSpec) => Promise<GvisorBox>
type Verdict = 'enforced' | 'not enforced'
const verdict = (holds: boolean): Verdict => (holds ? 'enforced' : 'not enforced')

/** A loop that is let run for so many ms at this share of a core. */
const loopMs = 600
const loopCpu = 0.2
const tried = { memoryMb: 8, pids: 16, diskMb: 4, fileBytes: mebibyte }
/** What a trial may take once it runs, ms. */
const trialMs = 8_000

/** Each part says what it got: one byte over the limit of a file, files of 1 MiB on a /tmp of 4, processes. */
const guestScript = `b=/bin/busybox
$b dd if=/dev/zero of=/tmp/file bs=65536 count=32 2>/dev/null
echo "file_size $($b stat -c %s /tmp/file)"
$b rm /tmp/file
n=0
while [ $n -lt 8 ] && $b dd if=/dev/zero of=/tmp/$n bs=65536 count=16 2>/dev/null; do n=$((n+1)); done
echo "disk $n"
$b rm /tmp/0
(n=0; while [ $n -lt 40 ]; do $b sleep 9 & n=$((n+1)); echo $n >/tmp/pids; done) 2>/dev/null
read -r n </tmp/pids
echo "pids $n"`

/** Makes a root with nothing but a static busybox in it. */
export async function trialImage(dir: string, busybox: string): Promise<Image> {
  await mkdir(join(dir, 'bin'), { recursive: true })
  await mkdir(join(dir, 'etc'))
  await copyFile(busybox, join(dir, 'bin/busybox'))
  await Promise.all(ownFiles.map((file) => writeFile(join(dir, file), '')))
  return {
    digest: 'sha256:',
    config: { entrypoint: [], cmd: [], env: {}, workingDir: '/', user: '' },
    layout: dir,
    root: async () => dir,
    [Symbol.dispose]: () => {},
  }
}

function trialSpec(image: Image, command: string[], cpu: number): BoxSpec {
  return {
    image,
    argv: ['/bin/busybox', ...command],
    env: {},
    cwd: '/',
    user: { uid: 0, gid: 0, groups: [] },
    mounts: [],
    limits: { ...tried, cpu },
    network: undefined,
  }
}

/** Throws `BoxError` where no box can be run at all. */
export async function probeLimits(create: Create, image: Image): Promise<LimitReport> {
  const [inGuest, memory, cpu] = await Promise.allSettled([
    guestLimits(create, image),
    memoryHolds(create, image),
    cpuHolds(create, image),
  ])
  if (inGuest.status === 'rejected') throw inGuest.reason
  const holds = (found: PromiseSettledResult<boolean>) => verdict(found.status === 'fulfilled' && found.value)
  return { memory: holds(memory), cpu: holds(cpu), ...inGuest.value }
}

async function run<T>(create: Create, spec: BoxSpec, follow: (box: GvisorBox) => Promise<T>): Promise<T> {
  const box = await create(spec)
  try {
    box.stdout.on('error', () => {})
    box.stderr.resume()
    await box.start()
    return await follow(box)
  } finally {
    await box.remove()
  }
}

/** What gVisor itself holds. */
function guestLimits(
  create: Create,
  image: Image,
): Promise<Pick<LimitReport, 'pids' | 'file_size' | 'disk'>> {
  return run(create, trialSpec(image, ['sh', '-c', guestScript], 4), async (box) => {
    let said = ''
    box.stdout.setEncoding('latin1').on('data', (piece: string) => {
      said = (said + piece).slice(-1_000)
    })
    await ended(box)
    const got = (name: string) => Number(new RegExp(`^${name} (\\d+)$`, 'm').exec(said)?.[1] ?? Number.NaN)
    return {
      pids: verdict(got('pids') < tried.pids),
      file_size: verdict(got('file_size') <= tried.fileBytes),
      disk: verdict(got('disk') <= tried.diskMb),
    }
  })
}

function memoryHolds(create: Create, image: Image): Promise<boolean> {
  const much = ['dd', 'if=/dev/zero', 'of=/dev/null', 'bs=160M', 'count=1']
  return run(create, trialSpec(image, much, 4), async (box) => {
    box.stdout.resume()
    return (await ended(box)).oom
  })
}

function cpuHolds(create: Create, image: Image): Promise<boolean> {
  return run(create, trialSpec(image, ['sh', '-c', 'while :; do :; done'], loopCpu), async (box) => {
    box.stdout.resume()
    const before = (await box.usage()).cpuMs ?? Number.NaN
    await sleep(loopMs)
    const used = ((await box.usage()).cpuMs ?? Number.NaN) - before
    // Held back by the kernel, and not only by others who wanted the cores.
    return box.throttled() > 0 && used < loopMs / 2
  })
}

async function ended(box: GvisorBox) {
  const timer = setTimeout(() => void box.kill(), trialMs)
  try {
    return await box.exited
  } finally {
    clearTimeout(timer)
  }
}
