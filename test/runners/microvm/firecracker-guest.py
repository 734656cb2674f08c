"""The other end of a tap, in place of a VMM: an interface eth0 in another network namespace.

Run as root in that namespace with `outer`, the path of the tap's namespace, the tap's name and the user who may open it.
Says `ready`, and carries frames until it is killed.
"""
import fcntl
import os
import select
import struct
import sys

DEVICE = "/dev/net/tun"
TUNSETIFF = 0x400454CA
IFF_TAP_NO_PI = 0x1002


def attach(tap, name):
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP_NO_PI))
    return tap


stage, *rest = sys.argv[1:]
if stage == "outer":
    netns, name, user = rest
    inside = attach(os.open(DEVICE, os.O_RDWR), "eth0")
    os.set_inheritable(inside, True)
    command = ["nsenter", f"--net={netns}", "--", sys.executable, __file__, "inner", str(inside), name, user]
    os.execvp("nsenter", command)
inside, name, user = int(rest[0]), rest[1], int(rest[2])
device = os.open(DEVICE, os.O_RDWR)
os.setgroups([])
os.setgid(user)
os.setuid(user)
outside = attach(device, name)
print("ready", flush=True)
while True:
    for readable in select.select([inside, outside], [], [])[0]:
        frame = os.read(readable, 70_000)
        try:
            os.write(outside if readable == inside else inside, frame)
        except OSError:
            pass  # One of both is down.
