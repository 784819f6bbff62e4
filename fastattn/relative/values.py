"""Shaw's relative values: what a key adds to its value by its distance. In blocks of query rows, in plain torch."""

import torch

from ..dispatch import UnsupportedError
from ..scores.relative import Rewriting
from ..torch_internals import outside_of_graphs
from ..transforms import dense
from ..transforms.blocks import Block, BlockFunction
from ..transforms.slots import Call
from ..transforms.works import Higher, apply
from .arguments import check_heads


class ShawValues(Rewriting):
    name = "shaw"

    def __init__(self, keys: torch.Tensor | None, values: torch.Tensor):
        self.keys, self.values = keys, values

    def attend(self, attention, bind, q, k, v, options):
        return _attend(self, bind, q, k, v, options)


def _attend(bias: ShawValues, bind, q, k, v, options: dict):
    if options["backend"] not in (None, "reference"):
        raise UnsupportedError(
            f"backend={options['backend']!r} has no relative values, which want the weights, and these never leave a "
            "kernel: shaw(values=...) runs in torch's own operators, on any device, without backend="
        )
    bound = bind(q, k, v, **options | {"bias": None, "backend": "reference"})
    problem, terms = bound.problem, bound.terms
    if problem.dropout and terms.seed is None:
        drawn = torch.randint(2**63 - 1, ())
        terms = terms._replace(seed=drawn if problem.transformed else int(drawn))
    call = Call(problem, "reference", terms, False)
    tensors = {"q": q, "k": k, "v": v, **{name: getattr(terms, name) for name in call.term_slots}}
    for name, argument, table, like in (("keys_at", "keys", bias.keys, q), ("values_at", "values", bias.values, v)):
        if table is not None:
            table = table[None] if table.dim() == 2 else table
            check_heads("shaw", argument, table.shape[0], q)
            if table.shape[2] != like.shape[3]:
                size = "head_dim" if like is q else "head_dim_v"
                raise ValueError(f"shaw: {argument} has {table.shape[2]} columns; it must have {size}={like.shape[3]}")
            tensors[name] = table
    outs = ("out", "lse") if options["return_lse"] else ("out",)
    found = apply(Higher(call, BlockFunction(_of_block, tuple(tensors), outs)), tensors)
    return (found["out"], found["lse"]) if options["return_lse"] else found["out"]


_attend = outside_of_graphs(_attend, "relative values run in blocks: call it outside of torch.compile")


def _of_block(call: Call, block: Block, x: dict) -> dict:
    """The results of a block, "out" and "lse"."""
    by_distance = None
    if "keys_at" in x:
        products = (x["q"] * dense.factor(call)) @ x["keys_at"].mT
        by_distance = products.gather(-1, _places(call, block, x["keys_at"], products))
    x, s, visible = dense.scores(call, block, x, by_distance)
    p, lse = dense.softmax_and_lse(block, x, s, visible)
    p = dense.kept(call, block, x, p)
    places = _places(call, block, x["values_at"], p)
    of_distances = p.new_zeros(*p.shape[:3], x["values_at"].shape[1]).scatter_add(-1, places, p)
    return {"out": dense.by_keys(p, x["v"]) + of_distances @ x["values_at"], "lse": lse}


def _places(call: Call, block: Block, table: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[batch, num_heads, rows, keys]: the row of the table for each query and key."""
    (start, end), (first, last), furthest = *(block.ranges[x] for x in ("seqlen_q", "seqlen_k")), table.shape[1] // 2
    query = torch.arange(start, end, device=like.device)[:, None] + call.fixed.query_start
    distance = torch.arange(first, last, device=like.device) - query
    return (distance.clamp_(-furthest, furthest) + furthest).expand(*like.shape[:2], -1, -1)
