"""Every private part of Triton that fastattn uses: to launch a compiled kernel without Triton's own Python.

Checked with Triton 3.7.1, 3.8.0 and 3.9.0 (`make test-triton`, `make test-triton-versions`).
"""

from collections.abc import Callable
from typing import NamedTuple

import triton
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _probe():
    pass


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return not isinstance(_probe, JITFunction)


class Loaded(NamedTuple):
    """A compiled kernel on a device.

    start(programs, 1, 1, stream, function, metadata, None, None, None, *arguments, *constexprs)    launches it
    start_with_hooks(programs)(*arguments, *constexprs, stream=stream)    launches it if `is_profiled`
    """

    start: Callable
    function: object
    metadata: object
    get_stream: Callable
    start_with_hooks: Callable


def compile_and_load(kernel: JITFunction, arguments: tuple, constexprs: dict, options: dict) -> Loaded:
    compiled = kernel.warmup(*arguments, grid=(1,), **constexprs, **options)
    compiled[1, 1, 1]  # loads it
    return Loaded(
        compiled.run, compiled.function, compiled.packed_metadata, driver.active.get_current_stream,
        lambda programs: compiled[programs, 1, 1],
    )  # fmt: skip


def is_profiled(hooks=knobs.runtime) -> bool:
    """Whether somebody wants to be told of launches."""
    return hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls


def specialized(kernel: JITFunction) -> tuple[bool, ...]:
    """For each argument, whether Triton compiles anew for another kind of integer (`kind_of_integer`)."""
    return tuple(name not in kernel.do_not_specialize for name in kernel.arg_names)


class _Kinds(dict):
    def __missing__(self, x: int):
        if len(self) > 1 << 16:
            self.clear()
        kind = self[x] = "1" if x == 1 else (x % 16 == 0, -(2**31) <= x < 2**31)
        return kind


kind_of_integer = _Kinds().__getitem__
"""What Triton's code for an integer depends on: 1 is a constant; divisible by 16; 32 bits are enough."""


def same_descriptors(*first: TensorDescriptor) -> Callable:
    """A function from tensors to descriptors like these, of the same shapes and strides: checked once."""
    fields = [{name: value for name, value in vars(x).items() if name != "base"} for x in first]
    new = object.__new__

    def describe(*tensors):
        made = []
        for known, base in zip(fields, tensors):  # noqa: B905 (fast)
            x = new(TensorDescriptor)
            x.__dict__ = known | {"base": base}
            made.append(x)
        return made

    return describe
