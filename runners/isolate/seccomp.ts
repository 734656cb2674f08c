/**
 * The system calls that a sandbox child may make, as a classic BPF program for `bwrap --seccomp`. It is a list of
 * what Node needs after it was started; everything else is answered with an error, as by a kernel that lacks it.
 */

/** Numbers of a call on x86_64 and aarch64 (Linux’s syscall tables); null where there is none. */
type Numbers = readonly [x64: number | null, arm64: number | null]

const allowed: Record<string, Numbers> = {
  // Bytes in and out of descriptors that are there already.
  read: [0, 63],
  write: [1, 64],
  readv: [19, 65],
  writev: [20, 66],
  pread64: [17, 67],
  lseek: [8, 62],
  close: [3, 57],
  dup: [32, 23],
  dup3: [292, 24],
  fcntl: [72, 25],
  pipe2: [293, 59],
  eventfd2: [290, 19],
  epoll_create1: [291, 20],
  epoll_ctl: [233, 21],
  epoll_wait: [232, null],
  epoll_pwait: [281, 22],
  poll: [7, null],
  ppoll: [271, 73],
  recvmsg: [47, 212],
  sendmsg: [46, 211],
  shutdown: [48, 210],
  getsockname: [51, 204],
  getsockopt: [55, 209],
  // Files, all of them on read-only mounts.
  open: [2, null],
  openat: [257, 56],
  stat: [4, null],
  lstat: [6, null],
  fstat: [5, 80],
  newfstatat: [262, 79],
  statx: [332, 291],
  statfs: [137, 43],
  access: [21, null],
  faccessat: [269, 48],
  readlink: [89, null],
  readlinkat: [267, 78],
  getcwd: [79, 17],
  getdents64: [217, 61],
  // Memory.
  mmap: [9, 222],
  mprotect: [10, 226],
  munmap: [11, 215],
  mremap: [25, 216],
  madvise: [28, 233],
  brk: [12, 214],
  membarrier: [324, 283],
  pkey_alloc: [330, 289],
  pkey_mprotect: [329, 288],
  pkey_free: [331, 290],
  // Threads and their signals; `clone` of threads is among `conditional`.
  futex: [202, 98],
  set_tid_address: [218, 96],
  set_robust_list: [273, 99],
  rseq: [334, 293],
  sched_yield: [24, 124],
  sched_getaffinity: [204, 123],
  gettid: [186, 178],
  tgkill: [234, 131],
  rt_sigaction: [13, 134],
  rt_sigprocmask: [14, 135],
  rt_sigreturn: [15, 139],
  sigaltstack: [131, 132],
  restart_syscall: [219, 128],
  arch_prctl: [158, null],
  prctl: [157, 167],
  exit: [60, 93],
  exit_group: [231, 94],
  // bubblewrap: starts the child, and waits for its end.
  execve: [59, 221],
  wait4: [61, 260],
  // Time, chance, and what the process is told of itself.
  clock_gettime: [228, 113],
  clock_getres: [229, 114],
  clock_nanosleep: [230, 115],
  nanosleep: [35, 101],
  gettimeofday: [96, 169],
  getrandom: [318, 278],
  getpid: [39, 172],
  getppid: [110, 173],
  getuid: [102, 174],
  geteuid: [107, 175],
  getgid: [104, 176],
  getegid: [108, 177],
  getrusage: [98, 165],
  getrlimit: [97, 163],
  capget: [125, 90],
  uname: [63, 160],
  sysinfo: [99, 179],
}

/** Allowed only where an argument (its low 32 bits) has all of the bits `has`, or is one of `is`. */
const conditional: Record<string, { numbers: Numbers; arg: number; has?: number; is?: number[] }> = {
  // CLONE_THREAD: no new process.
  clone: { numbers: [56, 220], arg: 0, has: 0x10000 },
  // FIONBIO, FIOCLEX, TCGETS, TIOCGWINSZ: how libuv looks at and sets up a descriptor.
  ioctl: { numbers: [16, 29], arg: 1, is: [0x5421, 0x5451, 0x5401, 0x5413] },
  // Reading one’s own limits: the new ones (third argument) are a null pointer.
  prlimit64: { numbers: [302, 261], arg: 2, is: [0] },
}

