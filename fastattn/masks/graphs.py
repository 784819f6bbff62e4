"""Block masks in graphs of torch.compile and torch.export: whatever makes one is an operator there.

    fastattn::block_mask(function, arguments, tensors, sizes) -> the six tensors of a BlockMask

    function   one of those that `in_graphs` has wrapped, by name
    arguments  the structure of its arguments, as text, in which integers and tensors are places
    tensors    all tensors of the arguments, those of masks among them; sizes: all integers, in order

How long lists are depends on values: a graph learns it when it runs.
"""

import ast
import functools
import inspect
import math
from collections.abc import Callable

import torch
from torch.compiler import is_dynamo_compiling

from ..checks import one_line
from ..torch_internals import new_dynamic_size, num_dispatch_modes
from .block_checks import check_block_size
from .block_mask import BlockMask
from .intervals import Mask, Window

_LIBRARY = torch.library.Library("fastattn", "FRAGMENT")
_functions: dict[str, Callable] = {}


def is_in_graph() -> bool:
    """Whether operators alone are seen: while Dynamo traces, and under modes as those of make_fx and torch.export."""
    return is_dynamo_compiling() or num_dispatch_modes() > 0


def in_graphs(sizes: Callable) -> Callable:
    """Decorates a function that returns a BlockMask, so that graphs hold it as an operator.

    sizes  (arguments by name) -> ((seqlen_q, seqlen_k), block_size)
    """

    def decorate(function):
        known_as = function.__qualname__
        _functions[known_as] = function
        parameters = inspect.signature(function).parameters
        names = tuple(parameters)
        defaults = {key: x.default for key, x in parameters.items() if x.default is not x.empty}

        @functools.wraps(function)
        def build(*args, **kwargs):
            if not is_in_graph():
                return function(*args, **kwargs)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            return _traced(known_as, given, *sizes({**defaults, **given}))

        return build

    return decorate


def of_lengths(given: dict) -> tuple:
    """Sizes of functions that take seqlen_q and perhaps seqlen_k, or seqlen."""
    seqlen_q = given["seqlen_q"] if "seqlen_q" in given else given["seqlen"]
    seqlen_k = given.get("seqlen_k")
    return (seqlen_q, seqlen_q if seqlen_k is None else seqlen_k), given["block_size"]


def of_documents(given: dict) -> tuple:
    """Sizes of `patterns.documents`."""
    ids_q, ids_k = given["ids_q"], given["ids_k"]
    return (ids_q.shape[1], (ids_q if ids_k is None else ids_k).shape[1]), given["block_size"]


def of_axes(given: dict) -> tuple:
    """Sizes of `patterns.neighborhood`."""
    seqlen = math.prod(given["shape"]) + given["num_prefix_tokens"]
    return (seqlen, seqlen), given["block_size"]


def assembled(lists, block_size: tuple[int, int], seq_lengths: tuple[int, int]) -> BlockMask:
    """The mask of six tensors that are known to fit."""
    mask = object.__new__(BlockMask)
    for key, value in zip(_FIELDS, [*lists, block_size, seq_lengths, {}], strict=True):
        object.__setattr__(mask, key, value)
    return mask


_FIELDS = (*BlockMask.__match_args__, "_cache")


