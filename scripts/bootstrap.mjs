/**
 * Runs a script of this project on a machine that has nothing but Node 20 and npm:
 *
 *     node scripts/bootstrap.mjs [script.ts [arguments…]]
 *
 * Installs the locked dependencies where they are missing or out of date (one of them is Node 26 itself), then
 * runs the script under that Node with the same arguments, standard streams, signals and exit code. Without a
 * script it only installs. Built-in modules only, and nothing newer than Node 20 has.
 */
import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { readFileSync, readlinkSync, renameSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { constants } from 'node:os'
import { delimiter, dirname, join, sep } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const bin = join(root, 'node_modules', '.bin')
/** Holds the hash of the lock file that node_modules was installed from. Written last, so it proves a whole install. */
const stamp = join(root, 'node_modules', '.vulcan-installed')
/** A symbolic link whose target is the pid of the installing process: it appears together with its content. */
const lock = join(root, '.npm-ci.lock')
const lockWaitMs = 10 * 60_000

const say = (text) => process.stderr.write(`vulcan: ${text}\n`)

class BootstrapError extends Error {}

function read(path) {
  try {
    return readFileSync(path, 'utf8')
  } catch {
    return undefined
  }
}

function alive(pid) {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    return error.code === 'EPERM'
  }
}

const wanted = () =>
  createHash('sha256')
    .update(readFileSync(join(root, 'package-lock.json')))
    .digest('hex')
const installed = () => read(stamp) === wanted()

/** Runs a command to its end and forwards the signals that come meanwhile. Resolves with an exit code. */
function run(command, args, options) {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, options)
    const forward = (signal) => child.kill(signal)
    const signals = ['SIGINT', 'SIGTERM', 'SIGHUP']
    for (const signal of signals) process.on(signal, forward)
    child.once('error', reject)
    child.once('exit', (code, signal) => {
      for (const name of signals) process.off(name, forward)
      resolve(code ?? 128 + constants.signals[signal])
    })
  })
}

/** Waits for its turn: two installs at once would leave one tree broken. */
async function takeLock() {
  const deadline = Date.now() + lockWaitMs
  for (let told = false; ; ) {
    try {
      symlinkSync(String(process.pid), lock)
      return
    } catch (error) {
      if (error.code !== 'EEXIST') throw error
    }
    let holder
    try {
      holder = Number(readlinkSync(lock))
    } catch {
      continue
    }
    if (!alive(holder)) {
      discardLock(holder)
      continue
    }
    if (Date.now() > deadline) {
      throw new BootstrapError(
        `process ${holder} has been installing dependencies for too long. If it is not an npm of this project, remove ${lock} and try again.`,
      )
    }
    if (!told) say(`waiting for process ${holder}, which is installing dependencies`)
    told = true
    await sleep(200)
  }
}

/** Removes a dead process's lock, but not one that somebody took since it was read. */
function discardLock(holder) {
  const aside = `${lock}.${process.pid}`
  try {
    renameSync(lock, aside)
    const moved = Number(readlinkSync(aside))
    rmSync(aside)
    if (moved !== holder) symlinkSync(String(moved), lock)
  } catch {
    // Another process was faster: the next look shows what is there now.
  }
}

async function install() {
  await takeLock()
  try {
    if (installed()) return
    say('installing the locked dependencies (npm ci); this happens once per version of the lock file')
    const begun = Date.now()
    // npm deletes node_modules first: it must not itself run on the Node inside it.
    const path = (process.env.PATH ?? '').split(delimiter)
    const outside = path.filter((entry) => !entry.includes(`node_modules${sep}.bin`)).join(delimiter)
    const args = ['ci', '--no-audit', '--no-fund', '--loglevel=error']
    let code
    try {
      // npm's own output goes to stderr: stdout belongs to the script.
      code = await run('npm', args, {
        cwd: root,
        stdio: ['ignore', 2, 2],
        env: { ...process.env, PATH: outside },
      })
    } catch (error) {
      throw new BootstrapError(
        `npm could not be started (${error.message}). Install Node 20 or newer with npm.`,
      )
    }
    if (code > 128) process.exit(code)
    if (code !== 0) {
      throw new BootstrapError(
        `npm ci failed with exit code ${code}; its messages are above. It needs the npm registry (see \`npm config get registry\`) and package.json and package-lock.json as they are in the repository. Run \`npm ci\` by hand in ${root} to see more.`,
      )
    }
    writeFileSync(stamp, wanted())
    say(`dependencies installed in ${((Date.now() - begun) / 1000).toFixed(1)} s`)
  } finally {
    rmSync(lock, { force: true })
  }
}

try {
  if (!installed()) await install()
  const [script, ...args] = process.argv.slice(2)
  if (script) {
    // The bin folder on PATH: programs of our dependencies, and Node 26, for what the script starts in turn.
    const env = { ...process.env, PATH: `${bin}${delimiter}${process.env.PATH ?? ''}` }
    process.exitCode = await run(join(bin, 'node'), [script, ...args], { stdio: 'inherit', env })
  }
} catch (error) {
  say(error instanceof BootstrapError ? error.message : error.stack)
  process.exitCode = 1
}
