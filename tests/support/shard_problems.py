"""Attention whose sequence lies on several ranks, beside the same in one place."""

import random
from typing import NamedTuple

import torch

from backward import cotangents, gradients, score_tensors, sizes_of_scale_sums, sizes_of_slope_sums, slack_of, to_double
from cases import Case, inputs
from fastattn import BlockMask, Mask, parallel
from fastattn.parallel.block_masks import local_rows
from forward import assert_parity
from processes import Team, mesh_of

INF = float("inf")


class Sharded(NamedTuple):
    """A call, and how it is cut. ranks: sizes of the mesh dimensions."""

    case: Case
    ranks: tuple[int, ...]
    shards: parallel.Shards
    shards_k: parallel.Shards
    schedule: str | None = None
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.case}-{'x'.join(map(str, self.ranks))}-{self.schedule}"

    @property
    def dim(self):
        return "cp" if len(self.ranks) == 1 else ("outer", "inner")


def sharded(case: Case, ranks: tuple[int, ...], kind: str = "contiguous", schedule=None, seed: int = 0) -> Sharded:
    """Cut as `kind` says: "contiguous", "zigzag", "uneven" (runs of any length, some ranks empty) or "one" (one rank
    has all). Runs end where blocks of a BlockMask do."""
    seqlen_k = case.seqlen_q if case.seqlen_k is None else case.seqlen_k
    count, multiple = 1, 64 if "blocks" in str(case.mask) else 1
    for size in ranks:
        count *= size
    rng = random.Random(seed)

    def cut(seqlen):
        if kind == "uneven":
            cuts = sorted(rng.randint(0, -(-seqlen // multiple)) * multiple for _ in range(2 * count))
            ends = [0, *[min(x, seqlen) for x in cuts], seqlen]
            held = [[] for _ in range(count)]
            for start, stop in zip(ends, ends[1:], strict=False):
                if start < stop:
                    held[rng.randrange(count)].append((start, stop))
            return parallel.Shards(tuple(tuple(runs) for runs in held))
        if kind == "one":
            return parallel.Shards.of_lengths([seqlen] + [0] * (count - 1))
        return getattr(parallel.Shards, kind)(seqlen, count, multiple)

    shards = cut(case.seqlen_q)
    return Sharded(case, ranks, shards, shards if seqlen_k == case.seqlen_q else cut(seqlen_k), schedule, seed)


def local_options(problem: Sharded, kwargs: dict, rank: int) -> dict:
    """`kwargs` for the rows of a rank."""
    mask, rows = kwargs.get("mask"), {}
    if isinstance(mask, BlockMask):
        rows["mask"] = local_rows(mask, problem.shards, rank)
    if isinstance(mask, Mask):
        rows["mask"] = Mask(mask.windows, *[of_rows(problem, x, rank) for x in (mask.k_start, mask.k_end)])
    for name in ("mask", "bias"):
        if isinstance(kwargs.get(name), torch.Tensor):
            rows[name] = of_rows(problem, kwargs[name], rank)
    return kwargs | rows


def of_rows(problem: Sharded, x, rank: int):
    return x if x is None or x.shape[2] == 1 else problem.shards.take(x, rank, 2)


def attend(rank: int, problem: Sharded, options: dict) -> dict[str, torch.Tensor]:
    """out, lse and gradients of a rank, which makes the whole problem and takes its part."""
    qkv, kwargs = inputs(problem.case, problem.seed)
    cuts = problem.shards, problem.shards_k, problem.shards_k
    leaves = {name: y.take(x, rank, 2) for name, x, y in zip("qkv", qkv, cuts, strict=True)}
    kwargs = local_options(problem, kwargs, rank)
    leaves |= {name: kwargs[name] for name in score_tensors(kwargs)}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    out, lse = parallel.attention(
        **leaves, **{name: x for name, x in kwargs.items() if name not in leaves}, mesh=mesh_of(*problem.ranks),
        dim=problem.dim, schedule=problem.schedule, shards=problem.shards, shards_k=problem.shards_k, return_lse=True,
        **options,
    )  # fmt: skip
    dout, dlse = cotangents(qkv[0], qkv[2])
    dout, dlse = (problem.shards.take(x, rank, 2) for x in (dout, dlse))
    results = out, lse.masked_fill(lse == -INF, 0.0)
    grads = torch.autograd.grad(results, list(leaves.values()), (dout.to(out.dtype), dlse.to(lse.dtype)))
    return {"out": out.detach(), "lse": lse.detach()} | {f"d{x}": y for x, y in zip(leaves, grads, strict=True)}


def joined(problem: Sharded, parts: list[dict]) -> dict[str, torch.Tensor]:
    """The whole results: rows put together, gradients of what every rank has added up."""
    found = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        if name in ("dk", "dv"):
            found[name] = problem.shards_k.joined(pieces, 2)
        elif name in ("out", "lse", "dq") or (name == "dbias" and problem.case.bias != "key"):
            found[name] = problem.shards.joined(pieces, 2)
        else:
            found[name] = torch.stack(pieces).sum(0)
    return found


def assert_as_in_one_place(team: Team, problem: Sharded, **options) -> list[dict]:
    """out, lse and all gradients within the rules of the tests of one process; returns what each rank has found."""
    parts = team.run(attend, problem, options)
    found = joined(problem, parts)
    (q, k, v), kwargs = inputs(problem.case, problem.seed)
    assert_parity((found["out"], found["lse"]), q, k, v, **kwargs)
    dout, dlse = cotangents(q, v)
    dout = dout.to(q.dtype).double()
    doubles = q.double(), k.double(), v.double(), to_double(kwargs), dout, dlse
    same_dtype = gradients(q, k, v, kwargs, dout, dlse, "reference", of_scores=True)
    oracle = gradients(*doubles, "reference", of_scores=True)
    for name, expected in oracle.items():
        x, y = found[f"d{name}"], same_dtype[name]
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        size = expected.abs().clamp(min=1.0)
        sizes_of_sums = {"alibi_slopes": sizes_of_slope_sums, "softmax_scale": sizes_of_scale_sums}.get(name)
        floor = sizes_of_sums(*doubles) * 2**-24 / size if sizes_of_sums else 0.0
        is_of_all = name == "bias" and problem.case.bias == "key"
        if is_of_all or name in ("alibi_slopes", "sinks", "softmax_scale"):  # parts are rounded, and then added up
            floor = floor + sum(part[f"d{name}"].double().abs() for part in parts) * torch.finfo(x.dtype).eps / size
        errors, reference_errors = ((z.double() - expected).abs() / size for z in (x, y))
        largest, reference_error = (e.amax() if e.numel() else 0.0 for e in (errors - floor, reference_errors))
        if sizes_of_sums:  # a few sums of many terms: the reference may be lucky where one process is not
            alone = gradients(q, k, v, kwargs, dout.to(q.dtype), dlse, "cpu", of_scores=True)[name]
            reference_error = max(reference_error, ((alone.double() - expected).abs() / size).amax())
        allowed = 2.0 * reference_error + slack_of(x, q)
        assert largest <= allowed, f"d{name}: error {largest:.3g}, allowed {allowed:.3g} ({problem})"
    return parts


def random_problem(seed: int, ranks: tuple[int, ...]) -> Sharded:
    """Any mask, terms, dtype, shards and schedule that go together."""
    rng = random.Random(seed)
    masks = (None, None, "lengths", "documents", "prefix_lm", "intervals", "tensor", "tensor_per_head", "blocks")
    heads_k = rng.choice((2, 4))
    seqlen = rng.choice((5, 37, 64, 130, 200))
    case = Case(
        batch=rng.choice((1, 2)), num_heads=4, num_heads_k=heads_k, seqlen_q=seqlen,
        seqlen_k=rng.choice((seqlen, seqlen, 97)), head_dim=rng.choice((8, 20)), head_dim_v=rng.choice((8, 12)),
        mask=rng.choice(masks), causal=rng.random() < 0.5, alibi=rng.random() < 0.3, sinks=rng.random() < 0.3,
        window_size=rng.choice((None, None, (20, 5), (0, 40), (None, 9))), softcap=rng.choice((0.0, 0.0, 3.0)),
        bias=rng.choice((None, None, None, "key", "full", "query")), layout=rng.choice(("bhsd", "bshd")),
        learned_scale=rng.choice((None, None, "one", "per_head")),
        dtype=rng.choice(("float32", "float32", "float64", "bfloat16")),
    )  # fmt: skip
    schedules = ["ring", "all_gather"] if len(ranks) == 1 else ["ring+all_to_all"]
    if len(ranks) == 2 or (heads_k % ranks[0] == 0 and rng.random() < 0.4):
        case = case._replace(bias=None, mask=None if "tensor" in str(case.mask) else case.mask)
        schedules = ["all_to_all"] if len(ranks) == 1 else schedules
    kind = rng.choice(("contiguous", "zigzag", "uneven", "one"))
    problem = sharded(case, ranks, kind, rng.choice((*schedules, None)), seed)
    return problem._replace(case=case._replace(dropout_p=rng.choice((0.0, 0.0, 0.3))))
