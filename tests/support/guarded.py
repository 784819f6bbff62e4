"""Memory between guard pages, what a process takes, and children that may die of it."""

import ctypes
import gc
import mmap
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = mmap.PAGESIZE


libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


UNTOUCHED = 0xA5


class Guarded:
    """A tensor between two pages that kill the process when touched: it ends at the one or starts at the other."""

    def __init__(self, x: torch.Tensor, side: str):
        x = x.contiguous()
        inner = max(-(-x.nbytes // PAGE), 1) * PAGE
        self.memory = mmap.mmap(-1, inner + 2 * PAGE)
        self.memory[PAGE : PAGE + inner] = bytes([UNTOUCHED]) * inner
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for guard in (address, address + PAGE + inner):
            assert libc.mprotect(guard, PAGE, mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0) == 0
        self.first = PAGE if side == "start" else PAGE + inner - x.nbytes
        self.last = self.first + x.nbytes
        self.end = PAGE + inner
        self.tensor = torch.frombuffer(self.memory, dtype=x.dtype, count=x.numel(), offset=self.first).view(x.shape)
        self.tensor.copy_(x)

    def assert_untouched_outside(self):
        outside = self.memory[PAGE : self.first] + self.memory[self.last : self.end]
        assert outside.count(UNTOUCHED) == len(outside)


def in_child(function, *arguments) -> None:
    """function(say, *arguments) in a forked child; if that dies, fails with what it said last."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=function, args=(sender.send, *arguments))
    child.start()
    sender.close()
    said = "nothing"
    try:
        while True:
            said = receiver.recv()
    except EOFError:
        child.join()
    assert child.exitcode == 0, f"exit code {child.exitcode} at {said}"


def status(field: str) -> int:
    """Bytes of a field of this process: VmRSS (now), VmHWM (its largest since the last reset)."""
    try:
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024
    except (OSError, AttributeError):
        pytest.skip("/proc does not tell how much memory a process has")


def resident() -> int:
    """Bytes that this process has now, without what malloc keeps to reuse."""
    gc.collect()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    return status("VmRSS")


def reset_peak() -> int:
    """Bytes that this process has now; VmHWM counts from here, and what is allocated next has no memory yet."""
    before = resident()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("/proc/self/clear_refs cannot reset VmHWM")
    return before


def printed_by_child(call: str) -> int:
    """The number that "module.function(...)" returns in a process of its own, whose heap is new."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = f"import {call.partition('.')[0]}; print({call})"
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return int(child.stdout)
