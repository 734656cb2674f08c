/**
 * Where archives of strangers are taken apart: a process under bubblewrap that has no network, no environment, no
 * other processes, and sees nothing but its own code, the files it reads and the one directory it fills.
 */

import { fileURLToPath } from 'node:url'
import { sharedLibraries } from '../../../shared/shared-libraries.ts'
import { ImageError } from '../engine.ts'
import { findProgram, run } from './processes.ts'
import type { Answer, LayersJob, SplitJob } from './unpacker/protocol.ts'

export const noBubblewrap = 'install bubblewrap (Debian: apt-get install bubblewrap)'

const code = fileURLToPath(new URL('unpacker', import.meta.url))
/** Says that our files are ES modules. */
const packageFile = fileURLToPath(new URL('../../../package.json', import.meta.url))
/** Of the child’s own heap, MiB: names of a million entries fit. */
const heapMb = 1_024
/** What it needs as root to give files their owners and modes, and to fill directories of others. */
const capabilities = ['CAP_CHOWN', 'CAP_DAC_OVERRIDE', 'CAP_FOWNER', 'CAP_FSETID']

const inside = { layers: '/layers', target: '/target', code: '/unpacker', node: '/node' }

export interface JailOptions {
  /** Absolute; filled by the child. */
  target: string
  /** Absolute, each seen by the child as `/layers/<its place in the list>`. */
  files: string[]
  job:
    | (Omit<LayersJob, 'layers' | 'root' | 'owners'> & { diffIds: string[] })
    | Omit<SplitJob, 'archive' | 'into'>
  signal: AbortSignal
}

/** The mounts of a child, apart from what it is given. They do not change while this process lives. */
let ground: string[] | undefined

const isRoot = process.getuid?.() === 0

function prepare(): string[] {
  const bind = (from: string, to: string) => ['--ro-bind', from, to]
  return [
    ...['--unshare-ipc', '--unshare-pid', '--unshare-net', '--unshare-uts', '--unshare-cgroup-try'],
    ...['--die-with-parent', '--new-session', '--clearenv', '--cap-drop', 'ALL'],
    // Behind a user namespace there would be no owners to give. Without root there are none anyway.
    ...(isRoot ? capabilities.flatMap((name) => ['--cap-add', name]) : ['--unshare-user']),
    ...sharedLibraries().flatMap((path) => bind(path, path)),
    ...bind(process.execPath, inside.node),
    ...bind(code, inside.code),
    ...bind(packageFile, '/package.json'),
    ...['--dev', '/dev', '--proc', '/proc', '--chdir', '/'],
  ]
}

/**
 * Does one job in a jail of its own.
 *
 * @throws ImageError `disk_full`, or `backend_unavailable` where there is no jail to be had
 */
export async function inJail({ target, files, job, signal }: JailOptions): Promise<Answer> {
  const bwrap = findProgram('bwrap')
  if (bwrap === undefined)
    throw new ImageError(
      'backend_unavailable',
      `images are unpacked under bubblewrap, which is not here: ${noBubblewrap}`,
    )
  ground ??= prepare()
  const seen = files.map((file, index) => ({ file, at: `${inside.layers}/${index}` }))
  const given: LayersJob | SplitJob =
    job.kind === 'layers'
      ? {
          ...job,
          layers: seen.map(({ at }, index) => ({ file: at, diffId: job.diffIds[index]! })),
          root: inside.target,
          owners: isRoot,
        }
      : { ...job, archive: seen[0]!.at, into: inside.target }
  const args = [
    ...ground,
    ...seen.flatMap(({ file, at }) => ['--ro-bind', file, at]),
    ...['--bind', target, inside.target, '--remount-ro', '/'],
    ...['--', inside.node, '--disable-warning=ExperimentalWarning', `--max-old-space-size=${heapMb}`],
    `${inside.code}/child.ts`,
  ]
  const {
    code: exit,
    stdout,
    stderr,
  } = await run(bwrap, args, {
    signal,
    env: {},
    input: JSON.stringify(given),
    maxOutput: 64 * 1024 * 1024,
  })
  let answer: Answer
  try {
    answer = JSON.parse(stdout.toString())
  } catch {
    const why = stderr.trim().split('\n').at(-1)?.slice(0, 300) || 'no word'
    throw new ImageError(
      'backend_unavailable',
      `the process that unpacks images ended with ${exit ?? 'a signal'}: ${why}`,
    )
  }
  if (answer.kind === 'full') throw new ImageError('disk_full', 'the disk is full')
  if (answer.kind === 'failed')
    throw new ImageError('backend_unavailable', `unpacking has failed: ${answer.why}`)
  return answer
}
