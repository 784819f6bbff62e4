"""The attention calls that tests and benchmarks share: `Case` describes one, `inputs` makes its tensors."""

from typing import NamedTuple

import torch

from fastattn import BlockMask, Mask, relative


class Case(NamedTuple):
    """One call of `fastattn.attention`, by value: usable as a pytest id and as a row of a benchmark.

    mask    None | "lengths" | "left_padding" | "documents" | "prefix_lm" | "tensor" (a random bool [1, 1, Sq, Sk]) |
            "tensor_per_head" ([B, H, Sq, Sk]) | "key_tensor" ([B, 1, 1, Sk]) | "top_left" |
            "intervals" (random ones for each [B, H, Sq], empty ones among them) |
            "blocks" (a random BlockMask for each [B, H], blocks of 32 x 16) | "shared_blocks" ([1, 1], 64 x 64)
    bias    None | "shared" ([1, 1, Sq, Sk]) | "per_head" ([1, H, Sq, Sk]) | "full" ([B, H, Sq, Sk]) |
            "key" ([B, 1, 1, Sk]) | "query" ([1, H, Sq, 1]); of distances, `fastattn.relative.toeplitz`:
            "distances" ([H, Sq + Sk - 1]) | "shared distances" ([1, ...]) | "distances of each" ([B, H, ...])
    learned_scale  None | "one" (a tensor with one number) | "per_head" ([num_heads])
    layout  memory order of q, k, v and out: "bhsd" | "bshd"
    """

    batch: int = 1
    num_heads: int = 1
    seqlen_q: int = 1
    seqlen_k: int | None = None
    head_dim: int = 64
    head_dim_v: int | None = None
    num_heads_k: int | None = None
    dtype: str = "float32"
    causal: bool = False
    window_size: tuple[int | None, int | None] | None = None
    mask: str | None = None
    bias: str | None = None
    alibi: bool = False
    softcap: float = 0.0
    sinks: bool = False
    softmax_scale: float | None = None
    learned_scale: str | None = None
    dropout_p: float = 0.0
    layout: str = "bhsd"

    def __str__(self) -> str:
        default = Case()
        sk = self.seqlen_q if self.seqlen_k is None else self.seqlen_k
        parts = [f"B{self.batch}H{self.num_heads}" + (f"/{self.num_heads_k}" if self.num_heads_k else "")]
        parts += [f"S{self.seqlen_q}" + (f"x{sk}" if sk != self.seqlen_q else "")]
        parts += [f"D{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v else "")]
        for field in ("dtype", "mask", "bias", "softcap", "softmax_scale", "learned_scale", "dropout_p", "layout"):
            if getattr(self, field) != getattr(default, field) or field == "dtype":
                value = getattr(self, field)
                parts.append(value if isinstance(value, str) and field in ("dtype", "layout") else f"{field}:{value}")
        if self.window_size is not None:
            parts.append("window:{},{}".format(*self.window_size))
        parts += [name for name in ("causal", "alibi", "sinks") if getattr(self, name)]
        return "-".join(parts)


def inputs(case: Case, seed: int = 0) -> tuple[tuple[torch.Tensor, ...], dict]:
    """((q, k, v), keyword arguments of `fastattn.attention`) for `case`; the same values for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    b, h, sq, sk = case.batch, case.num_heads, case.seqlen_q, case.seqlen_q if case.seqlen_k is None else case.seqlen_k
    hk, dv = case.num_heads_k or h, case.head_dim_v or case.head_dim

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def states(heads, seqlen, dim):
        if case.layout == "bshd":
            return normal(b, seqlen, heads, dim).to(dtype).transpose(1, 2)
        return normal(b, heads, seqlen, dim).to(dtype)

    qkv = states(h, sq, case.head_dim), states(hk, sk, case.head_dim), states(hk, sk, dv)
    kwargs: dict = {}
    for name in ("causal", "window_size", "softcap", "softmax_scale"):
        if getattr(case, name) != getattr(Case(), name):
            kwargs[name] = getattr(case, name)
    if case.mask is not None:
        kwargs["mask"] = _mask(case.mask, generator, b, h, sq, sk)
    if case.bias is not None and "distances" in case.bias:
        lead = {"distances": (h,), "shared distances": (1,), "distances of each": (b, h)}[case.bias]
        kwargs["bias"] = relative.toeplitz(normal(*lead, max(sq + sk - 1, 0)).to(torch.float32))
    elif case.bias is not None:
        shape = {
            "shared": (1, 1, sq, sk),
            "per_head": (1, h, sq, sk),
            "full": (b, h, sq, sk),
            "key": (b, 1, 1, sk),
            "query": (1, h, sq, 1),
        }[case.bias]
        kwargs["bias"] = normal(*shape).to(dtype)
    if case.alibi:
        kwargs["alibi_slopes"] = 2.0 ** -torch.arange(1, h + 1, dtype=torch.float64).to(torch.float32)
    if case.sinks:
        kwargs["sinks"] = normal(h).to(torch.float32)
    if case.learned_scale:
        kwargs["softmax_scale"] = (normal(*([h] if case.learned_scale == "per_head" else [])) * 0.3).to(torch.float32)
    if case.dropout_p:
        kwargs |= {"dropout_p": case.dropout_p, "seed": seed}
    return qkv, kwargs


def _mask(kind, generator, b, h, sq, sk):
    def integers(low, high, shape):
        return torch.randint(low, high, shape, generator=generator)

    if kind == "lengths":
        return Mask.lengths(integers(0, sk + 1, (b,)))
    if kind == "left_padding":
        return Mask.padding(torch.arange(sk) >= integers(0, sk + 1, (b, 1)))
    if kind == "documents":
        ids_k = integers(0, 4, (b, sk)).sort(1).values
        return Mask.documents(ids_k) if sq == sk else Mask.documents(integers(0, 4, (b, sq)).sort(1).values, ids_k)
    if kind == "prefix_lm":
        return Mask.prefix_lm(integers(0, sk + 1, (b,)), sq, sk)
    if kind == "top_left":
        return Mask.causal("top_left")
    if kind == "intervals":
        return Mask.intervals(integers(-2, sk + 1, (b, h, sq)), integers(0, sk + 3, (b, h, sq)))
    if kind in BLOCK_SIZES:
        return _block_mask(generator, *((b, h) if kind == "blocks" else (1, 1)), sq, sk, BLOCK_SIZES[kind])
    shape = {"tensor": (1, 1, sq, sk), "tensor_per_head": (b, h, sq, sk), "key_tensor": (b, 1, 1, sk)}[kind]
    return torch.rand(shape, generator=generator) < 0.7


BLOCK_SIZES = {"blocks": (32, 16), "shared_blocks": (64, 64)}


def _block_mask(generator, b, h, sq, sk, block_size) -> BlockMask:
    """Absent, full and partial blocks, and rows that see nothing."""
    unit_q, unit_k = block_size
    blocks = torch.rand(b, h, -(-sq // unit_q), -(-sk // unit_k), generator=generator)
    share = (blocks.repeat_interleave(unit_q, 2).repeat_interleave(unit_k, 3)[:, :, :sq, :sk] * 3.0).floor() / 2.0
    visible = torch.rand(b, h, sq, sk, generator=generator) < share
    return BlockMask.from_dense(visible & (torch.rand(b, h, sq, 1, generator=generator) < 0.97), block_size=block_size)


def visited_pairs(case: Case) -> int:
    """How many (query, key) pairs the masks leave, over batch and query heads: what FLOPs are counted from."""
    (q, k, _), kwargs = inputs(case)
    b, h, sq, sk = *q.shape[:3], k.shape[2]
    mask = kwargs.get("mask")
    interval = mask if isinstance(mask, Mask) else Mask()
    if case.causal:
        interval = interval & Mask.causal()
    if case.window_size is not None:
        interval = interval & Mask.window(*case.window_size)
    visible = interval.to_dense(sq, sk)
    if isinstance(mask, (torch.Tensor, BlockMask)):
        visible = visible & (mask if isinstance(mask, torch.Tensor) else mask.to_dense())
    return int(visible.sum()) * (b // visible.shape[0]) * (h // visible.shape[1])


def _parity_cases() -> tuple[Case, ...]:
    masks = ("lengths", "left_padding", "documents", "prefix_lm", "intervals", "top_left")
    masks += ("tensor", "tensor_per_head", "key_tensor")
    biases = ("shared", "per_head", "full", "key", "query", "distances", "shared distances", "distances of each")
    small = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=45, seqlen_k=77, head_dim=24, head_dim_v=40)
    cases = [Case(head_dim=d, seqlen_q=s, num_heads=2) for d in (1, 7, 8, 33, 64, 65, 128) for s in (1, 5, 64, 130)]
    cases += [
        Case(head_dim=d, seqlen_q=19, seqlen_k=70, head_dim_v=dv) for d, dv in ((256, 512), (512, 96), (192, 128))
    ]
    cases += [Case(seqlen_q=sq, seqlen_k=sk, head_dim=16) for sq, sk in ((0, 5), (5, 0), (1, 300), (300, 1), (17, 600))]
    cases += [Case(batch=0, seqlen_q=4), Case(num_heads=0, seqlen_q=4)]
    cases += [small, small._replace(layout="bshd"), small._replace(num_heads_k=1), small._replace(softmax_scale=0.0)]
    cases += [small._replace(causal=True, seqlen_q=sq, seqlen_k=sk) for sq, sk in ((77, 45), (45, 77), (260, 260))]
    cases += [small._replace(window_size=w) for w in ((0, 0), (5, 3), (None, 4), (9, None), (500, 500))]
    cases += [small._replace(mask=mask, seqlen_q=s) for mask in masks for s in (45, 77)]
    cases += [small._replace(mask=mask, causal=True, window_size=(20, None)) for mask in masks]
    cases += [small._replace(bias=bias) for bias in biases]
    blocks = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=150, seqlen_k=170, head_dim=24, head_dim_v=40)
    for mask in BLOCK_SIZES:
        cases += [blocks._replace(mask=mask), blocks._replace(mask=mask, seqlen_q=170, causal=True, layout="bshd")]
        cases += [blocks._replace(mask=mask, dtype=dtype) for dtype in ("bfloat16", "float16", "float64")]
        cases += [blocks._replace(mask=mask, window_size=(90, 20), bias="full", softcap=3.0, alibi=True, sinks=True)]
    cases += [
        blocks._replace(mask="blocks", seqlen_q=sq, seqlen_k=sk) for sq, sk in ((3, 500), (500, 3), (0, 40), (40, 0))
    ]
    cases += [small._replace(softcap=3.0), small._replace(alibi=True), small._replace(sinks=True)]
    cases += [small._replace(learned_scale=kind) for kind in ("one", "per_head")]
    cases += [small._replace(dropout_p=p) for p in (0.1, 0.9)] + [small._replace(num_heads_k=4, dropout_p=0.5)]
    everything = small._replace(
        softcap=5.0, alibi=True, sinks=True, bias="per_head", mask="tensor_per_head", causal=True, dropout_p=0.2,
        learned_scale="per_head",
    )  # fmt: skip
    cases += [everything]
    of_distances = small._replace(bias="distances", mask="intervals", softcap=2.0, alibi=True, sinks=True)
    cases += [
        of_distances._replace(seqlen_q=sq, seqlen_k=sk) for sq, sk in ((0, 5), (5, 0), (1, 1), (1, 300), (300, 1))
    ]
    cases += [of_distances._replace(num_heads_k=1, dropout_p=0.2, layout="bshd"), blocks._replace(bias="distances")]
    cases += [blocks._replace(mask="blocks", bias="distances of each")]
    for dtype in ("bfloat16", "float16", "float64"):
        cases += [Case(dtype=dtype, num_heads=2, seqlen_q=130, causal=True), small._replace(dtype=dtype)]
        cases += [everything._replace(dtype=dtype), small._replace(dtype=dtype, layout="bshd", mask="lengths")]
    # several tiles of rows and of keys; few rows against many keys, which are split
    tiles = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=150, seqlen_k=400, head_dim=20, head_dim_v=36)
    split = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=5, seqlen_k=2100, head_dim=12)
    for case in (tiles, split):
        cases += [case, case._replace(causal=True), case._replace(window_size=(90, 20)), case._replace(bias="key")]
        cases += [case._replace(mask=mask) for mask in ("lengths", "left_padding", "documents", "intervals", "tensor")]
        cases += [case._replace(alibi=True), case._replace(softcap=2.0, bias="query"), case._replace(sinks=True)]
        cases += [case._replace(dropout_p=0.3), case._replace(dropout_p=0.3, window_size=(90, 20), dtype="bfloat16")]
        cases += [case._replace(learned_scale="per_head", causal=True)]
        cases += [case._replace(bias="distances", window_size=w) for w in (None, (90, 20))]
        for dtype in ("bfloat16", "float16", "float64"):
            cases += [case._replace(dtype=dtype, mask=mask, causal=True) for mask in ("documents", "tensor")]
            cases += [case._replace(dtype=dtype, bias="distances")]
    return tuple(dict.fromkeys(cases))


CASES = _parity_cases()
"""What every kernel is compared with the reference on."""


SHORT = (
    Case(batch=256, num_heads=4, seqlen_q=49, head_dim=32, bias="per_head"),
    Case(batch=256, num_heads=2, seqlen_q=50, head_dim=32, causal=True),
    Case(batch=32, num_heads=12, seqlen_q=32, head_dim=64),
    Case(batch=32, num_heads=12, seqlen_q=64, head_dim=32),
)
"""Windows of an image (Swin), lists of a recommender, batches of short texts."""


LONG = tuple(Case(num_heads=8, seqlen_q=s, head_dim=64) for s in (1024, 2048))
WIDE = Case(num_heads=8, seqlen_q=1024, head_dim=128), Case(num_heads=4, seqlen_q=2048, head_dim=128)


def _bench_grid() -> tuple[Case, ...]:
    grid = [Case(batch=8, num_heads=12, seqlen_q=128, head_dim=32), Case(num_heads=8, seqlen_q=512, head_dim=64)]
    grid += (*LONG, *WIDE)
    grid += [case._replace(causal=True) for case in grid]
    grid += [case._replace(dtype="bfloat16") for case in (*LONG, *WIDE)]
    grid += [case._replace(dtype="float16") for case in (*LONG, WIDE[0])]
    grid += [Case(num_heads=8, seqlen_q=4096, head_dim=64, window_size=(256, 0))]
    grid += [LONG[1]._replace(bias="shared"), LONG[1]._replace(mask="tensor")]
    grid += [Case(num_heads=4, seqlen_q=16, seqlen_k=4096, head_dim=64)]
    return (*grid, *SHORT)


GRID = _bench_grid()
"""What is timed: by bench/ and by the pytest-benchmark cases."""