def _traced(function: str, given: dict, seq_lengths, block_size) -> BlockMask:
    tensors, sizes = [], []
    arguments = taken_apart(given, tensors, sizes)
    block_size = check_block_size(block_size)
    rows = -(-seq_lengths[0] // block_size[0])
    lists = torch.ops.fastattn.block_mask(function, arguments, tensors, sizes, rows, block_size)
    return assembled(lists, block_size, tuple(seq_lengths))


# --- arguments as text -----------------------------------------------------------------------------------------------


def taken_apart(x, tensors: list, sizes: list, floats: list | None = None) -> str:
    """A Python literal: (kind, content) for each value; what is in tensors, sizes and floats (where there is
    such a list: a graph may take any number) leaves its kind behind."""
    if isinstance(x, torch.Tensor):
        tensors.append(x.detach())
        return "('tensor', None)"
    if isinstance(x, BlockMask):
        tensors += x.tensors().values()
        sizes += [*x.BLOCK_SIZE, *x.seq_lengths]
        return "('blocks', None)"
    if isinstance(x, Mask):
        windows = tuple([tuple(window) for window in x.windows])
        return f"('mask', {taken_apart([windows, x.k_start, x.k_end], tensors, sizes, floats)})"
    if isinstance(x, int) and not isinstance(x, bool):
        sizes.append(x)
        return "('int', None)"
    if floats is not None and isinstance(x, float):
        floats.append(x)
        return "('float', None)"
    if x is None or isinstance(x, (bool, float, str)):
        return f"('constant', {x!r})"
    if isinstance(x, (list, tuple, range)):
        return "('tuple', [" + "".join([taken_apart(part, tensors, sizes, floats) + "," for part in x]) + "])"
    if isinstance(x, dict):
        parts = [f"{key!r}: {taken_apart(part, tensors, sizes, floats)}," for key, part in x.items()]
        return "('dict', {" + "".join(parts) + "})"
    raise TypeError(f"{one_line(x)} cannot be an argument of a block mask inside a graph; build the mask outside")


def put_together(text: tuple, tensors, sizes, floats=None):
    """What `taken_apart` took apart; tensors, sizes and floats are iterators."""
    kind, content = text
    if kind == "tensor":
        return next(tensors)
    if kind == "blocks":
        lists, numbers = [next(tensors) for _ in range(6)], [next(sizes) for _ in range(4)]
        return assembled(lists, tuple(numbers[:2]), tuple(numbers[2:]))
    if kind == "int":
        return next(sizes)
    if kind == "float":
        return next(floats)
    if kind == "constant":
        return content
    if kind == "dict":
        return {key: put_together(part, tensors, sizes, floats) for key, part in content.items()}
    if kind == "mask":
        windows, k_start, k_end = put_together(content, tensors, sizes, floats)
        return Mask(tuple([Window(*window) for window in windows]), k_start, k_end)
    return tuple([put_together(part, tensors, sizes, floats) for part in content])


# --- the operator ----------------------------------------------------------------------------------------------------


def _build(function: str, arguments: str, tensors, sizes) -> BlockMask:
    text = ast.literal_eval(arguments)
    given = put_together(text, iter(tensors or ()), iter(sizes or ()))  # AOTInductor: None is no list
    return _functions[function](**given)


@functools.lru_cache(maxsize=64)
def _constant(function: str, arguments: str, sizes: tuple[int, ...]) -> BlockMask:
    return _build(function, arguments, (), sizes)


def _block_mask(function, arguments, tensors, sizes, rows, block_size):
    if tensors:
        mask = _build(function, arguments, tensors, sizes)
    else:
        mask = _constant(function, arguments, tuple(sizes or ()))
    return tuple([x.clone() for x in mask.tensors().values()])  # a graph may write into the results of an operator


def _fake(function, arguments, tensors, sizes, rows, block_size):
    batch, heads, partial, full, bitmaps = (new_dynamic_size() for _ in range(5))
    like = tensors[0] if tensors else torch.empty(0)
    shapes = [(batch, heads, rows), (batch, heads, rows, partial), (batch, heads, rows), (batch, heads, rows, full)]
    lists = [like.new_empty(shape, dtype=torch.int32) for shape in (*shapes, shapes[1])]
    return (*lists, like.new_empty((bitmaps, block_size[0], block_size[1] // 8), dtype=torch.uint8))


_LIBRARY.define(
    "block_mask(str function, str arguments, Tensor[] tensors, SymInt[] sizes, SymInt rows, int[] block_size) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("block_mask", _block_mask, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::block_mask", _fake, lib=_LIBRARY)
