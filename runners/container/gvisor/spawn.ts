/** The start of a launcher with the pipes of its box. */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, rmSync } from 'node:fs'
import type { Socket } from 'node:net'
import { program } from './launch.ts'
import { openPipe, type Pipe } from './pipes.ts'
import { programsEnv } from './programs.ts'

export type Ours = [stdin: Socket, stdout: Socket, stderr: Socket, status: Socket, gate: Socket]
/** Who reads from each. */
export const readers = ['them', 'us', 'us', 'us', 'them'] as const

/** Throws where there are no descriptors left. */
export function spawnWithPipes(paths: string[], args: string[]): { child: ChildProcess; ours: Ours } {
  const pipes: Pipe[] = []
  try {
    for (const [index, reader] of readers.entries()) pipes.push(openPipe(paths[index]!, reader))
    const child = spawn(program, args, {
      // Its own session: a terminal’s Ctrl-C is for the runner.
      detached: true,
      cwd: '/',
      env: programsEnv,
      stdio: pipes.map(({ theirs }) => theirs),
    })
    return { child, ours: pipes.map(({ ours }) => ours) as Ours }
  } catch (error) {
    for (const { ours } of pipes) ours.destroy()
    for (const path of paths) rmSync(path, { force: true })
    throw error
  } finally {
    for (const { theirs } of pipes) closeSync(theirs)
  }
}
