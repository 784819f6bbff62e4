"""The operators of `attention`. Their options follow from the table of terms."""

import torch

from ..backends import cpu
from ..calls import current_backend
from ..masks import block_checks
from ..masks.block_mask import BlockMask
from ..masks.graphs import assembled
from ..masks.intervals import ALIGNMENTS, Window
from ..plans import Bound, find, recall
from ..scores import rotary
from ..terms import TERMS, Terms
from . import library

_POSITIONS = ("diagonal_lo", "diagonal_hi", "query_start", "dropout_start")
"""They follow from windows and lengths when the graph runs; the whole call is its own dropout_start."""
_SCHEMAS = {
    "block_mask": "Tensor[]? block_mask=None, SymInt[]? block_sizes=None",
    "seed": "Tensor? seed=None",
    "skip_negligible": "bool? skip_negligible=None",
    "rotary_interleaved": "bool rotary_interleaved=False",
}


def _schema_of(term) -> str:
    if term.shapes:
        return f"Tensor? {term.name}=None"
    return f"float {term.name}={term.neutral}" if isinstance(term.neutral, float) else _SCHEMAS[term.name]


_TERMS = [term for term in TERMS if term.name not in _POSITIONS]
_TENSORS = tuple(term.name for term in _TERMS if term.shapes)
_OPTIONS = [
    "bool causal=False", "float? scale=None", "SymInt[]? windows=None", "bool return_lse=False",
    *map(_schema_of, _TERMS), "str? backend=None", "Tensor? number=None",
]  # fmt: skip
"""scale is the softmax_scale that is a number, number the same in a graph that takes any; windows are three integers
each: left and right, -1 where open, and which of ALIGNMENTS."""


def _bind(q, k, v, options: dict, needs_grad: bool) -> Bound:
    """The call of `attention` that these options are."""
    get, tensors, windows = options.get, {}, ()
    scale = get("scale")
    for name, value in options.items():
        if value is None:
            pass
        elif name in _TENSORS:
            tensors[name] = value
        elif name == "block_mask":
            tensors["block_mask"] = _of_batch(_together(value, options["block_sizes"]), q.shape[0])
        elif name == "seed":
            tensors["seed"] = int(value)
        elif name == "number":
            scale = float(value)
        elif name == "windows":
            windows = windows_of(value)
    interleaved = get("rotary_interleaved", False)
    if "rotary_cos" in tensors:
        tensors |= rotary.tables((tensors["rotary_cos"], tensors["rotary_sin"]), q, k)
    settings = (
        get("causal", False), scale, get("softcap", 0.0), get("dropout_p", 0.0), get("skip_negligible"), interleaved,
        get("return_lse", False), get("backend") or current_backend(),
    )  # fmt: skip
    return find(q, k, v, windows, tensors, settings, needs_grad)


def _bind_short(q, k, v, causal: bool, scale: float | None) -> Bound:
    settings = causal, scale, 0.0, 0.0, None, False, False, current_backend()
    known = None if torch.is_grad_enabled() else recall(q, k, v, settings)
    return known or find(q, k, v, (), {}, settings, False)


def windows_of(flat) -> tuple[Window, ...]:
    windows = ()
    for i in range(0, len(flat or ()), 3):
        left, right = (None if side < 0 else side for side in flat[i : i + 2])
        windows += (Window(left, right, ALIGNMENTS[flat[i + 2]]),)
    return windows


def _together(lists, sizes) -> BlockMask:
    """The mask that `call` took apart; nothing is checked again. The same object where somebody still has it, so that
    its transpose is computed once."""
    mask = block_checks.made.get(lists[0].data_ptr())
    if mask is not None and all(map(_is_same_memory, mask.tensors().values(), lists)):
        return mask
    return assembled(lists, tuple(sizes[:2]), tuple(sizes[2:]))


def _of_batch(mask: BlockMask, batch: int) -> BlockMask:
    """A mask of so many batch entries, among which the samples of a vmap may be."""
    own = mask.shape[0]
    return mask if own in (1, batch) or batch % own else BlockMask.cat([mask] * (batch // own), dim=0)


def _is_same_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape


LAYOUT = library.Layout(
    names=("attention", "forward", "forward_train", "backward"),
    options=", ".join(_OPTIONS),
    tensors=(*_TENSORS, "seed", "number"),
    learned=tuple(term.name for term in TERMS if term.gradient),
    lists=("block_mask",),
    bind=_bind,
    terms=Terms,
    kind="dense",
    into=(cpu.decode, cpu.prefill, cpu.prefill_for_backward),
    short=_bind_short,
)
_operator = library.define(LAYOUT)


def call(q, k, v, windows: tuple[Window, ...], tensors: dict, seed: int | None, numbers: dict):
    """(out, lse) of the call in a graph.

    tensors   terms by name, a BlockMask among them; numbers: the options of the operator that are no tensors
    """
    options = {name: value for name, value in numbers.items() if value is not None}
    if options.get("dropout_p", 0.0) > 0.0:
        # A tensor: each run of the graph draws another one, and the backward pass gets the same.
        draw = torch.randint(2**63 - 1, (), device="cpu") if seed is None else torch.full((), seed, dtype=torch.int64)
        options["seed"] = draw
    for name, x in tensors.items():
        if isinstance(x, BlockMask):
            options[name] = list(x.tensors().values())
            options["block_sizes"] = [*x.BLOCK_SIZE, *x.seq_lengths]
        else:
            options[name] = x
    if windows:
        options["windows"] = [
            number
            for left, right, alignment in windows
            for number in (-1 if left is None else left, -1 if right is None else right, ALIGNMENTS.index(alignment))
        ]
    return _operator(q, k, v, **options)
