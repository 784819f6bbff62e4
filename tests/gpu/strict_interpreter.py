"""Triton's interpreter, made strict: what a GPU would do wrong without a word raises here.

`harden()`, in a process with TRITON_INTERPRET=1 and after `import triton`, changes the interpreter for good:

- Each tensor argument lives in an address range of its own, 2^44 bytes from the next, so that an access beyond it
  (or into a gap between its strides) is `OutOfBounds` wherever its neighbours lie and however the pointer was made.
- Programs run one after another, but each element remembers which program read and wrote it: two programs that a GPU
  would run in any order, one of them writing, are a `Race`.
- A masked lane that has no `other` is NaN, or the largest integer, where the interpreter would give 0.
- bfloat16 is real (ml_dtypes), not the bits as integers; float32 products round their factors to tf32 if asked to.
- tl.device_assert works, and an int32 that overflows is an error (unless written with sanitize_overflow=False).
- Atomics raise: their order, and with it the bits of a float sum, would change from run to run.

The launches are also counted: `launches[name]` says how often a kernel ran.
"""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

SPACE = 1 << 44  # bytes from one tensor's addresses to the next one's
NOBODY, SEVERAL = 0, -1  # in place of a program, which counts from 1 here: memory that nobody touched costs nothing

launches: Counter = Counter()


class Violation(AssertionError):
    """A kernel did what has no defined result on a GPU."""


class OutOfBounds(Violation):
    pass


class Race(Violation):
    pass


class _Storage:
    """Which program of this launch read and wrote each element of a torch storage."""

    def __init__(self, tensor: torch.Tensor):
        count = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.reader, self.writer = (np.zeros(count, np.int32) for _ in range(2))

    def load(self, elements: np.ndarray, program: int) -> None:
        writer = self.writer[elements]
        _raise_race((writer != NOBODY) & (writer != program), writer, program, "reads what", "writes")
        reader = self.reader[elements]
        self.reader[elements] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)

    def store(self, elements: np.ndarray, program: int) -> None:
        if len(np.unique(elements)) != elements.size:
            raise Race(f"two lanes of program {program - 1} store to one element")
        for accessor, verb in ((self.writer[elements], "writes"), (self.reader[elements], "reads")):
            _raise_race((accessor != NOBODY) & (accessor != program), accessor, program, "writes what", verb)
        self.writer[elements] = program


def _raise_race(conflicts: np.ndarray, others: np.ndarray, program: int, does: str, verb: str) -> None:
    if conflicts.any():
        other = int(others[conflicts][0])
        who = "more than one program" if other == SEVERAL else f"program {other - 1}"
        raise Race(f"program {program - 1} {does} {who} {verb}: {int(conflicts.sum())} elements")


class _Region:
    """The addresses of one tensor argument."""

    def __init__(self, tensor: torch.Tensor, base: int, storage: _Storage):
        self.itemsize, self.base, self.data_ptr = tensor.element_size(), base, tensor.data_ptr()
        self.shape, self.storage, self.first = tuple(tensor.shape), storage, tensor.storage_offset()
        strides = tensor.stride()
        extent = 1 + sum((n - 1) * step for n, step in zip(self.shape, strides, strict=True)) if tensor.numel() else 0
        self.valid = np.zeros(extent, bool)
        if extent:
            np.lib.stride_tricks.as_strided(self.valid, self.shape, strides)[...] = True

    def elements(self, addresses: np.ndarray, what: str) -> np.ndarray:
        """Offsets in elements, each of them inside."""
        offsets = addresses.astype(np.int64) - self.base
        elements = offsets // self.itemsize
        inside = (elements >= 0) & (elements < self.valid.size) & (offsets % self.itemsize == 0)
        inside[inside] = self.valid[elements[inside]]
        if not inside.all():
            raise OutOfBounds(
                f"{what}: {int((~inside).sum())} of {inside.size} lanes outside a tensor of shape {self.shape}, the "
                f"first {int(elements[~inside][0])} elements from its start (its last is at {self.valid.size - 1})"
            )
        return elements


class _Memory:
    """The tensors of the launch that is running."""

    def __init__(self):
        self.regions: list[_Region] = []
        self.storages: dict[tuple, _Storage] = {}

    def address(self, tensor: torch.Tensor) -> int:
        """A made-up address for `tensor`, as aligned as its own."""
        if tensor.device.type != "cpu":
            raise Violation(f"a kernel got a tensor on {tensor.device}")
        base = (len(self.regions) + 1) * SPACE + tensor.data_ptr() % 4096
        key = tensor.untyped_storage().data_ptr(), tensor.element_size()
        storage = self.storages.get(key) or self.storages.setdefault(key, _Storage(tensor))
        self.regions.append(_Region(tensor, base, storage))
        return base

    def access(self, addresses: np.ndarray, mask: np.ndarray, program: int, is_store: bool) -> np.ndarray:
        """The real addresses of the lanes in `mask` (0 elsewhere), checked and noted."""
        real = np.zeros(addresses.shape, np.uint64)
        indices = (addresses.astype(np.int64) + SPACE // 2) // SPACE - 1
        for index in np.unique(indices[mask]):
            if not 0 <= index < len(self.regions):
                raise OutOfBounds(f"an address that comes from no tensor, in program {program}")
            lanes, region = mask & (indices == index), self.regions[index]
            elements = region.elements(addresses[lanes], f"{'store' if is_store else 'load'} in program {program}")
            (region.storage.store if is_store else region.storage.load)(elements + region.first, program + 1)
            real[lanes] = region.data_ptr + elements * region.itemsize
        return real


_memory = _Memory()


def _program(builder: InterpreterBuilder) -> int:
    x, y, z = builder.grid_idx
    return x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z)


