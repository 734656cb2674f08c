/** A virtual machine by its driver alone, with no more around it than it needs to run a command: the floor of microVMs. */
import { randomBytes } from 'node:crypto'
import { mkdir, mkdtemp, rm, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { driveOf, findMachineParts } from '../rootfs/index.ts'
import { openImageStore } from '../runners/container/images/store.ts'
import { findRuntime, type RuntimeName } from '../runners/container/runtimes/index.ts'
import {
  type Driver,
  jobDriveBytes,
  type Machine,
  type MachineShape,
  type Template,
} from '../runners/microvm/driver.ts'
import {
  type Configure,
  encodeMachineFrame,
  MachineFrames,
  type MachineKind,
  machineKinds,
  machineStreams,
  type Start,
} from '../shared/machine.ts'

export interface BareMachines extends AsyncDisposable {
  /** The VMM, as the driver calls it. */
  name: string
  /** From its kernel to the end of `true`. */
  boot(): Promise<void>
  /** From a snapshot to the end of `true`. */
  restore(): Promise<void>
  /** Restored, with Node in it that has evaluated something. */
  ready(): Promise<ReadyMachine>
}

export interface ReadyMachine extends AsyncDisposable {
  /** Has Node evaluate an expression, and gives the JSON of it. */
  evaluate(expression: string): Promise<string>
}

/** Reads an expression a line, writes its value as a line of JSON. */
const evaluator = `require('node:readline').createInterface({ input: process.stdin })
  .on('line', (line) => console.log(JSON.stringify((0, eval)(line))))`
const rehearsals = 20

/** The driver is the caller’s, who disposes of it afterwards. */
export async function bareMachines(driver: Driver, cacheDir: string): Promise<BareMachines> {
  await using scope = new AsyncDisposableStack()
  const dir = await mkdtemp(join(tmpdir(), 'bench-vm-'))
  scope.defer(() => rm(dir, { recursive: true, force: true }))
  const parts = await findMachineParts(cacheDir, { kernelFormat: driver.kernelFormat })
  if (parts === undefined) throw new Error('no kernel was prepared: npm run setup -- microvm')
  const images = scope.use(
    await openImageStore({
      dir: join(cacheDir, 'images'),
      insecureRegistries: [],
      imageDirectories: [join(cacheDir, 'runtimes')],
      budgetMb: 20_480,
    }),
  )
  const shapeOf = async (name: RuntimeName): Promise<MachineShape> => {
    const found = await findRuntime(name, cacheDir)
    if (found === undefined) throw new Error(`the ${name} image was not built: npm run setup -- microvm`)
    const source = { kind: 'reference', reference: `oci:${found.layout}` } as const
    using image = await images.get(source, AbortSignal.timeout(60_000))
    const root = await driveOf(image, driver.rootFormat, cacheDir)
    const { kernel, initramfs } = parts
    return { kernel, initramfs, root, memoryMb: 256, vcpus: 1, network: false }
  }
  let n = 0
  const place = async () => {
    const own = join(dir, String(++n))
    await mkdir(own)
    const jobDrive = join(own, 'job')
    await writeFile(jobDrive, '')
    await truncate(jobDrive, jobDriveBytes)
    return { dir: own, jobDrive, netns: undefined }
  }
  const guests = new Set<Guest>()
  scope.defer(async () => {
    await Promise.all([...guests].map((guest) => guest.end()))
  })
  const guestOf = async (machine: Promise<Machine>) => {
    const guest = new Guest(await machine)
    guests.add(guest)
    void guest.machine.exited.then(() => guests.delete(guest))
    return guest
  }
  const written = async (
    shape: MachineShape,
    prepare: (guest: Guest) => Promise<void>,
  ): Promise<Template> => {
    const guest = await guestOf(driver.boot(shape, await place()))
    await guest.expect(machineKinds.ready)
    await prepare(guest)
    await guest.machine.pause()
    const into = join(dir, `template-${++n}`)
    await mkdir(into)
    await guest.machine.snapshot(into)
    await guest.end()
    return { shape, dir: into }
  }

  const base = await shapeOf('base')
  const plain = await written(base, (guest) => guest.configure())
  const evaluating = await written(await shapeOf('node'), async (guest) => {
    await guest.configure()
    await guest.start(['node', '-e', evaluator])
    for (let i = 0; i < rehearsals; i++) await guest.ask(`${i} * 2`)
  })
  const held = scope.move()
  const runTrue = async (guest: Guest) => {
    await guest.configure()
    await guest.start(['true'])
    await guest.expect(machineKinds.exited)
    await guest.end()
  }
  return {
    name: driver.version,
    async boot() {
      const guest = await guestOf(driver.boot(base, await place()))
      await guest.expect(machineKinds.ready)
      await runTrue(guest)
    },
    restore: async () => runTrue(await guestOf(driver.restore(plain, await place()))),
    async ready() {
      const guest = await guestOf(driver.restore(evaluating, await place()))
      await guest.configure()
      await guest.ask('1')
      return {
        evaluate: (expression) => guest.ask(expression),
        [Symbol.asyncDispose]: () => guest.end(),
      }
    },
    [Symbol.asyncDispose]: () => held.disposeAsync(),
  }
}

const startOf = (argv: string[]): Start => ({
  argv,
  env: { PATH: '/usr/local/bin:/usr/bin:/bin' },
  cwd: '/',
  user: { uid: 65_534, gid: 65_534, groups: [] },
  memory_mb: 128,
  pids: 64,
  file_bytes: 2 ** 24,
  result: null,
  result_bytes: 0,
})

/** The agent of a machine, asked one thing at a time. */
class Guest {
  readonly machine: Machine
  readonly #frames = new MachineFrames()
  /** What came and nobody has expected yet. */
  readonly #heard: { kind: number; payload: Buffer }[] = []
  #wake: () => void = () => {}
  #ended = false

  constructor(machine: Machine) {
    this.machine = machine
    machine.channel.on('data', (chunk: Buffer) =>
      this.#frames.push(chunk, (kind, stream, payload) => {
        const isNoise =
          kind === machineKinds.credit ||
          kind === machineKinds.end ||
          (kind === machineKinds.data && stream !== machineStreams.stdout)
        if (!isNoise) this.#heard.push({ kind, payload: Buffer.from(payload) })
        this.#wake()
      }),
    )
    machine.channel.on('error', () => {})
    void machine.exited.then(() => {
      this.#ended = true
      this.#wake()
    })
  }

  #send(kind: MachineKind, payload: unknown, stream = 0): void {
    const bytes = payload instanceof Uint8Array ? payload : Buffer.from(JSON.stringify(payload))
    this.machine.channel.write(encodeMachineFrame(kind, bytes, stream))
  }

  /** The next frame of this kind. Throws where the agent says that something failed, or the machine ends. */
  async expect(kind: MachineKind): Promise<Buffer> {
    for (;;) {
      const at = this.#heard.findIndex((frame) => frame.kind === kind || frame.kind === machineKinds.failed)
      const [found] = at < 0 ? [] : this.#heard.splice(at, 1)
      if (found?.kind === kind) return found.payload
      if (found !== undefined) throw new Error(`the agent failed: ${found.payload}`)
      if (this.#ended) throw new Error(`the machine ended: ${this.machine.console()}`)
      await new Promise<void>((resolve) => {
        this.#wake = resolve
      })
    }
  }

  async configure(): Promise<void> {
    const configuration: Configure = {
      time_ms: Date.now(),
      entropy: randomBytes(64).toString('hex'),
      network: null,
      mounts: [],
      disk_mb: 64,
    }
    this.#send(machineKinds.configure, configuration)
    await this.expect(machineKinds.configured)
  }

  async start(argv: string[]): Promise<void> {
    this.#send(machineKinds.start, startOf(argv))
    await this.expect(machineKinds.started)
  }

  /** A line to the process, and the next piece of what it says. */
  async ask(line: string): Promise<string> {
    this.#send(machineKinds.data, Buffer.from(`${line}\n`), machineStreams.stdin)
    const answer = await this.expect(machineKinds.data)
    this.#send(machineKinds.credit, Buffer.from(String(answer.length)), machineStreams.stdout)
    return answer.toString().trim()
  }

  async end(): Promise<void> {
    await this.machine.kill()
  }
}
