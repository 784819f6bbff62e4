"""From a call to a compiled kernel, with as little Python as possible: compiled once per signature, launched directly.

The same for a GPU, for Triton's interpreter (CPU tensors, TRITON_INTERPRET=1) and for compiling alone (meta tensors).
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from . import config, tuning
from .config import SMEM, Device

SIZES = ["seed", "threshold", "diagonal_lo", "diagonal_hi", "num_heads", "group_size", "seqlen_q", "seqlen_k"]
"""Arguments whose values never decide about the machine code."""

DIAGONAL_LIMIT = 1 << 30  # of diagonal offsets and of sequence lengths: positions are 32-bit


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return not isinstance(_probe, JITFunction)


@triton.jit
def _probe():
    pass


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
_MAX_LAUNCHES = 4096


class Plan(NamedTuple):
    """How to launch a kernel: on `programs` programs, with `arguments` behind the tensors, constexprs by name, options
    of the compiler. describe(second tensor, third tensor): arguments between the tensors and `arguments`."""

    kernel: Callable
    programs: int
    arguments: tuple
    constexprs: dict
    options: dict
    describe: Callable | None = None


def of(key: tuple) -> dict:
    """The kernels of a call by name, for `run`, and what else it remembers.

    `key` has to determine their plans, and dtypes, strides and alignment of the tensors that they get.
    """
    launches = _launches.get(key)
    if launches is None:
        if len(_launches) >= _MAX_LAUNCHES:
            _launches.clear()
        launches = _launches[key] = {}
    return launches


def run(launches: dict, name: str, tensors: tuple, make_plan: Callable[[], Plan]) -> None:
    """Launch a kernel as make_plan() says."""
    launch = launches.get(name)
    if launch is None:
        launch = launches[name] = _prepare(tensors, make_plan())
    launch(tensors)


def choose(
    kernel: str, problem, device: Device, tensors: tuple, plan_with: Callable[[config.Config], Plan], block_size=None
) -> Plan:
    """plan_with(tiles) for the tiles of the table, or measured ones, or ones that are measured now.

    block_size: of a block mask, which the tiles have to divide; nothing is measured then.
    """
    tiles = tuning.tiles(kernel, problem, device)
    if block_size:
        return plan_with(config.within(tiles, block_size))
    if tuning.is_wanted(kernel, problem, device) and not interpreted():

        def launch_with(candidate):
            launch = _prepare(tensors, plan_with(candidate))
            return lambda: launch(tensors)

        tiles = tuning.tune(kernel, problem, device, launch_with)
    return plan_with(tiles)


def _prepare(tensors, plan: Plan) -> Callable:
    kernel, programs, arguments, constexprs, options, describe = plan
    described = describe(*tensors[1:3]) if describe else ()
    device = tensors[0].get_device()
    if interpreted():
        return lambda tensors: kernel[(programs,)](*tensors, *described, *arguments, **constexprs)
    compiled = kernel.warmup(*tensors, *described, *arguments, grid=(programs,), **constexprs, **options)
    start_with_hooks, start, hooks = compiled[programs, 1, 1], compiled.run, knobs.runtime  # loads it
    function, metadata, get_stream = compiled.function, compiled.packed_metadata, driver.active.get_current_stream
    tail = (*arguments, *[constexprs[name] for name in kernel.arg_names if name in constexprs])

    def launch(tensors):
        if current_device() != device:
            with torch.cuda.device(device):
                return launch(tensors)
        if describe is not None:
            tensors += describe(*tensors[1:3])
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # somebody profiles
            start_with_hooks(*tensors, *tail, stream=get_stream(device))
        else:
            start(programs, 1, 1, get_stream(device), function, metadata, None, None, None, *tensors, *tail)

    return launch


def descriptors(device: Device, k, v, rows: int, constexprs: dict) -> Callable:
    """A function from k and v to their tensor descriptors (TMA) of [1, 1, rows, width]; to None where the device has no
    such thing, a head is held in two tiles, or the memory of either tensor does not allow it."""
    has_tma = device.arch.startswith("sm_") and int(device.arch[3:]) >= 90
    if not has_tma or constexprs["D1"] or constexprs["E1"] or not all(map(_allows_descriptor, (k, v))):
        return lambda k, v: (None, None)
    kd, vd = vars(_descriptor(k, rows, constexprs["D0"])), vars(_descriptor(v, rows, constexprs["E0"]))
    new = object.__new__

    def describe(k, v):
        of_k, of_v = new(TensorDescriptor), new(TensorDescriptor)  # not by its class: checked once, by the first call
        of_k.__dict__, of_v.__dict__ = kd | {"base": k}, vd | {"base": v}
        return of_k, of_v

    return describe


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


def precision(problem) -> str:
    """input_precision of products of float32: IEEE unless torch's own products may use tf32."""
    exact = problem.dtype != "float32" or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def describe(*extras: torch.Tensor | None) -> tuple:
    """What a launch depends on of the optional tensors."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0) for x in extras])


def is_of_any_sign(softmax_scale: float | torch.Tensor) -> bool:
    """Whether the largest score may not be the one of the largest product, for all that is known before the launch."""
    return isinstance(softmax_scale, torch.Tensor) or softmax_scale <= 0.0


def call_key(problem, q, k, v, terms) -> tuple:
    """What decides about the launch of a forward kernel."""
    scale, softcap, lo, hi, k_start, k_end, mask, _, bias, alibi_slopes, sinks, dropout_p, *_ = terms
    extras = None
    if not (k_start is k_end is mask is bias is alibi_slopes is sinks is None):
        extras = describe(k_start, k_end, mask, bias, alibi_slopes, sinks)
    return (
        problem, q.get_device(), q.stride(), k.stride(), v.stride(), alignment(q, k, v), extras, softcap, lo, hi,
        dropout_p, describe(scale) if isinstance(scale, torch.Tensor) else scale <= 0.0, precision(problem),
    )  # fmt: skip


def empty_results(problem, q: torch.Tensor, for_backward: bool) -> tuple[torch.Tensor, ...]:
    """(out, lse, out_exact, lse_parts) to write to; None where not needed.

    for_backward: out_exact too, where out has 16 bits, because delta would be off by what rounding takes from out.
    """
    shape = (problem.batch, problem.num_heads, problem.seqlen_q)
    lse = q.new_empty(shape, dtype=torch.float32) if problem.lse else None
    if not for_backward:
        return empty_out(problem, q), lse, None, None
    rounds, lse_parts = problem.dtype != "float32", q.new_empty((*shape, 2), dtype=torch.float32)
    out_exact = q.new_empty((*shape, problem.head_dim_v), dtype=torch.float32) if rounds else None
    return empty_out(problem, q), lse, out_exact, lse_parts


def empty_out(problem, q: torch.Tensor) -> torch.Tensor:
    """[batch, num_heads, seqlen_q, head_dim_v] in q's memory order."""
    if problem.head_dim == problem.head_dim_v and q.is_contiguous():
        return torch.empty_like(q)
    b, h, s, d = problem.batch, problem.num_heads, problem.seqlen_q, problem.head_dim_v
    if q.stride(1) < q.stride(2) and s > 1:  # [batch, seqlen, num_heads, head_dim] memory
        return q.new_empty((b, s, h, d)).transpose(1, 2)
    return q.new_empty((b, h, s, d))


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
        "PRECISION": precision(problem), "WIDE": is_wide(*arguments[:8]), **diagonal_flags(lo, hi),
    }  # fmt: skip
    return arguments, constexprs
