/** A box with everything that was made for it, and is to go with it. */
import type { Digest } from '../../shared/workload.ts'
import type { Box, Bytes, Network } from './engine.ts'
import { Shim } from './handler.ts'

export interface SandboxParts {
  box: Box
  network: Network | undefined
  /** Of the image it runs on. */
  imageDigest: Digest
  /** The directory that it sees as its workspace, while nothing is in there. */
  workspace: string | undefined
  /** All but the box; let go when that is gone. */
  held: AsyncDisposableStack
  /** Nothing is left of it. `ms`: what that took. */
  onClosed(ms: number): void
}

export class Sandbox {
  readonly box: Box
  /** Of a handler, once it was attached. */
  shim: Shim | undefined
  readonly network: Network | undefined
  readonly imageDigest: Digest
  readonly workspace: string | undefined
  readonly madeAt = performance.now()
  /** What warm reuse goes by, once a job has run in it. */
  warmKey: string | undefined
  /** The program that was put into it. */
  programKey: string | undefined
  /** CPU time of it when the last run ended, in ms. */
  cpuMs = 0
  /** Bytes of its disks and its network when the last run ended. */
  disk: Bytes | undefined
  traffic: Bytes | undefined
  /** Since `performance.now()` it has had nothing to do. */
  idleSince = 0
  /** Memory it holds at most while it is idle, in MiB. */
  memoryMb = 0
  readonly #held: AsyncDisposableStack
  readonly #onClosed: (ms: number) => void
  #closing: Promise<void> | undefined
  /** What was asked of freezing and thawing, one after the other. */
  #sleep: Promise<void> = Promise.resolve()
  #asleep = false

  constructor({ box, network, imageDigest, workspace, held, onClosed }: SandboxParts) {
    this.box = box
    this.network = network
    this.imageDigest = imageDigest
    this.workspace = workspace
    this.#held = held
    this.#onClosed = onClosed
  }

  /** Talks to the shim that is its process, or will be. */
  attach(): Shim {
    this.shim = new Shim(this.box, () => void this.kill())
    return this.shim
  }

  get asleep(): boolean {
    return this.#asleep
  }

  get usable(): boolean {
    return this.#closing === undefined && this.shim?.dead === false
  }

  /** Gets no time from now on. Where it cannot be frozen it stays awake. */
  freeze(): void {
    this.#asleep = true
    this.#sleep = this.#sleep.then(() => (this.#asleep ? this.box.freeze().catch(() => {}) : undefined))
  }

  async thaw(): Promise<void> {
    if (!this.#asleep) return
    this.#asleep = false
    this.#sleep = this.#sleep.then(() => this.box.thaw())
    await this.#sleep
  }

  /** Every process of it is dead when this settles, as far as they can be killed. Never rejects. */
  async kill(): Promise<void> {
    await this.box.kill().catch(() => {})
  }

  /** Nothing of it is left when this settles. Never rejects; safe more than once. */
  close(): Promise<void> {
    this.#closing ??= (async () => {
      const began = performance.now()
      await this.box.remove()
      // What is left of it is found by the next start.
      await this.#held.disposeAsync().catch(() => {})
      this.#onClosed(performance.now() - began)
    })()
    return this.#closing
  }
}
