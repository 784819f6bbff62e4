"""Backward pass without atomics: the same bits in every run.

    P = exp2(scores - lse)   dP = dropout(dout V^T)   delta = rowsum(dout * out) - dlse   dS = P * (dP - delta)
    dV = P^T dout            dQ = scale * dS K        dK = scale * dS^T Q

as in FlashAttention-2 (Dao, arXiv 2307.08691).
The kernels, in the order in which they run: backward_delta.py (delta, and which keys each block of queries sees),
backward_key_value.py, backward_query.py, backward_bias.py. Each gradient is summed by one program, in a fixed order.
"""

import torch
import triton

from . import config, launch, tuning
from . import lists as block_lists
from .backward_bias import bias_kernel
from .backward_delta import delta_kernel
from .backward_key_value import key_value_kernel
from .backward_query import query_kernel


def backward(problem, q, k, v, terms, saved, dout, dlse, wanted):
    """Gradients of q, k, v, and those of the terms by name: None where not `wanted` (backward signature of
    dispatch.Row). saved: of `prefill.forward_for_backward`."""
    out, lse_parts = saved
    want_q, want_k, want_v, wants = wanted
    dq, dk, dv = (torch.empty_like(x) if want else None for x, want in zip((q, k, v), wanted[:3], strict=True))
    rows = (problem.batch, problem.num_heads, problem.seqlen_q)

    def row_sums(want) -> torch.Tensor | None:
        return q.new_empty(rows, dtype=torch.float32) if want else None

    delta, dslopes = row_sums(True), row_sums(wants.alibi_slopes)
    dsinks, dscale = row_sums(wants.sinks), row_sums(wants.softmax_scale)
    dbias = _empty_dbias(problem, terms.bias) if wants.bias else None
    if out.numel():
        call = BackwardPass(problem, q, k, v, out, dout, dlse, terms, lse_parts, wanted)
        exact = row_sums(any(wants))  # weights were rounded to 16 bits in out, which these gradients would show
        if exact is not None:
            call.launch_query("totals", None, None, exact, None, None)
        num_m = -(-problem.seqlen_q // call.block_m)  # of no candidate are there more
        bounds = torch.empty((*rows[:2], num_m, 4), dtype=torch.int32, device=q.device)
        of_delta = (out, dlse, exact, delta, dsinks, bounds)
        call.launch_delta(call.block_m, *of_delta)
        if (want_k or want_v) and problem.seqlen_k:
            call.launch_key_value(of_delta, dk, dv)
        if want_q or wants.alibi_slopes or wants.softmax_scale:
            call.launch_query("query", delta, dq, None, dslopes, dscale)
        if wants.bias and dbias.numel():
            call.launch_bias(delta, dbias)
    else:
        for x in (dq, dk, dv, dslopes, dsinks, dscale, dbias):
            if x is not None:
                x.zero_()
    sums = {
        "bias": dbias,
        "alibi_slopes": None if dslopes is None else dslopes.sum(-1, dtype=torch.float64),
        "sinks": None if dsinks is None else dsinks.sum((0, 2), dtype=torch.float64),
        "softmax_scale": None if dscale is None else dscale.sum((0, 2), dtype=torch.float64),
    }
    grads = {name: x if x is None else _sum_to(x, getattr(terms, name)) for name, x in sums.items()}
    return dq, dk, dv, type(terms)(**dict.fromkeys(terms._fields) | grads)


def _sum_to(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.sum_to_size((1,) * (x.dim() - like.dim()) + like.shape).view(like.shape).to(like.dtype)


def _empty_dbias(problem, bias) -> torch.Tensor:
    """Sums by bias_kernel: over batches and heads in the kernel if the bias has queries and keys, else afterwards."""
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if shape[2] == 1 or shape[3] == 1:
        shape = (problem.batch, problem.num_heads, problem.seqlen_q if shape[3] == 1 else 1, shape[3])
    return torch.empty(shape, dtype=torch.float32, device=bias.device)


class BackwardPass:
    """What the launches of one backward pass have in common."""

    def __init__(self, problem, q, k, v, out, dout, dlse, terms, lse_parts, wanted):
        self.problem, self.inputs, self.terms, self.lse_parts = problem, (q, k, v, dout), terms, lse_parts
        self.lists, self.transposed = block_lists.lists_of(terms.block_mask), None
        if self.lists:
            self.transposed = block_lists.lists_of(terms.block_mask.transpose())
        self.launches = launch.launches_of((
            "backward", wanted, out.dtype, dout.stride(), out.stride(), launch.alignment(out, dout),
            launch.facts_of(dlse), self.lists and (self.lists.key, self.transposed.key),
            *launch.call_key(problem, q, k, v, terms),
        ))  # fmt: skip
        if "block_m" not in self.launches:
            self.launches["block_m"] = self._block_m()
        self.block_m = self.launches["block_m"]

    def _device(self) -> config.Device:
        return launch.device_facts(self.lse_parts.get_device())

    def _block_m(self) -> int:
        """Queries of a block in key_value_kernel, of which delta_kernel notes what it sees."""
        tiles = tuning.tiles("key_value", self.problem, self._device())
        return (config.within(tiles, self.lists.block_size) if self.lists else tiles).BLOCK_M

    def launch_delta(self, block_m, out, dlse, exact, delta, dsinks, bounds) -> None:
        """bounds: of blocks of block_m queries."""
        problem, terms, dout = self.problem, self.terms, self.inputs[3]
        sinks = None if dsinks is None else terms.sinks
        tensors = (
            out, dout, exact, dlse, self.lse_parts, sinks, terms.k_start, terms.k_end, delta, dsinks, bounds
        )  # fmt: skip

        def plan():
            lo, hi = launch.clamp_diagonal(terms)
            arguments = (
                out.stride(), dout.stride(), launch.strides(dlse, 3), launch.strides(terms.k_start, 3),
                launch.strides(terms.k_end, 3), *launch.strides(sinks, 1), lo, hi, problem.num_heads, problem.seqlen_q,
                problem.seqlen_k,
            )  # fmt: skip
            constexprs = {
                "HEAD_DIM_V": problem.head_dim_v, "BLOCK_D": triton.next_power_of_2(problem.head_dim_v),
                "BLOCK_M": block_m, "WIDE": launch.is_wide(*arguments[:2]), **launch.diagonal_flags(lo, hi),
            }  # fmt: skip
            # a product fused into the sum of two lanes would round it as one of them does, and each of them stores it
            options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
            programs = triton.cdiv(problem.seqlen_q, block_m) * problem.num_heads * problem.batch
            return launch.Plan(delta_kernel, programs, arguments, constexprs, options)

        launch.run(self.launches, f"delta {block_m}", tensors, plan)

    def launch_key_value(self, of_delta, dk, dv) -> None:
        """of_delta: what launch_delta took behind block_m."""
        problem, (*_, delta, _, bounds) = self.problem, of_delta

        def note_bounds(tiles):
            """Of blocks of as many queries as these tiles have, which differ where tiles are measured."""
            if tiles.BLOCK_M != self.block_m:
                self.launch_delta(tiles.BLOCK_M, *of_delta)
                self.block_m = tiles.BLOCK_M

        def count_programs(tiles):
            return triton.cdiv(problem.seqlen_k, tiles.BLOCK_N) * problem.num_heads_k * problem.batch

        written = (dk, dv)
        self._launch(
            "key_value", key_value_kernel, count_programs, (delta, bounds), written, written, self.transposed,
            make_ready=note_bounds,
        )  # fmt: skip
        self.launches["block_m"] = self.block_m

    def launch_query(self, name, delta, dq, totals, dslopes, dscale) -> None:
        problem = self.problem

        def count_programs(tiles):
            return triton.cdiv(problem.seqlen_q, tiles.BLOCK_M) * problem.num_heads * problem.batch

        written = (dq, totals, dslopes, dscale)
        self._launch(name, query_kernel, count_programs, (delta,), written, (dq,), self.lists)

    def launch_bias(self, delta, dbias) -> None:
        problem = self.problem
        b, h, sq, sk = dbias.shape
        rows_summed, cols_summed = sq == 1 and problem.seqlen_q > 1, sk == 1 and problem.seqlen_k > 1

        def count_programs(tiles):
            m_blocks = 1 if rows_summed else triton.cdiv(sq, tiles.BLOCK_M)
            n_blocks = 1 if cols_summed else triton.cdiv(sk, tiles.BLOCK_N)
            return m_blocks * n_blocks * b * h

        counts = (problem.batch // b, problem.num_heads // h)
        flags = {"ROWS_SUMMED": rows_summed, "COLS_SUMMED": cols_summed}
        self._launch("bias", bias_kernel, count_programs, (delta,), (dbias,), (dbias,), self.lists, counts, flags)

    def _launch(
        self, name, kernel, count_programs, read, written, strided, lists, counts=(), flags=None, make_ready=None
    ) -> None:
        """read, written: what the kernel takes between lse_parts and k_start; strided: those of written that have
        strides; counts: what it takes behind all other arguments; make_ready: of launch.plan_with_best_tiles."""
        problem, terms = self.problem, self.terms
        of_blocks = lists.tensors if lists else block_lists.NOTHING
        tensors = (
            *self.inputs, self.lse_parts, *read, *written, terms.k_start, terms.k_end, terms.mask, terms.bias,
            terms.alibi_slopes, terms.softmax_scale, terms.seed or 0, *of_blocks,
        )  # fmt: skip

        def plan():
            device = self._device()
            of_lists = (lists.strides, lists.num_bitmaps) if lists else (None, 0)

            def plan_with(tiles):
                arguments, constexprs = launch.score_arguments(problem, *self.inputs, terms)
                constexprs |= block_lists.constexprs(self.lists, tiles) | (flags or {})
                constexprs["EXACT"] = problem.dtype == "float32"
                constexprs["RELOAD"] = tiles.reload
                arguments = (*of_lists, *[launch.strides(x, 4) for x in strided], *arguments, *counts)
                return launch.Plan(kernel, count_programs(tiles), arguments, constexprs, tiles.options(device))

            table = "query" if name == "totals" else name
            block_size = self.lists and self.lists.block_size
            return launch.plan_with_best_tiles(
                table, problem, device, tensors, plan_with, written, block_size, make_ready
            )

        launch.run(self.launches, name, tensors, plan)
