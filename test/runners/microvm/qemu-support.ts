/** Machines of QEMU with a guest of the tests’ own: a shell that is spoken to over the agent’s port. */
import { randomBytes } from 'node:crypto'
import { existsSync, readdirSync } from 'node:fs'
import { mkdir, mkdtemp, readFile, rm, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'uvu'
import { writeCpio } from '../../../rootfs/cpio.ts'
import { findMachineParts } from '../../../rootfs/index.ts'
import { findProgram } from '../../../runners/container/images/processes.ts'
import {
  type Driver,
  jobDriveBytes,
  type Machine,
  type MachineOptions,
  type MachineShape,
  type Template,
} from '../../../runners/microvm/driver.ts'
import { createQemu, type QemuOptions } from '../../../runners/microvm/qemu/index.ts'
import { cacheDirectory } from '../../../scripts/cache-directory.ts'
import { skip } from '../../harness.ts'

/** Where the tests’ control groups are: not where those of a running vulcan are. */
export const cgroupParent = '/vulcan-test'
export const isRoot = process.getuid?.() === 0
export const cacheDir = cacheDirectory(process.env)
const answerMs = 20_000

const programs = 'cat cut dd echo head ifconfig insmod ls mount nc poweroff seq sh sleep timeout tr true wc'

/** Says `ready`, then carries out a line after the other; the code of each stands in brackets behind its output. */
const init = `#!/bin/sh
export PATH=/bin
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
[ -f /modules/order ] && while read name; do insmod /modules/$name; done </modules/order
while [ -z "$port" ]; do
  for dir in /sys/class/virtio-ports/*; do
    [ "$(cat $dir/name)" = vulcan ] && port=/dev/\${dir##*/}
  done
done
exec 3<>$port 0<&3 1>&3
echo '[ready]'
while read -r line; do
  eval "$line" 2>&1
  echo "[$?]"
done
poweroff -f
`

export interface QemuHost extends AsyncDisposable {
  driver: Driver
  options: QemuOptions
  dir: string
  shape: MachineShape
  /** Of a machine that is up, made once for each shape. */
  template(shape: MachineShape): Promise<Template>
  /** A directory with a job drive for one machine. */
  place(more?: Partial<MachineOptions>): Promise<MachineOptions>
  boot(shape?: MachineShape): Promise<Guest>
  restore(template: Template, more?: Partial<MachineOptions>): Promise<Guest>
}

export const newOwner = () => `microvm-${randomBytes(8).toString('hex')}`

/** Why there can be no machine here. */
export async function noMachines(): Promise<string | undefined> {
  const missing = ['qemu-system-x86_64', 'busybox'].filter((name) => findProgram(name) === undefined)
  if (missing.length > 0) return `${missing.join(' and ')} not installed`
  const parts = await findMachineParts(cacheDir, { kernelFormat: 'either' })
  return parts === undefined ? 'no kernel was prepared: npm run setup -- microvm' : undefined
}

/** What a machine of the tests begins from, in `dir`. */
export async function makeShape(dir: string): Promise<MachineShape> {
  const parts = (await findMachineParts(cacheDir, { kernelFormat: 'either' }))!
  const initramfs = join(dir, 'initramfs')
  const root = join(dir, 'root')
  const over = writeCpio([
    { path: 'bin', mode: 0o40755 },
    { path: 'bin/busybox', mode: 0o100755, content: await readFile(findProgram('busybox')!) },
    ...programs
      .split(' ')
      .map((name) => ({ path: `bin/${name}`, mode: 0o120777, content: Buffer.from('busybox') })),
    { path: 'init', mode: 0o100755, content: Buffer.from(init) },
  ])
  // What comes later in such an archive replaces what came before: the agent.
  await writeFile(initramfs, Buffer.concat([await readFile(parts.initramfs), over]), { mode: 0o644 })
  await writeFile(root, Buffer.concat([Buffer.from('the root drive\n'), Buffer.alloc(8 * 2 ** 20)]))
  return { kernel: parts.kernel, initramfs, root, memoryMb: 192, vcpus: 1, network: false }
}

export async function startQemuHost(): Promise<QemuHost> {
  await using scope = new AsyncDisposableStack()
  const dir = await mkdtemp(join(tmpdir(), 'vulcan-test-qemu-'))
  scope.defer(() => rm(dir, { recursive: true, force: true }))
  const options = { owner: newOwner(), stateDir: join(dir, 'state'), cgroupParent }
  const driver = scope.use(await createQemu(options))
  const shape = await makeShape(dir)
  const templates = new Map<MachineShape, Promise<Template>>()
  let count = 0
  const place = async (more: Partial<MachineOptions> = {}): Promise<MachineOptions> => {
    const own = join(options.stateDir, options.owner, `place${++count}`)
    await mkdir(own, { mode: 0o700 })
    const jobDrive = join(own, 'job')
    await writeFile(jobDrive, '')
    await truncate(jobDrive, jobDriveBytes)
    return { dir: own, jobDrive, netns: undefined, ...more }
  }
  const boot = async (wanted = shape) => {
    // An emulated kernel may fail at its clock while the machine is busy, and hang: it is tried again.
    for (let tries = 1; ; tries++) {
      const guest = new Guest(await driver.boot(wanted, await place()))
      try {
        await guest.until('ready')
        return guest
      } catch (error) {
        await guest.machine.kill()
        if (tries === 3) throw new Error(`${(error as Error).message}: ${guest.machine.console()}`)
      }
    }
  }
  const make = async (wanted: MachineShape): Promise<Template> => {
    const guest = await boot(wanted)
    await guest.run('head -c 64 /dev/vda /dev/vdb >/dev/null; true')
    await guest.machine.pause()
    const kept = join(dir, `template${templates.size}`)
    await mkdir(kept)
    await guest.machine.snapshot(kept)
    return { shape: wanted, dir: kept }
  }
  const resources = scope.move()
  return {
    ...{ driver, options, dir, shape, place, boot },
    template(wanted) {
      let template = templates.get(wanted)
      if (template === undefined) {
        template = make(wanted)
        templates.set(wanted, template)
      }
      return template
    },
    restore: async (template, more) => new Guest(await driver.restore(template, await place(more))),
    [Symbol.asyncDispose]: () => resources.disposeAsync(),
  }
}

/** The shell in a machine. */
export class Guest implements AsyncDisposable {
  readonly machine: Machine
  #heard = ''
  #changed = Promise.withResolvers<void>()

  constructor(machine: Machine) {
    this.machine = machine
    const wake = () => {
      this.#changed.resolve()
      this.#changed = Promise.withResolvers<void>()
    }
    machine.channel.setEncoding('utf8')
    machine.channel.on('data', (piece: string) => {
      this.#heard += piece
      wake()
    })
    machine.channel.once('close', wake)
  }

  /** What it says up to `[word]`. */
  async until(word: string | RegExp): Promise<{ said: string; word: string }> {
    const pattern = new RegExp(`\\[(${typeof word === 'string' ? word : word.source})\\]\n`)
    const late = AbortSignal.timeout(answerMs)
    for (;;) {
      const found = pattern.exec(this.#heard)
      if (found !== null) {
        const said = this.#heard.slice(0, found.index)
        this.#heard = this.#heard.slice(found.index + found[0].length)
        return { said, word: found[1]! }
      }
      if (this.machine.channel.destroyed) throw new Error(`the machine has gone after ${this.#heard}`)
      const overdue = Promise.withResolvers<never>()
      const refuse = () => overdue.reject(new Error(`no [${word}] within ${answerMs} ms: ${this.#heard}`))
      late.addEventListener('abort', refuse)
      try {
        await Promise.race([this.#changed.promise, overdue.promise])
      } finally {
        late.removeEventListener('abort', refuse)
      }
    }
  }

  /** What a line of shell says, and its code. */
  async run(line: string): Promise<{ said: string; code: number }> {
    this.machine.channel.write(`${line}\n`)
    const { said, word } = await this.until(/\d+/)
    return { said, code: Number(word) }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.machine.kill()
  }
}

/** One driver for all tests of a file: they differ in their machines. */
export async function qemuTests() {
  const reason = await noMachines()
  const host = reason === undefined ? await startQemuHost() : undefined
  test.after(async () => {
    await host?.[Symbol.asyncDispose]()
  })
  return (name: string, run: (it: QemuHost) => Promise<void>, needs: { root?: boolean } = {}) => {
    if (host === undefined) skip(test, name, reason!)
    else if (needs.root && !isRoot) skip(test, name, 'needs root')
    else test(name, () => run(host))
  }
}

const cgroupRoots = () =>
  existsSync('/sys/fs/cgroup/cgroup.controllers')
    ? ['/sys/fs/cgroup']
    : readdirSync('/sys/fs/cgroup').map((name) => `/sys/fs/cgroup/${name}`)

/** Control groups of an owner’s machines. */
export const groupsOf = (owner: string): string[] =>
  cgroupRoots().flatMap((root) => {
    const dir = `${root}${cgroupParent}/${owner}`
    if (!existsSync(dir)) return []
    const inner = readdirSync(dir, { withFileTypes: true }).filter((entry) => entry.isDirectory())
    return [dir, ...inner.map(({ name }) => join(dir, name))]
  })
