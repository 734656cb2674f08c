/** Types of what the groups get from `install.ts`. */
import type { Bridge, GuestServices } from '../bridge.ts'

export interface Host extends Omit<Bridge, 'load' | 'fetchOpen' | 'crypto'>, GuestServices {
  /** The original web globals, loaded at their first use; beyond the reach of the user’s code. */
  readonly web: typeof globalThis & Record<string, any>
  /** Like `instanceof`, for a global of `web`; false without loading where it is not loaded yet. */
  isA(name: string): (value: unknown) => boolean
  /** In place of FinalizationRegistry, which isolates do not have: registers nothing. */
  NoRegistry: new () => object
  /** When the APIs were installed, as `now` tells it. */
  readonly timeOrigin: number
  warn(message: unknown): void
  /** Starts an operation whose answers go to `receive`; gives the number of it. */
  crypto(receive: (...args: unknown[]) => void, request: string, buffers: ArrayBuffer[]): number
  fetchOpen(
    receive: (kind: string, ...args: unknown[]) => void,
    head: string,
    body: Uint8Array | undefined,
  ): number
  /** No more answers wanted. */
  forget(id: number): void
}

/** Gives the exports of a group, evaluated at its first use. */
export type Group = (name: string) => any
