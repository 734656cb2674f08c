// timeout: 900
/** What hostile code tries in a microVM: all that it tries in a container, and what only a kernel of its own offers. */
import * as assert from 'uvu/assert'
import { python, shell } from '../conformance/languages.ts'
import { type Attempt, attempts } from '../container/attempts.ts'

const limits = { timeout_s: 60, memory_mb: 96 }

/** Answers what of the machine was open to it. Opening is enough; nothing is written. */
const reachingIn = `import ctypes, glob, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def opened(path, flags=os.O_WRONLY):
    os.close(os.open(path, flags))
def called(number, *arguments):
    if libc.syscall(number, *arguments) != 0:
        raise OSError(ctypes.get_errno())
def vsock():
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as host:
        host.settimeout(2)
        host.connect((2, 1024))
attempts = {
    **{path: lambda path=path: opened(path, os.O_RDWR)
       for path in glob.glob('/dev/v*') + glob.glob('/dev/hwrng') + glob.glob('/dev/ttyS*')},
    'the agent’s memory': lambda: opened('/proc/1/mem', os.O_RDWR),
    'memory': lambda: opened('/dev/mem', os.O_RDONLY),
    'the kernel’s log': lambda: opened('/dev/kmsg'),
    'settings of the kernel': lambda: opened('/proc/sys/kernel/panic'),
    'settings of the network': lambda: opened('/proc/sys/net/ipv4/ip_local_port_range'),
    'the power switch': lambda: called(169, 0xfee1dead, 672274793, 0x4321fedc, None),
    'another kernel': lambda: called(246, 0, 0, None, 0),
    'a module': lambda: called(175, b'', 0, b''),
    'ports of the processor': lambda: called(172, 3),
    'the host by vsock': vsock,
}
def handler(input, ctx):
    done = []
    for name, attempt in attempts.items():
        try:
            attempt()
            done.append(name)
        except (OSError, ValueError):
            pass
    return done
`

const more: Attempt[] = [
  {
    name: 'reaching the machine beneath it as root',
    language: python,
    program: reachingIn,
    fields: { user: 'root', limits },
    ends: ['completed'],
    check: ({ output }) => assert.equal(output, []),
  },
  {
    name: 'a panic of its kernel, as root, which it lives through',
    language: shell,
    program: 'echo c > /proc/sysrq-trigger; sleep 1; exit 3\n',
    fields: { user: 'root', limits: { ...limits, timeout_s: 10 } },
    ends: ['exit_code'],
    check: ({ exit_code }) => assert.is(exit_code, 3),
  },
]

await attempts('microvm', more)
