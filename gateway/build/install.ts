/**
 * Runs inside the sandbox: npm in a file system of limited size, then its modules to where they are wanted. Takes
 * JSON on standard input. Imports nothing of ours.
 */
import { spawnSync } from 'node:child_process'
import { cpSync, existsSync, readFileSync, writeFileSync } from 'node:fs'

const { cli, args, files } = JSON.parse(readFileSync(0, 'utf8')) as {
  cli: string
  args: string[]
  files: Record<string, string>
}
for (const [name, text] of Object.entries(files)) writeFileSync(`/install/${name}`, text)
const wall = ['--permission', '--allow-fs-read=*', '--allow-fs-write=/install', '--allow-fs-write=/tmp']
const { status } = spawnSync(
  process.execPath,
  [
    ...wall,
    '--allow-net',
    '--disable-warning=SecurityWarning',
    '--disable-warning=ExperimentalWarning',
    '--max-old-space-size=1024',
    cli,
    ...args,
  ],
  { cwd: '/install', stdio: ['ignore', 'ignore', 'inherit'] },
)
if (status === 0 && existsSync('/install/node_modules'))
  cpSync('/install/node_modules', '/out/node_modules', {
    recursive: true,
    filter: (path) => !path.endsWith('/.bin'),
  })
process.exitCode = status ?? 1
