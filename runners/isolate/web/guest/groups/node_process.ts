/** node:process, as far as libraries ask for it. It says of no Node version, for those who then want its files. */
const queue = globalThis.queueMicrotask
const none = () => process
const process = {
  get env() {
    return host.env()
  },
  argv: [] as string[],
  browser: true,
  platform: 'linux',
  arch: 'x64',
  pid: 1,
  title: 'vulcan',
  version: '',
  versions: {},
  release: {},
  exitCode: undefined as number | undefined,
  cwd: () => '/',
  emitWarning: (warning: unknown) => host.warn(warning),
  hrtime: Object.assign(
    (since?: [number, number]) => {
      const ns = host.now() * 1e6
      const now: [number, number] = [Math.floor(ns / 1e9), Math.floor(ns % 1e9)]
      if (since === undefined) return now
      const [s, n] = [now[0] - since[0], now[1] - since[1]]
      return n < 0 ? [s - 1, n + 1e9] : [s, n]
    },
    { bigint: () => BigInt(Math.round(host.now() * 1e6)) },
  ),
  nextTick: (callback: (...args: unknown[]) => void, ...args: unknown[]) => queue(() => callback(...args)),
  uptime: () => (host.now() - host.timeOrigin) / 1000,
  addListener: none,
  emit: () => false,
  listenerCount: () => 0,
  listeners: () => [],
  off: none,
  on: none,
  once: none,
  removeListener: none,
}
export const exports = { ...process, default: process } as Record<string, unknown>
Object.defineProperty(exports, 'env', { get: () => host.env(), enumerable: true, configurable: true })

export { process }