def _resolve(builder, pointers: TensorHandle, mask: TensorHandle, is_store: bool) -> tuple[TensorHandle, TensorHandle]:
    active = np.broadcast_to(mask.data, np.broadcast_shapes(mask.data.shape, pointers.data.shape))
    addresses = np.broadcast_to(pointers.data, active.shape)
    real = _memory.access(addresses, active, _program(builder), is_store)
    return TensorHandle(real, pointers.dtype), TensorHandle(np.ascontiguousarray(active), tl.int1)


def _bits(handle: TensorHandle) -> TensorHandle:
    """The interpreter's C++ moves integers of 16 bits, not bfloat16."""
    return TensorHandle(handle.data.view(np.uint16), tl.uint16) if handle.dtype.scalar == tl.bfloat16 else handle


def _poison(dtype: np.dtype):
    """What a masked lane reads if nobody says what."""
    if dtype.kind == "b":
        return True
    return np.iinfo(dtype).max if dtype.kind in "iu" else np.nan


def _masked_load(self, ptrs, mask, other, *policies):
    dtype = ptrs.get_element_ty()
    numpy_dtype = interpreter._get_np_dtype(dtype)
    ptrs, mask = _resolve(self, ptrs, mask, is_store=False)
    if other is None:
        other = TensorHandle(np.full(mask.data.shape, _poison(numpy_dtype), numpy_dtype), dtype)
    other = np.ascontiguousarray(np.broadcast_to(_bits(other).data, mask.data.shape))
    data = interpreter._interpreter.load(ptrs.data, mask.data, other, other.dtype)
    return TensorHandle(data.view(numpy_dtype), dtype)


def _masked_store(self, ptrs, value, mask, *policies):
    ptrs, mask = _resolve(self, ptrs, mask, is_store=True)
    return interpreter._interpreter.store(ptrs.data, _bits(value).data, mask.data)


def _atomic(self, *args, **kwargs):
    raise Violation("an atomic: its order, and the bits of a float sum, change from run to run")


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    if a.data.dtype == np.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
        a, b = (TensorHandle(_round_to_tf32(x.data), x.dtype) for x in (a, b))
    return TensorHandle(np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _round_to_tf32(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded.view(np.float32), x)


def _numpy_cast(original, is_bfloat16):
    """`original`, except that numpy and ml_dtypes round to and from bfloat16 (to nearest even)."""

    def cast(self, src, dst_type, *rest):
        if is_bfloat16(src.dtype) or is_bfloat16(dst_type):
            return TensorHandle(src.data.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)
        return original(self, src, dst_type, *rest)

    return cast


def _numpy_dtype(original):
    known = {}

    def numpy_dtype(dtype):
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = np.dtype(ml_dtypes.bfloat16) if scalar == tl.bfloat16 else original(scalar)
        return known[scalar.name]

    return numpy_dtype


def _convert_argument(original):
    def convert(arg):
        converted = original(arg)
        if hasattr(arg, "data_ptr"):
            converted.handle.data = np.array([_memory.address(interpreter._unwrap_tensor(arg))], np.uint64)
        return converted

    return convert


def _call(original):
    """A launch with a memory of its own. The language is patched once for it, and not at every device function."""
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    patch = interpreter._patch_lang

    def call(self, *args, **kwargs):
        global _memory
        _memory = _Memory()
        launches[self.fn.__name__] += 1
        scope = patch(everything)
        interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)
        try:
            with np.errstate(all="ignore"):  # a GPU does not warn of NaN
                return original(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            raise _cause(error) from None
        finally:
            interpreter._patch_lang = patch
            scope.restore()

    return call


def _cause(error: BaseException) -> BaseException:
    """What a kernel raised, out of the interpreter's wrappings."""
    while isinstance(error, interpreter.InterpreterError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def harden() -> None:
    """Make this process's interpreter strict (see the module's docstring). Idempotent."""
    if InterpreterBuilder.create_masked_load is _masked_load:
        return
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, debug=True)  # device_assert, overflow of int32
    cast, convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def is_bfloat16(dtype):
        return dtype.scalar == tl.bfloat16

    InterpreterBuilder.cast_impl = _numpy_cast(cast, is_bfloat16)
    InterpreterBuilder.create_fp_to_fp = _numpy_cast(convert, is_bfloat16)
    InterpreterBuilder.create_masked_load = _masked_load
    InterpreterBuilder.create_masked_store = _masked_store
    InterpreterBuilder.create_atomic_rmw = InterpreterBuilder.create_atomic_cas = _atomic
    InterpreterBuilder.create_dot = _dot
    interpreter._get_np_dtype = _numpy_dtype(interpreter._get_np_dtype)
    interpreter._implicit_cvt = _convert_argument(interpreter._implicit_cvt)
    GridExecutor.__call__ = _call(GridExecutor.__call__)
