/**
 * Runs inside the sandbox: pip in a file system of limited size, then its packages to where they are wanted. Takes
 * JSON on standard input. Imports nothing of ours.
 */
import { spawnSync } from 'node:child_process'
import { cpSync, existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs'

const { python, args, folder, files } = JSON.parse(readFileSync(0, 'utf8')) as {
  python: string
  args: string[]
  folder: string
  files: Record<string, string>
}
for (const [name, text] of Object.entries(files)) writeFileSync(`/install/${name}`, text)
const { status } = spawnSync(python, args, { cwd: '/install', stdio: ['ignore', 'ignore', 'inherit'] })
const installed = `/install/${folder}`
// Programs of packages name the Python of this host.
rmSync(`${installed}/bin`, { recursive: true, force: true })
if (status === 0 && existsSync(installed)) cpSync(installed, `/out/${folder}`, { recursive: true })
process.exitCode = status ?? 1
