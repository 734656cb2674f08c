/** Tries out a kernel before machines start with it: whether the agent comes up on it. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { cpus } from 'node:os'
import { encodeMachineFrame, MachineFrames, machineKinds } from '../shared/machine.ts'

/** A boot takes two or three. */
const bootSeconds = 30
const boots = 2
/** On a busy host a kernel may fail to calibrate its clock under emulation, and stops there; any frequency will do here. */
const clock = `tsc_early_khz=${(cpus()[0]?.speed || 2_000) * 1_000}`

export interface Trial {
  kernel: string
  initramfs: string
  /** Root drive, erofs. */
  root: string
}

/** Boots a machine under QEMU's emulation. False where no agent says that it is ready. */
export async function comesUp(trial: Trial): Promise<boolean> {
  for (let count = 0; count < boots; count++) if (await boot(trial)) return true
  return false
}

async function boot({ kernel, initramfs, root }: Trial): Promise<boolean> {
  const args = [
    ...['-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot', '-m', '256', '-accel', 'tcg'],
    ...['-sandbox', 'on', '-M', 'microvm,acpi=on', '-kernel', kernel, '-initrd', initramfs],
    ...['-append', `quiet panic=-1 no_timer_check ${clock}`],
    ...['-drive', `id=root,file=${root.replaceAll(',', ',,')},format=raw,if=none,read-only=on`],
    ...['-device', 'virtio-blk-device,drive=root,serial=root'],
    ...['-chardev', 'stdio,id=agent,signal=off', '-device', 'virtio-serial-device'],
    ...['-device', 'virtserialport,chardev=agent,name=vulcan', '-device', 'virtio-rng-device'],
  ]
  // Whatever becomes of this process, the machine ends in time.
  const limit = ['--foreground', '--signal=KILL', String(bootSeconds), 'qemu-system-x86_64']
  const machine = spawn('timeout', [...limit, ...args], { stdio: ['pipe', 'pipe', 'ignore'] })
  machine.stdin.on('error', () => {})
  let isReady = false
  const frames = new MachineFrames()
  machine.stdout.on('data', (bytes: Buffer) => {
    try {
      frames.push(bytes, (kind) => {
        if (kind !== machineKinds.ready) return
        isReady = true
        machine.stdin.write(encodeMachineFrame(machineKinds.off))
      })
    } catch {
      // Not our agent: nothing that it says will do.
    }
  })
  await once(machine, 'close')
  return isReady
}
