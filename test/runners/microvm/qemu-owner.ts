/** A process that has machines: one runs, one is paused. Says their pids and waits to be killed. */
import { mkdir, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { jobDriveBytes } from '../../../runners/microvm/driver.ts'
import { createQemu } from '../../../runners/microvm/qemu/index.ts'

const { options, template } = JSON.parse(process.argv[2]!)
const driver = await createQemu(options)
const restore = async (name: string) => {
  const dir = join(options.stateDir, options.owner, name)
  const jobDrive = join(dir, 'job')
  await mkdir(dir)
  await writeFile(jobDrive, '')
  await truncate(jobDrive, jobDriveBytes)
  return await driver.restore(template, { dir, jobDrive, netns: undefined })
}
const [running, paused] = await Promise.all([restore('one'), restore('two')])
await paused.pause()
console.log(JSON.stringify([running.pid, paused.pid]))
setInterval(() => {}, 1_000)
