"""Launches of the fake driver, executed on CPU tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from triton.tools.tensor_descriptor import TensorDescriptor

from fake_device import Launch
from kernel_report import compiling_for

from . import programs
from .amd import programs as programs_of_amd


@contextmanager
def executing(arch: int | str, edit: Callable[[str, str], str] = lambda name, text: text) -> Iterator[list[Launch]]:
    """Inside, fastattn's Triton kernels take CPU tensors, compile for `arch` and are executed; yields the launches.

    edit(kernel's name, text) -> the text that is executed instead.
    """
    stage, executor = ("amdgcn", programs_of_amd) if isinstance(arch, str) else ("ptx", programs)

    def run(launch: Launch) -> None:
        metadata, text = launch.binary.metadata, edit(launch.binary.name, launch.binary.text(stage))
        # behind these come pointers to memory that our kernels do not ask for
        values = list(_flat(launch.args, launch.signature, iter(metadata.get("tensordesc_meta") or ())))
        executor.run(text, values, launch.grid, metadata["num_warps"], metadata["shared"])

    with compiling_for(arch, run) as launches:
        yield launches


def _flat(arguments, types, maps: Iterator[dict]):
    """The arguments that a compiled kernel takes: tuples as their parts, no constants, and of a tensor descriptor its
    map, shape and strides. maps: what Triton notes for each descriptor."""
    for argument, type in zip(arguments, types, strict=True):
        if isinstance(argument, TensorDescriptor):
            note = next(maps)
            yield programs.Map(argument.base, tuple(argument.strides), tuple(note["block_size"]), note["swizzle"])
            yield from (*argument.shape, *argument.strides)
        elif isinstance(type, tuple):
            yield from _flat(argument, type, maps)
        elif type != "constexpr":
            yield argument
