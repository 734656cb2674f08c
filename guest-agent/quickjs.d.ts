/**
 * What the agent uses of QuickJS’s modules, and linux.c’s own. Calls that can fail return a negative errno.
 */

declare module 'quickjs:os' {
  export function open(path: string, flags: number, mode?: number): number
  export function close(fd: number): number
  export function read(fd: number, buffer: ArrayBuffer, offset: number, length: number): number
  export function write(fd: number, buffer: ArrayBuffer, offset: number, length: number): number
  /** Milliseconds since the epoch. */
  export function utimes(path: string, accessed: number, modified: number): number
  export function mkdir(path: string, mode?: number): number
  export function remove(path: string): number
  export function symlink(target: string, path: string): number
  export function readdir(path: string): [names: string[], error: number]
  export function stat(
    path: string,
  ): [found: { mode: number; size: number; dev: number; ino: number } | null, error: number]
  export function lstat(path: string): [found: { mode: number } | null, error: number]
  export function kill(pid: number, signal: number): number
  /** Milliseconds of the monotonic clock. */
  export function now(): number
}

declare module 'vulcan:linux' {
  export function mount(
    source: string | null,
    target: string,
    type: string | null,
    flags: number,
    data: string | null,
  ): number
  export function mknod(path: string, mode: number, major: number, minor: number): number
  /** A descriptor; links and `..` in `path` lead nowhere but below `root`. */
  export function openIn(root: string, path: string, flags: number, mode?: number): number
  /** `buffer` holds `count` structures: a descriptor (int32), events (int16) and what came of them (int16). */
  export function poll(buffer: ArrayBuffer, count: number, timeoutMs: number): number
  /** The first bytes of a file, whatever was read of it before. */
  export function readFirst(fd: number, buffer: ArrayBuffer): number
  /** A descriptor that becomes readable when a child has ended. */
  export function childSignals(): number
  /** A child that has ended; its code as a shell has it. */
  export function reap(): [pid: number, code: number] | null
  /** Milliseconds since the epoch. */
  export function setTime(ms: number): number
  export function addEntropy(bytes: ArrayBuffer): number
  export function dropCache(device: string): number
  export function loadModule(path: string): number
  export function interfaceUp(
    name: string,
    address: string | null,
    netmask: string | null,
    gateway: string | null,
  ): number
  export function vsockListen(port: number): number
  export function vsockAccept(fd: number): number
  export function release(): string
  export function setHostname(name: string): number
  export function powerOff(): never
  export function utf8(text: string): ArrayBuffer
  export function text(buffer: ArrayBuffer, offset: number, length: number): string
  /** Starts a process; else a negative errno and the stage: 1 its surroundings, 2 its directory, 3 its command. */
  export function execute(plan: {
    argv: string[]
    /** `NAME=value` */
    env: string[]
    cwd: string
    root: string
    /** The directory of the control group that it is in. */
    cgroup: string
    uid: number
    gid: number
    groups: number[]
    fileBytes: number
    files: number
  }): [pid: number, stdin: number, stdout: number, stderr: number]
  export function errorText(errno: number): string
}
