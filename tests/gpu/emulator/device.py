"""Launches of the fake driver, executed on CPU tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fake_device import Launch
from kernel_report import compiling_for

from . import programs


@contextmanager
def executing(arch: int, edit: Callable[[str, str], str] = lambda name, text: text) -> Iterator[list[Launch]]:
    """Inside, fastattn's Triton kernels take CPU tensors, compile for `arch` and are executed; yields the launches.

    edit(kernel's name, text) -> the text that is executed instead.
    """

    def run(launch: Launch) -> None:
        metadata, text = launch.binary.metadata, edit(launch.binary.name, launch.binary.text("ptx"))
        # behind these come pointers to memory that our kernels do not ask for
        values = list(_flat(launch.args, launch.signature))
        programs.run(text, values, launch.grid, metadata["num_warps"], metadata["shared"])

    with compiling_for(arch, run) as launches:
        yield launches


def _flat(arguments, types):
    """The arguments that a compiled kernel takes: tuples as their parts, and no constants."""
    for argument, type in zip(arguments, types, strict=True):
        if isinstance(type, tuple):
            yield from _flat(argument, type)
        elif type != "constexpr":
            yield argument