/** Answered as by an older kernel, for which libc and libuv have another way. */
const absent: Record<string, Numbers> = {
  clone3: [435, 435],
  io_uring_setup: [425, 425],
  faccessat2: [439, 439],
  epoll_pwait2: [441, 441],
  openat2: [437, 437],
  close_range: [436, 436],
  mseal: [462, 462],
}

/** linux/audit.h */
const auditArch = { x64: 0xc000003e, arm64: 0xc00000b7 }
/** Numbers from here on are of the x32 ABI: other ways to the same calls. */
const x32Bit = 0x40000000

/** linux/filter.h and linux/bpf_common.h */
const load = 0x20
const jumpEqual = 0x15
const jumpGreaterEqual = 0x35
const jumpSet = 0x45
const giveBack = 0x06
/** linux/seccomp.h: what a filter gives back, and where it finds what (struct seccomp_data). */
const verdicts = { kill: 0x80000000, allow: 0x7fff0000, errno: 0x00050000 }
const [EPERM, ENOSYS] = [1, 38]
const numberAt = 0
const archAt = 4
const argAt = (index: number) => 16 + 8 * index

type Verdict = 'allow' | 'eperm' | 'enosys' | 'kill'
const codes: Record<Verdict, number> = {
  allow: verdicts.allow,
  eperm: verdicts.errno | EPERM,
  enosys: verdicts.errno | ENOSYS,
  kill: verdicts.kill,
}

type Step = { code: number; value: number; yes?: number; no?: number }
const verdict = (what: Verdict): Step => ({ code: giveBack, value: codes[what] >>> 0 })

/** The program for this machine’s architecture; undefined where there is no table for it. */
export function seccompProgram(arch: string = process.arch): Buffer | undefined {
  if (arch !== 'x64' && arch !== 'arm64') return undefined
  const numberOf = (numbers: Numbers) => numbers[arch === 'x64' ? 0 : 1]
  const steps: Step[] = [
    { code: load, value: archAt },
    { code: jumpEqual, value: auditArch[arch], yes: 1, no: 0 },
    verdict('kill'),
    { code: load, value: numberAt },
  ]
  if (arch === 'x64') steps.push({ code: jumpGreaterEqual, value: x32Bit, yes: 0, no: 1 }, verdict('enosys'))
  const answer = (table: Record<string, Numbers>, what: Verdict) => {
    for (const numbers of Object.values(table)) {
      const number = numberOf(numbers)
      if (number !== null) steps.push({ code: jumpEqual, value: number, yes: 0, no: 1 }, verdict(what))
    }
  }
  answer(allowed, 'allow')
  for (const { numbers, arg, has, is = [] } of Object.values(conditional)) {
    const tests =
      has === undefined ? is.map((value) => ({ code: jumpEqual, value })) : [{ code: jumpSet, value: has }]
    const number = numberOf(numbers)
    if (number === null) continue
    // The load of the argument, the tests, and two verdicts.
    steps.push({ code: jumpEqual, value: number, yes: 0, no: tests.length + 3 })
    steps.push({ code: load, value: argAt(arg) })
    for (const [i, test] of tests.entries()) steps.push({ ...test, yes: tests.length - i, no: 0 })
    steps.push(verdict('eperm'), verdict('allow'))
  }
  answer(absent, 'enosys')
  steps.push(verdict('eperm'))
  const program = Buffer.alloc(steps.length * 8)
  steps.forEach(({ code, value, yes = 0, no = 0 }, i) => {
    // struct sock_filter, in the order of bytes of both architectures.
    program.writeUInt16LE(code, i * 8)
    program.writeUInt8(yes, i * 8 + 2)
    program.writeUInt8(no, i * 8 + 3)
    program.writeUInt32LE(value, i * 8 + 4)
  })
  return program
}
