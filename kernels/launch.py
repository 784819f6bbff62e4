"""From a call to a compiled kernel, with as little Python as possible.

What decides about machine code is compiled once (`_loaded`): kernel, dtypes, alignment, constexprs, kinds of strides,
and no length. Grid and arguments of the latest calls are remembered (`_launches`), and computed for any other.
The same for a GPU, for Triton's interpreter (CPU tensors, TRITON_INTERPRET=1) and for compiling alone (meta tensors).
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch import KernelError
from ..torch_internals import are_products_exact
from . import config, tuning
from .config import SMEM, Device
from .triton_internals import (
    Loaded,
    compile_and_load,
    interpreted,
    is_profiled,
    kind_of_integer,
    same_descriptors,
    specialized,
)

SIZES = ["seed", "threshold", "diagonal_lo", "diagonal_hi", "num_heads", "group_size", "seqlen_q", "seqlen_k"]
"""Arguments whose values never decide about the machine code."""

DIAGONAL_LIMIT = 1 << 30  # of diagonal offsets and of sequence lengths: positions are 32-bit


@cache
def device_facts(index: int) -> Device:
    """The only question that is ever asked of a device. Tests replace it to compile for others."""
    if interpreted():
        return Device("interpreter", 1 << 30, 8, "interpreter")
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    smem = getattr(properties, "shared_memory_per_block_optin", 0) or SMEM.get(arch, 48 * 1024)
    return Device(arch, smem, properties.multi_processor_count, properties.name)


current_device = torch.cuda.current_device
_launches: dict[tuple, dict] = {}
_MAX_LAUNCHES = 1024
_loaded: dict[tuple, Loaded] = {}
_history: list[tuple] = []  # keys of all code that was ever loaded, in order


class Plan(NamedTuple):
    """How to launch a kernel: on `programs` programs, with `arguments` behind the tensors, constexprs by name, options
    of the compiler. describe(second tensor, third tensor): arguments between the tensors and `arguments`."""

    kernel: Callable
    programs: int
    arguments: tuple
    constexprs: dict
    options: dict
    describe: Callable | None = None


def launches_of(key: tuple) -> dict:
    """The launches of a call by name, for `run`, and what else it remembers.

    `key` has to determine their plans, and dtypes, strides and alignment of the tensors that they get.
    """
    launches = _launches.get(key)
    if launches is None:
        if len(_launches) >= _MAX_LAUNCHES:
            _launches.clear()
        launches = _launches[key] = {}
    return launches


def forget() -> None:
    """For tests: as in a new process."""
    _launches.clear(), _loaded.clear(), _history.clear()


def loaded() -> int:
    """How many pieces of code have been loaded so far."""
    return len(_history)


def loaded_since(before: int) -> list[tuple]:
    """Keys of the code that has been loaded since `loaded()` was `before`, if it is still there."""
    return [key for key in _history[before:] if key in _loaded]


def drop(code: list[tuple]) -> None:
    """Forget loaded code, which the next launch of it loads anew."""
    for key in code:
        _loaded.pop(key, None)
    _launches.clear()


def run(launches: dict, name: str, tensors: tuple, make_plan: Callable[[], Plan]) -> None:
    """Launch a kernel as make_plan() says; KernelError if that cannot be prepared."""
    launch = launches.get(name)
    if launch is None:
        launch = launches[name] = _prepared(name, tensors, make_plan)
    launch(tensors)


def is_capturing() -> bool:
    """Whether the launches of this thread go into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _prepared(name: str, tensors: tuple, make_plan: Callable[[], Plan]) -> Callable:
    """A first launch of its kind, compiled for the device of the tensors and loaded there, whichever is current."""
    if interpreted():
        return _prepare(tensors, make_plan())
    device = tensors[0].get_device()
    if refusal := config.refusal(device_facts(device), triton.__version__):
        raise KernelError(refusal)
    with nullcontext() if current_device() == device else torch.cuda.device(device):
        try:
            return _prepare(tensors, make_plan())
        except Exception as error:  # of Triton's compiler, ptxas, a driver: of any type
            if is_capturing():
                raise
            raise KernelError(f"{name}: {type(error).__name__}: {error}".splitlines()[0]) from error


