/**
 * What the engine really holds to, found by exceeding it: a box of our own writes more than it may, forks more than it
 * may, takes more memory and more time than it may.
 */
import { createHash } from 'node:crypto'
import { copyFile, mkdir, readFile, readlink, rm, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { text } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import { create } from 'tar'
import type { LimitReport } from '../../../shared/backends.ts'
import { BoxError, type BoxLimits, type Network } from '../engine.ts'
import { type Api, ApiError } from './api.ts'
import type { DockerBox } from './box.ts'
import type { Groups } from './cgroup.ts'
import { checkProgress } from './images.ts'

/** Of all that is tried; what was not found out by then is not enforced, ms. */
const probeMs = 10_000
/** For the kernel to hold back what takes more time than it may, ms. */
const throttleMs = 3_000
const repository = 'vulcan.local/probe'
/** Statically linked; Debian: busybox-static. */
const busyboxPaths = ['/bin/busybox', '/usr/bin/busybox']
const programs = ['sh', 'cat', 'dd', 'readlink', 'sleep', 'stat']

/** Small, so that exceeding them takes no time. */
const limits: BoxLimits = { memoryMb: 32, cpu: 0.5, pids: 12, diskMb: 8, fileBytes: 4 * 2 ** 20 }

/** Prints what came of each attempt; burns time from `burn` until it is given a line. What may end it comes last. */
const script = `
dd if=/dev/zero of=/tmp/a bs=1M count=6 2>/dev/null
echo file $(stat -c %s /tmp/a)
for f in b c d; do dd if=/dev/zero of=/tmp/$f bs=1M count=3 2>/dev/null; done
echo disk $(stat -c %s /tmp/a /tmp/b /tmp/c /tmp/d)
rm -f /tmp/*
echo root $(: 2>/dev/null > /written && echo writable)
echo mount $(cat /probe)
(i=0; while [ $i -lt 40 ]; do sleep 60 & i=$((i+1)); done; echo pids unlimited) 2>/dev/null
kill -9 -1 2>/dev/null
echo burn
while ! read -t 0 _; do :; done
echo memory
dd if=/dev/zero of=/dev/null bs=96M count=1 2>/dev/null && echo had it
`
/** Loads the probe image where it is not there yet. Undefined: there is no busybox to make it of. */
export async function ensureProbeImage(api: Api, directory: string): Promise<string | undefined> {
  let found: { path: string; tag: string } | undefined
  for (const path of busyboxPaths)
    try {
      const tag = createHash('sha256')
        .update(programs.join())
        .update(await readFile(path))
        .digest('hex')
        .slice(0, 32)
      found = { path, tag }
      break
    } catch {
      // Not there.
    }
  if (found === undefined) return undefined
  const { path, tag } = found
  const ref = `${repository}:${tag}`
  try {
    await api.call('look for an image', () => api.docker.getImage(ref).inspect())
    return ref
  } catch (error) {
    if (!(error instanceof ApiError) || error.status !== 404) throw error
  }
  const root = join(directory, 'probe')
  try {
    await mkdir(join(root, 'bin'), { recursive: true })
    await copyFile(path, join(root, 'bin', 'busybox'))
    for (const program of programs) await symlink('busybox', join(root, 'bin', program))
    const archive = join(directory, 'probe.tar')
    await create({ cwd: root, file: archive, portable: true }, ['bin'])
    const bytes = await readFile(archive)
    await rm(archive)
    await api.call('import an image', async () => {
      const answer = await api.docker.importImage(Readable.from([bytes]), { repo: repository, tag })
      await checkProgress(answer as Readable)
    })
  } finally {
    await rm(root, { recursive: true, force: true })
  }
  return ref
}

export interface Findings {
  limits: LimitReport
  rootWritable: boolean
  /** Its processes can be seen from here, and killed. */
  visible: boolean
  groups: Groups | undefined
}

export type MakeInNetwork = (
  argv: string[],
  limits: BoxLimits,
  network: Pick<Network, 'hosts' | 'nameservers' | 'join'>,
) => Promise<DockerBox>
export type MakeBox = (
  argv: string[],
  limits: BoxLimits,
  mounts: { source: string; target: string }[],
) => Promise<DockerBox>

/** Throws `BoxError` where a box cannot be had at all. */
export async function probeLimits(make: MakeBox, directory: string): Promise<Findings> {
  const file = join(directory, 'seen')
  await writeFile(file, 'seen', { mode: 0o644 })
  const box = await make(['/bin/sh', '-c', script], limits, [{ source: file, target: '/probe' }])
  const late = setTimeout(() => void box.kill(), probeMs)
  try {
    await box.start()
    void text(box.stderr)
    const said = new Map<string, string>()
    const lines = linesOf(box.stdout)
    await take(lines, said, 'burn')
    if (said.has('mount') && said.get('mount') !== 'seen')
      throw new BoxError('engine', 'the Docker Engine does not see the files of this host: it must run on it')
    const visible = box.pid !== undefined && mayKill(box.pid)
    const cpu = said.has('burn') && (await isThrottled(box))
    await box.update(limits).catch(() => {})
    box.stdin.end('\n')
    await take(lines, said, 'had')
    const disk = sum(said.get('disk'))
    const report: LimitReport = {
      file_size: enforced(Number(said.get('file')) <= limits.fileBytes),
      disk: enforced(disk > 0 && disk <= limits.diskMb * 2 ** 20),
      memory: enforced(said.has('memory') && !said.has('had')),
      pids: enforced(said.has('burn') && !said.has('pids')),
      cpu: enforced(cpu),
    }
    return { limits: report, rootWritable: said.get('root') === 'writable', visible, groups: box.groups }
  } finally {
    clearTimeout(late)
    await box.remove()
    await rm(file, { force: true })
  }
}

function mayKill(pid: number): boolean {
  try {
    return process.kill(pid, 0)
  } catch {
    return false
  }
}

const enforced = (holds: boolean) => (holds ? 'enforced' : 'not enforced')
const sum = (numbers = '') => numbers.split(' ').reduce((total, one) => total + Number(one), 0)

async function* linesOf(stream: Readable): AsyncGenerator<string> {
  let rest = ''
  for await (const chunk of stream) {
    const lines = (rest + chunk).split('\n')
    rest = lines.pop()!
    yield* lines
  }
}

/** Takes lines `<name> <rest>`, up to one of that name or the end. */
async function take(lines: AsyncGenerator<string>, said: Map<string, string>, last: string): Promise<void> {
  for (;;) {
    const { value, done } = await lines.next()
    if (done) return
    const [name = '', ...more] = value.split(' ')
    said.set(name, more.join(' '))
    if (name === last) return
  }
}

/** Whether the kernel holds it back; it burns all the time that it gets, which is little on a busy host. */
async function isThrottled(box: DockerBox): Promise<boolean> {
  // gVisor’s runtime cannot: then it must get as much as it may.
  await box.update({ ...limits, cpu: 0.05 }).catch(() => {})
  const before = await box.throttled()
  const until = performance.now() + throttleMs
  while (performance.now() < until) {
    if ((await box.throttled()) > before) return true
    await sleep(20)
  }
  return false
}

/** Whether a box can share the network of a container that holds one. */
export async function probeNetwork(make: MakeInNetwork): Promise<boolean> {
  let joined = 0
  const network: Pick<Network, 'hosts' | 'nameservers' | 'join'> = {
    hosts: [{ address: '192.0.2.1', name: 'probe.invalid' }],
    nameservers: [],
    join: async (pid) => {
      joined = pid
    },
  }
  const box = await make(['/bin/sh', '-c', 'readlink /proc/self/ns/net; cat /etc/hosts'], limits, network)
  try {
    const namespace = await readlink(`/proc/${joined}/ns/net`)
    await box.start()
    box.stdin.end()
    void text(box.stderr)
    const said = await text(box.stdout)
    return said.startsWith(`${namespace}\n`) && said.includes('192.0.2.1\tprobe.invalid')
  } finally {
    await box.remove()
  }
}
