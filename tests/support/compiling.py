"""Calls inside graphs of torch.compile, and how they are compared with eager ones."""

import torch
from torch._dynamo.utils import counters

import fastattn
from backward import score_tensors
from cases import Case, inputs

SMALL = Case(batch=2, num_heads=4, num_heads_k=2, seqlen_q=21, seqlen_k=37, head_dim=12, head_dim_v=20)
BLOCKS = SMALL._replace(seqlen_q=70, seqlen_k=90)
EVERYTHING = SMALL._replace(
    softcap=5.0, alibi=True, sinks=True, bias="per_head", mask="tensor_per_head", causal=True, dropout_p=0.2,
    learned_scale="per_head", layout="bshd",
)  # fmt: skip
CASES = [
    SMALL, SMALL._replace(layout="bshd"), SMALL._replace(causal=True), SMALL._replace(window_size=(5, 3)),
    SMALL._replace(softmax_scale=0.0), SMALL._replace(softcap=3.0), SMALL._replace(alibi=True),
    SMALL._replace(sinks=True), SMALL._replace(learned_scale="one"), SMALL._replace(dropout_p=0.5),
    *[SMALL._replace(mask=mask) for mask in ("lengths", "intervals", "top_left", "tensor", "key_tensor")],
    *[BLOCKS._replace(mask=mask) for mask in ("blocks", "shared_blocks")],
    *[SMALL._replace(bias=bias) for bias in ("shared", "full", "key", "query")],
    *[SMALL._replace(dtype=dtype, causal=True) for dtype in ("bfloat16", "float16", "float64")],
    EVERYTHING, EVERYTHING._replace(dtype="bfloat16"),
    Case(batch=0, seqlen_q=4, head_dim=8), Case(num_heads=0, seqlen_q=4, head_dim=8),
    Case(seqlen_q=0, seqlen_k=5, head_dim=8), Case(seqlen_q=5, seqlen_k=0, head_dim=8),
]  # fmt: skip


def leaves_of(case: Case) -> tuple[list[torch.Tensor], dict]:
    """(tensors that want a gradient, the other keyword arguments); the names of the tensors are the first of these."""
    (q, k, v), kwargs = inputs(case)
    names = score_tensors(kwargs)
    tensors = [x.detach().requires_grad_() for x in (q, k, v, *[kwargs.pop(name) for name in names])]
    return tensors, {"names": names, **kwargs}


def attend(q, k, v, *others, names=(), **kwargs):
    """(out, lse) of leaves as `leaves_of` returns them."""
    return fastattn.attention(q, k, v, **dict(zip(names, others, strict=True)), **kwargs, return_lse=True)


def with_gradients(function, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """All results of `function`, and the gradients of the leaves, to which an lse of -inf adds nothing."""
    results = list(function(*leaves))
    loss = sum([x.masked_fill(x.isinf(), 0.0).double().square().sum() for x in results])
    return [*results, *torch.autograd.grad(loss, leaves)]


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype) and torch.equal(x, y)


def assert_compiles(function, leaves, backend="aot_eager", **options):
    """One graph, the eager bits forward and backward, and the same kernels on the same problems."""
    torch._dynamo.reset()
    with fastattn.record() as expected_calls:
        expected = with_gradients(function, leaves)
    compiled = torch.compile(function, backend=backend, fullgraph=True, **options)
    with fastattn.record() as calls:
        actual = with_gradients(compiled, leaves)
    assert_equal(actual, expected)
    key = [(call.problem, call.kernel) for call in calls]
    assert sorted(key) == sorted([(call.problem, call.kernel) for call in expected_calls])


def num_graphs() -> int:
    """How many different graphs Dynamo has made since the latest `torch._dynamo.reset` and `counters.clear`."""
    return counters["stats"]["unique_graphs"]
