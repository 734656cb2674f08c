/** What a VMM is asked so that it boots, restores or writes down a machine: decided here, sent elsewhere. */
import type { MachineShape } from '../driver.ts'
import { type RateLimiter, type Request, resources } from './api.ts'
import { jailed, snapshotDir } from './jailer.ts'

/** Bytes per second; undefined: no limit. */
export interface Rates {
  disk: number | undefined
  /** In each direction. */
  network: number | undefined
}

/** Any other than the host’s (0 to 2): each guest has a host of its own. */
const guestCid = 3
/** Locally administered. The same for all: each is alone on its tap. */
const guestMac = '06:00:c6:13:00:02'
const interfaceId = 'eth0'
/** As the agent looks for them: the guest reads them as the serials of its disks. */
const drives = { root: 'root', job: 'job' } as const

/**
 * A panic or a restart ends the VMM (`reboot=k`: by the keyboard controller, which Firecracker takes for its end).
 * There is no PCI bus. Nothing waits for more of what the console takes.
 */
const kernelArgs = 'console=ttyS0 reboot=k panic=-1 pci=off 8250.nr_uarts=1'

/** `tap`: the machine’s interface on the host; undefined where its shape has none. */
export function bootRequests(shape: MachineShape, tap: string | undefined, rates: Rates): Request[] {
  return [
    ...observed(),
    resources.machine({
      vcpu_count: shape.vcpus,
      mem_size_mib: shape.memoryMb,
      smt: false,
      track_dirty_pages: false,
    }),
    resources.bootSource({
      kernel_image_path: jailed.kernel,
      initrd_path: jailed.initramfs,
      boot_args: `${kernelArgs} quiet vulcan.channel=vsock`,
    }),
    drive(drives.root, jailed.root, undefined),
    drive(drives.job, jailed.job, rates.disk),
    ...(tap === undefined ? [] : [network(tap, rates.network)]),
    vsock(),
    resources.entropy(),
    resources.action('InstanceStart'),
  ]
}

/** The machine runs at once, unless something of it has to be set before that. */
export function restoreRequests(tap: string | undefined, rates: Rates): Request[] {
  const limited = rates.disk !== undefined
  return [
    ...observed(),
    resources.loadSnapshot({
      snapshot_path: jailed.state,
      mem_backend: { backend_type: 'File', backend_path: jailed.memory },
      resume_vm: !limited,
      ...(tap !== undefined && { network_overrides: [{ iface_id: interfaceId, host_dev_name: tap }] }),
    }),
    ...(limited
      ? [
          resources.limitDrive({ drive_id: drives.job, rate_limiter: bytesPerSecond(rates.disk!) }),
          resources.state('Resumed'),
        ]
      : []),
  ]
}

/** Of a kernel alone, that says who it is and finds nothing to go on with. */
export const trialRequests = (shape: MachineShape): Request[] => [
  ...observed(),
  resources.machine({ vcpu_count: shape.vcpus, mem_size_mib: shape.memoryMb }),
  resources.bootSource({ kernel_image_path: jailed.kernel, boot_args: kernelArgs }),
  vsock(),
  resources.action('InstanceStart'),
]

export const snapshotRequests = (): Request[] => [
  resources.state('Paused'),
  resources.createSnapshot({
    snapshot_type: 'Full',
    snapshot_path: `${snapshotDir}/state`,
    mem_file_path: `${snapshotDir}/memory`,
  }),
]

/** Neither is in a snapshot. Both go to pipes that hold 64 KiB. */
const observed = (): Request[] => [
  resources.logger({ log_path: jailed.log, level: 'Warning', show_level: true, show_log_origin: false }),
  resources.metrics({ metrics_path: jailed.metrics }),
]

const vsock = () => resources.vsock({ guest_cid: guestCid, uds_path: jailed.vsock })

const drive = (drive_id: string, path_on_host: string, rate: number | undefined) =>
  resources.drive({
    ...{ drive_id, path_on_host, is_root_device: false, is_read_only: true },
    ...(rate !== undefined && { rate_limiter: bytesPerSecond(rate) }),
  })

const network = (host_dev_name: string, rate: number | undefined) =>
  resources.network({
    ...{ iface_id: interfaceId, host_dev_name, guest_mac: guestMac },
    ...(rate !== undefined && {
      rx_rate_limiter: bytesPerSecond(rate),
      tx_rate_limiter: bytesPerSecond(rate),
    }),
  })

const bytesPerSecond = (bytes: number): RateLimiter => ({ bandwidth: { size: bytes, refill_time: 1_000 } })
