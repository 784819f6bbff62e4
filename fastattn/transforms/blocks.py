"""Functions of blocks of query rows, run over all blocks: O(n) memory for derivatives that no kernel computes.

Rows of queries are independent: results of rows go to their rows, those that rows share (gradients of k, v, terms)
add up. A function of a block is plain torch, so that its derivatives are functions of blocks again, to any order.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..outputs import compute_dtype
from ..problem import LENGTHS
from ..torch_internals import is_traced
from .slots import Call, base

_ROWS = 128
_SCORES = 1 << 19  # of a block: its tensors stay in a cache, and torch's own cost for each operation is small


class Block(NamedTuple):
    """The part of a call that is computed at a time.

    ranges     name of a dimension -> (start, end)
    batch      that of the whole call
    is_finite  whether all keys, values and their tangents are; a block has one query row otherwise
    of_rows    what blocks of the same rows have found out for each other
    """

    ranges: dict[str, tuple[int, int]]
    batch: int
    is_finite: bool
    of_rows: dict

    def cut(self, x: torch.Tensor, dims: tuple[str, ...]) -> torch.Tensor:
        """The part of a tensor that belongs to the block; what it broadcasts over stays."""
        for dim, name in enumerate(dims):
            if name in self.ranges and x.shape[dim] != 1:
                start, end = self.ranges[name]
                x = x.narrow(dim, start, end - start)
        return x


class BlockFunction(NamedTuple):
    """run(call, block, tensors) -> results by name, all tensors by slot and in the compute dtype.

    slots  of the tensors
    outs   names of the results: a slot among `slots`, whose shape the result has, or "out" or "lse"
    recipe what the function is made of, in constants alone: `formulas.function_of`
    """

    run: Callable
    slots: tuple[str, ...]
    outs: tuple[str, ...]
    recipe: tuple = ()


def over_blocks(function: BlockFunction, call: Call, tensors: dict) -> list[torch.Tensor]:
    """The results of a function over all blocks."""
    sums = {name: _zeros(call, name, tensors) for name in function.outs}
    dims = {slot: call.dims(slot, x) for slot, x in (sums | tensors).items()}
    with torch.autocast(tensors["q"].device.type, enabled=False):
        _add_blocks(function, call, tensors, dims, sums)
    return [total.to(_dtype(call, name, tensors)) for name, total in sums.items()]


def _add_blocks(function: BlockFunction, call: Call, tensors: dict, dims: dict, sums: dict) -> None:
    dtype = compute_dtype(call.problem)
    for block in _blocks(call, tensors):
        cut = {slot: block.cut(x, dims[slot]) for slot, x in tensors.items()}
        cut = {slot: x.to(dtype) if x.is_floating_point() else x for slot, x in cut.items()}
        found = function.run(call, block, cut)
        for name in sums.keys() & found.keys():
            if is_traced():  # all is one block, and a graph had better not have changes in place
                sums[name] = sums[name] + found[name]
            else:
                block.cut(sums[name], dims[name]).add_(found[name])


def derived(function: BlockFunction, cotangents: tuple[str, ...], wanted: tuple[str, ...]) -> BlockFunction:
    """The gradients of slots `wanted`, given cotangents (slots "c1.out", ...) of some results."""

    def run(call, block, tensors):
        create_graph = torch.is_grad_enabled()
        given = {slot.partition(".")[2]: tensors[slot] for slot in cotangents}
        with torch.enable_grad():
            inputs = {slot: source(tensors[slot]) if slot in wanted else tensors[slot] for slot in function.slots}
            found = function.run(call, block, inputs)
            ys = [name for name in given if name in found and found[name].requires_grad]
            grads = gradients([found[y] for y in ys], [inputs[x] for x in wanted], [given[y] for y in ys], create_graph)
        return dict(zip(wanted, grads, strict=True))

    recipe = "derived", function.recipe, cotangents, wanted
    return BlockFunction(run, (*function.slots, *cotangents), wanted, recipe)


def pushed(function: BlockFunction, tangents: dict[str, str]) -> BlockFunction:
    """The tangents of all results, given tangents of some slots; tangents: slot -> slot of its tangent.

    By the transpose of the transpose: a function of blocks needs no forward-mode derivative, which does not nest.
    """

    def run(call, block, tensors):
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = {slot: source(tensors[slot]) if slot in tangents else tensors[slot] for slot in function.slots}
            found = {name: y for name, y in function.run(call, block, inputs).items() if name in function.outs}
            weights = {name: torch.zeros_like(y).requires_grad_() for name, y in found.items() if y.requires_grad}
            ys, us = [found[name] for name in weights], list(weights.values())
            grads = gradients(ys, [inputs[x] for x in tangents], us, True)
            pairs = [(x, tensors[t]) for x, t in zip(grads, tangents.values(), strict=True) if x.requires_grad]
            results = gradients([x for x, _ in pairs], us, [t for _, t in pairs], create_graph)
        return dict(zip(weights, results, strict=True))

    recipe = "pushed", function.recipe, tangents
    return BlockFunction(run, (*function.slots, *tangents.values()), function.outs, recipe)


def source(x: torch.Tensor) -> torch.Tensor:
    """`x` as something to differentiate by: a view, so that a tensor that stands in two slots has two gradients."""
    x = x.view_as(x)
    return x if x.requires_grad else x.requires_grad_()


def gradients(ys, xs, dys, create_graph: bool) -> tuple[torch.Tensor, ...]:
    """torch.autograd.grad, with zeros where a result does not depend on a source."""
    if not ys or not xs:
        return tuple(torch.zeros_like(x) for x in xs)
    return torch.autograd.grad(ys, xs, dys, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def _zeros(call: Call, name: str, tensors: dict) -> torch.Tensor:
    """Where a result adds up, in the compute dtype."""
    shape = tensors[name].shape if name in tensors else call.sizes(name, tensors)
    return tensors["q"].new_zeros(shape, dtype=compute_dtype(call.problem))


def _dtype(call: Call, name: str, tensors: dict) -> torch.dtype:
    if name in tensors:
        return tensors[name].dtype
    return tensors["q"].dtype if base(name) == "out" else compute_dtype(call.problem)


def _blocks(call: Call, tensors: dict) -> Iterator[Block]:
    problem = call.problem_of(tensors)
    if 0 in (problem.batch, problem.num_heads):
        return
    if is_traced():
        sizes = {name: (0, getattr(problem, name)) for name in (*LENGTHS, "num_heads", "num_heads_k")}
        if call.runs != (sizes["seqlen_q"],):
            raise NotImplementedError("chosen query rows cannot be traced (make_fx, torch.func.linearize): choose all")
        yield Block(sizes, problem.batch, True, {})
        return
    # A sum is finite only if all of it is; where it overflows instead, blocks are needlessly small.
    is_finite = all(bool(x.sum().isfinite()) for slot, x in tensors.items() if base(slot) in ("k", "v"))
    most = _ROWS
    if call.mixes_heads:
        most = min(max(_SCORES // max(problem.seqlen_k * problem.num_heads, 1), 8), _ROWS)
    for queries, others, scores in _row_ranges(call, problem, tensors, most if is_finite else 1):
        heads = min(max(_SCORES // max(scores * problem.group_size, 1), 1), problem.num_heads_k)
        heads = problem.num_heads_k if call.mixes_heads else heads
        batches = max(_SCORES // max(scores * problem.num_heads, 1), 1) if heads == problem.num_heads_k else 1
        of_rows: dict = {}
        for b in _ranges(problem.batch, batches):
            for h in _ranges(problem.num_heads_k, heads):
                ranges = {"batch": b, "num_heads_k": h, "seqlen_q": queries, **others}
                ranges["num_heads"] = tuple(head * problem.group_size for head in h)
                yield Block(ranges, problem.batch, is_finite, of_rows)


def _row_ranges(call: Call, problem, tensors: dict, rows: int) -> Iterator[tuple]:
    """(range of queries, ranges of what they see, scores of one head)"""
    if call.layout == "csr":
        yield from _edge_ranges(problem, tensors["indptr"])
        return
    lo, hi = call.fixed.diagonal_lo, call.fixed.diagonal_hi
    done = 0  # of the rows that are looked at
    for first, last in call.runs:
        for start, end in ((first + a, first + b) for a, b in _ranges(last - first, rows)):
            keys = max(0, start + lo), min(problem.seqlen_k, end + hi)
            keys = keys if keys[0] < keys[1] else (0, min(1, problem.seqlen_k))  # rows that see nothing: one hidden key
            at = done, done + end - start
            diagonals = start - keys[1] + problem.seqlen_k, end - keys[0] + problem.seqlen_k - 1
            of_rows = {"seqlen_k": keys, "rows": at, "num_diagonals": diagonals}
            yield (start, end), of_rows, (end - start) * (keys[1] - keys[0])
            done = at[1]


def _edge_ranges(problem, indptr: torch.Tensor) -> Iterator[tuple]:
    size = max(problem.head_dim, problem.head_dim_v)
    starts, row = indptr.tolist(), 0
    while row < problem.seqlen_q:
        end = row + 1
        while end < problem.seqlen_q and (starts[end + 1] - starts[row]) * size * problem.num_heads <= _SCORES:
            end += 1
        yield (row, end), {"edges": (starts[row], starts[end])}, (starts[end] - starts[row]) * size
        row = end


def _ranges(size: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, step):
        yield start, min(start + step, size)