def plan_with_best_tiles(
    kernel: str, problem, device: Device, tensors: tuple, plan_with: Callable[[config.Config], Plan],
    results: tuple, block_size=None, make_ready: Callable[[config.Config], None] | None = None,
) -> Plan:  # fmt: skip
    """plan_with(tiles) for the tiles of the table, or measured ones, or ones that are measured now.

    results     the tensors that the kernel writes: where candidates have others than the table's tiles, they are wrong
    block_size  of a block mask, which the tiles have to divide; nothing is measured then
    make_ready  called with tiles before a launch with them is prepared, and last with those of the result: it brings
                what other kernels write into `tensors` for them

    RuntimeError where tiles would have to be measured in a capture.
    """
    make_ready = make_ready or (lambda tiles: None)
    tiles = tuning.tiles(kernel, problem, device)
    if block_size:
        return plan_with(config.within(tiles, block_size))
    if tuning.is_wanted(kernel, problem, device) and not interpreted():
        if is_capturing():
            raise RuntimeError(
                f"{kernel}: FASTATTN_AUTOTUNE=1 measures tiles in the first call of a kind, which no CUDA graph can "
                "capture; call it once before the capture, or unset FASTATTN_AUTOTUNE"
            )

        def launch_with(candidate):
            make_ready(candidate)
            launch = _prepare(tensors, plan_with(candidate))
            return lambda: launch(tensors)

        tiles = tuning.tune(kernel, problem, device, launch_with, [x for x in results if x is not None])
    make_ready(tiles)
    return plan_with(tiles)


def _prepare(tensors, plan: Plan) -> Callable:
    kernel, programs, arguments, constexprs, options, describe = plan
    device = tensors[0].get_device()
    if interpreted():
        described = describe(*tensors[1:3]) if describe else ()
        return lambda tensors: kernel[(programs,)](*tensors, *described, *arguments, **constexprs)
    loaded = _load(tensors, plan, device)
    start, function, metadata, get_stream, start_with_hooks = loaded
    tail = (*arguments, *[constexprs[name] for name in kernel.arg_names if name in constexprs])

    def launch(tensors):
        if current_device() != device:
            with torch.cuda.device(device):
                return launch(tensors)
        if describe is not None:
            tensors = (*tensors, *describe(*tensors[1:3]))
        if is_profiled():
            start_with_hooks(programs)(*tensors, *tail, stream=get_stream(device))
        else:
            start(programs, 1, 1, get_stream(device), function, metadata, None, None, None, *tensors, *tail)

    return launch


_are_specialized = cache(specialized)


def _load(tensors, plan: Plan, device: int) -> Loaded:
    """The kernel that was compiled for such a launch, compiled now if there is none; RuntimeError in a capture."""
    described = plan.describe(*tensors[1:3]) if plan.describe else ()
    arguments = (*tensors, *described, *plan.arguments)
    kinds = tuple(map(_kind_of, arguments, _are_specialized(plan.kernel)))
    key = (plan.kernel, device, kinds, tuple(plan.constexprs.items()), tuple(plan.options.items()))
    loaded = _loaded.get(key)
    if loaded is None:
        if is_capturing():
            raise RuntimeError(
                f"{plan.kernel.__name__}: the first call of its kind compiles and loads code, which no CUDA graph can "
                "capture; call it once before the capture, in each process (`python -m fastattn warmup` compiles ahead "
                "of time, and loads nothing)"
            )
        loaded = _loaded[key] = compile_and_load(plan.kernel, arguments, plan.constexprs, plan.options)
        _history.append(key)
    return loaded


def _kind_of(argument, is_specialized: bool):
    """What Triton's code depends on of an argument."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, tuple):
        try:
            return tuple(map(kind_of_integer, argument))
        except TypeError:  # tuples in it
            return tuple([_kind_of(x, is_specialized) for x in argument])
    if isinstance(argument, int):
        return kind_of_integer(argument) if is_specialized else int
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, tuple(argument.block_shape)
    return type(argument)


def has_descriptors(device: Device, k, v, constexprs: dict) -> bool:
    """Whether k and v have tensor descriptors (TMA): there is such a thing on the device, a head is held in one tile,
    and the memory of both tensors allows it."""
    has_tma = device.arch.startswith("sm_") and int(device.arch[3:]) >= 90
    return has_tma and not constexprs["D1"] and not constexprs["E1"] and all(map(_allows_descriptor, (k, v)))


def descriptors(device: Device, k, v, rows: int, constexprs: dict) -> Callable:
    """A function from k and v to their tensor descriptors of [1, 1, rows, width]; to None where there are none."""
    if not has_descriptors(device, k, v, constexprs):
        return lambda k, v: (None, None)
    return same_descriptors(_descriptor(k, rows, constexprs["D0"]), _descriptor(v, rows, constexprs["E0"]))


def _allows_descriptor(x: torch.Tensor) -> bool:
    size, outer = x.element_size(), x.stride()[:3]
    aligned = all(stride * size % 16 == 0 and stride > 0 for n, stride in zip(x.shape[:3], outer, strict=True) if n > 1)
    return aligned and x.stride(3) == 1 and x.numel() > 0 and x.data_ptr() % 16 == 0


def _descriptor(x: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    outer = [stride if n > 1 else x.shape[3] * 16 for n, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*outer, 1], [1, 1, rows, width])


def alignment(*tensors: torch.Tensor) -> int | tuple:
    """0 if all tensors start at a multiple of 16 bytes, else which do not."""
    bits = 0
    for x in tensors:
        bits |= x.data_ptr()
    return tuple(x.data_ptr() % 16 != 0 for x in tensors) if bits % 16 else 0


def strides(x: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides with leading dimensions and dimensions of size 1 broadcast."""
    if x is None:
        return (0,) * dims
    own = tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (0,) * (dims - x.dim()) + own


