"""A network link between two namespaces of this machine, of any rate and delay: what tc's netem does where the kernel
has it, in user space.

Each namespace has a TUN device. `pass_on` reads the packets of both, and writes each to the other one when a link of
that rate and delay would have brought it there. Needs root, and Linux.
"""

import fcntl
import os
import select
import struct
import subprocess
import time
from collections import deque
from pathlib import Path

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_PACKET = 60000  # bytes: few packets, so that passing them on takes little time
_POLL = 0.02
_made: list[str] = []
_KEEP_WINDOW = "echo\t0>/proc/sys/net/ipv4/tcp_slow_start_after_idle"  # a transfer begins as fast as the one before


def name_of(end: int) -> str:
    """Of a namespace and of its device."""
    return f"fastattn{end}"


def address_of(end: int) -> str:
    return f"10.77.0.{end + 1}"


def make() -> list[int]:
    """Both namespaces with their devices; returns the files of these. OSError or CalledProcessError if it cannot."""
    files = []
    for end in range(2):
        name = name_of(end)
        files.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
        fcntl.ioctl(files[end], _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
        for command in (
            f"netns add {name}",
            f"link set {name} netns {name}",
            f"-n {name} addr add {address_of(end)}/24 dev {name}",
            f"-n {name} link set {name} mtu {_PACKET} up",
            f"-n {name} link set lo up",
            f"netns exec {name} sh -c {_KEEP_WINDOW}",
        ):
            subprocess.run(["ip", *command.split(" ")], check=True, capture_output=True, text=True)
            if command.startswith("netns add"):
                _made.append(name)
    return files


def remove() -> None:
    """What `make` has made of it."""
    while _made:
        subprocess.run(["ip", "netns", "del", _made.pop()], capture_output=True)


def set_link(settings: Path, rate: float, delay: float) -> None:
    """From now on so many bytes a second go each way, and arrive so many seconds later; inf: no limit."""
    settings.write_text(f"{rate} {delay}")
    time.sleep(3 * _POLL)


def pass_on(files: list[int], settings: Path) -> None:
    """Serve the link until the process is killed. settings: the file of `set_link`."""
    other = {files[0]: files[1], files[1]: files[0]}
    waiting, free, read = {file: deque() for file in files}, dict.fromkeys(files, 0.0), 0.0
    rate, delay = float("inf"), 0.0
    while True:
        if time.monotonic() - read > _POLL:
            rate, delay = map(float, settings.read_text().split() or (rate, delay))
            read = time.monotonic()
        due = min([queue[0][0] for queue in waiting.values() if queue], default=read + _POLL)
        ready, _, _ = select.select(files, [], [], min(max(due - time.monotonic(), 0.0), _POLL))
        for file in ready:
            packet, now = os.read(file, 1 << 16), time.monotonic()
            free[file] = max(now, free[file]) + len(packet) / rate
            waiting[other[file]].append((free[file] + delay, packet))
        for file, queue in waiting.items():
            while queue and queue[0][0] <= time.monotonic():
                os.write(file, queue.popleft()[1])