def is_wide(*strides: tuple[int, ...]) -> bool:
    """Whether an offset inside a tile (at most 256 rows or columns) may need more than 32 bits."""
    return max(abs(s) for each in strides for s in each[-2:]) >= 1 << 22


def precision(problem, device: int) -> str:
    """input_precision of products of float32: IEEE unless torch's own products may use tf32, and the device has it."""
    if problem.dtype != "float32" or are_products_exact():
        return "ieee"
    arch = device_facts(device).arch
    return "ieee" if arch.startswith("gfx") and arch != "gfx942" else "tf32"


def facts_of(*extras: torch.Tensor | None) -> tuple:
    """What a launch depends on of the optional tensors."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0) for x in extras])


def is_of_any_sign(softmax_scale: float | torch.Tensor) -> bool:
    """Whether the largest score may not be the one of the largest product, for all that is known before the launch."""
    return isinstance(softmax_scale, torch.Tensor) or softmax_scale <= 0.0


def call_key(problem, q, k, v, terms) -> tuple:
    """What decides about the launch of a forward kernel."""
    k_start, k_end, mask, bias = terms.k_start, terms.k_end, terms.mask, terms.bias
    alibi_slopes, sinks, scale, extras = terms.alibi_slopes, terms.sinks, terms.softmax_scale, None
    if not (k_start is k_end is mask is bias is alibi_slopes is sinks is None):
        extras = facts_of(k_start, k_end, mask, bias, alibi_slopes, sinks)
    return (
        problem, q.get_device(), q.stride(), k.stride(), v.stride(), alignment(q, k, v), extras, terms.softcap,
        terms.diagonal_lo, terms.diagonal_hi, terms.dropout_p,
        facts_of(scale) if isinstance(scale, torch.Tensor) else scale <= 0.0, precision(problem, q.get_device()),
    )  # fmt: skip


def clamp_diagonal(terms) -> tuple[int, int]:
    """diagonal_lo, diagonal_hi in 32 bits; +-DIAGONAL_LIMIT is no bound."""
    lo, hi = (max(-DIAGONAL_LIMIT, min(DIAGONAL_LIMIT, d)) for d in (terms.diagonal_lo, terms.diagonal_hi))
    return lo, hi


def diagonal_flags(lo: int, hi: int) -> dict[str, bool]:
    return {"HAS_LO": lo > -DIAGONAL_LIMIT, "HAS_HI": hi < DIAGONAL_LIMIT}


def score_arguments(problem, q, k, v, out, terms) -> tuple[tuple, dict]:
    """What all kernels that compute scores take: (arguments from q_strides to seqlen_k, constexprs but for the tiles).

    out: the tensor of out's shape that the kernel takes, out or dout.
    """
    tensors = (terms.k_start, terms.k_end, terms.mask, terms.bias, terms.alibi_slopes)
    extras = tuple(strides(x, dims) for x, dims in zip(tensors, (3, 3, 4, 4, 2), strict=True))
    learned = isinstance(terms.softmax_scale, torch.Tensor)
    (scale_stride,) = strides(terms.softmax_scale, 1) if learned else (0,)
    lo, hi = clamp_diagonal(terms)
    arguments = (
        q.stride(), k.stride(), v.stride(), out.stride(), *extras, scale_stride,
        float(terms.softcap), lo, hi, int(terms.dropout_p * 2**32), 1.0 / (1.0 - terms.dropout_p),
        problem.num_heads, problem.group_size, problem.seqlen_q, problem.seqlen_k,
    )  # fmt: skip
    (d0, d1), (e0, e1) = (config.split_head_dim(d, problem.dtype) for d in (problem.head_dim, problem.head_dim_v))
    constexprs = {
        "HEAD_DIM": problem.head_dim, "HEAD_DIM_V": problem.head_dim_v, "D0": d0, "D1": d1, "E0": e0, "E1": e1,
        "SOFTCAP": problem.softcap, "DROPOUT": problem.dropout, "LEARNED_SCALE": learned,
        "PRECISION": precision(problem, q.get_device()), "WIDE": is_wide(*arguments[:8]), **diagonal_flags(lo, hi),
    }  # fmt: skip
    return arguments, constexprs
